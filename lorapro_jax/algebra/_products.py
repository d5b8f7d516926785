"""Products of skinny matrices on factors, as they lie in the tree.

Feature axes are contracted where they are, never merged and never moved: merging would
gather a sharded array, and moving costs a copy of it.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ._factors import Both, Factor
from ._linalg import power_of_two
from ._sharding import of_product, replicated, resharded, sharding_of


def unit_of(both: Both[Factor]) -> jax.Array:
    """The power of two just below the largest entry of either, `(*batch)`.

    Squares in this unit neither over- nor underflow, and it costs no accuracy.
    """
    (unit,) = units_of(both)
    return unit


def units_of(*pairs: Both[Factor]) -> list[jax.Array]:
    """The `unit_of` of several that have the same rank and batch."""

    def of_each_row(x: Factor) -> jax.Array:
        largest = jnp.abs(x.array).max(axis=x.features)
        return jnp.moveaxis(replicated(largest), x.axes.rank_among_batch, -1)

    # First over the features alone: of that a GPU's compiler makes one kernel, and two
    # of all at once.
    rows = jnp.stack([jnp.maximum(*x.map(of_each_row)) for x in pairs])
    return list(jax.lax.stop_gradient(power_of_two(rows.max(-1))))


def beside(small: jax.Array, x: Factor) -> jax.Array:
    """The scalars or small matrices of all layers, where a factor has its layers.

    Its partner may have them elsewhere, which an explicit mesh would not mix.
    """
    return resharded(small, sharding_of(x.array, x.axes.batch))


def times(scalars: jax.Array, x: Factor) -> Factor:
    """A factor times one scalar, or one for each batch element, `(*batch)`."""
    scalars = scalars.astype(x.dtype)
    if not scalars.ndim:
        return x.map(lambda y: scalars * y)
    scalars = jnp.expand_dims(beside(scalars, x), (x.axes.rank, *x.features))
    return x.map(lambda y: scalars * y)


def over(scalars: jax.Array, x: jax.Array) -> jax.Array:
    """Scalars, `(*batch)` or one, to be multiplied with an array `(*batch, ...)`."""
    return scalars.reshape(*scalars.shape, *(1,) * (x.ndim - scalars.ndim))


def contract(x: Factor, y: Factor) -> jax.Array:
    """The products of two like factors over all feature axes, `(*batch, r, r)`.

    For A and g_A that is `A g_Aᵀ`, for B and g_B `Bᵀ g_B`. Each layer's is where the
    layer is.
    """
    batch = x.axes.batch
    return jax.lax.dot_general(
        x.array,
        y.array,
        ((x.features, x.features), (batch, batch)),
        precision=jax.lax.Precision.HIGHEST,
        out_sharding=sharding_of(x.array, batch),
    )


def apply(matrix: jax.Array, x: Factor) -> Factor:
    """`(*batch, r, r)` matrices M on the rank axis of a factor, sharded like it.

    For A that is `M A`, for B `B Mᵀ`.
    """
    matrix = beside(matrix, x)
    batch, rank = x.axes.batch, x.axes.rank
    front = tuple(range(len(batch)))
    columns = len(front) + 1
    if rank == len(x.shape) - 1:  # then the result needs no transpose either
        operands, contracted = (x.array, matrix), ((rank,), (columns,))
        layers, order = (batch, front), (*batch, *x.features, rank)
    else:
        operands, contracted = (matrix, x.array), ((columns,), (rank,))
        layers, order = (front, batch), x.axes.rank_first(len(x.shape))
    result = jax.lax.dot_general(
        *operands,
        (contracted, layers),
        precision=jax.lax.Precision.HIGHEST,
        out_sharding=sharding_of(x.array, order),
    )
    return x.like(result.transpose(np.argsort(order)))


def outer(b: Factor, a: Factor) -> jax.Array:
    """`B A` of factors alike: `(*batch, *features of b, *features of a)`."""
    of_b = sharding_of(b.array, (*b.axes.batch, *b.features))
    return jax.lax.dot_general(
        b.array,
        a.array,
        (((b.axes.rank,), (a.axes.rank,)), (b.axes.batch, a.axes.batch)),
        precision=jax.lax.Precision.HIGHEST,
        out_sharding=of_product(of_b, sharding_of(a.array, a.features)),
    )


def inner(x: Factor, product: jax.Array, over: tuple[int, ...], like: Factor) -> Factor:
    """A factor's product with an `outer`, over its own features: `Bᵀ X` or `X Aᵀ`.

    Args:
      x: A or B.
      product: X, `(*batch, *features of b, *features of a)`.
      over: The axes of X with the features of `x`.
      like: The other factor: the result is laid out and sharded like it.
    """
    order = like.axes.rank_first(len(like.shape))
    layers = tuple(range(len(x.axes.batch)))
    result = jax.lax.dot_general(
        x.array,
        product,
        ((x.features, over), (x.axes.batch, layers)),
        precision=jax.lax.Precision.HIGHEST,
        out_sharding=sharding_of(like.array, order),
    )
    return like.like(result.transpose(np.argsort(order)))
