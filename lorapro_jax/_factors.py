"""The arrays of one LoRA pair, and the products of skinny matrices on them.

Every factor is brought to (*batch, r, *features): A as in the paper, B as its
transpose, so that one function serves both. Feature axes are contracted where they
are and never merged: merging would gather a sharded array.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from ._linalg import power_of_two


class PairArrays(NamedTuple):
    """The arrays of one LoRA pair.

    Attributes:
      a: A, `(*batch, r, *features)`.
      b: Bᵀ, `(*batch, r, *features)`, with feature axes of its own.
      grad_a: g_A, like `a`.
      grad_b: g_Bᵀ, like `b`.
      scale: s, a scalar.
      batch_ndim: The number of batch axes, static.
    """

    a: jax.Array
    b: jax.Array
    grad_a: jax.Array
    grad_b: jax.Array
    scale: ArrayLike = 1.0
    batch_ndim: int = 0


def rank_first(x: jax.Array, rank_axis: int, batch_axes: Sequence[int]) -> jax.Array:
    """A leaf as `(*batch, r, *features)`."""
    return jnp.moveaxis(x, (*batch_axes, rank_axis), range(len(batch_axes) + 1))


def undo_rank_first(
    x: jax.Array, rank_axis: int, batch_axes: Sequence[int]
) -> jax.Array:
    """Brings `(*batch, r, *features)` back to the axes of the leaf."""
    return jnp.moveaxis(x, range(len(batch_axes) + 1), (*batch_axes, rank_axis))


def in_compute_dtype(pair: PairArrays) -> PairArrays:
    """All in float64 if one array is, else in float32."""
    arrays = pair[:4]
    wide = any(x.dtype == jnp.float64 for x in arrays)
    dtype = jnp.float64 if wide else jnp.float32
    scale = jnp.asarray(pair.scale, dtype)
    return PairArrays(*(x.astype(dtype) for x in arrays), scale, pair.batch_ndim)


def unit_of(pair: PairArrays) -> jax.Array:
    """A power of two near the largest entry of either factor, `(*batch)`."""
    axes = lambda x: tuple(range(pair.batch_ndim, x.ndim))
    largest = [jnp.abs(x).max(axis=axes(x)) for x in (pair.a, pair.b)]
    return power_of_two(jnp.maximum(*largest))


def contract(x: jax.Array, y: jax.Array, batch_ndim: int) -> jax.Array:
    """x yᵀ over all feature axes, `(*batch, r, r)`.

    On an explicit mesh the result is replicated, as the eigendecomposition needs.
    """
    batch, features = range(batch_ndim), range(batch_ndim + 1, x.ndim)
    return jax.lax.dot_general(
        x,
        y,
        ((features, features), (batch, batch)),
        precision=jax.lax.Precision.HIGHEST,
        out_sharding=_explicit_sharding(x, PartitionSpec()),
    )


def apply(matrix: jax.Array, x: jax.Array, batch_ndim: int) -> jax.Array:
    """`matrix @ x`, for `(*batch, r, r)` and a factor; sharded like the factor."""
    batch = range(batch_ndim)
    return jax.lax.dot_general(
        matrix,
        x,
        (((batch_ndim + 1,), (batch_ndim,)), (batch, batch)),
        precision=jax.lax.Precision.HIGHEST,
        out_sharding=_explicit_sharding(x),
    )


def times(scalars: jax.Array, x: jax.Array) -> jax.Array:
    """A scalar for each batch element: `(*batch)` times `(*batch, ...)`."""
    return jax.lax.expand_dims(scalars, range(scalars.ndim, x.ndim)) * x


def _explicit_sharding(
    x: jax.Array, spec: PartitionSpec | None = None
) -> NamedSharding | None:
    """`spec` (or that of `x`) on the explicit mesh of `x`; None without such a mesh.

    A contraction over a sharded axis has to say how its result is sharded on an
    explicit mesh, and may not say it elsewhere.
    """
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    return NamedSharding(sharding.mesh, sharding.spec if spec is None else spec)
