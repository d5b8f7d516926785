"""The formula of `_coefficients` in parts, in eigenbases, for both factors at once.

Every array has an axis of two sides in front, that of A and that of B. On the side of a
factor its own Gram matrix is *own*, and that of its partner *other*: on the side of A
own is AAᵀ and other BᵀB, and `swapped` turns one into the other. A matrix is *turned*
where its axes are in the eigenbases of the Gram matrices that they belong to, and there
these are diagonal.

Derivatives go through the Gram matrices, not their eigenvectors; see `_coefficients`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ._linalg import matmul, not_through, reciprocal
from ._spectra import Spectra, damped_inverse


def swapped(x: jax.Array) -> jax.Array:
    """What belongs to B where A's was, and the reverse: `(2, ...)`."""
    return x[::-1]


class Bases(NamedTuple):
    """The eigenbases of both sides.

    Attributes:
      values: The eigenvalues of own, `(2, N, R)`.
      vectors: Its eigenvectors, `(2, N, R, R)`.
      grams: Own, turned: diagonal up to rounding, and there for derivatives.
    """

    values: jax.Array
    vectors: jax.Array
    grams: jax.Array

    @classmethod
    def of(cls, spectra: Spectra) -> "Bases":
        """Those of all pairs and layers."""
        eigen = spectra.a, spectra.b
        values, vectors = (jnp.stack(x) for x in zip(*eigen, strict=True))
        own = swapped(spectra.grams)  # which has that of B first
        return cls(values, vectors, matmul(matmul(vectors.mT, own), vectors))

    def turn(self, x: jax.Array) -> jax.Array:
        """Into the eigenbases, for rows of other and columns of own."""
        return matmul(self.turn_rows(x), self.vectors)

    def turn_rows(self, x: jax.Array) -> jax.Array:
        """For rows of other and columns that stay as they are."""
        return matmul(swapped(self.vectors).mT, x)

    def weigh(self, x: jax.Array) -> jax.Array:
        """Other times x, for turned rows of other."""
        return _weighed(swapped(self.values), swapped(self.grams), x)

    def weigh_own(self, x: jax.Array) -> jax.Array:
        """Own times x, for turned rows of own."""
        return _weighed(self.values, self.grams, x)


class Solves(NamedTuple):
    """Inverses with damping e, of `Bases`.

    Attributes:
      bases: The eigenbases.
      e: The damping, `(1, N, 1, 1)`.
      inverses: The eigenvalues of (own + e)⁻¹, `(2, N, R)`.
      weights: 1/d on the side of A, `(1, N, R, R)`; 0 where a factor lacks the
        direction: there is no cross term, only rounding noise.
      trains: Whether the factor of that side moves, `(2, N, 1, 1)`.
    """

    bases: Bases
    e: jax.Array
    inverses: jax.Array
    weights: jax.Array
    trains: jax.Array

    @classmethod
    def of(
        cls,
        bases: Bases,
        sizes: np.ndarray | jax.Array,
        e: jax.Array,
        trains: ArrayLike,
    ) -> "Solves":
        """As `Bases` knows them.

        Args:
          bases: The eigenbases.
          sizes: The size of each matrix, `(N,)`.
          e: The damping of each matrix, `(N,)`, in the units of the Gram matrices.
          trains: As above.
        """
        column = e[:, None]
        inverses = jnp.stack([damped_inverse(x, column, sizes) for x in bases.values])
        at_a, at_b = inverses[0][:, None, :], inverses[1][:, :, None]
        mu, lam = bases.values[0][:, None, :], bases.values[1][:, :, None]
        lost = (at_a == 0) | (at_b == 0)
        weights = jnp.where(lost, 0, reciprocal(lam + mu + column[:, :, None]))
        each = e[None, :, None, None]
        return cls(bases, each, inverses, weights[None], jnp.asarray(trains))

    def solve(self, x: jax.Array) -> jax.Array:
        """(other + e)⁻¹ x for turned rows of other; 0 for a factor that stays."""
        grams = swapped(self.bases.grams)
        found = _solved(swapped(self.inverses), grams, self.e, x)
        return jnp.where(self.trains, found, 0)

    def solve_own(self, x: jax.Array) -> jax.Array:
        """(own + e)⁻¹ x for turned rows of own; 0 if the partner stays."""
        found = _solved(self.inverses, self.bases.grams, self.e, x)
        return jnp.where(swapped(self.trains), found, 0)

    def sylvester(self, cross: jax.Array) -> jax.Array:
        """The Z of other Z + Z own + e Z = C on both sides, turned like C.

        Args:
          cross: C on the side of A, turned, `(N, R, R)`; on B's it is the transpose.
        """
        at_a, at_b = self.bases.grams
        both = jnp.where(self.trains.all(0), cross, 0)
        z = _sylvester(self.weights[0], at_b, at_a, self.e[0], both)
        return jnp.stack([z, z.mT])


@jax.custom_jvp
def _weighed(values: jax.Array, grams: jax.Array, x: jax.Array) -> jax.Array:
    del grams
    return values[..., None] * x


@_weighed.defjvp
def _weighed_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (values, grams, x), (_, d_grams, d_x) = primals, tangents
    result = _weighed(*primals)
    return result, matmul(d_grams, x) + _constant(values, grams)[..., None] * d_x


@jax.custom_jvp
def _solved(
    inverses: jax.Array, grams: jax.Array, e: jax.Array, x: jax.Array
) -> jax.Array:
    del grams, e
    return inverses[..., None] * x


@_solved.defjvp
def _solved_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """d(S⁻¹ x) = S⁻¹ (dx - dS S⁻¹ x)."""
    (inverses, grams, _, x), (_, d_grams, d_e, d_x) = primals, tangents
    inverses = _constant(inverses, grams)[..., None]
    y = inverses * x
    moved = matmul(d_grams, y) + d_e * y
    return _solved(*primals), inverses * (d_x - moved)


@jax.custom_jvp
def _sylvester(
    weights: jax.Array,
    left: jax.Array,
    right: jax.Array,
    e: jax.Array,
    cross: jax.Array,
) -> jax.Array:
    del left, right, e
    return weights * cross


@_sylvester.defjvp
def _sylvester_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """Z's differential solves the same equation for dC - dL Z - Z dR - de Z."""
    (weights, left, _, _, cross), (_, d_left, d_right, d_e, d_cross) = primals, tangents
    weights = _constant(weights, left)
    z = weights * cross
    moved = matmul(d_left, z) + matmul(z, d_right) + d_e * z
    return _sylvester(*primals), weights * (d_cross - moved)


def _constant(x: jax.Array, grams: jax.Array) -> jax.Array:
    """What depends on eigenvalues, of which there are no second derivatives here."""
    constant: jax.Array = not_through("A derivative of an update", x, grams)
    return constant
