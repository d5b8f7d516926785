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

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from ..algebra._adjust import InUnits, project, project_in_units
from ..algebra._coefficients import Gauge
from ..algebra._factors import (
    Both,
    Factor,
    PairArrays,
    Step,
    in_compute_dtype,
)
from ..algebra._linalg import reciprocal, root
from ..algebra._products import kept, times
from ..algebra._sharding import replicated
from ..algebra._spectra import decompose
from ..algebra._thin import carry, energies, norm, thin_gradients
from ..transforms._clip import Clip, scaled
from ._damping import damping_by_motion
from ._moments import copied, decayed, estimated, unbiased

_LARGEST = 2.0**20
"""What E is divided by until its size is known: gradients up to the largest float32
overflow nowhere, and squares of entries of 1e-13 do not vanish."""

_SPIKE = 10.0
"""How far ‖E‖ may be above its past; see `FactoredAdam._size`."""


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
        """As `Rule.update`."""
        spectra = decompose(pairs)
        gradients = [pair.gradients for pair in pairs]
        old_factors = [old.factors for old in states]
        e = damping_by_motion(self.damping, spectra, pairs, old_factors)
        steps = project_in_units(spectra, pairs, gradients, e=e, largest=_LARGEST)
        # With factors in their units, B a + b A of these steps is E by _LARGEST.
        factors = [
            pair.factors.map(functools.partial(times, unit))
            for pair, unit in zip(pairs, spectra.units, strict=True)
        ]
        factor = clip.factor(
            norm(both, x.step).times(_LARGEST)
            for both, x in zip(factors, steps, strict=True)
        )
        steps = [x._replace(step=scaled(factor, x.step)) for x in steps]
        # Without damping, which would forget a little of M at every step.
        carried = [
            carry(pair, old.factors, old.mu)
            for pair, old in zip(pairs, states, strict=True)
        ]
        means = project(spectra, pairs, carried, e=jnp.zeros_like(e))

        directions, new = [], []
        for k, (pair, old) in enumerate(zip(pairs, states, strict=True)):
            sums = energies(factors[k], steps[k].step)
            size = self._size(sums, old.nu, count)
            step, sums = _by(size, steps[k], sums)
            mu = decayed(means[k], step, self.b1)
            nu = decayed(old.nu, sums, self.b2)
            mean = estimated(mu, step, self.b1, count, nesterov=self.nesterov)
            directions.append(self._direction(pair, mean, nu, count))
            new.append(FactoredMoments(mu, nu, copied(pair)))
        result = project(spectra, pairs, directions, e=e, gauge=self.gauge)
        return result, new, factor

    def _size(
        self, sums: Both[Factor], nu: Both[Factor], count: jax.Array
    ) -> jax.Array:
        """What E by _LARGEST is multiplied with before it enters the moments.

        Less than _LARGEST where ‖E‖ is more than ten times the root of its mean square
        so far, of each layer by itself: with sums, one entry that is far too large
        would slow all of its layer, and what a spike leaves in M would, in float32,
        drown the rest. And 0 where the squares of E overflow.
        """
        past, square = (
            replicated(x.array.sum((x.axes.rank, *x.features))) for x in (nu.b, sums.b)
        )
        mean = unbiased(past, self.b2, jnp.maximum(count - 1, 1))
        most, norm = _SPIKE * root(mean), root(square)
        # Also where it is no number, because squares overflow or gradients are none.
        known = jnp.isfinite(square)
        spike = (mean > 0) & ~(known & (norm <= most / _LARGEST))
        finite = spike & known
        bounded = jnp.where(finite, most / jnp.where(finite, norm, 1), 0)
        return jnp.where(spike, bounded, _LARGEST)

    def _direction(
        self, pair: PairArrays, mean: Step, nu: Both[Factor], count: jax.Array
    ) -> Step:
        """LoRA's gradients of D = diag(p) M̂ diag(q)."""
        p, q = self._preconditioners(pair, nu, count)
        left, right = (p * pair.b, p * mean.b), (q * mean.a, q * pair.a)
        return thin_gradients(pair, left, right)

    def _preconditioners(
        self, pair: PairArrays, nu: Both[Factor], count: jax.Array
    ) -> tuple[Factor, Factor]:
        """Thin diagonals p and q, so that p_i q_j = 1/√V_ij with V's rank-one form.

        ε² joins V before its reconstruction, so that the result is an outer product;
        where Adam has 1/(√V + ε), this is at most √2 times as large.
        """
        m, n = pair.b.feature_count, pair.a.feature_count
        floor = jnp.asarray(self.eps, pair.dtype) ** 2
        row = nu.b.map(lambda x: unbiased(x / n, self.b2, count) + floor)
        column = nu.a.map(lambda x: unbiased(x / m, self.b2, count) + floor)
        mean = row.array.mean((row.axes.rank, *row.features))
        # Where V overflows the direction is 0, as it is in Adam.
        size = jnp.where(jnp.isposinf(mean), 0, jnp.sqrt(mean))
        inverse_root = lambda x: reciprocal(jnp.sqrt(x))
        return row.map(inverse_root), times(size, column.map(inverse_root))


def _by(
    size: jax.Array, scaled: InUnits, sums: Both[Factor]
) -> tuple[Step, Both[Factor]]:
    """The step and the sums for an E times a number, which may be 0."""
    unit = size / _LARGEST * scaled.unit
    step = scaled.step.map(functools.partial(times, unit))
    # Cancellation may leave less than 0.
    clean = sums.map(lambda x: kept(size != 0, x.map(lambda y: jnp.maximum(y, 0))))
    return step, clean.map(functools.partial(times, size**2))
