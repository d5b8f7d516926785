"""LoRA-Pro's Adam with nothing that is m×n.

    E = J(project(G))                        what the factors can follow of G
    M ← β₁ carry(M) + (1-β₁) E,  V ← β₂ V + (1-β₂) E∘E
    D = M̂ / √(V̂ + ε²),  (a, b) = project(D)

V is the outer product of its row and column sums, as in Adafactor (Shazeer and Stern,
arXiv 1804.04235), and those sums are exact. M is the equivalent gradient of one pair
(μ_a, μ_b). It belongs to the tangent space of the factors (A⁻, B⁻) of its step, so it
is carried to the present one, by projection. M, D and E are *thin*: sums of two
products of an m×r and an r×n matrix.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from ..algebra._coefficients import Gauge
from ..algebra._factors import Both, Factor, PairArrays, Step, in_compute_dtype
from ..algebra._linalg import reciprocal
from ..algebra._products import times
from ..algebra._solves import Bases, Solves, swapped
from ..algebra._spectra import Spectra
from ..algebra._stack import Stack
from ..transforms._clip import Clip
from ._combined import StepArrays, means_of, sums_of
from ._composed import Composed, MeanTerms, SumTerms, delivered, of_sides
from ._damping import damping_of_square
from ._grams import Grams, MomentUnits, Units, joined
from ._moments import copied, copied_after, decayed, estimate, unbiased


class FactoredMoments(NamedTuple):
    """Adam's moments of one weight, M by a pair of steps and V by its sums.

    Attributes:
      mu: (μ_a, μ_b), like A and B, with M = s (B⁻ μ_a + μ_b A⁻).
      nu: The sums of V over the features of B, like A, and over the features of A,
        like B, both with a rank axis of size 1.
      factors: (A⁻, B⁻), those of the last step.
    """

    mu: Both[Factor]
    nu: Both[Factor]
    factors: Both[Factor]


class FactoredAdam(NamedTuple):
    """The rule, by its hyperparameters; see `lorapro_adamw`."""

    b1: ArrayLike
    b2: ArrayLike
    eps: ArrayLike
    damping: ArrayLike
    gauge: Gauge
    mu_dtype: DTypeLike | None
    nesterov: bool = False

    @property
    def state(self) -> type[FactoredMoments]:
        """The class of a pair's moments."""
        return FactoredMoments

    def init(self, pair: PairArrays) -> FactoredMoments:
        """Moments of 0, and the factors in their own dtypes."""
        wide = in_compute_dtype(pair).factors
        zeros = lambda x: jnp.zeros_like(x, dtype=self.mu_dtype)
        sums = lambda x: x.map(lambda y: y.max(x.axes.rank, keepdims=True))
        return FactoredMoments(
            mu=jax.tree.map(zeros, wide),
            nu=jax.tree.map(jnp.zeros_like, wide.map(sums)),
            factors=copied(pair),
        )

    def update(
        self,
        pairs: Sequence[PairArrays],
        states: Sequence[FactoredMoments],
        count: jax.Array,
        clip: Clip,
    ) -> tuple[list[Step], list[FactoredMoments], jax.Array | None]:
        """As `Rule.update`: three times over the arrays, with r×r algebra between."""
        stack = Stack.of(pairs)
        each = list(zip(pairs, states, strict=True))
        units = [Units.of(pair, old.nu, self.b2, count) for pair, old in each]
        means, before = [x.mu for x in states], [x.factors for x in states]
        grams = Grams.of(stack, pairs, units, means, before)
        composed = self._composed(stack, pairs, units, grams)
        factor = clip.factor([composed.norm])
        kept, dtype = composed.kept(factor), grams.own.dtype

        average, ahead = estimate(self.b1, count, dtype, nesterov=self.nesterov)
        counts = average if ahead is None else jnp.ones((), dtype)
        moments = [x.clipped(factor) for x in units]
        all_moments = joined(stack, moments)
        found = composed.moments(kept, all_moments, self.b1, ahead)
        on_means, on_sums = delivered(stack, found[0]), delivered(stack, found[1])
        decays = self.b2, self.eps, count
        new, arrays, products = [], [], []
        for (pair, old), unit, size, *terms in zip(
            each, units, moments, on_means, on_sums, strict=True
        ):
            numbers = unit, size, decays, average, counts
            found = _moments(pair, old, *terms, *numbers)
            for x, y in zip((new, arrays, products), found, strict=True):
                x.append(y)

        root = self._root_mean(stack, pairs, composed, kept, count)
        root = root / all_moments.mean / all_moments.mean
        weighted = stack.join(products)
        last = delivered(stack, composed.steps(weighted, root, counts, self.gauge))
        steps = [x.step(terms) for x, terms in zip(arrays, last, strict=True)]
        return steps, new, factor

    def _composed(
        self,
        stack: Stack,
        pairs: Sequence[PairArrays],
        units: Sequence[Units],
        grams: Grams,
    ) -> Composed:
        """The r×r matrices of all pairs."""
        spectra = Spectra.of(stack, [x.factors for x in units], swapped(grams.own))
        bases, square = Bases.of(spectra), grams.square_of_motion()
        e = damping_of_square(self.damping, spectra, square)
        trains = [[side.trains for side in pair.factors] for pair in pairs]
        moves = stack.repeat(trains).T[:, :, None, None]
        damped = Solves.of(bases, stack.sizes, e, moves)
        exact = Solves.of(bases, stack.sizes, jnp.zeros_like(e), moves)
        return Composed.of(joined(stack, units), grams, damped, exact)

    def _root_mean(
        self,
        stack: Stack,
        pairs: Sequence[PairArrays],
        composed: Composed,
        kept: jax.Array,
        count: jax.Array,
    ) -> jax.Array:
        """The root of the mean of V with ε², `(1, N, 1, 1)`; see `_diagonals`.

        Where V overflows it is 0, and so is the direction, as it is in Adam.
        """
        decay, dtype = jnp.asarray(self.b2, kept.dtype), kept.dtype
        total = decay * composed.units.past
        norm = kept * composed.norm.value[None, :, None, None]
        total += (1 - decay) * norm**2
        counts = stack.repeat([x.a.feature_count * x.b.feature_count for x in pairs])
        mean = total / jnp.asarray(counts, dtype)[None, :, None, None]
        mean = unbiased(mean, self.b2, count) + jnp.asarray(self.eps, dtype) ** 2
        return jnp.where(jnp.isposinf(mean), 0, jnp.sqrt(mean))


