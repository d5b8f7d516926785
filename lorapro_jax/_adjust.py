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

from ._factors import PairArrays, apply, contract, in_compute_dtype, times, unit_of
from ._linalg import Eigh, eigh_psd, reciprocal, stack_square, unstack_square

Gauge: TypeAlias = Literal["sylvester", "symmetric", "zero"]


class Coefficients(NamedTuple):
    """Four r×r matrices that turn factors and gradients into adjusted gradients.

    `a = grad_a @ g_A - factor_a @ A`, and likewise for the transposes of b, g_B
    and B.
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
      a and bᵀ of each pair, in float64 if one of its arrays is, else in float32.
    """
    pairs = [in_compute_dtype(pair) for pair in pairs]
    # In units of its larger factor no Gram matrix over- or underflows; in powers
    # of two that costs no accuracy. A gradient's own unit is s times the factors'.
    units = [unit_of(pair) for pair in pairs]
    weights = [1 / (pair.scale * unit) for pair, unit in zip(pairs, units, strict=True)]

    grams_a, grams_b, crosses = [], [], []
    for pair, unit, weight in zip(pairs, units, weights, strict=True):
        a, b = times(1 / unit, pair.a), times(1 / unit, pair.b)
        grams_a.append(contract(a, a, pair.batch_ndim))
        grams_b.append(contract(b, b, pair.batch_ndim))
        crosses.append(times(weight, contract(pair.grad_a, a, pair.batch_ndim)))

    # From here to the last line all pairs are one stack of small matrices.
    shapes = [x.shape for x in crosses]
    ranks = np.repeat([x[-1] for x in shapes], [int(np.prod(x[:-2])) for x in shapes])
    values, vectors = eigh_psd(stack_square(grams_b + grams_a), np.tile(ranks, 2))
    (lam, mu), (u, v) = jnp.split(values, 2), jnp.split(vectors, 2)
    stacks = coefficients(
        Eigh(lam, u), Eigh(mu, v), stack_square(crosses), ranks, damping, gauge
    )
    per_pair = zip(*(unstack_square(x, shapes) for x in stacks), strict=True)

    return [
        _combine(pair, Coefficients(*matrices), unit, weight)
        for pair, matrices, unit, weight in zip(
            pairs, per_pair, units, weights, strict=True
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

    inverse_b, inverse_a = reciprocal(lam + e), reciprocal(mu + e)
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


def equivalent(pair: PairArrays, step_a: jax.Array, step_b: jax.Array) -> jax.Array:
    """J(a, b) = s (B a + b A): `(*batch, *features of b, *features of a)`."""
    batch = tuple(range(pair.batch_ndim))
    rank = (pair.batch_ndim,)
    outer = lambda b, a: jax.lax.dot_general(
        b, a, ((rank, rank), (batch, batch)), precision=jax.lax.Precision.HIGHEST
    )
    return pair.scale * (outer(pair.b, step_a) + outer(step_b, pair.a))


def _combine(
    pair: PairArrays, matrices: Coefficients, unit: jax.Array, weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Coefficients at unit scale, applied to one pair at its own scale."""

    def one(on_grad, grad, on_factor, factor):
        on_grad, on_factor = on_grad.astype(grad.dtype), on_factor.astype(grad.dtype)
        # Half of the scale before the product, half behind: weight² may overflow.
        near = apply(times(weight, on_grad), grad, pair.batch_ndim)
        far = apply(times(1 / unit, on_factor), factor, pair.batch_ndim)
        return times(weight, near - far)

    return (
        one(matrices.grad_a, pair.grad_a, matrices.factor_a, pair.a),
        one(matrices.grad_b, pair.grad_b, matrices.factor_b, pair.b),
    )


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)
