"""Adam's moments of the equivalent gradient as they are in the paper, m×n."""

from collections.abc import Sequence
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ._adjust import Step, equivalent, lora_gradients
from ._coefficients import Gauge
from ._factors import PairArrays, in_compute_dtype
from ._layout import Shape
from ._moments import Adam, Projector, decayed, unbiased


class DenseMoments(NamedTuple):
    """M and V as they are, `(*batch, *features of B, *features of A)`."""

    mean: jax.Array
    square: jax.Array

    @classmethod
    def shapes(cls, pair: PairArrays) -> list[Shape]:
        """Of all arrays."""
        features = [
            x.shape[axis]
            for x, axes in ((pair.b, pair.b_axes), (pair.a, pair.a_axes))
            for axis in axes.features(x.ndim)
        ]
        return 2 * [(*pair.batch, *features)]

    @classmethod
    def init(cls, pair: PairArrays, mu_dtype: DTypeLike | None) -> Self:
        """Moments of 0, in the pair's compute dtype but for `mu_dtype`."""
        pair = in_compute_dtype(pair)
        # A product, because it has the sharding too.
        zeros = jnp.zeros_like(equivalent(pair, pair.a, pair.b))
        return cls(jnp.zeros_like(zeros, dtype=mu_dtype), zeros)

    @classmethod
    def directions(
        cls,
        pairs: Sequence[PairArrays],
        steps: Sequence[Step],
        moments: Sequence[Self],
        adam: Adam,
        project: Projector,
        gauge: Gauge,
    ) -> tuple[list[Step], list[Self]]:
        """Adam's directions for the factors, and the new moments.

        Args:
          pairs: In their compute dtype.
          steps: The adjusted gradients; E is their equivalent gradient.
          moments: Of the step before.
          adam: Hyperparameters.
          project: To the tangent spaces at the factors of `pairs`.
          gauge: Of the directions.
        """
        directions, new = [], []
        for pair, step, old in zip(pairs, steps, moments, strict=True):
            e = equivalent(pair, *step)
            mean = decayed(old.mean, e, adam.b1)
            square = decayed(old.square, e**2, adam.b2)
            root = jnp.sqrt(unbiased(square, adam.b2, adam.step))
            d = unbiased(mean, adam.b1, adam.step) / (root + adam.eps)
            directions.append(lora_gradients(pair, d))
            new.append(cls(mean, square))
        return project(pairs, directions, gauge), new
