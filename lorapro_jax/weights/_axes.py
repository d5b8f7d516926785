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

from ..algebra._axes import FactorAxes, Shape
from ..pairs._axes import LayoutError, as_axes

Order: TypeAlias = Literal["in,out", "out,in"] | None
"""Whether a kernel has its inputs or its outputs first; None if that is not known."""


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
      inputs: The sizes of A's feature axes.
      outputs: The sizes of B's feature axes.
    """

    batch: Shape
    inputs: Shape
    outputs: Shape

    @classmethod
    def of(cls, a: Shape, b: Shape, at_a: FactorAxes, at_b: FactorAxes) -> "Sizes":
        """The sizes of two factors of these shapes and axes."""
        batch = tuple(a[axis] for axis in at_a.batch)
        inputs = tuple(a[axis] for axis in at_a.features(len(a)))
        return cls(batch, inputs, tuple(b[axis] for axis in at_b.features(len(b))))


def kernel_readings(shape: Shape, sizes: Sizes, stack: Shape = ()) -> list[KernelAxes]:
    """All readings that the shape allows, at least one.

    Args:
      shape: The shape of the kernel.
      sizes: The sizes that it has to hold.
      stack: The stacked axes of the factors, preferred for the kernel too.

    Raises:
      LayoutError: There is none.
    """
    readings = _distinct(shape, _readings(shape, sizes))
    if not readings:
        raise LayoutError("the sizes do not fit")
    return [axes for axes in readings if axes.batch == stack] or readings


def order_of(shape: Shape, axes: KernelAxes) -> Order:
    """What comes first in a kernel; None where the two interleave, or have size 1."""
    inputs, outputs = (_wide_axes(shape, x) for x in (axes.inputs, axes.outputs))
    if not (inputs and outputs):
        return None
    if inputs[-1] < outputs[0]:
        return "in,out"
    return "out,in" if outputs[-1] < inputs[0] else None


def in_order(
    shape: Shape, readings: list[KernelAxes], sizes: Sizes, order: Order
) -> list[KernelAxes]:
    """The one reading that an order settles, or all.

    `"in,out"` settles a choice only for the reading that has its inputs before its
    outputs, and only if no other has outputs last: einsum kernels called `w` are
    `(in, heads, size)` in tunix and `(heads, in, size)` in gemma.

    Args:
      shape: The shape of the kernel.
      readings: What `kernel_readings` found.
      sizes: The sizes that the kernel has to hold.
      order: What is known of it.
    """
    found = [axes for axes in readings if order and order_of(shape, axes) == order]
    if order == "in,out":
        flat = len(_wide(sizes.inputs)) < 2 and len(_wide(sizes.outputs)) < 2
        last = [axes for axes in readings if _has_outputs_last(shape, axes)]
        found = found if flat or last == found else []
    return found if len(found) == 1 else readings


def fits_bias(shape: Shape, axes: KernelAxes, bias: Shape) -> bool:
    """Whether a bias of this shape has one number an output, layer by layer."""
    batch, outputs = _sizes(shape, axes.batch), _wide(_sizes(shape, axes.outputs))
    for stack in itertools.combinations(range(len(bias)), len(batch)):
        rest = [axis for axis in range(len(bias)) if axis not in stack]
        if _sizes(bias, stack) == batch and _wide(_sizes(bias, rest)) == outputs:
            return True
    return False


def biased_readings(shape: Shape, bias: Shape, batch: Shape) -> list[KernelAxes]:
    """All readings of a kernel with these stacked axes that its bias allows."""
    rest = [axis for axis in range(len(shape)) if axis not in batch]
    found = []
    for count in range(1, len(rest)):
        for outputs in itertools.combinations(rest, count):
            inputs = tuple(axis for axis in rest if axis not in outputs)
            axes = KernelAxes(batch, inputs, outputs)
            if fits_bias(shape, axes, bias):
                found.append(axes)
    return found


def check_kernel_axes(
    shape: Shape, sizes: Sizes, inputs: object, outputs: object
) -> KernelAxes:
    """Explicit axes, checked against the shape; all others are stacked.

    Args:
      shape: The shape of the kernel.
      sizes: The sizes that it has to hold.
      inputs: The axis or axes that are A's features, as the user wrote them.
      outputs: The axis or axes that are B's features, as the user wrote them.

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
        raise LayoutError(f"{describe_axes(axes)} have sizes {found}, not {wanted}")
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


def _has_outputs_last(shape: Shape, axes: KernelAxes) -> bool:
    """Whether an axis of the outputs comes behind all inputs."""
    ends = _wide_axes(shape, axes.outputs)[-1:]
    return all(
        x < y for x, y in itertools.product(_wide_axes(shape, axes.inputs), ends)
    )


def _holds(found: Shape, wanted: Shape) -> bool:
    """Whether axes of a kernel are the features of a factor, perhaps flattened."""
    found, wanted = _wide(found), _wide(wanted)
    flattened = len(wanted) == 1 and math.prod(found) == wanted[0]
    return found == wanted or flattened


def _distinct(shape: Shape, readings: Iterator[KernelAxes]) -> list[KernelAxes]:
    """Without those that differ in axes of size 1 only: they mean the same."""
    found: dict[tuple[Shape, ...], KernelAxes] = {}
    for axes in readings:
        found.setdefault(tuple(_wide_axes(shape, x) for x in axes), axes)
    return list(found.values())


def _sizes(shape: Shape, axes: Sequence[int]) -> Shape:
    return tuple(shape[axis] for axis in axes)


def _wide_axes(shape: Shape, axes: Shape) -> Shape:
    return tuple(axis for axis in axes if shape[axis] > 1)


def _wide(sizes: Shape) -> Shape:
    return tuple(size for size in sizes if size > 1)


def describe_axes(axes: KernelAxes) -> str:
    """What is what, for messages."""
    return f"inputs {axes.inputs} and outputs {axes.outputs}"
