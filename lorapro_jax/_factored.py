"""Adam's moments of the equivalent gradient, with nothing that is m×n.

V is the outer product of its row and column sums, as in Adafactor (Shazeer and Stern,
arXiv 1804.04235), and those sums are exact. M is the equivalent gradient of one pair
(μ_a, μ_b). It belongs to the tangent space of the factors (A⁻, B⁻) of its step, so it
is projected to the present one, by adjusting its LoRA gradients. M, D and E are *thin*:
sums of two products of an m×r and an r×n matrix.
"""

from collections.abc import Sequence
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ._adjust import Step
from ._coefficients import Gauge
from ._factors import PairArrays, in_compute_dtype, times
from ._layout import Shape
from ._linalg import reciprocal
from ._moments import Adam, Projector, decayed, unbiased
from ._thin import energies, thin_gradients


class FactoredMoments(NamedTuple):
    """M as the equivalent gradient of a pair, V by its sums.

    Attributes:
      mean_a: μ_a, like A.
      mean_b: μ_b, like B.
      columns: The sums of V over the features of B, like A with a rank axis of 1.
      rows: The sums of V over the features of A, like B with a rank axis of 1.
      a: A⁻, the A that M = s (B⁻ μ_a + μ_b A⁻) belongs to.
      b: B⁻, likewise.
    """

    mean_a: jax.Array
    mean_b: jax.Array
    columns: jax.Array
    rows: jax.Array
    a: jax.Array
    b: jax.Array

    @classmethod
    def shapes(cls, pair: PairArrays) -> list[Shape]:
        """Of all arrays."""
        a, b = pair.a.shape, pair.b.shape
        column, row = (
            tuple(1 if axis == axes.rank else size for axis, size in enumerate(shape))
            for shape, axes in ((a, pair.a_axes), (b, pair.b_axes))
        )
        return [a, b, column, row, a, b]

    @classmethod
    def init(cls, pair: PairArrays, mu_dtype: DTypeLike | None) -> Self:
        """Moments of 0, in the pair's compute dtype but for `mu_dtype`."""
        wide = in_compute_dtype(pair)
        one_rank = lambda x, axes: jnp.zeros_like(x.max(axes.rank, keepdims=True))
        return cls(
            mean_a=jnp.zeros_like(wide.a, dtype=mu_dtype),
            mean_b=jnp.zeros_like(wide.b, dtype=mu_dtype),
            columns=one_rank(wide.a, pair.a_axes),
            rows=one_rank(wide.b, pair.b_axes),
            # Copies: without them, donating the parameters would delete the state.
            a=jnp.copy(pair.a),
            b=jnp.copy(pair.b),
        )

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
        """As in `DenseMoments`, without an m×n array."""
        means = cls._transported(pairs, moments, project)
        directions, new = [], []
        for pair, step, mean, old in zip(pairs, steps, means, moments, strict=True):
            rows, columns = energies(pair, *step)
            now = cls(
                mean_a=decayed(mean[0], step[0], adam.b1),
                mean_b=decayed(mean[1], step[1], adam.b1),
                columns=decayed(old.columns, columns, adam.b2),
                rows=decayed(old.rows, rows, adam.b2),
                a=jnp.copy(pair.a),
                b=jnp.copy(pair.b),
            )
            p, q = now._preconditioners(pair, adam)
            mean_a = unbiased(now.mean_a, adam.b1, adam.step)
            mean_b = unbiased(now.mean_b, adam.b1, adam.step)
            left, right = (p * pair.b, p * mean_b), (q * mean_a, q * pair.a)
            directions.append(thin_gradients(pair, left, right))
            new.append(now)
        return project(pairs, directions, gauge), new

    @classmethod
    def _transported(
        cls, pairs: Sequence[PairArrays], moments: Sequence[Self], project: Projector
    ) -> list[Step]:
        """(μ_a, μ_b) of the projections of M to the present tangent spaces.

        Without damping, which would forget a little of M at every step.
        """
        gradients = []
        for pair, old in zip(pairs, moments, strict=True):
            dtype = pair.a.dtype
            mean_a, mean_b, a, b = (
                x.astype(dtype) for x in (old.mean_a, old.mean_b, old.a, old.b)
            )
            gradients.append(thin_gradients(pair, (b, mean_b), (mean_a, a)))
        return project._replace(damping=0.0)(pairs, gradients)

    def _preconditioners(self, pair: PairArrays, adam: Adam) -> Step:
        """Thin diagonals p and q, so that p_i q_j = 1/√V_ij with V's rank-one form.

        ε² joins V before its reconstruction, so that the result is an outer product;
        where Adam has 1/(√V + ε), this is at most √2 times as large.
        """
        n = pair.a_axes.feature_count(pair.a.shape)
        m = pair.b_axes.feature_count(pair.b.shape)
        floor = jnp.asarray(adam.eps, self.rows.dtype) ** 2
        row = unbiased(self.rows / n, adam.b2, adam.step) + floor
        column = unbiased(self.columns / m, adam.b2, adam.step) + floor
        mean = row.mean((pair.b_axes.rank, *pair.b_axes.features(row.ndim)))
        # Where V overflows the direction is 0, as it is in Adam.
        root = jnp.where(jnp.isposinf(mean), 0, jnp.sqrt(mean))
        p = reciprocal(jnp.sqrt(row))
        q = times(root, reciprocal(jnp.sqrt(column)), pair.a_axes)
        return p, q
