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

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from .._checks import check_choice, is_real_scalar, is_traced, known
from ._factors import Both
from ._linalg import Eigh, matmul, not_through, reciprocal
from ._spectra import Spectra, damped_inverse

Gauge: TypeAlias = Literal["sylvester", "symmetric", "zero"]


def check_adjustment(gauge: Any, damping: Any) -> None:
    """Raises ValueError for a gauge that is none, or a damping below 0."""
    check_choice("gauge", gauge, Gauge)
    if is_traced(damping):
        return  # under `inject_hyperparams`
    if not (is_real_scalar(damping) and 0 <= known(damping) < math.inf):
        raise ValueError(
            f"`damping={damping!r}` has to be a finite number of at least 0; 0 is the "
            "paper's undamped adjustment."
        )


class Coefficients(NamedTuple):
    """Of one pair, each `(*batch, r, r)`.

    With a weight w, a = w (C_a g_A + D_a A) and b = w (g_B C_bᵀ + B D_bᵀ).

    Attributes:
      on_gradient: C_a and C_b.
      on_factor: D_a and D_b.
    """

    on_gradient: Both[jax.Array]
    on_factor: Both[jax.Array]


def coefficients(
    spectra: Spectra,
    crosses: Sequence[jax.Array],
    weights: Sequence[jax.Array],
    e: jax.Array,
    gauge: Gauge,
) -> list[Coefficients]:
    """The matrices of the adjustment, pair by pair.

    The two bracketed matrices of the formula are one correction, divided between
    the factors. Only their sum reaches the equivalent gradient, so it is the same
    in every gauge, damped or not:

    * `"sylvester"`: as in the formula, closest to LoRA's own gradients (Theorem
      2.3) and, undamped, the minimum-norm solution J⁺G;
    * `"symmetric"`: half of the sum each;
    * `"zero"`: all of it on B, the paper's X = 0.

    Args:
      spectra: The `decompose` of all pairs.
      crosses: g_A Aᵀ of each, in the units of `spectra` for A: `(*batch, r, r)`.
      weights: w, the units of `spectra` by s, `(*batch)` of each.
      e: The damping of each matrix, `(N,)`, in the units of `spectra.grams`.
      gauge: One of the above.
    """
    stack = spectra.stack
    on_grad, on_factor = map(stack.join_scalars, (weights, spectra.units))
    cross = on_grad * stack.join(crosses)
    eigen = spectra.b, spectra.a
    blocks = _blocks(gauge, stack.sizes, eigen, spectra.grams, cross, e)
    # Half of 1/s² here, half behind the skinny products: their product may overflow.
    size = blocks.shape[-2]
    halves = jnp.where(np.arange(2 * size) < size, on_grad, on_factor)
    bases = jnp.stack([spectra.b.vectors, spectra.a.vectors])
    parts = stack.products(bases, halves[None] * blocks)
    dtypes = [x.dtype for x in weights]
    return [_of_pair(*x) for x in zip(parts, stack.ranks, dtypes, strict=True)]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _blocks(
    gauge: Gauge,
    sizes: np.ndarray,
    eigen: tuple[Eigh, Eigh],
    grams: jax.Array,
    cross: jax.Array,
    e: jax.Array,
) -> jax.Array:
    """The formula's matrices without their first factors U and V: `(2, N, R, 2 R)`.

    The Grams are there for derivatives only.
    """
    del grams
    f = _Formula.of(sizes, eigen, cross, e)
    corrections = _divided(f.p_b * f.z, f.z * f.p_a, gauge)
    return _side_by_side(
        eigen, f.p_b * eigen[0].vectors.mT, f.p_a.mT * eigen[1].vectors.mT, corrections
    )


