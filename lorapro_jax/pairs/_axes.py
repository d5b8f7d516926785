"""Which axis of a factor is what: a pair, and the axes that the user gives for it."""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from jax.typing import ArrayLike

from ..algebra._axes import FactorAxes, Shape


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
      scale: The s of W = W0 + s B A; a NumPy array where each layer of a stack has
        its own, in the order of `a_batch_axes`.
      rank: r.
      wrt: Which factors move, `"both"`, `"a"` or `"b"`: what a transform's own `wrt`
        says, and not of interest elsewhere.
    """

    a: str
    b: str
    a_rank_axis: int | None = None
    b_rank_axis: int | None = None
    a_batch_axes: tuple[int, ...] = ()
    b_batch_axes: tuple[int, ...] = ()
    scale: ArrayLike | None = None
    rank: int | None = None
    wrt: str = "both"

    @property
    def paths(self) -> tuple[str, str]:
        """Those of A and of B."""
        return self.a, self.b

    @property
    def has_axes(self) -> bool:
        """Whether any axis is given."""
        ranks = self.a_rank_axis, self.b_rank_axis
        given = *ranks, self.a_batch_axes, self.b_batch_axes
        return given != (None, None, (), ())

    @property
    def factor_axes(self) -> tuple[FactorAxes, FactorAxes]:
        """The axes of A and of B, in a pair of `find_pairs`."""
        a, b = cast(int, self.a_rank_axis), cast(int, self.b_rank_axis)
        return FactorAxes(a, self.a_batch_axes), FactorAxes(b, self.b_batch_axes)


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

    @property
    def factor_axes(self) -> tuple[FactorAxes, FactorAxes]:
        """Those of A and those of B."""
        a = FactorAxes(self.a_rank, self.a_batch)
        return a, FactorAxes(self.b_rank, self.b_batch)


class LayoutError(ValueError):
    """Shapes that are no pair, or more than one. The caller knows the paths.

    Attributes:
      readings: The readings that the user may choose from, if there are any.
      remedy: What to do about it, as sentences, where axes are no help.
    """

    def __init__(
        self, reason: str, *, readings: Sequence[Axes] = (), remedy: str = ""
    ) -> None:
        super().__init__(reason)
        self.readings = tuple(readings)
        self.remedy = remedy


def check_axes(a: Shape, b: Shape, pair: LoRAPair) -> Axes:
    """Explicit axes, checked against the shapes and made non-negative.

    Args:
      a: Shape of A.
      b: Shape of B.
      pair: The pair, with its axes as the user wrote them.

    Raises:
      LayoutError: An axis that does not exist, is named twice or is missing, or
        sizes that differ.
    """
    given_a, given_b = pair.a_rank_axis, pair.b_rank_axis
    if given_a is None or given_b is None:
        raise LayoutError(
            f"`a_rank_axis={given_a}` and `b_rank_axis={given_b}` go together, and "
            "with batch axes both are needed"
        )
    a_rank, *a_batch = _non_negative("A", a, (given_a, *as_axes(pair.a_batch_axes)))
    b_rank, *b_batch = _non_negative("B", b, (given_b, *as_axes(pair.b_batch_axes)))
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
        if any(isinstance(axis, bool | np.bool_) for axis in found):
            raise TypeError
        return tuple(operator.index(axis) for axis in found)
    except TypeError:
        raise LayoutError(f"{axes!r} is no axis and no tuple of axes") from None


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
