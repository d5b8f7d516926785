"""How large base weights are."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from ..algebra._linalg import Norm
from ..pairs._axes import LoRAPair
from ..pairs._leaves import Leaf, index_leaves
from ._find import find_kernel_stacks
from ._given import KernelsSpec
from ._values import is_quantized


def kernel_norms(
    base: Any,
    params: Any,
    pairs: Sequence[LoRAPair],
    kernels: KernelsSpec | None = None,
) -> list[Norm]:
    """The norm of each pair's base weight, one for each layer: `(*batch)`.

    Args:
      base: A tree with the base weights.
      params: A tree with the factors, which `base` may lack.
      pairs: As `find_pairs` returns them.
      kernels: See `merge_adapters`.

    Raises:
      ValueError: A weight that is not found, or quantised.
    """
    leaves = index_leaves(base)
    owned = {path: leaf.value for path, leaf in leaves.items()}
    both = owned | {path: leaf.value for path, leaf in index_leaves(params).items()}
    norms = []
    for pair, (path, stack) in zip(
        pairs, find_kernel_stacks(both, pairs, kernels), strict=True
    ):
        _check_floating(pair, path, leaves)
        x = jnp.asarray(leaves[path].value)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        norm = Norm.of(wide, tuple(i for i in range(x.ndim) if i not in stack))
        order = [sorted(stack).index(axis) for axis in stack]
        norms.append(Norm(*(y.transpose(order) for y in norm)))
    return norms


def _check_floating(pair: LoRAPair, path: str, leaves: Mapping[str, Leaf]) -> None:
    """Raises ValueError where a base weight has no values of its own."""
    if path in leaves and not is_quantized(leaves[path].value):
        return
    parts = [x for x in leaves if x == path or x.startswith(f"{path}/")]
    kinds = {x: str(leaves[x].value.dtype) for x in parts}
    raise ValueError(
        f"`{path}`, the base weight of `{pair.a}`, is quantised: {kinds}. Pass the "
        "dequantised weights as `base=`, or leave `base` out."
    )
