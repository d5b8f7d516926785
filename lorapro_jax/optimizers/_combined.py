"""The large arrays of `FactoredAdam` as combinations of those that are there.

Functions of one pair, of its arrays and of the r×r matrices of `_composed`.
"""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from ..algebra._factors import Both, Factor, PairArrays, Step
from ..algebra._products import apply, contract, times
from ..algebra._sharding import replicated
from ._composed import MeanTerms, StepTerms, SumTerms
from ._grams import MomentUnits, Units

T = TypeVar("T")


def in_dtype_of(pair: PairArrays, terms: T) -> T:
    """Matrices of a stack of all pairs in the dtype of one."""
    result: T = jax.tree.map(lambda x: x.astype(pair.dtype), terms)
    return result


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

    def mean(x: Factor, g: Factor, mu: Factor, old: Factor, on: MeanTerms) -> Factor:
        if not x.trains:
            return x.map(jnp.zeros_like)
        old, mu = old.astype(x.dtype), mu.astype(x.dtype)
        new = apply(on.gradient, g) + apply(on.factor, x) + apply(on.former, old)
        return apply(on.mean, mu) + times(scale, new)

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
    """

    factors: Both[Factor]
    means: Step
    diagonals: Both[Factor]
    unit: Units

    def products(self) -> jax.Array:
        """What `Composed.steps` knows the direction by, `(*batch, 2, 2, r, r)`."""

        def of(x: Factor, mean: Factor, diagonal: Factor) -> jax.Array:
            left = times(self.unit.factors, diagonal) * x
            both = contract(left, x), contract(mean, left)
            return replicated(jnp.stack(both, axis=-3))

        return jnp.stack(self.factors.map(of, self.means, self.diagonals), axis=-4)

    def step(self, terms: Both[StepTerms]) -> Step:
        """The step closest to D = diag(p) M̂ diag(q)."""

        def of(x: Factor, mean: Factor, diagonal: Factor, on: StepTerms) -> Factor:
            if not x.trains:
                return x.map(jnp.zeros_like)
            rest = diagonal * apply(on.factor, x) + apply(on.rest, x)
            return diagonal * apply(on.mean, mean) + times(self.unit.step, rest)

        return self.factors.map(of, self.means, self.diagonals, terms)
