"""The large arrays of `FactoredAdam` as combinations of those that are there.

Functions of one pair, of its arrays and of the r×r matrices of `_composed`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..algebra._factors import Both, Factor, PairArrays, Step
from ..algebra._products import apply, contract, over, times
from ..algebra._sharding import replicated
from ._composed import MeanTerms, StepTerms, SumTerms
from ._delivered import of_sides
from ._grams import MomentUnits, Units


def means_of(
    pair: PairArrays,
    means: Step,
    former: Both[Factor],
    unit: Units,
    size: MomentUnits,
    terms: Both[MeanTerms],
) -> tuple[Step, Step | None]:
    """The mean after this step, and what Nesterov's momentum adds to it, if it does."""
    scale = unit.step * size.mean

    # Units of matrices that nothing else is done with come here: then XLA takes them
    # of the stack in one kernel on a GPU. That of the mean makes it only larger: what
    # is below the smallest number is lost.
    up = jnp.maximum(1 / size.mean, 1)

    def mean(x: Factor, g: Factor, mu: Factor, old: Factor, on: MeanTerms) -> Factor:
        if not x.trains:
            return x.map(jnp.zeros_like)
        old, mu = old.astype(x.dtype), mu.astype(x.dtype)
        on_former = over(unit.factors, on.former) * on.former
        on_mean = over(up, on.mean) * on.mean
        new = apply(on.gradient, g) + apply(on.factor, x) + apply(on_former, old)
        return times(1 / up, apply(on_mean, mu)) + times(scale, new)

    def newest(x: Factor, g: Factor, on: MeanTerms) -> Factor:
        if on.newest is None or not x.trains:
            return x.map(jnp.zeros_like)
        on_gradient, on_factor = on.newest
        return times(scale, apply(on_gradient, g) + apply(on_factor, x))

    found = pair.factors.map(mean, pair.gradients, means, former, terms)
    if terms.a.newest is None:
        return found, None
    return found, pair.factors.map(newest, pair.gradients, terms)


def sums_of(
    pair: PairArrays, unit: Units, size: MomentUnits, terms: Both[SumTerms]
) -> Both[Factor]:
    """The column and the row sums of E∘E, from their quadratic forms."""

    def over_rank(x: Factor) -> Factor:
        return x.map(lambda y: y.sum(x.axes.rank, keepdims=True))

    def of(x: Factor, g: Factor, on: SumTerms) -> Factor:
        # Units come behind the sums: in front XLA would make full arrays of them.
        on_factor = x * (apply(on.factor, x) + apply(on.both, g))
        total = times(unit.factors, over_rank(on_factor))
        total += times(unit.gradients, over_rank(g * apply(on.gradient, g)))
        # Cancellation may leave less than 0.
        clean = total.map(lambda y: jnp.maximum(y, 0))
        return times(size.sums, times(size.sums, clean))

    return pair.factors.map(of, pair.gradients, terms)


class StepArrays(NamedTuple):
    """What a step is made of.

    Attributes:
      factors: A and B.
      means: The mean of the direction.
      diagonals: q and p.
      unit: Of the pair.
      average: What the mean counts.
    """

    factors: Both[Factor]
    means: Step
    diagonals: Both[Factor]
    unit: Units
    average: jax.Array

    def products(self) -> jax.Array:
        """What `Composed.steps` knows the direction by, `(*batch, 2, 2, r, r)`."""

        def of(x: Factor, mean: Factor, diagonal: Factor) -> jax.Array:
            left = times(self.unit.factors, diagonal) * x
            both = contract(left, x), contract(mean, left)
            return replicated(jnp.stack(both, axis=-3))

        return jnp.stack(self.factors.map(of, self.means, self.diagonals), axis=-4)

    @jax.jit
    def step(self, terms: StepTerms) -> Step:
        """The step closest to D = diag(p) M̂ diag(q), by the matrices `delivered`."""

        def of(x: Factor, mean: Factor, diagonal: Factor, on: StepTerms) -> Factor:
            if not x.trains:
                return x.map(jnp.zeros_like)
            rest = diagonal * apply(on.factor, x) + apply(on.rest, x)
            on_mean = self.average.astype(on.mean.dtype) * on.mean
            return diagonal * apply(on_mean, mean) + times(self.unit.step, rest)

        sides = of_sides(terms, self.factors)
        return self.factors.map(of, self.means, self.diagonals, sides)
