r"""The r×r matrices of LoRA-Pro's formula.

The gradients whose equivalent gradient is closest to G, with Levenberg-Marquardt
damping e ≥ 0, are (JᵀJ + s²e I)⁻¹ Jᵀ G. They are diagonal in the eigenbases of
the two Gram matrices, BᵀB = U diag(λ) Uᵀ and AAᵀ = V diag(μ) Vᵀ:

    K = Uᵀ (g_A Aᵀ) V        d_ij = λ_i + μ_j + e
    a = (1/s²) { U diag(1/(λ+e)) Uᵀ g_A  −  U [K_ij / ((λ_i+e) d_ij)] Vᵀ A }
    b = (1/s²) { g_B V diag(1/(μ+e)) Vᵀ  −  B U [K_ij / ((μ_j+e) d_ij)] Vᵀ }

At e = 0, where 1/0 counts as 0, this is Theorem 2.1 of the paper with the X of
Theorem 2.3 (Wang et al., arXiv 2407.18242), and its first-step rule where B = 0.
"""

from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ._linalg import Eigh, matmul, reciprocal, rounding_level

Gauge: TypeAlias = Literal["sylvester", "symmetric", "zero"]


class Coefficients(NamedTuple):
    """Four r×r matrices for each pair, up to the last product: `bases @ blocks`.

    That product is `[[C_1, C_2], [C_3, C_4]]`, and `a = C_1 g_A + C_2 A`,
    `b = g_B C_3ᵀ + B C_4ᵀ`.

    Attributes:
      bases: U and V, `(N, 2, R, R)`.
      blocks: `(N, 2, R, 2 R)`.
    """

    bases: jax.Array
    blocks: jax.Array


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
      Their stacks; the top left r×r corner of each matrix counts.
    """
    (lam, u), (mu, v) = eig_b, eig_a
    dtype = cross.dtype
    mean = (lam.sum(-1) + mu.sum(-1)) / jnp.asarray(ranks, dtype)
    e = (jnp.asarray(damping, dtype) * mean)[:, None]

    inverse_b = _damped_inverse(lam, e, ranks)
    inverse_a = _damped_inverse(mu, e, ranks)
    k = matmul(matmul(u.mT, cross), v)
    # A direction that a factor lacks has no cross term, only rounding noise.
    k = jnp.where((inverse_b[:, :, None] == 0) | (inverse_a[:, None, :] == 0), 0, k)
    shared = k * reciprocal(lam[:, :, None] + mu[:, None, :] + e[:, :, None])
    on_a, on_b = shared * inverse_b[:, :, None], shared * inverse_a[:, None, :]
    if gauge == "symmetric":
        on_a = on_b = (on_a + on_b) / 2
    elif gauge == "zero":
        on_a, on_b = jnp.zeros_like(on_a), on_a + on_b

    of_a = inverse_b[:, :, None] * u.mT, -matmul(on_a, v.mT)
    of_b = inverse_a[:, :, None] * v.mT, -matmul(on_b.mT, u.mT)
    blocks = [jnp.concatenate(x, axis=-1) for x in (of_a, of_b)]
    return Coefficients(jnp.stack([u, v], axis=1), jnp.stack(blocks, axis=1))


def _damped_inverse(values: jax.Array, e: jax.Array, ranks: np.ndarray) -> jax.Array:
    """1/(λ+e), and 0 for a lost direction that e is too small to bring back.

    There e is itself below the rounding noise of the Gram matrix and of what the
    result is multiplied with, and 1/e would amplify that noise.
    """
    lost = (values == 0) & (e < rounding_level(values, ranks))
    return jnp.where(lost, 0, reciprocal(values + e))