@jax.jit  # traced once for all pairs that are alike
def _moments(
    pair: PairArrays,
    old: FactoredMoments,
    on_means: MeanTerms,
    on_sums: SumTerms,
    unit: Units,
    size: MomentUnits,
    decays: tuple[ArrayLike, ArrayLike, jax.Array],
    average: jax.Array,
    counts: jax.Array,
) -> tuple[FactoredMoments, StepArrays, jax.Array]:
    """The second time over the arrays of one pair: its moments.

    And what the step is made of, and the products that the direction is known by.
    """
    terms, b2 = of_sides((on_means, on_sums), pair.factors), decays[0]
    of_mean, of_sums = (Both(*x) for x in zip(*terms, strict=True))
    mean, newest = means_of(pair, old.mu, old.factors, unit, size, of_mean)
    nu = decayed(old.nu, sums_of(pair, unit, size, of_sums), b2)
    # From here on the copy is read, and the factors themselves no more: or XLA would
    # copy them again for the update that takes their place.
    factors = copied_after(pair, mean)
    new = FactoredMoments(mean, nu, factors)
    diagonals = _diagonals(pair, nu, size, *decays)
    if newest is not None:
        mean = mean.map(lambda x, y: times(average, x) + y, newest)
    arrays = StepArrays(factors, mean, diagonals, unit, counts)
    return new, arrays, arrays.products()


def _diagonals(
    pair: PairArrays,
    nu: Both[Factor],
    size: MomentUnits,
    b2: ArrayLike,
    eps: ArrayLike,
    count: jax.Array,
) -> Both[Factor]:
    """Thin diagonals q and p: p_i q_j · `_root_mean` is 1/√V_ij of a rank-one V.

    They are times the unit of the mean, so that they are about 1.

    ε² joins V before its reconstruction, so that the result is an outer product; where
    Adam has 1/(√V + ε), this is at most √2 times as large.
    """
    floor = jnp.asarray(eps, pair.dtype) ** 2
    counts = Both(pair.b.feature_count, pair.a.feature_count)

    def diagonal(x: Factor, number: int) -> Factor:
        mean = x.map(lambda y: unbiased(y / number, b2, count) + floor)
        return times(size.mean, mean.map(lambda y: reciprocal(jnp.sqrt(y))))

    return nu.map(diagonal, counts)
