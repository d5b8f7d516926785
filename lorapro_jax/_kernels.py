"""The base weight that a LoRA pair adapts: which leaf, and which of its axes are what.

Static Python over paths and shapes, like `find_pairs`. In every stack the kernel lies
near its factors: beside them (Linen, qwix, Keras), one level up (`nnx.LoRALinear`,
gemma), or in a module that the adapter wraps (`nnx.LoRA`, PEFT).
"""

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from ._kernel_axes import Order, Sizes, check_kernel_axes, infer_kernel_axes
from ._layout import FactorAxes, LayoutError, LoRAPair, Shape, factor_axes
from ._leaves import Leaf, index_leaves
from ._paths import normalize_path, parse_factor_name

KernelSpec: TypeAlias = str | tuple[str, int | Sequence[int], int | Sequence[int]]
"""Path of a kernel; or `(path, its input axes, its output axes)`."""
KernelsSpec: TypeAlias = Mapping[str, KernelSpec]
"""From a regex that matches all of a factor's path to its kernel."""

_NAMES = ("kernel", "_kernel", "w", "weight", "weights", "embedding", "embeddings")
# What an adapter wraps, in NNX, PEFT, Levanter and AXLearn.
_MODULES = ("base_module", "base_layer", "wrapped", "layer")
_INPUTS_FIRST = frozenset({"kernel", "_kernel", "w", "embedding", "embeddings"})


class Kernel(NamedTuple):
    """The base weight of a LoRA pair, static.

    Attributes:
      path: Of the leaf, like those of a `LoRAPair`. Of a quantised weight that is
        kept in several leaves: what their paths have in common.
      batch: Its stacked axes, in the order of the pair's.
      inputs: Its axes that are A's features, in A's order.
      outputs: Its axes that are B's features, in B's order.
    """

    path: str
    batch: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def find_kernels(
    params: Any, pairs: Sequence[LoRAPair], kernels: KernelsSpec | None = None
) -> list[Kernel]:
    r"""The base kernel of each pair, by the names and shapes of the leaves.

    Args:
      params: The tree with factors and kernels; only paths, shapes and dtypes count.
      pairs: As `find_pairs` returns them.
      kernels: Where a kernel is that has another name, or which of its axes are
        what: `{regex: path}` or `{regex: (path, input axes, output axes)}`. The regex
        has to match all of the path of A or B, and the path may refer to its groups
        (`r"\1/gate"`). The first that matches counts; other pairs are searched for.

    Raises:
      ValueError: No kernel, or one that sizes and name do not settle. The message
        names the pair and what to do.
    """
    leaves = index_leaves(params)
    shapes = _quantized(leaves) | {
        path: leaf.shape
        for path, leaf in leaves.items()
        if hasattr(leaf.value, "shape")
    }
    for pattern in kernels or {}:
        _check_pattern(pattern, pairs)
    return [_find(pair, shapes, kernels or {}) for pair in pairs]


def as_matrix(kernel: Kernel, x: Any) -> jax.Array:
    """A kernel or its gradient as `(*batch, m, n)`, the paper's layout."""
    shape = x.shape
    size = lambda axes: math.prod(shape[axis] for axis in axes)
    batch = tuple(shape[axis] for axis in kernel.batch)
    moved = jnp.transpose(x, (*kernel.batch, *kernel.outputs, *kernel.inputs))
    return moved.reshape(*batch, size(kernel.outputs), size(kernel.inputs))


def as_kernel(kernel: Kernel, matrix: jax.Array, shape: Shape) -> jax.Array:
    """The inverse of `as_matrix`, for a kernel of this shape."""
    order = (*kernel.batch, *kernel.outputs, *kernel.inputs)
    split = matrix.reshape([shape[axis] for axis in order])
    return jnp.moveaxis(split, range(len(order)), order)


def as_factor(matrix: jax.Array, axes: FactorAxes, shape: Shape) -> jax.Array:
    """`(*batch, r, features)`, that is A or Bᵀ, as a leaf of this shape and axes."""
    order = (*axes.batch, axes.rank, *axes.features(len(shape)))
    split = matrix.reshape([shape[axis] for axis in order])
    return jnp.moveaxis(split, range(len(order)), order)


def _find(pair: LoRAPair, shapes: Mapping[str, Shape], given: KernelsSpec) -> Kernel:
    at_a, at_b = factor_axes(pair)
    sizes = Sizes.of(shapes[pair.a], shapes[pair.b], at_a, at_b)
    explicit = _look_up(pair, given)
    if explicit and explicit[0] not in shapes:
        raise ValueError(_unknown_message(pair, explicit[0], shapes))
    axes = explicit[1:] if explicit else ()
    nearby = [explicit[:1]] if explicit else list(_candidates(pair))

    misfits = []
    for paths in nearby:
        found = []
        for path in (x for x in paths if x in shapes and x not in pair[:2]):
            shape = shapes[path]
            try:
                if axes:
                    read = check_kernel_axes(shape, sizes, *axes)
                else:
                    order = _order(path, pair)
                    read = infer_kernel_axes(shape, sizes, at_a.batch, order)
            except LayoutError as error:
                misfits.append(f"`{path}` {shape}: {error}")
            else:
                found.append(Kernel(path, *read))
        if len(found) > 1:
            misfits = [f"`{kernel.path}` fits" for kernel in found]
            break
        if found:
            return found[0]
    raise ValueError(_no_kernel_message(pair, shapes, misfits, nearby))


