"""The axes of one factor."""

import math
from typing import NamedTuple

Shape = tuple[int, ...]


class FactorAxes(NamedTuple):
    """The axes of one factor, non-negative; all that are not named are features.

    Attributes:
      rank: The axis of size r.
      batch: The stacked axes, one slice a layer or expert, ascending.
    """

    rank: int
    batch: tuple[int, ...] = ()

    def features(self, ndim: int) -> tuple[int, ...]:
        """The feature axes of a factor with `ndim` axes."""
        return tuple(x for x in range(ndim) if x != self.rank and x not in self.batch)

    @property
    def rank_among_batch(self) -> int:
        """Where the rank axis is when there are no feature axes."""
        return sum(axis < self.rank for axis in self.batch)

    def feature_count(self, shape: Shape) -> int:
        """The product of the feature sizes: n of an A, m of a B, of this shape."""
        return math.prod(shape[axis] for axis in self.features(len(shape)))

    def rank_first(self, ndim: int) -> tuple[int, ...]:
        """All axes in the order `(*batch, rank, *features)`, that of A in the paper."""
        return (*self.batch, self.rank, *self.features(ndim))

    def stacked(self) -> "FactorAxes":
        """The same axes behind a new axis 0 of layers."""
        return FactorAxes(self.rank + 1, (0, *(axis + 1 for axis in self.batch)))

    def unstacked(self) -> "FactorAxes":
        """Those of one slice along axis 0: the reverse of `stacked`."""
        return FactorAxes(self.rank - 1, tuple(axis - 1 for axis in self.batch[1:]))
