r"""AdamW's moments of the equivalent gradient, as functions of arrays.

Full fine-tuning with AdamW keeps a mean M and a mean square V of the gradient of W.
LoRA-Pro runs it on the equivalent gradient E = s (B a + b A): its direction
D = M / (√V + ε) is brought back to the factors as any gradient of W is, by adjusting
g_A = s Bᵀ D and g_B = s D Aᵀ (Wang et al., arXiv 2407.18242, algorithm with AdamW).

* Dense: M and V are m×n, as in the paper.
* Factored: nothing is m×n. V is the outer product of its row and column sums (as in
  Adafactor, Shazeer and Stern, arXiv 1804.04235), and those sums are exact. M is the
  equivalent gradient of one pair (μ_a, μ_b). It belongs to the tangent space of the
  factors (A⁻, B⁻) of its step, so it is projected to the present one by adjusting its
  gradients. M, D and E are *thin*: sums of two products of an m×r and an r×n matrix.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from ._adjust import Spectra, Step, equivalent, lora_gradients, solve
from ._coefficients import Gauge
from ._factors import PairArrays, in_compute_dtype, times
from ._layout import FactorAxes
from ._linalg import reciprocal
from ._thin import energies, thin_gradients


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


class DenseMoments(NamedTuple):
    """M and V as they are, `(*batch, *features of B, *features of A)`."""

    mean: jax.Array
    square: jax.Array

    @classmethod
    def init(cls, pair: PairArrays, mu_dtype: DTypeLike | None) -> Self:
        """Moments of 0, in the pair's compute dtype but for `mu_dtype`."""
        pair = in_compute_dtype(pair)
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
            mean = _decayed(old.mean, e, adam.b1)
            square = _decayed(old.square, e**2, adam.b2)
            root = jnp.sqrt(_unbiased(square, adam.b2, adam.step))
            d = _unbiased(mean, adam.b1, adam.step) / (root + adam.eps)
            directions.append(lora_gradients(pair, d))
            new.append(cls(mean, square))
        return project(pairs, directions, gauge), new


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
                mean_a=_decayed(mean[0], step[0], adam.b1),
                mean_b=_decayed(mean[1], step[1], adam.b1),
                columns=_decayed(old.columns, columns, adam.b2),
                rows=_decayed(old.rows, rows, adam.b2),
                a=jnp.copy(pair.a),
                b=jnp.copy(pair.b),
            )
            p, q = now._preconditioners(pair, adam)
            mean_a = _unbiased(now.mean_a, adam.b1, adam.step)
            mean_b = _unbiased(now.mean_b, adam.b1, adam.step)
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
        n = _feature_count(pair.a, pair.a_axes)
        m = _feature_count(pair.b, pair.b_axes)
        floor = jnp.asarray(adam.eps, self.rows.dtype) ** 2
        row = _unbiased(self.rows / n, adam.b2, adam.step) + floor
        column = _unbiased(self.columns / m, adam.b2, adam.step) + floor
        mean = row.mean((pair.b_axes.rank, *pair.b_axes.features(row.ndim)))
        # Where V overflows the direction is 0, as it is in Adam.
        root = jnp.where(jnp.isposinf(mean), 0, jnp.sqrt(mean))
        p = reciprocal(jnp.sqrt(row))
        q = times(root, reciprocal(jnp.sqrt(column)), pair.a_axes)
        return p, q


def _feature_count(x: jax.Array, axes: FactorAxes) -> int:
    return math.prod(x.shape[axis] for axis in axes.features(x.ndim))


def _decayed(old: jax.Array, new: jax.Array, decay: ArrayLike) -> jax.Array:
    decay = jnp.asarray(decay, new.dtype)
    return decay * old.astype(new.dtype) + (1 - decay) * new


def _unbiased(x: jax.Array, decay: ArrayLike, step: jax.Array) -> jax.Array:
    return x / (1 - jnp.asarray(decay, x.dtype) ** step)
