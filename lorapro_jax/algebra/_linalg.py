"""Many small positive semi-definite matrices in one eigendecomposition.

Everything here maps arrays to arrays and knows nothing of LoRA, trees or Optax.
"""

import functools
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

T = TypeVar("T")


class Eigh(NamedTuple):
    """`vectors @ diag(values) @ vectors.T`, batched.

    Attributes:
      values: `(N, R)`, ascending; what is rounding noise is exactly 0.
      vectors: `(N, R, R)`, orthonormal columns.
    """

    values: jax.Array
    vectors: jax.Array


def eigh_psd(stack: jax.Array, sizes: np.ndarray | jax.Array) -> Eigh:
    """Eigendecompositions of a `stack_square` of positive semi-definite matrices.

    One batched `eigh` for all, which is the fastest way on accelerators; see
    `_batched_eigh` for CPUs.

    A matrix with a non-finite entry gets NaN eigenvalues and cannot reach its
    neighbours, whatever the backend does with NaN. Each matrix is brought to
    unit size first, so that no backend's absolute tolerance matters.

    Args:
      stack: `(N, R, R)`, symmetric positive semi-definite up to rounding.
      sizes: `(N,)` integers, the size `r_i` of each matrix before padding.

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
    missing = np.arange(size)[None] >= sizes[:, None]
    padding = jnp.where(missing, 1 + jnp.arange(size, dtype=dtype)[None] / size, 0)
    matrices -= padding[:, :, None] * jnp.eye(size, dtype=dtype)[None]

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


def rounding_level(values: jax.Array, sizes: np.ndarray | jax.Array) -> jax.Array:
    """The size below which an eigenvalue is rounding noise, `(*batch, 1)`.

    It is measured: float32 Gram matrices show null spaces of up to 5 eps, relative to
    the largest eigenvalue, at rank 16, and of about 9 at rank 64. A factor of rank 32
    keeps all of its directions up to a condition number of 1e3.

    Args:
      values: `(*batch, R)`, ascending.
      sizes: `(*batch)`, the size of each matrix.
    """
    roundings = jnp.maximum(8, jnp.asarray(sizes) / 4)[..., None]
    eps = jnp.finfo(values.dtype).eps
    return jnp.asarray(roundings, values.dtype) * eps * values[..., -1:]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def not_through(what: str, x: T, source: jax.Array) -> T:
    """`x`, which raises where it is differentiated with respect to its source.

    For results whose derivative would otherwise be silently wrong.
    """
    del what, source
    return x


@not_through.defjvp
def _not_through_jvp(what: str, primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        f"{what} cannot be differentiated. Put `jax.lax.stop_gradient` around the "
        "parameters or the gradients that `update` gets."
    )


def root(x: jax.Array) -> jax.Array:
    """√x of `x >= 0`, with a derivative of 0 at 0."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), x)


def svd(x: jax.Array, *, full_matrices: bool) -> tuple[jax.Array, ...]:
    """`jnp.linalg.svd`, on GPUs by QR iterations.

    Jacobi's, which are JAX's choice there, end with errors of 1e-5 in float32, where
    LAPACK's are below 2.4e-6, twenty roundings. TPUs have no QR iterations, so what is
    traced beside a GPU cannot be exported to them. `platform_dependent` is no way out:
    a program for several platforms lowers each rule for all of them.
    """
    of = jax.lax.linalg.SvdAlgorithm
    algorithm = of.QR if on_gpu() else of.DEFAULT
    u, s, vt = jax.lax.linalg.svd(x, full_matrices=full_matrices, algorithm=algorithm)
    return u, s, vt


def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """`x @ y` at the highest precision, batched.

    On GPUs all batch axes become one: under `vmap`, the compiler of jax 0.11.2 ends
    with an internal error at products that have four. On meshes that would send more.
    """
    batch = jnp.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    if one := len(batch) > 1 and on_gpu():
        whole = lambda z: jnp.broadcast_to(z, (*batch, *z.shape[-2:]))
        x, y = (whole(z).reshape(-1, *z.shape[-2:]) for z in (x, y))
    product = jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)
    return product.reshape(*batch, *product.shape[-2:]) if one else product


def on_gpu() -> bool:
    """Whether JAX computes on a GPU unless it is told otherwise."""
    return jax.default_backend() == "gpu"


def reciprocal(x: jax.Array) -> jax.Array:
    """`1/x` of `x >= 0`, and 0 where `x` is 0: the pseudo-inverse of a diagonal."""
    zero = x < jnp.finfo(x.dtype).tiny  # a subnormal's reciprocal overflows
    return jnp.where(zero, 0, 1 / jnp.where(zero, 1, x))


class Norm(NamedTuple):
    """`unit · value`, of which the product may overflow while neither part does.

    Attributes:
      unit: At least the size of the largest entry, up to a factor.
      value: NaN or infinite only where an entry is.
    """

    unit: jax.Array
    value: jax.Array

    def times(self, number: ArrayLike) -> "Norm":
        """The norm of as many times the array, with a unit that may be divided by.

        Above 2^126 of float32 a reciprocal, which XLA may take instead, would be 0.
        """
        largest = 1 / jnp.finfo(self.unit.dtype).tiny
        return Norm(jnp.minimum(number * self.unit, largest), self.value)

    @property
    def number(self) -> jax.Array:
        """The norm itself, which may overflow."""
        return self.unit * self.value

    def over(self, other: "Norm") -> jax.Array:
        """The ratio to another norm; 0 where that is 0."""
        return self.unit / other.unit * (self.value * reciprocal(other.value))

    def together(self, owners: np.ndarray) -> "Norm":
        """Those of all arrays of one owner, an integer from 0: `(owners,)`."""
        count = int(owners.max()) + 1
        unit = jax.ops.segment_max(self.unit, owners, count)
        unit = jnp.where(unit > 0, unit, 1)
        squares = (self.unit / unit[owners] * self.value) ** 2
        return Norm(unit, root(jax.ops.segment_sum(squares, owners, count)))

    @classmethod
    def of(cls, x: jax.Array, over: tuple[int, ...] | None = None) -> "Norm":
        """√Σ|x|² of a real or complex array, over some axes or over all."""
        size = jnp.abs(x)
        unit = power_of_two(size.max(over, initial=0, keepdims=True))
        value = root(jnp.sum((size / unit) ** 2, over))
        return cls(unit.reshape(value.shape), value)


def power_of_two(x: jax.Array) -> jax.Array:
    """The power of two just below `x`, to divide by without a rounding error.

    1/2 where `x` is 0 or not finite; never subnormal, and its reciprocal is
    never subnormal either.
    """
    # Its own exponent bits: few operations, since XLA puts them into every program that
    # a unit is used in.
    info = jnp.finfo(x.dtype)
    whole = jnp.uint64 if info.bits == 64 else jnp.uint32
    mask = np.array(np.inf, x.dtype).view(whole)
    below = jax.lax.bitcast_convert_type(x, whole) & mask
    power = jax.lax.bitcast_convert_type(below, x.dtype)
    largest = 2.0 ** (-info.minexp - 1)
    power = jnp.clip(power, 1 / largest, largest)
    return jnp.where((x > 0) & jnp.isfinite(x), power, 0.5)
