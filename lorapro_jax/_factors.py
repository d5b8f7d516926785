"""The arrays of one LoRA pair, and the products of skinny matrices on them.

A factor stays as it lies in the tree. Its feature axes are contracted where they
are, never merged and never moved: merging would gather a sharded array, and moving
costs a copy of it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from ._layout import FactorAxes


class PairArrays(NamedTuple):
    """The arrays of one LoRA pair.

    Attributes:
      a: A, by default the paper's `(r, n)`.
      b: B, by default the paper's `(m, r)`.
      grad_a: g_A, like `a`.
      grad_b: g_B, like `b`.
      scale: s, a scalar.
      a_axes: The axes of `a`.
      b_axes: The axes of `b`, with the same batch sizes.
    """

    a: jax.Array
    b: jax.Array
    grad_a: jax.Array
    grad_b: jax.Array
    scale: ArrayLike = 1.0
    a_axes: FactorAxes = FactorAxes(0)
    b_axes: FactorAxes = FactorAxes(1)

    @property
    def rank(self) -> int:
        """The number r."""
        return self.a.shape[self.a_axes.rank]

    @property
    def batch(self) -> tuple[int, ...]:
        """The sizes of the stacked axes."""
        return tuple(self.a.shape[axis] for axis in self.a_axes.batch)


def in_compute_dtype(pair: PairArrays) -> PairArrays:
    """All in float64 if one array is, else in float32."""
    wide = any(x.dtype == jnp.float64 for x in pair[:4])
    dtype = jnp.float64 if wide else jnp.float32
    a, b, grad_a, grad_b = (x.astype(dtype) for x in pair[:4])
    scale = jnp.asarray(pair.scale, dtype)
    return PairArrays(a, b, grad_a, grad_b, scale, *pair[5:])


def largest_entry(pair: PairArrays) -> jax.Array:
    """The largest absolute value in either factor, `(*batch)`, on every device."""

    def largest(x: jax.Array, axes: FactorAxes) -> jax.Array:
        return jnp.abs(x).max(axis=(axes.rank, *axes.features(x.ndim)))

    entries = largest(pair.a, pair.a_axes), largest(pair.b, pair.b_axes)
    return jnp.maximum(*map(replicated, entries))


def replicated(x: jax.Array) -> jax.Array:
    """The scalars or small matrices of all layers, on every device.

    Said only to an explicit mesh, which demands it. On an automatic one, the
    compiler would carry the demand back to the factors and gather those.
    """
    sharding = _explicit_sharding(x, ())
    return jax.sharding.reshard(x, sharding) if sharding else x


def beside(small: jax.Array, x: jax.Array, axes: FactorAxes) -> jax.Array:
    """The scalars or small matrices of all layers, where a factor has its layers.

    Its partner may have them elsewhere, which an explicit mesh would not mix.
    """
    sharding = _explicit_sharding(x, axes.batch)
    return jax.sharding.reshard(small, sharding) if sharding else small


def times(scalars: jax.Array, x: jax.Array, axes: FactorAxes) -> jax.Array:
    """A factor times one scalar for each batch element, `(*batch)`."""
    others = (axes.rank, *axes.features(x.ndim))
    return jnp.expand_dims(beside(scalars.astype(x.dtype), x, axes), others) * x


def contract(x: jax.Array, y: jax.Array, axes: FactorAxes) -> jax.Array:
    """The products of two like factors over all feature axes, `(*batch, r, r)`.

    For A and g_A that is `A g_Aᵀ`, for B and g_B `Bᵀ g_B`. Each layer's is where the
    layer is.
    """
    features = axes.features(x.ndim)
    return jax.lax.dot_general(
        x,
        y,
        ((features, features), (axes.batch, axes.batch)),
        precision=jax.lax.Precision.HIGHEST,
        out_sharding=_explicit_sharding(x, axes.batch),
    )


def apply(matrix: jax.Array, x: jax.Array, axes: FactorAxes) -> jax.Array:
    """`(*batch, r, r)` matrices on the rank axis of a factor, sharded like it.

    For A that is `M A`, for B `B Mᵀ`.
    """
    matrix = beside(matrix, x, axes)
    front = tuple(range(len(axes.batch)))
    columns = len(front) + 1
    features = axes.features(x.ndim)
    if axes.rank == x.ndim - 1:  # then the result needs no transpose either
        operands, contracted = (x, matrix), ((axes.rank,), (columns,))
        batch, order = (axes.batch, front), (*axes.batch, *features, axes.rank)
    else:
        operands, contracted = (matrix, x), ((columns,), (axes.rank,))
        batch, order = (front, axes.batch), (*axes.batch, axes.rank, *features)
    result = jax.lax.dot_general(
        *operands,
        (contracted, batch),
        precision=jax.lax.Precision.HIGHEST,
        out_sharding=_explicit_sharding(x, order),
    )
    return result.transpose(np.argsort(order))


def outer(
    b: jax.Array, a: jax.Array, b_axes: FactorAxes, a_axes: FactorAxes
) -> jax.Array:
    """`B A` of factors alike: `(*batch, *features of b, *features of a)`."""
    at_b, at_a = b_axes.features(b.ndim), a_axes.features(a.ndim)
    sharding = _explicit_sharding(b, (*b_axes.batch, *at_b))
    if sharding:  # one mesh axis cannot shard two axes of the result
        used = set(jax.tree.leaves(tuple(sharding.spec)))
        of_a = _explicit_sharding(a, at_a).spec  # type: ignore[union-attr]
        free = (None if used & set(jax.tree.leaves(x)) else x for x in of_a)
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec, *free))
    return jax.lax.dot_general(
        b,
        a,
        (((b_axes.rank,), (a_axes.rank,)), (b_axes.batch, a_axes.batch)),
        precision=jax.lax.Precision.HIGHEST,
        out_sharding=sharding,
    )


def inner(
    factor: jax.Array,
    x: jax.Array,
    axes: FactorAxes,
    over: tuple[int, ...],
    like: jax.Array,
    like_axes: FactorAxes,
) -> jax.Array:
    """A factor's product with an `outer` over its own features.

    Args:
      factor: A or B.
      x: `(*batch, *features of b, *features of a)`.
      axes: Of the factor.
      over: The axes of `x` with the features of the factor.
      like: The other factor: the result is laid out and sharded like it.
      like_axes: Of the other factor.
    """
    dims = (
        (axes.features(factor.ndim), over),
        (axes.batch, tuple(range(len(axes.batch)))),
    )
    order = (*like_axes.batch, like_axes.rank, *like_axes.features(like.ndim))
    result = jax.lax.dot_general(
        factor,
        x,
        dims,
        precision=jax.lax.Precision.HIGHEST,
        out_sharding=_explicit_sharding(like, order),
    )
    return result.transpose(np.argsort(order))


def _explicit_sharding(x: jax.Array, axes: tuple[int, ...]) -> NamedSharding | None:
    """The sharding of these axes of `x` on an explicit mesh; None without one.

    A contraction over a sharded axis has to say how its result is sharded on an
    explicit mesh, and may not say it elsewhere.
    """
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    spec = (*sharding.spec, *[None] * (x.ndim - len(sharding.spec)))
    return NamedSharding(sharding.mesh, PartitionSpec(*(spec[axis] for axis in axes)))
