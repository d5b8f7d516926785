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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from ..algebra._coefficients import Gauge
from ..algebra._divided import Division
from ..algebra._factors import Both, Factor, PairArrays, Step, in_compute_dtype
from ..algebra._linalg import reciprocal
from ..algebra._products import times
from ..algebra._solves import Bases, Solves, swapped
from ..algebra._spectra import Sizes, Spectra
from ..algebra._stack import Stack
from ..transforms._clip import Clip
from ._combined import StepArrays, means_of, sums_of
from ._composed import Composed, MeanTerms, StepTerms, SumTerms
from ._damping import damping_of_square
from ._delivered import delivered, multiplied, of_sides
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
        division = Division.of(grams.own)
        known = grams, joined(stack, units), *_static(stack, pairs)
        composed = division.run(self._composed, known, (), self.damping)
        factor = clip.factor([composed.norm])

        average, ahead = estimate(
            self.b1, count, grams.own.dtype, nesterov=self.nesterov
        )
        counts = average if ahead is None else jnp.ones_like(average)
        moments = [x.clipped(factor) for x in units]
        in_units, rest = joined(stack, moments), (factor, self.b1, ahead)
        found = division.run(_moment_terms, in_units, composed, rest, multiplied)
        on_means, on_sums = (delivered(stack, x) for x in found)
        decays = self.b2, self.eps, count
        each_moved = [
            _moments(pair, old, *terms, unit, size, decays, average, counts)
            for (pair, old), unit, size, *terms in zip(
                each, units, moments, on_means, on_sums, strict=True
            )
        ]
        new, arrays, products = map(list, zip(*each_moved, strict=True))

        entries = stack.repeat([x.a.feature_count * x.b.feature_count for x in pairs])
        whole = in_units, stack.join(products)[None], entries[None]
        rest = factor, count, counts
        last = division.run(self._step_terms, whole, composed, rest, multiplied)
        last = delivered(stack, last)
        steps = [x.step(terms) for x, terms in zip(arrays, last, strict=True)]
        return steps, new, factor

    def _composed(self, known: Any, _: Any, damping: ArrayLike) -> Composed:
        """The r×r matrices of all pairs, by all that is known at first."""
        grams, units, sizes, moves = known
        sizes = sizes[0]
        spectra = Spectra.of(Sizes(sizes), [], swapped(grams.own))
        bases, square = Bases.of(spectra), grams.square_of_motion()
        e = damping_of_square(damping, spectra, square)
        damped = Solves.of(bases, sizes, e, moves)
        exact = Solves.of(bases, sizes, jnp.zeros_like(e), moves)
        return Composed.of(units, grams, damped, exact)

    def _step_terms(self, whole: Any, composed: Composed, rest: Any) -> StepTerms:
        """What the arrays are multiplied with for the step."""
        in_units, weighted, entries = whole
        factor, count, counts = rest
        root = self._root_mean(composed, composed.kept(factor), entries, count)
        root = root / in_units.mean / in_units.mean
        return composed.steps(weighted[0], root, counts, self.gauge)

    def _root_mean(
        self,
        composed: Composed,
        kept: jax.Array,
        entries: ArrayLike,
        count: jax.Array,
    ) -> jax.Array:
        """The root of the mean of V with ε², `(1, N, 1, 1)`; see `_diagonals`.

        Where V overflows it is 0, and so is the direction, as it is in Adam. `entries`
        are m n of each matrix, `(1, N)`.
        """
        decay, dtype = jnp.asarray(self.b2, kept.dtype), kept.dtype
        total = decay * composed.units.past
        norm = kept * composed.norm.value[None, :, None, None]
        total += (1 - decay) * norm**2
        mean = total / jnp.asarray(entries, dtype)[:, :, None, None]
        mean = unbiased(mean, self.b2, count) + jnp.asarray(self.eps, dtype) ** 2
        return jnp.where(jnp.isposinf(mean), 0, jnp.sqrt(mean))


def _moment_terms(
    in_units: MomentUnits, composed: Composed, rest: Any
) -> tuple[MeanTerms, SumTerms]:
    """What the arrays are multiplied with for the moments."""
    factor, b1, ahead = rest
    return composed.moments(composed.kept(factor), in_units, b1, ahead)


def _static(stack: Stack, pairs: Sequence[PairArrays]) -> tuple[np.ndarray, np.ndarray]:
    """The size of each matrix, `(1, N)`, and which factors move, `(2, N, 1, 1)`."""
    trains = [[side.trains for side in pair.factors] for pair in pairs]
    return stack.sizes[None], stack.repeat(trains).T[:, :, None, None]


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
    for_means, for_sums = (
        of_sides(on_means, pair.factors),
        of_sides(on_sums, pair.factors),
    )
    mean, newest = means_of(pair, old.mu, old.factors, unit, size, for_means)
    nu = decayed(old.nu, sums_of(pair, unit, size, for_sums), decays[0])
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
