"""The r×r algebra of `FactoredAdam`: what its large arrays are multiplied with.

Every large array of a step is a combination of eight that are there anyway: gradient g,
factor F, mean μ and former factor F⁻ of A and of B. So all matrices are composed first,
of Gram matrices, and only then the arrays are read again. All is in the bases, and with
the axis of two sides, of `_solves`, and in the units of `Grams`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ..algebra._coefficients import Gauge
from ..algebra._linalg import Norm, matmul, root
from ..algebra._solves import Solves, swapped
from ._delivered import Product
from ._grams import Grams, MomentUnits, Units
from ._tangent import Energies, Tangent


class MeanTerms(NamedTuple):
    """What the arrays are multiplied with for the mean; `Product`s, then matrices.

    Attributes:
      gradient: On g.
      factor: On F.
      former: On F⁻, to be multiplied with the factors' unit. These three come out in
        the mean's unit.
      mean: On μ.
      newest: What of g and of F comes beside the mean in the direction, or None.
    """

    gradient: Any
    factor: Any
    former: Any
    mean: Any
    newest: tuple[Any, Any] | None


class SumTerms(NamedTuple):
    """The quadratic forms of E∘E's sums: `Product`s, then matrices.

    Attributes:
      factor: Q_FF.
      both: Q_Fg, on g beside F.
      gradient: Q_gg.
    """

    factor: Any
    both: Any
    gradient: Any


class StepTerms(NamedTuple):
    """What the arrays are multiplied with for the step: `Product`s, then matrices.

    Attributes:
      mean: On the mean, to be weighted by q or p, and by what the mean counts.
      factor: On F, to be weighted too.
      rest: On F, as it is. This and the last come out in the unit of steps.
    """

    mean: Any
    factor: Any
    rest: Any


class Composed(NamedTuple):
    """All that is known before the arrays are read for the second time.

    Attributes:
      units: Of all pairs and layers.
      tangent: Of the gradients.
      energies: Of the E by `units.equivalent`.
      carried: The tangent of M, undamped.
      rows: T applied to BᵀB⁻ and to Bᵀμ_b, turned rows: what carries μ_a and A⁻.
    """

    units: Units
    tangent: Tangent
    energies: Energies
    carried: Tangent
    rows: tuple[jax.Array, jax.Array]

    @classmethod
    def of(
        cls, units: Units, grams: Grams, damped: Solves, exact: Solves
    ) -> "Composed":
        """By the Gram matrices, with damping, and without it for M."""
        bases = damped.bases
        cross = bases.turn(grams.cross)
        turned = matmul(bases.turn_rows(grams.squares), swapped(bases.vectors))
        tangent = Tangent.of(damped, cross[0], "sylvester")
        energies = Energies.of(tangent, cross, turned)
        # Rows of other: BᵀB⁻ and Bᵀμ_b for A.
        old = swapped(grams.own - grams.moved.mT)
        mean = swapped(grams.mean.mT)
        rest = grams.own - grams.moved
        met = matmul(old[0], grams.mean[0]) + matmul(mean[0], rest[0])
        turned_met = matmul(bases.turn_rows(jnp.stack([met, met]))[0], bases.vectors[0])
        carried = Tangent.of(exact, turned_met, "sylvester")
        carry = lambda x: exact.solve(bases.turn_rows(x))
        return cls(units, tangent, energies, carried, (carry(old), carry(mean)))

    @property
    def norm(self) -> Norm:
        """‖E‖ of each layer, `(N,)`."""
        square = self.energies.square
        value = root(jnp.where(square < 0, 0, square))
        return Norm(self.units.equivalent[0, :, 0, 0], value[0, :, 0, 0])

    def kept(self, factor: jax.Array | None) -> jax.Array:
        """What the E by `units.equivalent` counts as, `(1, N, 1, 1)`.

        Clipped, and less where ‖E‖ is more than ten times the root of its mean square
        so far, of each layer by itself: with sums, one entry that is far too large
        would slow all of its layer, and what a spike leaves in M would, in float32,
        drown the rest. And 0 where gradients are so large that products with them could
        overflow.
        """
        size, value = (x[None, :, None, None] for x in self.norm)
        if factor is not None:
            size *= factor.astype(size.dtype)
        most = self.units.most
        spike = (most > 0) & (value > 0) & ~(size * value <= most)
        bounded = most / jnp.where(spike, value, 1)
        lost = self.units.gradients < 2.0 ** (16 - jnp.finfo(size.dtype).maxexp)
        return jnp.where(spike, jnp.where(lost, 0, bounded), size)

    def moments(
        self,
        kept: jax.Array,
        unit: MomentUnits,
        b1: ArrayLike,
        ahead: jax.Array | None,
    ) -> tuple[MeanTerms, SumTerms]:
        """For the mean, and for what enters V.

        Args:
          kept: As from `kept`.
          unit: Those of the moments.
          b1: The decay of the mean.
          ahead: What the newest counts beside the mean in the direction, or None.
        """
        units, tangent, energies = self.units, self.tangent, self.energies
        own = tangent.solves.bases.vectors
        other = swapped(own)
        by_other, by_own = (lambda x, y=y: Product(y, x) for y in (other, own))
        keep = jnp.asarray(b1, kept.dtype)
        share, old = kept / unit.mean, keep / unit.mean
        on_g = units.gradients * tangent.solves.solve(other.mT)
        on_f = lambda x: by_other(units.factors * matmul(x, own.mT))
        new, carried = tangent.on_factor, self.carried.on_factor
        newest = None
        if ahead is not None:
            newest = by_other(ahead * share * on_g), on_f(ahead * share * new)
        means = MeanTerms(
            gradient=by_other((1 - keep) * share * on_g),
            factor=on_f((1 - keep) * share * new + old * carried),
            former=by_other(old * self.rows[1]),
            mean=by_other(keep * self.rows[0]),
            newest=newest,
        )
        size = (kept / unit.sums) ** 2
        for_g = size * units.gradients
        sums = SumTerms(
            factor=by_own(size * units.factors * matmul(energies.on_factors, own.mT)),
            both=by_own(for_g * matmul(energies.on_both, other.mT)),
            gradient=by_other(for_g * matmul(energies.on_gradients, other.mT)),
        )
        return means, sums

    def steps(
        self, weighted: jax.Array, size: jax.Array, average: jax.Array, gauge: Gauge
    ) -> StepTerms:
        """For the step closest to D = diag(p) M̂ diag(q).

        Args:
          weighted: The products of p F, for A q F, with F and of the mean with p F:
            `(N, 2, 2, R, R)`, for both sides.
          size: What both are to be multiplied with so that p q is Adam's.
          average: What the mean counts.
          gauge: Which of the closest steps.
        """
        solves, unit = self.tangent.solves, self.units.factors
        bases = solves.bases
        products, means = jnp.moveaxis(weighted, 2, 0).swapaxes(1, 2)
        products, means = unit * products, average / self.units.step * means
        # Rows of other: Bᵀ p B and Bᵀ p μ_b for A.
        on_mean, on_factor = swapped(size * products), swapped(size * means.mT)
        met = matmul(on_mean[0], means[0]) + matmul(on_factor[0], products[0])
        tangent = Tangent.of(solves, bases.turn(jnp.stack([met, met]))[0], gauge)
        by_other = lambda x: Product(swapped(bases.vectors), x)
        solved = lambda x: solves.solve(bases.turn_rows(x))
        return StepTerms(
            mean=by_other(solved(on_mean)),
            factor=by_other(unit * solved(on_factor)),
            rest=by_other(unit * matmul(tangent.on_factor, bases.vectors.mT)),
        )