@_blocks.defjvp
def _blocks_jvp(
    gauge: Gauge, sizes: np.ndarray, primals: Any, tangents: Any
) -> tuple[jax.Array, jax.Array]:
    """Derivatives of inverses and of a linear equation: no eigenvalue's difference.

    With P_B = (BᵀB + e)⁻¹, P_A likewise and the Z of BᵀB Z + Z AAᵀ + e Z = C the
    corrections are P_B Z and Z P_A, and

        dP = -P (dS + de I) P      dZ solves the same for dC - dS_B Z - Z dS_A - de Z.
    """
    eigen, grams, cross, e = primals
    _, d_grams, d_cross, d_e = tangents
    result = _blocks(gauge, sizes, *primals)
    eigen = not_through("A derivative of an update", eigen, grams)
    f = _Formula.of(sizes, eigen, cross, e)
    (_, u), (_, v) = eigen
    turned = lambda x, y, z: matmul(matmul(x.mT, y), z)
    ds_b, ds_a = turned(u, d_grams[0], u), turned(v, d_grams[1], v)
    de = d_e[:, None, None]
    eye = jnp.eye(cross.shape[-1], dtype=cross.dtype)[None]

    d_p_b = -f.p_b * (ds_b + de * eye) * f.p_b.mT
    d_p_a = -f.p_a.mT * (ds_a + de * eye) * f.p_a
    moved = matmul(ds_b, f.z) + matmul(f.z, ds_a) + de * f.z
    d_z = f.weights * jnp.where(f.lost, 0, turned(u, d_cross, v) - moved)
    corrections = _divided(
        matmul(d_p_b, f.z) + f.p_b * d_z, d_z * f.p_a + matmul(f.z, d_p_a), gauge
    )
    of_b, of_a = matmul(d_p_b, u.mT), matmul(d_p_a, v.mT)
    return result, _side_by_side(eigen, of_b, of_a, corrections)


class _Formula(NamedTuple):
    """The letters of the formula in the eigenbases, for N matrices.

    Attributes:
      p_b: 1/(λ+e), `(N, R, 1)`.
      p_a: 1/(μ+e), `(N, 1, R)`.
      weights: 1/d.
      lost: Where a factor lacks the direction: no cross term, only rounding noise.
      z: K/d.
    """

    p_b: jax.Array
    p_a: jax.Array
    weights: jax.Array
    lost: jax.Array
    z: jax.Array

    @classmethod
    def of(
        cls,
        sizes: np.ndarray,
        eigen: tuple[Eigh, Eigh],
        cross: jax.Array,
        e: jax.Array,
    ) -> "_Formula":
        (lam, u), (mu, v) = eigen
        e = e[:, None]
        p_b = damped_inverse(lam, e, sizes)[:, :, None]
        p_a = damped_inverse(mu, e, sizes)[:, None, :]
        lost = (p_b == 0) | (p_a == 0)
        k = jnp.where(lost, 0, matmul(matmul(u.mT, cross), v))
        weights = reciprocal(lam[:, :, None] + mu[:, None, :] + e[:, :, None])
        return cls(p_b, p_a, weights, lost, k * weights)


def _side_by_side(
    eigen: tuple[Eigh, Eigh], of_b: jax.Array, of_a: jax.Array, on: Both[jax.Array]
) -> jax.Array:
    """`[[of_b, -on_a Vᵀ], [of_a, -on_bᵀ Uᵀ]]`."""
    (_, u), (_, v) = eigen
    for_a = jnp.concatenate([of_b, -matmul(on.a, v.mT)], axis=-1)
    for_b = jnp.concatenate([of_a, -matmul(on.b.mT, u.mT)], axis=-1)
    return jnp.stack([for_a, for_b])


def _divided(on_a: jax.Array, on_b: jax.Array, gauge: Gauge) -> Both[jax.Array]:
    """The correction, divided between the factors as the gauge says."""
    if gauge == "symmetric":
        half = (on_a + on_b) / 2
        return Both(half, half)
    if gauge == "zero":
        return Both(jnp.zeros_like(on_a), on_a + on_b)
    return Both(on_a, on_b)


def _of_pair(product: jax.Array, rank: int, dtype: jnp.dtype) -> Coefficients:
    """From `(2, *batch, R, 2 R)`, padded, A's before B's."""
    product = product.astype(dtype)
    size = product.shape[-2]
    of = lambda start: product[..., :rank, start : start + rank]
    on_gradient, on_factor = of(0), of(size)
    return Coefficients(Both(*on_gradient), Both(*on_factor))
