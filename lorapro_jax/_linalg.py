"""Many small positive semi-definite matrices in one eigendecomposition.

Everything here maps arrays to arrays and knows nothing of LoRA, trees or Optax.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Eigh(NamedTuple):
    """`vectors @ diag(values) @ vectors.T`, batched.

    Attributes:
      values: `(N, R)`, ascending; what is rounding noise is exactly 0.
      vectors: `(N, R, R)`, orthonormal columns.
    """

    values: jax.Array
    vectors: jax.Array


def stack_square(matrices: Sequence[jax.Array]) -> jax.Array:
    """Stacks square matrices of mixed size and batch shape into one array.

    Args:
      matrices: `(*batch_i, r_i, r_i)` each; the widest dtype is that of all.

    Returns:
      `(N, R, R)` with `N` the number of matrices in all batches and `R` the
      largest `r_i`; smaller ones fill their top left corner, the rest is 0.
    """
    size = max(x.shape[-1] for x in matrices)
    widest = max((x.dtype for x in matrices), key=lambda dtype: dtype.itemsize)

    def padded(x: jax.Array) -> jax.Array:
        missing = size - x.shape[-1]
        flat = x.reshape(-1, *x.shape[-2:]).astype(widest)
        return jnp.pad(flat, [(0, 0), (0, missing), (0, missing)])

    return jnp.concatenate([padded(x) for x in matrices])


def split_batches(
    stack: jax.Array, batches: Sequence[tuple[int, ...]]
) -> list[jax.Array]:
    """Divides `(N, *rest)` into one `(*batch_i, *rest)` for each batch shape."""
    counts = [int(np.prod(batch)) for batch in batches]
    parts = jnp.split(stack, np.cumsum(counts)[:-1])
    return [
        part.reshape(*batch, *stack.shape[1:])
        for part, batch in zip(parts, batches, strict=True)
    ]


def eigh_psd(stack: jax.Array, sizes: np.ndarray) -> Eigh:
    """Eigendecompositions of a `stack_square` of positive semi-definite matrices.

    One batched `eigh` for all, which is the fastest way on accelerators; see
    `_batched_eigh` for CPUs.

    A matrix with a non-finite entry gets NaN eigenvalues and cannot reach its
    neighbours, whatever the backend does with NaN. Each matrix is brought to
    unit size first, so that no backend's absolute tolerance matters.

    Args:
      stack: `(N, R, R)`, symmetric positive semi-definite up to rounding.
      sizes: `(N,)` static integers, the size `r_i` of each matrix before padding.

    Returns:
      An `Eigh`. Padding shows as eigenvalue 0 with eigenvectors that vanish on
      the first `r_i` coordinates. Eigenvalues that are not above the rounding
      error of the largest one are 0.
    """
    dtype = stack.dtype
    finite = jnp.isfinite(stack).all(axis=(-2, -1))
    unit = power_of_two(jnp.abs(stack).max(axis=(-2, -1)))
    matrices = jnp.where(finite[:, None, None], stack / unit[:, None, None], 0)
    # Padding has eigenvalues of -1 to -2, where no positive semi-definite matrix has
    # any: its eigenvectors cannot mix with the null space of the matrix itself. They
    # differ, because the derivative of `eigh` divides by their differences.
    size = stack.shape[-1]
    missing = np.arange(size) >= np.asarray(sizes)[:, None]
    padding = jnp.where(missing, 1 + jnp.arange(size, dtype=dtype) / size, 0)
    matrices -= padding[:, :, None] * jnp.eye(size, dtype=dtype)

    values, vectors = _batched_eigh(matrices)
    noise = rounding_level(values, sizes)
    values = jnp.where(values > noise, values, 0) * unit[:, None]
    return Eigh(jnp.where(finite[:, None], values, jnp.nan), vectors)


@jax.jit  # for calls outside of one: they would compile it anew each time
def _batched_eigh(stack: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`jnp.linalg.eigh`, on CPUs one matrix after the other.

    There a batched call of LAPACK divides its work among the threads that run the
    program, and blocks one of them until they get to it. This call could run from the
    beginning of a training step, for it needs no gradient, and would take a thread
    from all of forward and backward pass; two at a time can wait for each other for
    ever. A call for one matrix does its work itself, in the same time.
    """

    def eigh(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, vectors = jnp.linalg.eigh(x)
        return values, vectors

    values, vectors = jax.lax.platform_dependent(
        stack, cpu=lambda x: jax.lax.map(eigh, x), default=eigh
    )
    return values, vectors


def rounding_level(values: jax.Array, sizes: np.ndarray) -> jax.Array:
    """The size below which an eigenvalue is rounding noise, `(N, 1)`.

    It is measured: float32 Gram matrices show null spaces of up to 5 eps, relative to
    the largest eigenvalue, at rank 16, and of about 9 at rank 64. A factor of rank 32
    keeps all of its directions up to a condition number of 1e3.

    Args:
      values: `(N, R)`, ascending.
      sizes: `(N,)` static, the size of each matrix.
    """
    roundings = np.maximum(8, np.asarray(sizes) / 4)[:, None]
    eps = jnp.finfo(values.dtype).eps
    return jnp.asarray(roundings, values.dtype) * eps * values[:, -1:]


def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """`x @ y` at the highest precision, batched."""
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def reciprocal(x: jax.Array) -> jax.Array:
    """`1/x` of `x >= 0`, and 0 where `x` is 0: the pseudo-inverse of a diagonal."""
    zero = x < jnp.finfo(x.dtype).tiny  # a subnormal's reciprocal overflows
    return jnp.where(zero, 0, 1 / jnp.where(zero, 1, x))


def safe_norm(x: jax.Array) -> jax.Array:
    """√Σx² over all entries, finite where the result is."""
    unit = power_of_two(jnp.abs(x).max(initial=0))
    return unit * jnp.sqrt(jnp.sum((x / unit) ** 2))


def power_of_two(x: jax.Array) -> jax.Array:
    """The power of two just below `x`, to divide by without a rounding error.

    1/2 where `x` is 0 or not finite; never subnormal, and its reciprocal is
    never subnormal either.
    """
    limit = -jnp.finfo(x.dtype).minexp - 1
    _, exponent = jnp.frexp(x)
    return jnp.ldexp(jnp.ones_like(x), jnp.clip(exponent - 1, -limit, limit))
