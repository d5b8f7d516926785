"""The first singular triplets of a matrix."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ._linalg import matmul, power_of_two, svd

_POWER_ITERATIONS = 4
_OVERSAMPLING = 10
_SMALL = 256  # the exact decomposition of such a matrix takes milliseconds


class SVD(NamedTuple):
    """`u @ diag(s) @ vt`.

    Attributes:
      u: `(m, k)`, orthonormal columns.
      s: `(k,)`, descending.
      vt: `(k, n)`, orthonormal rows.
    """

    u: jax.Array
    s: jax.Array
    vt: jax.Array


def truncated_svd(x: jax.Array, rank: int, key: jax.Array) -> SVD:
    """The largest singular values of a matrix, and their vectors.

    Exact where that is quick: where min(m, n) is at most 256 or at most eight times
    the rank. Else from a random subspace twice as large as the rank, after four power
    iterations (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1), as in
    `torch.svd_lowrank`: ten products with x, some `40 m n rank` operations.

    Singular values σ that stand out are found to rounding error, and so are their
    vectors; the error of the others is of the order of (σ_{2 rank} / σ)⁹. Where the
    spectrum is flat, single vectors mean nothing, but the product of the factors is
    still about as close to x as the best one. `lobpcg_standard` of JAX would work on
    xᵀx, which costs half of the digits.

    All calls of LAPACK depend on each other: independent batched ones in one program
    can deadlock on machines with few cores.

    Args:
      x: `(m, n)`, finite, float32 or float64.
      rank: Static, from 1 to min(m, n).
      key: Of `jax.random`; the exact decomposition does not use it.
    """
    sketch = rank + max(rank, _OVERSAMPLING)
    small = min(x.shape) <= max(_SMALL, 4 * sketch)
    # At unit size no sum of squares under- or overflows on any backend.
    unit = power_of_two(jnp.abs(x).max())
    x = x / unit
    if small:
        u, s, vt = svd(x, full_matrices=False)
    else:
        u, s, vt = _randomized(x, sketch, key)
    signs = _signs(u[:, :rank])
    return SVD(signs * u[:, :rank], unit * s[:rank], signs[:, None] * vt[:rank])


def _randomized(x: jax.Array, sketch: int, key: jax.Array) -> SVD:
    """The singular triplets of x within a subspace found by power iteration."""
    columns = _orthonormal(jax.random.normal(key, (x.shape[1], sketch), x.dtype))
    rows = _orthonormal(matmul(x, columns))
    for _ in range(_POWER_ITERATIONS):
        columns = _orthonormal(matmul(x.T, rows))
        rows = _orthonormal(matmul(x, columns))
    u, s, vt = svd(matmul(rows.T, x), full_matrices=False)
    return SVD(matmul(rows, u), s, vt)


def _signs(u: jax.Array) -> jax.Array:
    """With which the largest entry of each column is positive, `(k,)`.

    Each backend has other signs, and some starts depend on them.
    """
    largest = jnp.take_along_axis(u, jnp.abs(u).argmax(0)[None], axis=0)[0]
    return jnp.where(largest < 0, -1, 1).astype(u.dtype)


def _orthonormal(x: jax.Array) -> jax.Array:
    """An orthonormal basis of the columns, completed where they are dependent."""
    return jnp.linalg.qr(x)[0]
