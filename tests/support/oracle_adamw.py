"""LoRA-Pro's Adam in dense float64 NumPy, one weight of shape m×n at a time.

Nothing here shares a formula with the package: both moments are m×n matrices, the
moved momentum is a projection of one, and row and column energies are sums over
the rows and columns of the other. All in the paper's layout, as in `oracle`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.support import oracle


class Weight:
    """One adapter under `scale_by_lorapro_adam`: `tangent`, then `direction`, a step.

    Attributes:
      a: A, `(r, n)`; the caller moves it.
      b: B, `(m, r)`; likewise.
      scale: s.
      momentum: M, `(m, n)`.
      energy: V, `(m, n)`.
      count: The number of steps taken.
    """

    def __init__(
        self, a, b, scale=1.0, *, moments, b1=0.9, b2=0.999, eps=1e-8,
        damping=0.1, gauge="sylvester", nesterov=False,
    ):  # fmt: skip
        self.a, self.b, self.scale = np.float64(a), np.float64(b), scale
        self.moments, self.b1, self.b2, self.eps = moments, b1, b2, eps
        self.damping, self.gauge, self.nesterov = damping, gauge, nesterov
        self.before, self.relative = (self.a, self.b), 0.0
        self.momentum = np.zeros((len(self.b), self.a.shape[1]))
        self.energy = np.zeros_like(self.momentum)
        self.count = 0

    def tangent(self, full):
        """E = J(adjust(JᵀG)): what a step on the factors can do of G.

        Undamped that is Theorem 2.1, without any least squares.
        """
        if self.damping == 0:
            return oracle.projection(self.a, self.b, full)
        self.look()
        step = self._adjust(full, "sylvester")
        return oracle.equivalent(self.a, self.b, *step, self.scale)

    def look(self):
        """Sets the damping of this step, relative to the Grams, by the last one."""
        here = self.a, self.b
        self.relative = oracle.damping_by_motion(*here, self.before, self.damping)
        self.before = here

    def direction(self, e):
        """The step (a, b) for the equivalent gradient E, which may be clipped."""
        self.count += 1
        if self.moments == "factored":
            self.momentum = self.transported()
        self.momentum = self.b1 * self.momentum + (1 - self.b1) * e
        self.energy = self.b2 * self.energy + (1 - self.b2) * e**2
        return self._adjust(self.preconditioned(e), self.gauge)

    def transported(self):
        """The old momentum, as far as the factors of today can express it."""
        return oracle.projection(self.a, self.b, self.momentum)

    def preconditioned(self, e):
        """D, from the bias-corrected moments."""
        m_hat = self.momentum / (1 - self.b1**self.corrected_count)
        if self.nesterov:  # NAdam with a constant decay, of the average and of E
            m_hat = self.b1 * self.momentum / (
                1 - self.b1 ** (self.corrected_count + 1)
            ) + (1 - self.b1) * e / (1 - self.b1**self.corrected_count)
        v_hat = self.energy / (1 - self.b2**self.corrected_count)
        if self.moments == "dense":
            return m_hat / (np.sqrt(v_hat) + self.eps)
        v_hat = v_hat + self.eps**2
        rows, columns = v_hat.sum(1, keepdims=True), v_hat.sum(0, keepdims=True)
        return m_hat / np.sqrt(rows * columns / v_hat.sum())

    @property
    def corrected_count(self):
        """The t of the bias correction."""
        return self.count

    def _adjust(self, full, gauge):
        grads = oracle.lora_gradients(self.a, self.b, full, self.scale)
        args = self.a, self.b, *grads, self.scale, self.relative, gauge
        return oracle.adjust(*args)


class WithoutTransport(Weight):
    """Wrong on purpose: the old momentum stays as it was."""

    def transported(self):
        return self.momentum


class DampedTransport(Weight):
    """Wrong on purpose: damping takes a little of the old momentum at every step."""

    def transported(self):
        return self.tangent(self.momentum)


class CountedFromZero(Weight):
    """Wrong on purpose: the bias correction is one step late."""

    @property
    def corrected_count(self):
        return self.count + 1


def run(
    weights: list[Weight],
    gradient: Callable[[int, int, Any], Any],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = None,
    other_squares: float = 0.0,
) -> list[list[tuple[Any, Any]]]:
    """Trains many weights side by side, moving their factors.

    Args:
      weights: In place, also their state.
      gradient: G from the step (from 0), the index of the weight, and s B A.
      steps: How many.
      learning_rate: Constant.
      weight_decay: λ; the product B A shrinks by 1 - learning_rate · λ.
      max_grad_norm: Of all E together.
      other_squares: ‖g‖² of the leaves that are no factors, at every step.

    Returns:
      The factors (A, B) of every weight after every step.
    """
    trajectory = []
    decay = np.sqrt(max(0.0, 1 - learning_rate * weight_decay))
    for t in range(steps):
        tangents = [
            w.tangent(gradient(t, i, w.scale * w.b @ w.a))
            for i, w in enumerate(weights)
        ]
        norm = np.sqrt(sum(np.sum(e**2) for e in tangents) + other_squares)
        clip = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / norm)
        for w, e in zip(weights, tangents, strict=True):
            step_a, step_b = w.direction(clip * e)
            w.a = decay * w.a - learning_rate * step_a
            w.b = decay * w.b - learning_rate * step_b
        trajectory.append([(w.a, w.b) for w in weights])
    return trajectory


def matrices(x, axes, side):
    """A factor whose axes have these letters, one float64 matrix a layer.

    `r` is the rank, capitals are stacked axes, all others features. A becomes
    `(layers, r, n)` and B `(layers, m, r)`.
    """
    order, depth = _order(axes, side)
    x = np.einsum(f"{axes}->{order}", np.asarray(x, np.float64))
    layers, rank = int(np.prod(x.shape[:depth])), x.shape[order.index("r")]
    return x.reshape((layers, rank, -1) if side == "a" else (layers, -1, rank))


def from_matrices(x, axes, side, sizes):
    """The inverse of `matrices`, with the size of each letter."""
    order, _ = _order(axes, side)
    x = np.reshape(x, [sizes[c] for c in order])
    return np.einsum(f"{order}->{axes}", x)


def _order(axes, side):
    """The letters as in the paper, stacked axes first, and how many those are."""
    stack = "".join(c for c in axes if c.isupper())
    features = "".join(c for c in axes if c.islower() and c != "r")
    return stack + ("r" + features if side == "a" else features + "r"), len(stack)
