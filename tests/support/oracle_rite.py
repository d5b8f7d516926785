"""LoRA-RITE in float64 NumPy, one weight at a time, in the frames of its authors.

Algorithm 1 of Yen et al., arXiv 2410.20625, and of their code the clipping, the decays
that correct the bias as they average (Adafactor's), and where ε stands. Frames come
from QR and roots from a dense eigendecomposition each. All in the paper's layout, as in
`oracle`; what is not of the authors is the division by s.
"""

import numpy as np


def unmagnified(partner, gradient, scale):
    """Qᵀ G of s Pᵀ G, with P = Q R."""
    return np.linalg.solve(np.linalg.qr(partner)[1].T, gradient) / scale


def clip_factor(unmagnified_gradients, others, max_norm):
    """What all gradients are multiplied with; None for no bound."""
    if max_norm is None:
        return 1.0
    arrays = *unmagnified_gradients, *others
    norm = np.sqrt(sum(np.sum(np.float64(x) ** 2) for x in arrays))
    return min(1.0, max_norm / norm)


def corrected(decay, count):
    """The decay at step `count` with which an average has no bias towards 0."""
    return decay * (1 - decay ** (count - 1)) / (1 - decay**count)


class Side:
    """The moments of one factor F, r×k, whose partner is P, k'×r.

    For A these are A and B, and for B its transpose and that of A.
    """

    def __init__(self, b1, b2, eps, escape_mass):
        self.b1, self.b2, self.eps, self.escape_mass = b1, b2, eps, escape_mass
        self.momentum = self.second = self.frame = None
        self.count, self.escaped = 0, 0.0

    def direction(self, partner, gradient, scale):
        """The step on F for its gradient s Pᵀ G."""
        frame, size = np.linalg.qr(partner)
        new = unmagnified(partner, gradient, scale)
        if self.frame is None:
            self.momentum = np.zeros_like(new)
            self.second = np.zeros((len(size), len(size)))
            self.frame = frame
        self.count += 1
        d1, d2 = corrected(self.b1, self.count), corrected(self.b2, self.count)
        turn = frame.T @ self.frame
        turned = turn @ self.second @ turn.T
        if self.escape_mass:
            lost = np.linalg.eigvalsh(self.second) - np.linalg.eigvalsh(turned)
            self.escaped = d2 * (self.escaped + max(lost.max(), 0))
        self.second = d2 * turned + (1 - d2) * new @ new.T / new.shape[1]
        white = self.inverse_root() @ new
        self.momentum = d1 * turn @ self.momentum + (1 - d1) * white
        self.frame = frame
        return np.linalg.solve(size, self.momentum) / scale

    def inverse_root(self):
        values, vectors = np.linalg.eigh(self.second)
        return (vectors / (np.sqrt(values + self.escaped) + self.eps)) @ vectors.T


class Weight:
    """One adapter under LoRA-RITE; the caller moves its factors."""

    def __init__(self, scale=1.0, *, b1=0.9, b2=0.999, eps=1e-6, escape_mass=True):
        self.scale = scale
        self.of_a, self.of_b = (Side(b1, b2, eps, escape_mass) for _ in range(2))

    def unmagnified(self, a, b, grad_a, grad_b):
        """Both unmagnified gradients, in some frames: for their norms."""
        of_a = unmagnified(b, grad_a, self.scale)
        return of_a, unmagnified(a.T, grad_b.T, self.scale).T

    def direction(self, a, b, grad_a, grad_b):
        """The step (a, b) for LoRA's gradients at the factors A and B."""
        step_a = self.of_a.direction(b, grad_a, self.scale)
        step_b = self.of_b.direction(a.T, grad_b.T, self.scale)
        return step_a, step_b.T
