"""Which axes of a base kernel are what, from its shape and those of its factors.

A kernel has the stacked axes, the features of A and the features of B of its pair,
in any order: `(in, out)` in JAX, `(out, in)` in PyTorch, `(heads, in, size)` in an
einsum, `(*window, in, out)` in a convolution. A factor may have several of its axes
flattened to one, as qwix makes them. Static Python; nothing here knows paths.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias

from ._layout import FactorAxes, LayoutError, Shape, as_axes

Order: TypeAlias = Literal["in,out", "out,in"] | None
"""What the name of a kernel says about its axes; None for nothing."""


class KernelAxes(NamedTuple):
    """The axes of a kernel, non-negative.

    Attributes:
      batch: One slice per layer or expert, in the order of the pair's.
      inputs: The features of A, in A's order.
      outputs: The features of B, in B's order.
    """

    batch: Shape
    inputs: Shape
    outputs: Shape


class Sizes(NamedTuple):
    """What a kernel has to hold.

    Attributes:
      batch: The sizes of the stacked axes.
      inputs: Those of A's feature axes.
      outputs: Those of B's feature axes.
    """

    batch: Shape
    inputs: Shape
    outputs: Shape

    @classmethod
    def of(cls, a: Shape, b: Shape, at_a: FactorAxes, at_b: FactorAxes) -> "Sizes":
        """Those of two factors of these shapes and axes."""
        batch = tuple(a[axis] for axis in at_a.batch)
        inputs = tuple(a[axis] for axis in at_a.features(len(a)))
        return cls(batch, inputs, tuple(b[axis] for axis in at_b.features(len(b))))


def infer_kernel_axes(
    shape: Shape, sizes: Sizes, stack: Shape = (), order: Order = None
) -> KernelAxes:
    """Reads the axes off the shape, and where that leaves a choice, off the name.

    Args:
      shape: That of the kernel.
      sizes: What it has to hold.
      stack: The stacked axes of the factors, preferred for the kernel too.
      order: What the name says. `"in,out"` settles a choice only for the reading
        that has its inputs before its outputs, and only if no other has outputs
        last: einsum kernels called `w` are `(in, heads, size)` in tunix and
        `(heads, in, size)` in gemma.

    Raises:
      LayoutError: No reading, or more than one.
    """
    readings = _distinct(shape, _readings(shape, sizes))
    if not readings:
        raise LayoutError("the sizes do not fit")
    readings = [x for x in readings if x.batch == stack] or readings
    if len(readings) > 1 and order:
        readings = _settled_by_name(shape, readings, sizes, order)
    if len(readings) > 1:
        options = " or ".join(_describe(axes) for axes in readings)
        raise LayoutError(f"its axes can be {options}")
    return readings[0]


def check_kernel_axes(
    shape: Shape, sizes: Sizes, inputs: object, outputs: object
) -> KernelAxes:
    """Explicit axes, checked against the shape; all others are stacked.

    Raises:
      LayoutError: Axes that do not exist or are named twice, or sizes that differ.
    """
    given = as_axes(inputs), as_axes(outputs)
    named = [axis for axes in given for axis in axes]
    inside = all(-len(shape) <= axis < len(shape) for axis in named)
    if not inside or len({axis % len(shape) for axis in named}) < len(named):
        raise LayoutError(f"{given} are no inputs and outputs of {len(shape)} axes")
    at = [tuple(axis % len(shape) for axis in axes) for axes in given]
    batch = tuple(axis for axis in range(len(shape)) if axis not in (*at[0], *at[1]))
    axes = KernelAxes(batch, *at)
    found = _sizes(shape, batch), *(math.prod(_sizes(shape, x)) for x in at)
    wanted = sizes.batch, math.prod(sizes.inputs), math.prod(sizes.outputs)
    if found != wanted:
        raise LayoutError(f"{_describe(axes)} have sizes {found}, not {wanted}")
    return axes


def _readings(shape: Shape, sizes: Sizes) -> Iterator[KernelAxes]:
    """Every way to divide the axes; those of size 1 count as outputs."""
    for batch in itertools.combinations(range(len(shape)), len(sizes.batch)):
        if _sizes(shape, batch) != sizes.batch:
            continue
        rest = [axis for axis in range(len(shape)) if axis not in batch]
        wide = [axis for axis in rest if shape[axis] > 1]
        for count in range(len(wide) + 1):
            for inputs in itertools.combinations(wide, count):
                outputs = tuple(axis for axis in rest if axis not in inputs)
                if _holds(_sizes(shape, inputs), sizes.inputs) and _holds(
                    _sizes(shape, outputs), sizes.outputs
                ):
                    yield KernelAxes(batch, inputs, outputs)


def _settled_by_name(
    shape: Shape, readings: list[KernelAxes], sizes: Sizes, order: str
) -> list[KernelAxes]:
    """The one reading that the name of the kernel settles, or all."""

    def wide(axes: Shape) -> Shape:
        return tuple(axis for axis in axes if shape[axis] > 1)

    def before(first: Shape, second: Shape) -> bool:
        return all(x < y for x in wide(first) for y in wide(second))

    if order == "out,in":
        found = [x for x in readings if before(x.outputs, x.inputs)]
        return found if len(found) == 1 else readings
    found = [x for x in readings if before(x.inputs, x.outputs)]
    last = [x for x in readings if before(x.inputs, wide(x.outputs)[-1:])]
    flat = len(_wide(sizes.inputs)) < 2 and len(_wide(sizes.outputs)) < 2
    return found if len(found) == 1 and (flat or last == found) else readings


def _holds(found: Shape, wanted: Shape) -> bool:
    """Whether axes of a kernel are the features of a factor, perhaps flattened."""
    found, wanted = _wide(found), _wide(wanted)
    flattened = len(wanted) == 1 and math.prod(found) == wanted[0]
    return found == wanted or flattened


def _distinct(shape: Shape, readings: Iterator[KernelAxes]) -> list[KernelAxes]:
    """Without those that differ in axes of size 1 only: they mean the same."""
    wide = lambda axes: tuple(axis for axis in axes if shape[axis] > 1)
    found: dict[tuple[Shape, ...], KernelAxes] = {}
    for axes in readings:
        found.setdefault(tuple(wide(x) for x in axes), axes)
    return list(found.values())


def _sizes(shape: Shape, axes: Sequence[int]) -> Shape:
    return tuple(shape[axis] for axis in axes)


def _wide(sizes: Shape) -> Shape:
    return tuple(size for size in sizes if size > 1)


def _describe(axes: KernelAxes) -> str:
    return f"inputs {axes.inputs} and outputs {axes.outputs}"
