"""Two factors at another rank: functions of matrices, one layer at a time.

Down: B A = U Σ Vᵀ, from the QR decompositions of both factors and the singular values
of an r×r core; its first k terms are the closest matrix of rank k (Eckart and Young).
How Σ is divided between the factors decides how they go on training. The factor that
was larger, A in nearly every adapter, gets rows of equal length, the root mean square
of those it had, and the other one gets Σ. So neither is larger than √r times what it
was, and where Σ has a 0, as after LoRA's start with B = 0, one side of that direction
still is alive: both of them 0 would be a saddle that no gradient leaves.

Up: as LoRA starts. B gets columns of 0, so the product stays; A gets random rows of the
length of those it has, orthogonal to them and to each other while there are inputs
left. The new columns of B have gradients from the first step on, and what a step can do
to W, P_B G + (I - P_B) G P_A, grows by as much as so many rows can give.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .._placement import stored_as
from ..algebra._linalg import matmul, power_of_two, reciprocal, svd
from ..algebra._sharding import replicated


class ResizedFactors(NamedTuple):
    """What `resize_factors` returns.

    Attributes:
      a: `(*batch, k, n)`, in the dtype of A.
      b: `(*batch, m, k)`, in the dtype of B.
      error: ‖B' A' - c B A‖ / ‖c B A‖ in the Frobenius norm, of the factors as they are
        in their dtypes, `(*batch)`; 0 where B A is 0.
    """

    a: jax.Array
    b: jax.Array
    error: jax.Array


@functools.partial(jax.jit, static_argnames="rank")
def resize_factors(
    a: jax.Array,
    b: jax.Array,
    rank: int,
    key: jax.Array,
    ratio: jax.Array | float = 1.0,
) -> ResizedFactors:
    """Factors of another rank whose product is `ratio · B A`, as closely as it can be.

    To a lower rank it is the closest product of that rank. To a higher or the same one
    it is the product itself: A keeps its rows, B its columns times the ratio. Computed
    in float32, or float64 if a factor is, one layer after the other. A layer with
    an entry that is not finite becomes NaN, and no other does.

    Args:
      a: A, `(*batch, r, n)`.
      b: B, `(*batch, m, r)`.
      rank: The new rank k, at least 1; static.
      key: Of `jax.random`, for new rows of A; a lower rank does not use it.
      ratio: What the product is multiplied with, `()` or `(*batch)`: s / s' where the
        scale changes with the rank.
    """
    batch = a.shape[:-2]
    layers = math.prod(batch)
    dtypes = [jnp.asarray(x).dtype for x in (a, b)]
    wide = jnp.float64 if jnp.float64 in dtypes else jnp.float32
    change = _lowered if rank < a.shape[-2] else _raised

    def resize_layer(layer: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        a, b, ratio, key = layer
        a, b = a.astype(wide), ratio * b.astype(wide)
        finite = jnp.isfinite(a).all() & jnp.isfinite(b).all()
        old = jnp.where(finite, a, 0), jnp.where(finite, b, 0)
        wanted = zip(change(*old, rank, key), dtypes, strict=True)
        new = [stored_as(*x) for x in wanted]
        error = _relative_error((new[0].astype(wide), new[1].astype(wide)), old)
        nan = lambda x: jnp.where(finite, x, jnp.asarray(jnp.nan, x.dtype))
        return nan(new[0]), nan(new[1]), nan(error)

    # Not `vmap`: a batched call of LAPACK can wait for itself on few cores.
    flat = [replicated(x).reshape(layers, *x.shape[-2:]) for x in (a, b)]
    ratios = jnp.broadcast_to(jnp.asarray(ratio, wide), batch).reshape(layers)
    keys = jax.random.split(key, layers)
    found = jax.lax.map(resize_layer, (*flat, ratios, keys))
    return ResizedFactors(*(x.reshape(*batch, *x.shape[1:]) for x in found))


def _lowered(
    a: jax.Array, b: jax.Array, rank: int, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The closest product of a lower rank."""
    del key
    # At unit size no sum of squares under- or overflows.
    unit_a, unit_b = _unit(a), _unit(b)
    a, b = a / unit_a, b / unit_b
    (q_a, r_a), (q_b, r_b) = jnp.linalg.qr(a.T), jnp.linalg.qr(b)
    # With all vectors: those of singular values of 0 are of use to one side.
    u, values, vt = svd(matmul(r_b, r_a.T), full_matrices=True)
    left, right = matmul(q_b, u), matmul(q_a, vt.T)
    left, right, values = (_first(x, rank) for x in (left, right, values[None]))

    length_a, length_b = (jnp.sqrt(jnp.sum(x**2) / len(a)) for x in (a, b))
    a_leads = unit_a * length_a >= unit_b * length_b
    size_a = jnp.where(a_leads, length_a, values * reciprocal(length_b))
    size_b = jnp.where(a_leads, values * reciprocal(length_a), length_b)
    return unit_a * (right * size_a).T, unit_b * (left * size_b)


def _raised(
    a: jax.Array, b: jax.Array, rank: int, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The same product with more rows of A, and columns of 0 in B."""
    (old, inputs), more = a.shape, rank - len(a)
    if not more:
        return a, b
    rows = jax.random.normal(key, (more, inputs), a.dtype)
    rows /= jnp.linalg.norm(rows, axis=1, keepdims=True)
    if (left := min(rank, inputs) - old) > 0:
        both = jnp.concatenate([a / _unit(a), rows])
        basis, _ = jnp.linalg.qr(both.T)
        rows = rows.at[:left].set(basis[:, old : old + left].T)
    unit = _unit(a)
    length = unit * jnp.sqrt(jnp.sum((a / unit) ** 2) / old)
    # That of LoRA's start, uniform in ±1/√n, where there is none.
    length = jnp.where(length > 0, length, 1 / math.sqrt(3))
    zeros = jnp.zeros((len(b), more), b.dtype)
    return jnp.concatenate([a, length * rows]), jnp.concatenate([b, zeros], axis=1)


def _first(x: jax.Array, count: int) -> jax.Array:
    """The first columns; where there are fewer, zeros behind them."""
    return jnp.pad(x[:, :count], ((0, 0), (0, max(0, count - x.shape[1]))))


def _relative_error(
    new: tuple[jax.Array, jax.Array], old: tuple[jax.Array, jax.Array]
) -> jax.Array:
    """‖B' A' - B A‖ / ‖B A‖ from (A', B') and (A, B); 0 where B A is 0."""
    (new_a, new_b), (a, b) = new, old
    if len(new_a) < len(a):
        right, left = jnp.concatenate([new_a, a]), jnp.concatenate([new_b, -b], axis=1)
    else:  # A has kept its rows, and what is new in B is 0
        right, left = a, new_b[:, : len(a)] - b
    (error, *units), (size, *of_size) = _norm(right, left), _norm(a, b)
    parts = (x / y for x, y in zip(units, of_size, strict=True))
    return functools.reduce(jnp.multiply, parts, error * reciprocal(size))


def _norm(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """‖B A‖ by the units of A and B; and these, which it is to be multiplied with."""
    units = _unit(a), _unit(b)
    r_a, r_b = (jnp.linalg.qr(x, mode="r") for x in ((a / units[0]).T, b / units[1]))
    return jnp.linalg.norm(matmul(r_b, r_a.T)), *units


def _unit(x: jax.Array) -> jax.Array:
    """The power of two just below the largest entry."""
    return power_of_two(jnp.abs(x).max())
