"""Factors, which are arrays that own their axes, and pairs of them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from ._axes import FactorAxes, Shape

T = TypeVar("T")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["array"],
    meta_fields=["axes", "trains"],
)
@dataclasses.dataclass(frozen=True)
class Factor:
    """A or B of one pair, or an array with the same axes: a gradient, a step, a moment.

    Sums and products are elementwise, with a factor of the same axes or a scalar; the
    rank axis may have size 1.

    Attributes:
      array: In any layout.
      axes: What its axes are, static.
      trains: Whether the factor moves, static; what does not has steps of 0.
    """

    array: jax.Array
    axes: FactorAxes
    trains: bool = True

    @property
    def shape(self) -> Shape:
        return tuple(self.array.shape)

    @property
    def dtype(self) -> jnp.dtype:
        return self.array.dtype

    @property
    def rank(self) -> int:
        """The number r."""
        return self.shape[self.axes.rank]

    @property
    def batch(self) -> Shape:
        """The sizes of the stacked axes."""
        return tuple(self.shape[axis] for axis in self.axes.batch)

    @property
    def features(self) -> Shape:
        """The feature axes."""
        return self.axes.features(len(self.shape))

    @property
    def feature_count(self) -> int:
        """The product of the feature sizes, n of an A and m of a B."""
        return self.axes.feature_count(self.shape)

    def map(self, function: Callable[..., Any], *others: "Factor") -> "Factor":
        """`function` of the arrays, with these axes."""
        return self.like(function(self.array, *(x.array for x in others)))

    def like(self, array: Any) -> "Factor":
        """Another array with these axes."""
        return Factor(array, self.axes, self.trains)

    def astype(self, dtype: DTypeLike) -> "Factor":
        return self.map(lambda x: jnp.asarray(x, dtype))

    def __add__(self, other: "Factor") -> "Factor":
        return self.map(jnp.add, other)

    def __mul__(self, other: "Factor | ArrayLike") -> "Factor":
        if isinstance(other, Factor):
            return self.map(jnp.multiply, other)
        return self.map(lambda x: x * other)

    __rmul__ = __mul__
    __array_ufunc__ = None  # NumPy's scalars on the left ask `__rmul__`


class Both(NamedTuple, Generic[T]):
    """What belongs to A, and what belongs to B."""

    a: T
    b: T

    def map(self, function: Callable[..., Any], *others: "Both[Any]") -> "Both[Any]":
        """`function` of what belongs to A, then of what belongs to B."""
        return Both(*map(function, self, *others))


Step: TypeAlias = Both[Factor]
"""A step or gradient of A and of B, laid out like them."""


class PairArrays(NamedTuple):
    """The arrays of one LoRA pair, W = W0 + s B A.

    Attributes:
      a: A, the paper's r×n.
      b: B, the paper's m×r, with the same batch sizes.
      gradients: g_A and g_B, like A and B.
      scale: s, a scalar or, where each layer has its own, `(*batch)`.
    """

    a: Factor
    b: Factor
    gradients: Step
    scale: ArrayLike = 1.0

    @property
    def factors(self) -> Both[Factor]:
        """A and B."""
        return Both(self.a, self.b)

    @property
    def rank(self) -> int:
        """The number r."""
        return self.a.rank

    @property
    def batch(self) -> Shape:
        """The sizes of the stacked axes."""
        return self.a.batch

    @property
    def dtype(self) -> jnp.dtype:
        return self.a.dtype


def in_compute_dtype(pair: PairArrays) -> PairArrays:
    """All in float64 if a factor or gradient is, else in float32."""
    wide = any(x.dtype == jnp.float64 for x in (*pair.factors, *pair.gradients))
    dtype = jnp.float64 if wide else jnp.float32
    return PairArrays(
        pair.a.astype(dtype),
        pair.b.astype(dtype),
        pair.gradients.map(lambda x: x.astype(dtype)),
        jnp.asarray(pair.scale, dtype),
    )
