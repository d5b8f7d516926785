"""Which axis of a factor is what, from the shapes of the two.

A is `(*in, r)` and B is `(r, *out)`, or PyTorch's transposes; on top of that both
may carry stacked axes, one slice a layer: in front (`nn.scan`, `nnx.vmap`,
experts) or at axis 1 (MaxText). Everything that is neither rank nor stacked is a
feature axis: heads, kernel windows.
"""

import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast, get_args

import numpy as np
from jax.typing import ArrayLike

from ._paths import Layout

Shape = tuple[int, ...]


class LoRAPair(NamedTuple):
    """Where the two factors of one adapter sit in a tree, and how to read them.

    As an argument (`pairs=`) only the two paths are needed; axes that are left
    out are inferred from the shapes, and the scale from `scale=` or `alpha=`. As
    a result of `find_pairs` every field is filled in and axes are non-negative.

    Attributes:
      a: Path of the factor on the input side, parts joined by `/`, such as
        `"layers/0/q_proj/kernel_lora_a"`; in a list, its index, such as `"4"`.
      b: Path of the factor on the output side.
      a_rank_axis: The rank axis of A.
      b_rank_axis: The rank axis of B.
      a_batch_axes: The axes of A with one slice per layer (or expert).
      b_batch_axes: The same axes of B. Both are in ascending order.
      scale: The s of W = W0 + s B A.
      rank: r.
    """

    a: str
    b: str
    a_rank_axis: int | None = None
    b_rank_axis: int | None = None
    a_batch_axes: tuple[int, ...] = ()
    b_batch_axes: tuple[int, ...] = ()
    scale: ArrayLike | None = None
    rank: int | None = None


class FactorAxes(NamedTuple):
    """The axes of one factor; all others are feature axes.

    Attributes:
      rank: The axis of size r.
      batch: The stacked axes, ascending.
    """

    rank: int
    batch: tuple[int, ...] = ()

    def features(self, ndim: int) -> tuple[int, ...]:
        """The feature axes of a factor with `ndim` axes."""
        return tuple(x for x in range(ndim) if x != self.rank and x not in self.batch)

    def feature_count(self, shape: Shape) -> int:
        """N of an A, or m of a B, of this shape."""
        return math.prod(shape[axis] for axis in self.features(len(shape)))


class Axes(NamedTuple):
    """The rank and batch axes of both factors, non-negative.

    Attributes:
      a_rank: The rank axis of A.
      b_rank: The rank axis of B.
      a_batch: The stacked axes of A.
      b_batch: The stacked axes of B, in the order of those of A.
    """

    a_rank: int
    b_rank: int
    a_batch: Shape = ()
    b_batch: Shape = ()

    def split(self) -> tuple[FactorAxes, FactorAxes]:
        """Those of A and those of B."""
        return FactorAxes(self.a_rank, self.a_batch), FactorAxes(
            self.b_rank, self.b_batch
        )


class LayoutError(ValueError):
    """Shapes that are no pair, or more than one. The caller knows the paths."""


def infer_axes(
    a: Shape,
    b: Shape,
    layouts: Sequence[Layout],
    stack_axis: int | Sequence[int] | None = None,
) -> Axes:
    """Reads the axes off the shapes of A and B.

    Two factors of three axes or more count as stacked where that is possible:
    no known LoRA layer has two such factors unstacked with a common axis. A rank
    above the smaller feature size is accepted only where nothing else fits.

    Args:
      a: Shape of A.
      b: Shape of B.
      layouts: The layouts to consider.
      stack_axis: The stacked axis or axes, where shapes cannot settle it; `()`
        for none. Factors of two axes are never stacked.

    Raises:
      LayoutError: No reading, or more than one.
    """
    if min(len(a), len(b)) < 2:
        raise LayoutError("a factor has a rank axis and at least one feature axis")
    if 0 in (*a, *b):
        raise LayoutError("a factor has no elements")
    readings = [axes for layout in layouts for axes in _readings(a, b, layout)]
    if not readings:
        raise LayoutError(
            "they share no rank (the last axis of A and the first of B behind stacked "
            "axes; in PyTorch's layout the first of A and the second of B)"
        )
    if stack_axis is not None and min(len(a), len(b)) > 2:
        readings = _with_stack(readings, stack_axis)
    else:
        readings = [axes for axes in readings if axes.a_batch] or readings
    if not readings:
        raise LayoutError(f"`stack_axis={stack_axis!r}` does not fit them")

    found = [axes for axes in readings if _rank_is_low(a, b, axes)]
    if not found:  # more rank than features: rare, but possible on a small head
        others = [x for layout in get_args(Layout) for x in _readings(a, b, layout)]
        found = readings + [axes for axes in others if _rank_is_low(a, b, axes)]
    if len(found) > 1:
        options = " or ".join(_describe(a, axes) for axes in found)
        raise LayoutError(f"they can be read as {options}")
    return found[0]


