r"""The equivalent gradient E of a pair as r×r matrices on its factors and gradients.

With P = (BᵀB + e)⁻¹, W = (AAᵀ + e)⁻¹, and the Z of BᵀB Z + Z AAᵀ + e Z = g_A Aᵀ (see
`_coefficients`),

    E = [B, g_B] [D, P; W, 0] [A; g_A]      D = -(P Z + Z W)

so that the sums of E∘E over rows or columns are quadratic forms of (F, g), with

    Q_FF = Dᵀ BᵀB D + 2 Dᵀ Bᵀg_B W + W g_Bᵀg_B W
    Q_Fg = 2 (Dᵀ BᵀB + W g_Bᵀ B) P
    Q_gg = P BᵀB P

on the side of A, and with A and B swapped on that of B. All is in the bases, and with
the axis of two sides, of `_solves`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..algebra._coefficients import Gauge
from ..algebra._linalg import matmul
from ..algebra._solves import Solves, swapped


class Tangent(NamedTuple):
    """The step (a, b) closest to a matrix whose gradients are g, and its E, turned.

    Attributes:
      solves: The inverses.
      on_both: D, `(2, N, R, R)`, rows of other and columns of own.
      on_factor: What a has of A, beside P g_A.
    """

    solves: Solves
    on_both: jax.Array
    on_factor: jax.Array

    @classmethod
    def of(cls, solves: Solves, cross: jax.Array, gauge: Gauge) -> "Tangent":
        """By the product g_A Aᵀ, turned, `(N, R, R)`."""
        z = solves.sylvester(cross)
        on_own = solves.solve(z)
        both = on_own + swapped(on_own).mT
        if gauge == "symmetric":
            return cls(solves, -both, -both / 2)
        if gauge == "zero":
            return cls(solves, -both, jnp.stack([jnp.zeros_like(z[0]), -both[1]]))
        return cls(solves, -both, -on_own)


class Energies(NamedTuple):
    """The quadratic forms of E∘E's sums, and all of its sum.

    Attributes:
      on_factors: Q_FF, turned, `(2, N, R, R)`, rows and columns of own.
      on_both: Q_Fg, rows of own and columns of other.
      on_gradients: Q_gg, rows and columns of other.
      square: ‖E‖², `(1, N, 1, 1)`.
    """

    on_factors: jax.Array
    on_both: jax.Array
    on_gradients: jax.Array
    square: jax.Array

    @classmethod
    def of(cls, tangent: Tangent, cross: jax.Array, squares: jax.Array) -> "Energies":
        """By g Fᵀ and g gᵀ of each side, turned."""
        solves, d = tangent.solves, tangent.on_both
        bases = solves.bases
        of_partner = solves.solve_own(swapped(cross)).mT
        left = bases.weigh(d) + of_partner
        on_factors = matmul(d.mT, left + of_partner)
        on_factors += solves.solve_own(solves.solve_own(swapped(squares)).mT)
        on_both = 2 * solves.solve(left).mT
        eye = jnp.broadcast_to(jnp.eye(d.shape[-1], dtype=d.dtype), d.shape)
        on_gradients = solves.solve(bases.weigh(solves.solve(eye)))
        square = jnp.trace(bases.weigh_own(on_factors), axis1=-2, axis2=-1)
        square += (on_both * cross.mT).sum((-2, -1))
        square += (on_gradients * squares).sum((-2, -1))
        # Both sides' are the same up to rounding; the sums of V are those of B's side.
        found = square[1][None, :, None, None]
        return cls(on_factors, on_both, on_gradients, found)
