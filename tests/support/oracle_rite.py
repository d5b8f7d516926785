"""LoRA-RITE in float64 NumPy, one weight at a time, in the frames of its authors.

Algorithm 1 of Yen et al., arXiv 2410.20625, without clipping: frames come from QR, and
inverse roots from a dense eigendecomposition each. All in the paper's layout, as in
`oracle`.
"""

import numpy as np


def inverse_root(x):
    """x^(-½) of a symmetric positive definite matrix."""
    values, vectors = np.linalg.eigh(x)
    return (vectors / np.sqrt(values)) @ vectors.T


class Side:
    """The moments of one factor F, r×k, whose partner is P, k'×r.

    For A these are A and B, and for B its transpose and that of A.
    """

    def __init__(self, b1, b2, eps):
        self.b1, self.b2, self.eps = b1, b2, eps
        self.momentum = self.second = self.frame = None
        self.count = 0

    def direction(self, partner, gradient, scale):
        """The step on F for its gradient s Pᵀ G."""
        frame, size = np.linalg.qr(partner)
        unmagnified = np.linalg.solve(size.T, gradient) / scale  # Qᵀ G
        if self.frame is None:
            self.momentum = np.zeros_like(unmagnified)
            self.second = np.zeros((len(size), len(size)))
            self.frame = frame
        turn = frame.T @ self.frame
        self.frame, self.count = frame, self.count + 1
        new = unmagnified @ unmagnified.T / unmagnified.shape[1]
        self.second = self.b2 * turn @ self.second @ turn.T + (1 - self.b2) * new
        v_hat = self.second / (1 - self.b2**self.count)
        white = inverse_root(v_hat + self.eps**2 * np.eye(len(size))) @ unmagnified
        self.momentum = self.b1 * turn @ self.momentum + (1 - self.b1) * white
        m_hat = self.momentum / (1 - self.b1**self.count)
        return np.linalg.solve(size, m_hat) / scale


class Weight:
    """One adapter under LoRA-RITE; the caller moves its factors."""

    def __init__(self, scale=1.0, *, b1=0.9, b2=0.999, eps=1e-8):
        self.scale = scale
        self.of_a, self.of_b = Side(b1, b2, eps), Side(b1, b2, eps)

    def direction(self, a, b, grad_a, grad_b):
        """The step (a, b) for LoRA's gradients at the factors A and B."""
        step_a = self.of_a.direction(b, grad_a, self.scale)
        step_b = self.of_b.direction(a.T, grad_b.T, self.scale)
        return step_a, step_b.T