def check_axes(a: Shape, b: Shape, axes: Sequence[Any]) -> Axes:
    """Explicit axes, checked against the shapes and made non-negative.

    Args:
      a: Shape of A.
      b: Shape of B.
      axes: The fields of `Axes`, as the user wrote them.

    Raises:
      LayoutError: An axis that does not exist, is named twice or is missing, or
        sizes that differ.
    """
    if axes[0] is None or axes[1] is None:
        raise LayoutError(
            f"`a_rank_axis={axes[0]}` and `b_rank_axis={axes[1]}` go together, and "
            "with batch axes both are needed"
        )
    a_rank, *a_batch = _non_negative("A", a, (axes[0], *as_axes(axes[2])))
    b_rank, *b_batch = _non_negative("B", b, (axes[1], *as_axes(axes[3])))
    if a[a_rank] != b[b_rank]:
        raise LayoutError(f"the rank is {a[a_rank]} in A and {b[b_rank]} in B")
    stacks = [a[axis] for axis in a_batch], [b[axis] for axis in b_batch]
    if stacks[0] != stacks[1]:
        raise LayoutError(f"the batch axes have sizes {stacks[0]} and {stacks[1]}")
    return Axes(a_rank, b_rank, tuple(a_batch), tuple(b_batch))


def as_axes(axes: Any) -> Shape:
    """One axis, several, or None for none, as a tuple of Python integers."""
    try:
        found = () if axes is None else tuple(axes) if np.iterable(axes) else (axes,)
        return tuple(operator.index(axis) for axis in found)
    except TypeError:
        raise LayoutError(f"{axes!r} is no axis and no tuple of axes") from None


def factor_axes(pair: LoRAPair) -> tuple[FactorAxes, FactorAxes]:
    """The axes of A and of B, from a pair of `find_pairs`."""
    return Axes(*cast(Any, pair[2:6])).split()


def _readings(a: Shape, b: Shape, layout: Layout) -> Iterator[Axes]:
    """Every way to read the shapes as a pair: unstacked, in front, at axis 1."""
    depth = min(len(a), len(b)) - 2  # two axes must remain
    stacks: list[Shape] = [tuple(range(n)) for n in range(depth + 1)]
    if depth and layout == "jax":
        stacks.append((1,))
    for stack in stacks:
        rest_a, rest_b = _without(stack, a), _without(stack, b)
        a_rank = rest_a[-1] if layout == "jax" else rest_a[0]
        b_rank = rest_b[0] if layout == "jax" else rest_b[1]
        same_stack = all(a[axis] == b[axis] for axis in stack)
        if same_stack and a[a_rank] == b[b_rank]:
            yield Axes(a_rank, b_rank, stack, stack)


def _with_stack(readings: list[Axes], wanted: int | Sequence[int]) -> list[Axes]:
    """The readings stacked exactly as `wanted`, else those that also stack more."""
    axes = as_axes(wanted)
    exact = [x for x in readings if x.a_batch == axes]
    return exact or [x for x in readings if axes and set(axes) <= set(x.a_batch)]


def _rank_is_low(a: Shape, b: Shape, axes: Axes) -> bool:
    at_a, at_b = axes.split()
    return a[axes.a_rank] <= min(at_a.feature_count(a), at_b.feature_count(b))


def _without(stack: Shape, shape: Shape) -> list[int]:
    return [axis for axis in range(len(shape)) if axis not in stack]


def _describe(a: Shape, axes: Axes) -> str:
    stacked = f"stacked on {axes.a_batch}" if axes.a_batch else "unstacked"
    return f"rank {a[axes.a_rank]} on axes {axes.a_rank} and {axes.b_rank}, {stacked}"


def _non_negative(name: str, shape: Shape, axes: Sequence[int]) -> list[int]:
    axes = as_axes(axes)
    if not all(-len(shape) <= axis < len(shape) for axis in axes):
        raise LayoutError(f"{name} has no axes {axes}")
    found = [axis % len(shape) for axis in axes]
    if len(set(found)) < len(found):
        raise LayoutError(f"the axes {tuple(axes)} of {name} name one axis twice")
    if len(found) == len(shape):
        raise LayoutError(f"the axes {tuple(axes)} of {name} leave no feature axis")
    if found[1:] != sorted(found[1:]):
        raise LayoutError(f"the batch axes of {name} are not in ascending order")
    return found
