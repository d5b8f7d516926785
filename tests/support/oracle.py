"""The paper in dense float64 NumPy, written from its definitions.

Nothing here shares a formula with the package: least squares on the dense Jacobian
instead of eigenbases, pseudo-inverses and projectors instead of coefficients. All
in the paper's layout: A is r×n, B is m×r, and W = W0 + s B A is m×n.
"""

import numpy as np


def jacobian(a, b, scale):
    """J with `J @ [vec a, vec b] = vec(s (B a + b A))`, row-major."""
    (m, _), (_, n) = b.shape, a.shape
    return scale * np.hstack([np.kron(b, np.eye(n)), np.kron(np.eye(m), a.T)])


def lora_gradients(a, b, full, scale):
    """LoRA's gradients by the chain rule: s Bᵀ G and s G Aᵀ."""
    return scale * b.T @ full, scale * full @ a.T


def equivalent(a, b, step_a, step_b, scale):
    """J(a, b) = s (B a + b A)."""
    return scale * (b @ step_a + step_b @ a)


def projection(a, b, full):
    """The closest that any step can come to G: P_B G + (I - P_B) G P_A."""
    onto_b, onto_a = b @ np.linalg.pinv(b), np.linalg.pinv(a) @ a
    return onto_b @ full + (full - onto_b @ full) @ onto_a


def relative_damping(a, b, damping):
    """e = damping · (tr BᵀB + tr AAᵀ) / r."""
    return damping * (np.sum(b**2) + np.sum(a**2)) / len(a)


def damping_by_motion(a, b, before, damping):
    """The same for e = damping · ‖B A - B⁻ A⁻‖² / (‖A‖² + ‖B‖²), as a relative one.

    A hundredth of `damping` where the product has not moved.
    """
    square = np.sum((b @ a - before[1] @ before[0]) ** 2)
    if square == 0:
        return 0.01 * damping
    return damping * square / relative_damping(a, b, np.sum(a**2) + np.sum(b**2))


def adjust(a, b, grad_a, grad_b, scale=1.0, damping=0.0, gauge="sylvester"):
    """(JᵀJ + s²e I)⁻¹ Jᵀ G, then the gauge; JᵀG are LoRA's gradients."""
    a, b, grad_a, grad_b = (np.asarray(x, np.float64) for x in (a, b, grad_a, grad_b))
    e = relative_damping(a, b, damping)
    jac = jacobian(a, b, scale)
    normal = jac.T @ jac + scale**2 * e * np.eye(jac.shape[1])
    rhs = np.concatenate([grad_a.ravel(), grad_b.ravel()])
    if e > 0:
        solution = np.linalg.solve(normal, rhs)
    else:
        solution = np.linalg.pinv(normal, rcond=1e-13, hermitian=True) @ rhs
    step_a = solution[: a.size].reshape(a.shape)
    step_b = solution[a.size :].reshape(b.shape)
    if gauge == "sylvester":
        return step_a, step_b

    # The solution is a = M_B g_A - N_A A and b = g_B M_A - B N_B. Another gauge
    # divides N_A + N_B otherwise. Each N is read off by a pseudo-inverse.
    ridge = e * np.eye(len(a))
    free_a = np.linalg.pinv(b.T @ b + ridge) @ grad_a / scale**2
    free_b = grad_b @ np.linalg.pinv(a @ a.T + ridge) / scale**2
    on_a = (free_a - step_a) @ np.linalg.pinv(a)
    on_b = np.linalg.pinv(b) @ (free_b - step_b)
    share = {"zero": 0.0, "symmetric": 0.5}[gauge]
    total = on_a + on_b
    return free_a - share * total @ a, free_b - (1 - share) * b @ total


def factors(seed, m, n, r, *, cond=10.0, b_scale=1.0, dtype=np.float64):
    """A, B with singular values from 1 down to 1/cond, and a random G.

    A and B are rounded to `dtype`, everything is returned in float64.
    """
    rng = np.random.default_rng(seed)

    def with_spectrum(rows, cols):
        left = np.linalg.qr(rng.standard_normal((rows, min(rows, cols))))[0]
        right = np.linalg.qr(rng.standard_normal((cols, min(rows, cols))))[0]
        sigma = np.geomspace(1.0, 1.0 / cond, min(rows, cols))
        return (left * sigma) @ right.T

    a, b = with_spectrum(r, n), b_scale * with_spectrum(m, r)
    rounded = [x.astype(dtype).astype(np.float64) for x in (a, b)]
    return *rounded, rng.standard_normal((m, n))
