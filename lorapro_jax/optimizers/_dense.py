"""LoRA-Pro's Adam with its moments as they are in the paper, m×n.

    E = J(project(G))                        what the factors can follow of G
    M ← β₁ M + (1-β₁) E,  V ← β₂ V + (1-β₂) E∘E
    D = M̂ / (√V̂ + ε),  (a, b) = project(D)

Full fine-tuning with AdamW keeps M and V of the gradient of W; this keeps those of the
equivalent gradient E, and brings Adam's direction D for W back to the factors as any
gradient of W is (Wang et al., arXiv 2407.18242, the algorithm with AdamW).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from ..algebra._adjust import equivalent, lora_gradients, project
from ..algebra._coefficients import Gauge
from ..algebra._factors import (
    Both,
    Factor,
    PairArrays,
    Step,
    in_compute_dtype,
)
from ..algebra._linalg import Norm
from ..algebra._spectra import decompose
from ..transforms._clip import Clip, scaled
from ._damping import damping_by_motion
from ._moments import copied, decayed, estimated, unbiased


class DenseMoments(NamedTuple):
    """Adam's moments of one weight, at A; nothing at B.

    Attributes:
      mu: M, `(*batch, *features of B, *features of A)`.
      nu: V, likewise.
      factors: (A⁻, B⁻), those of the last step, like A and like B.
    """

    mu: Both[Any]
    nu: Both[Any]
    factors: Both[Factor]


class DenseAdam(NamedTuple):
    """The rule, by its hyperparameters; see `lorapro_adamw`."""

    b1: ArrayLike
    b2: ArrayLike
    eps: ArrayLike
    damping: ArrayLike
    gauge: Gauge
    mu_dtype: DTypeLike | None
    nesterov: bool = False

    @property
    def state(self) -> type[DenseMoments]:
        """The class of a pair's moments."""
        return DenseMoments

    def init(self, pair: PairArrays) -> DenseMoments:
        """Moments of 0."""
        wide = in_compute_dtype(pair)
        # A product, because it has the sharding too.
        zeros = jnp.zeros_like(equivalent(wide, wide.factors))
        mean = jnp.zeros_like(zeros, dtype=self.mu_dtype)
        return DenseMoments(Both(mean, None), Both(zeros, None), copied(pair))

    def update(
        self,
        pairs: Sequence[PairArrays],
        states: Sequence[DenseMoments],
        count: jax.Array,
        clip: Clip,
    ) -> tuple[list[Step], list[DenseMoments], jax.Array | None]:
        """As `Rule.update`."""
        spectra = decompose(pairs)
        gradients = [pair.gradients for pair in pairs]
        before = [old.factors for old in states]
        e = damping_by_motion(self.damping, spectra, pairs, before)
        steps = project(spectra, pairs, gradients, e=e)
        moved = list(map(equivalent, pairs, steps))
        factor = clip.factor(
            Norm.of(x, tuple(range(len(pair.batch), x.ndim)))
            for pair, x in zip(pairs, moved, strict=True)
        )

        directions, new = [], []
        for pair, x, old in zip(pairs, scaled(factor, moved), states, strict=True):
            at_a = Both(x, None)
            mu = decayed(old.mu, at_a, self.b1)
            nu = decayed(old.nu, Both(x**2, None), self.b2)
            mean = estimated(mu, at_a, self.b1, count, nesterov=self.nesterov)
            square = unbiased(nu, self.b2, count)
            d = mean.a / (jnp.sqrt(square.a) + self.eps)
            directions.append(lora_gradients(pair, d))
            new.append(DenseMoments(mu, nu, copied(pair)))
        found = project(spectra, pairs, directions, e=e, gauge=self.gauge)
        return found, new, factor
