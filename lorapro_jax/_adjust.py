r"""LoRA-Pro's gradients, as functions of arrays.

Notation of the paper: W = W0 + s B A with B: m×r and A: r×n. LoRA's gradients are
g_A = s Bᵀ G and g_B = s G Aᵀ for the full gradient G, which is never formed. A
step (a, b) on (A, B) moves W by the *equivalent gradient* J(a, b) = s (B a + b A).

The gradients whose equivalent gradient is closest to G, with Levenberg-Marquardt
damping e ≥ 0, are (JᵀJ + s²e I)⁻¹ Jᵀ G. They are diagonal in the eigenbases of
the two Gram matrices, BᵀB = U diag(λ) Uᵀ and AAᵀ = V diag(μ) Vᵀ:

    K = Uᵀ (g_A Aᵀ) V        d_ij = λ_i + μ_j + e
    a = (1/s²) { U diag(1/(λ+e)) Uᵀ g_A  −  U [K_ij / ((λ_i+e) d_ij)] Vᵀ A }
    b = (1/s²) { g_B V diag(1/(μ+e)) Vᵀ  −  B U [K_ij / ((μ_j+e) d_ij)] Vᵀ }

At e = 0, where 1/0 counts as 0, this is Theorem 2.1 of the paper with the X of
Theorem 2.3 (Wang et al., arXiv 2407.18242), and its first-step rule where B = 0.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ._factors import (
    PairArrays,
    apply,
    contract,
    in_compute_dtype,
    largest_entry,
    times,
)
from ._linalg import (
    Eigh,
    eigh_psd,
    power_of_two,
    reciprocal,
    rounding_level,
    split_batches,
    stack_square,
)

Gauge: TypeAlias = Literal["sylvester", "symmetric", "zero"]


class Coefficients(NamedTuple):
    """Four r×r matrices that turn factors and gradients into adjusted gradients.

    `a = grad_a g_A - factor_a A` and `b = g_B grad_bᵀ - B factor_bᵀ`.
    """

    grad_a: jax.Array
    factor_a: jax.Array
    grad_b: jax.Array
    factor_b: jax.Array


def adjust(
    pairs: Sequence[PairArrays], *, damping: ArrayLike, gauge: Gauge
) -> list[tuple[jax.Array, jax.Array]]:
    """The adjusted gradients of many pairs, with one eigendecomposition.

    **The gradients of a pair must come from one G**, so that g_A Aᵀ = Bᵀ g_B;
    this is not checked. Arrays that are not finite spoil their own pair only.

    Args:
      pairs: Any mix of ranks, shapes, batch axes and dtypes.
      damping: e in units of (tr BᵀB + tr AAᵀ) / r, pair by pair.
      gauge: Which of the minimisers; see `coefficients`.

    Returns:
      a and b of each pair, laid out like A and B, in float64 if one of the pair's
      arrays is, else in float32.
    """
    pairs = [in_compute_dtype(pair) for pair in pairs]
    batches = [pair.batch for pair in pairs]
    counts = [int(np.prod(batch)) for batch in batches]
    ranks = np.repeat([pair.rank for pair in pairs], counts)
    # In units of its larger factor no Gram matrix over- or underflows; in powers of
    # two that costs no accuracy. A gradient's own unit is s times the factors'.
    units = 1 / power_of_two(_stack([largest_entry(pair) for pair in pairs]))
    scales = [jnp.full(pair.batch, pair.scale) for pair in pairs]
    weights = units / _stack(scales)

    grams_a, grams_b, crosses = [], [], []
    for pair, unit in zip(pairs, split_batches(units, batches), strict=True):
        a, b = times(unit, pair.a, pair.a_axes), times(unit, pair.b, pair.b_axes)
        grams_a.append(contract(a, a, pair.a_axes))
        grams_b.append(contract(b, b, pair.b_axes))
        crosses.append(contract(pair.grad_a, a, pair.a_axes))

    # From here to the end all pairs are one stack of small matrices.
    values, vectors = eigh_psd(stack_square(grams_b + grams_a), np.tile(ranks, 2))
    (lam, mu), (u, v) = jnp.split(values, 2), jnp.split(vectors, 2)
    cross = weights[:, None, None] * stack_square(crosses)
    on_grad_a, on_a, on_grad_b, on_b = coefficients(
        Eigh(lam, u), Eigh(mu, v), cross, ranks, damping, gauge
    )
    # Half of the scale before the skinny product, half behind: weight² may overflow.
    matrices = Coefficients(
        weights[:, None, None] * on_grad_a,
        units[:, None, None] * on_a,
        weights[:, None, None] * on_grad_b,
        units[:, None, None] * on_b,
    )
    per_pair = zip(*(split_batches(x, batches) for x in matrices), strict=True)
    return [
        _apply(pair, Coefficients(*xs), weight)
        for pair, xs, weight in zip(
            pairs, per_pair, split_batches(weights, batches), strict=True
        )
    ]


def coefficients(
    eig_b: Eigh,
    eig_a: Eigh,
    cross: jax.Array,
    ranks: np.ndarray,
    damping: ArrayLike,
    gauge: Gauge,
) -> Coefficients:
    """The matrices of the adjustment at s = 1, for a stack of pairs.

    The two bracketed matrices of the formula are one correction, divided between
    the factors. Only their sum reaches the equivalent gradient, so it is the same
    in every gauge, damped or not:

    * `"sylvester"`: as in the formula, closest to LoRA's own gradients (Theorem
      2.3) and, undamped, the minimum-norm solution J⁺G;
    * `"symmetric"`: half of the sum each;
    * `"zero"`: all of it on B, the paper's X = 0.

    Args:
      eig_b: Of BᵀB: `(N, R)` and `(N, R, R)`.
      eig_a: Of AAᵀ, likewise.
      cross: g_A Aᵀ, `(N, R, R)`, zero-padded.
      ranks: `(N,)`, static.
      damping: e in units of (tr BᵀB + tr AAᵀ) / r.
      gauge: One of the above.

    Returns:
      Four stacks `(N, R, R)`; the top left r×r corner of each matrix counts.
    """
    (lam, u), (mu, v) = eig_b, eig_a
    dtype = cross.dtype
    mean = (lam.sum(-1) + mu.sum(-1)) / jnp.asarray(ranks, dtype)
    e = (jnp.asarray(damping, dtype) * mean)[:, None]

    inverse_b = _damped_inverse(lam, e, ranks)
    inverse_a = _damped_inverse(mu, e, ranks)
    k = _matmul(_matmul(u.mT, cross), v)
    # A direction that a factor lacks has no cross term, only rounding noise.
    k = jnp.where((inverse_b[:, :, None] == 0) | (inverse_a[:, None, :] == 0), 0, k)
    shared = k * reciprocal(lam[:, :, None] + mu[:, None, :] + e[:, :, None])
    on_a, on_b = shared * inverse_b[:, :, None], shared * inverse_a[:, None, :]
    if gauge == "symmetric":
        on_a = on_b = (on_a + on_b) / 2
    elif gauge == "zero":
        on_a, on_b = jnp.zeros_like(on_a), on_a + on_b

    return Coefficients(
        grad_a=_matmul(u * inverse_b[:, None, :], u.mT),
        factor_a=_matmul(_matmul(u, on_a), v.mT),
        grad_b=_matmul(v * inverse_a[:, None, :], v.mT),
        factor_b=_matmul(_matmul(v, on_b.mT), u.mT),
    )


def _damped_inverse(values: jax.Array, e: jax.Array, ranks: np.ndarray) -> jax.Array:
    """1/(λ+e), and 0 for a lost direction that e is too small to bring back.

    There e is itself below the rounding noise of the Gram matrix and of what the
    result is multiplied with, and 1/e would amplify that noise.
    """
    lost = (values == 0) & (e < rounding_level(values, ranks))
    return jnp.where(lost, 0, reciprocal(values + e))


def equivalent(pair: PairArrays, step_a: jax.Array, step_b: jax.Array) -> jax.Array:
    """J(a, b) = s (B a + b A): `(*batch, *features of b, *features of a)`."""
    ranks = ((pair.b_axes.rank,), (pair.a_axes.rank,))
    dims = (ranks, (pair.b_axes.batch, pair.a_axes.batch))

    def product(b: jax.Array, a: jax.Array) -> jax.Array:
        return jax.lax.dot_general(b, a, dims, precision=jax.lax.Precision.HIGHEST)

    moved = product(pair.b, step_a) + product(step_b, pair.a)
    return jnp.asarray(pair.scale, moved.dtype) * moved


def _apply(
    pair: PairArrays, matrices: Coefficients, weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The adjusted gradients of one pair from its coefficients."""
    on_grad_a, on_a, on_grad_b, on_b = (
        x[..., : pair.rank, : pair.rank].astype(pair.a.dtype) for x in matrices
    )
    a = apply(on_grad_a, pair.grad_a, pair.a_axes) - apply(on_a, pair.a, pair.a_axes)
    b = apply(on_grad_b, pair.grad_b, pair.b_axes) - apply(on_b, pair.b, pair.b_axes)
    return times(weight, a, pair.a_axes), times(weight, b, pair.b_axes)


def _stack(scalars: Sequence[jax.Array]) -> jax.Array:
    """`(*batch_i)` of all pairs as one `(N,)`, in the widest dtype."""
    widest = max((x.dtype for x in scalars), key=lambda dtype: dtype.itemsize)
    return jnp.concatenate([x.reshape(-1).astype(widest) for x in scalars])


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)
