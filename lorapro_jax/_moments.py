"""What Adam's moments of the equivalent gradient share, dense or factored.

Full fine-tuning with AdamW keeps a mean M and a mean square V of the gradient of W.
LoRA-Pro runs it on the equivalent gradient E = s (B a + b A): its direction
D = M / (√V + ε) is brought back to the factors as any gradient of W is, by adjusting
g_A = s Bᵀ D and g_B = s D Aᵀ (Wang et al., arXiv 2407.18242, algorithm with AdamW).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ._adjust import Spectra, Step, solve
from ._coefficients import Gauge
from ._factors import PairArrays


class Adam(NamedTuple):
    """Adam's hyperparameters at one step.

    Attributes:
      b1: Decay of M.
      b2: Decay of V.
      eps: ε.
      step: The number of this step, from 1.
    """

    b1: ArrayLike
    b2: ArrayLike
    eps: ArrayLike
    step: jax.Array


class Projector(NamedTuple):
    """Projects gradients of W, given by their LoRA gradients, to steps (a, b).

    Attributes:
      spectra: Of the present factors of all pairs; None if there are none.
      damping: See `adjust`.
    """

    spectra: Spectra | None
    damping: ArrayLike

    def __call__(
        self,
        pairs: Sequence[PairArrays],
        gradients: Sequence[Step],
        gauge: Gauge = "sylvester",
    ) -> list[Step]:
        """The steps that are closest to gradients other than those in `pairs`."""
        if self.spectra is None:
            return []
        pairs = [
            pair._replace(grad_a=grad_a, grad_b=grad_b)
            for pair, (grad_a, grad_b) in zip(pairs, gradients, strict=True)
        ]
        return solve(self.spectra, pairs, damping=self.damping, gauge=gauge)


def decayed(old: jax.Array, new: jax.Array, decay: ArrayLike) -> jax.Array:
    """The exponential moving average, one step on."""
    decay = jnp.asarray(decay, new.dtype)
    return decay * old.astype(new.dtype) + (1 - decay) * new


def unbiased(x: jax.Array, decay: ArrayLike, step: jax.Array) -> jax.Array:
    """An average that began at 0, without its bias towards it."""
    return x / (1 - jnp.asarray(decay, x.dtype) ** step)
