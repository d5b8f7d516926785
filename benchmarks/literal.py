"""The adjustment of one pair in two other ways, to compare `lorapro()` with.

`literal` computes what the paper prints, as it prints it. `reference` is for
checking: an independent derivation, in float64.

Both take the paper's layout: W = W0 + s B A with B: m×r and A: r×n. Theorems are
those of Wang et al., ICLR 2025, arXiv 2407.18242.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_sylvester

TOLERANCE = 1e-4


@jax.default_matmul_precision("highest")
def literal(
    a: jax.Array, b: jax.Array, grad_a: jax.Array, grad_b: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Theorem 2.1 with the X of Theorem 2.3, undamped, with a dense m×m projector."""
    # The Schur method is the default, but lowers on no accelerator.
    method = "schur" if jax.default_backend() == "cpu" else "eigen"
    s2 = scale**2
    inv_b = jnp.linalg.inv(b.T @ b)  # (BᵀB)⁻¹
    inv_a = jnp.linalg.inv(a @ a.T)  # (AAᵀ)⁻¹
    projector = jnp.eye(len(b), dtype=b.dtype) - b @ inv_b @ b.T  # I − B(BᵀB)⁻¹Bᵀ
    rhs = -inv_b @ grad_a @ a.T / s2  # −(1/s²) (BᵀB)⁻¹ g_A Aᵀ
    x = solve_sylvester(b.T @ b, a @ a.T, rhs, method=method)  # BᵀB X + X AAᵀ = rhs
    step_a = inv_b @ grad_a / s2 + x @ a  # (1/s²) (BᵀB)⁻¹ g_A + X A
    step_b = projector @ grad_b @ inv_a / s2 - b @ x  # (1/s²) […] g_B (AAᵀ)⁻¹ − B X
    return step_a, step_b


def reference(
    a: np.ndarray,
    b: np.ndarray,
    left: np.ndarray,
    right: np.ndarray,
    scale: float,
    damping: float,
) -> tuple[np.ndarray, np.ndarray]:
    """The damped adjustment for `G = left @ right`, in float64 and O((m+n) r²).

    With the thin SVDs B = U Σ Vᵀ and A = X T Yᵀ, the map J(a, b) = s (B a + b A)
    splits into one equation for every pair of singular directions,
    `s (σ_i α_ij + β_ij τ_j) = (Uᵀ G Y)_ij`, and one for each direction outside of
    them. Each is solved by itself; no Gram matrix is formed.
    """
    a, b, left, right = (np.asarray(x, np.float64) for x in (a, b, left, right))
    u, sigma, vt = np.linalg.svd(b, full_matrices=False)
    x, tau, yt = np.linalg.svd(a, full_matrices=False)
    e = damping * (np.sum(sigma**2) + np.sum(tau**2)) / len(a)

    ug, gy = (u.T @ left) @ right, left @ (right @ yt.T)  # Uᵀ G and G Y
    core = ug @ yt.T  # Uᵀ G Y
    shared = core / (sigma[:, None] ** 2 + tau**2 + e)
    inside_a, inside_b = sigma[:, None] * shared, shared * tau  # α and β
    outside_a = (sigma / (sigma**2 + e))[:, None] * (ug - core @ yt)
    outside_b = (gy - u @ core) * (tau / (tau**2 + e))
    step_a = vt.T @ (inside_a @ yt + outside_a) / scale
    step_b = (u @ inside_b + outside_b) @ x.T / scale
    return step_a, step_b


def check(what: str, got: Sequence[Any], expected: Sequence[Any]) -> float:
    """The larger relative error of two steps (a, b); raises above `TOLERANCE`."""
    errors = [
        float(np.linalg.norm(np.asarray(x, np.float64) - y) / np.linalg.norm(y))
        for x, y in zip(got, expected, strict=True)
    ]
    if not max(errors) < TOLERANCE:  # also when it is NaN
        raise AssertionError(f"{what}: relative errors of (a, b) are {errors}.")
    return max(errors)