def _look_up(pair: LoRAPair, given: KernelsSpec) -> tuple[Any, ...] | None:
    """The entry of `kernels=` for a pair: `(path,)` or `(path, inputs, outputs)`."""
    for pattern, spec in given.items():
        entry = (spec,) if isinstance(spec, str) else tuple(spec)
        if len(entry) not in (1, 3) or not isinstance(entry[0], str):
            raise ValueError(
                f"`kernels` has {spec!r} for {pattern!r}. It maps to a path, or to "
                "`(path, input axes, output axes)`."
            )
        try:
            matches = (re.fullmatch(pattern, path) for path in (pair.a, pair.b))
            for match in matches:
                if match:
                    return (normalize_path(match.expand(entry[0])), *entry[1:])
        except (re.error, IndexError, TypeError) as error:
            raise ValueError(
                f"`kernels={{{pattern!r}: {spec!r}}}` is no regular expression with "
                f"its template: {error}."
            ) from None
    return None


def _candidates(pair: LoRAPair) -> Iterator[tuple[str, ...]]:
    """Where the kernel may be, from near to far."""
    name = parse_factor_name(pair.a)
    if name is None:
        return
    place = name.owner.split("/") if name.owner else []
    if stem := name.group[-3].rstrip("_"):  # `kernel_lora_a` is beside `kernel`
        place = [*place, stem]
        yield ("/".join(place),)
    while True:
        modules = [place, *([*place, module] for module in _MODULES)]
        yield tuple("/".join((*module, x)) for module in modules for x in _NAMES)
        # `q/lora/lora_a` is of `q/kernel`, `q/_LoRAEinsum_0/lora/a` of `q/w`.
        if not (place and re.search("lora|adapter", place[-1], re.IGNORECASE)):
            return
        place = place[:-1]


def _order(path: str, pair: LoRAPair) -> Order:
    """What the last part of the path says about the axes."""
    *parents, name = path.split("/")
    if name in _INPUTS_FIRST or "lora_embedding_" in pair.a:
        return "in,out"  # PyTorch's embeddings are `(words, size)` as well
    at_a, at_b = (axes.rank for axes in factor_axes(pair))
    # Without factors in PyTorch's layout, `weight` may be Equinox's or AXLearn's.
    known = name == "weight" and parents[-1:] != ["wrapped"]
    return "out,in" if known and at_a < at_b else None


def _quantized(leaves: Mapping[str, Leaf]) -> dict[str, Shape]:
    """The shapes of weights kept as integers and scales: `kernel/array/qvalue`."""
    shapes: dict[str, Shape] = {}
    for path, leaf in leaves.items():
        if is_quantized(leaf.value):
            parent, _, _ = path.rpartition("/")
            for owner in (parent, parent.rpartition("/")[0]):
                shapes.setdefault(owner, leaf.shape)
    return shapes


def is_quantized(x: Any) -> bool:
    """Whether the values of an array are codes: integers, or floats of 8 bits."""
    dtype = getattr(x, "dtype", None)
    if dtype is None or jax.dtypes.issubdtype(dtype, jax.dtypes.extended):
        return False
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.finfo(dtype).bits <= 8
    return bool(jnp.issubdtype(dtype, jnp.integer))


def _check_pattern(pattern: str, pairs: Sequence[LoRAPair]) -> None:
    """Raises ValueError for a key of `kernels=` that matches no factor."""
    try:
        matches = [re.fullmatch(pattern, path) for pair in pairs for path in pair[:2]]
    except (re.error, TypeError) as error:
        raise ValueError(
            f"{pattern!r} in `kernels` is no regular expression: {error}."
        ) from None
    if not any(matches):
        raise ValueError(
            f"{pattern!r} in `kernels` matches no factor. It has to match all of a "
            f"path, such as `{pairs[0].a}`."
            if pairs
            else "There is no pair for `kernels`."
        )


def _unknown_message(pair: LoRAPair, path: str, shapes: Iterable[str]) -> str:
    close = difflib.get_close_matches(path, shapes, n=3, cutoff=0.0)
    return (
        f"`kernels` says that `{path}` is the base weight of `{pair.a}`, but there is "
        f"no such leaf. Close to it: {close}."
    )


def _no_kernel_message(
    pair: LoRAPair,
    shapes: Mapping[str, Shape],
    misfits: list[str],
    nearby: Sequence[Sequence[str]],
) -> str:
    a, b = (f"`{path}` {shapes[path]}" for path in pair[:2])
    if misfits:
        return (
            f"The base weight of {a} and {b} is not clear. {'; '.join(misfits)}. Say "
            f"which it is and its axes: `kernels={{{pair.a!r}: (path, input axes, "
            "output axes)}`."
        )
    tried = [path for paths in nearby for path in paths][:8]
    looked = f"looked for {tried} and the like" if tried else "its name is no help"
    return (
        f"No base weight of {a} and {b} among {len(shapes)} arrays; {looked}. Pass the "
        "whole parameters, frozen ones too (in NNX `nnx.state(model)`), or say where "
        f"it is: `kernels={{{pair.a!r}: path}}`."
    )
