"""Which leaves of a tree are base kernels: those of its pairs, or as the user says."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from .._checks import compiled, some
from ..pairs._find import PairsSpec, find_pairs
from ..pairs._leaves import Leaf, index_leaves
from ..pairs._names import normalize_path
from ._find import find_kernel_paths
from ._given import KernelsSpec
from ._values import is_quantized

KernelChoice: TypeAlias = str | Iterable[str] | Callable[[str], bool] | KernelsSpec
"""A regex, paths, a function of the path; or a mapping, as `find_kernels` takes it."""


def select_kernels(
    params: Any,
    kernels: KernelChoice | None = None,
    *,
    pairs: PairsSpec | None = None,
    stack_axis: int | Sequence[int] | None = None,
) -> tuple[str, ...]:
    """The paths of the kernels, each once, in the order of the tree.

    Args:
      params: The tree with the kernels.
      kernels: See `estimate_gradients`.
      pairs: See `lorapro`.
      stack_axis: See `lorapro`.

    Raises:
      ValueError: No kernel, a path that is none, or a leaf without a gradient.
    """
    leaves = index_leaves(params)
    if kernels is None or isinstance(kernels, Mapping):
        found = find_pairs(params, pairs=pairs, stack_axis=stack_axis)
        paths = find_kernel_paths(params, found, kernels)
    elif isinstance(kernels, str) or callable(kernels):
        chosen = kernels if callable(kernels) else compiled(kernels, "kernels").search
        paths = [x for x, leaf in leaves.items() if _is_kernel(leaf) and chosen(x)]
    else:
        paths = [normalize_path(path) for path in kernels]
    if not paths:
        raise ValueError(
            f"No kernel to estimate in a tree with {some(leaves)}. Where it has no "
            "LoRA pairs, choose with `kernels=`: a regex, a list of paths, or a "
            "function of the path."
        )
    for path in paths:
        if path not in leaves and not any(x.startswith(f"{path}/") for x in leaves):
            raise ValueError(
                f"`{path}` of `kernels=` is no path of this tree, which has "
                f"{some(leaves)}."
            )
        _check_differentiable(path, leaves.get(path))
    return tuple(sorted(set(paths), key=lambda path: leaves[path].position))


def _check_differentiable(path: str, leaf: Leaf | None) -> None:
    """Raises ValueError where no leaf can be differentiated as a kernel."""
    if leaf is None or not (leaf.unique and _is_kernel(leaf)):
        kind = "several leaves"
        if leaf and leaf.unique:
            x = leaf.value
            kind = f"{x.dtype} {leaf.shape}" if hasattr(x, "dtype") else repr(x)
        raise ValueError(
            f"`{path}` ({kind}) cannot be differentiated as a kernel: that takes one "
            "real floating point array with two axes or more. Estimate the gradients "
            "of quantised weights on the unquantised model."
        )
    if isinstance(leaf.value, jax.core.Tracer):
        raise ValueError(
            f"`{path}` is traced. Call `estimate_gradients` outside of `jit`; it "
            "compiles its own programs."
        )


def _is_kernel(leaf: Leaf) -> bool:
    """Whether a leaf is an array that may be a kernel; 8 bits hold no gradient."""
    dtype = getattr(leaf.value, "dtype", None)
    floating = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
    if not floating or is_quantized(leaf.value):
        return False
    return len(leaf.shape) > 1 and 0 not in leaf.shape
