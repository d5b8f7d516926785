"""The paper's algorithm with AdamW, restated, beside dense moments for 100 steps.

With all that users put around it: a schedule, decay of the product, clipping by the
norm, and gradients accumulated by `optax.MultiSteps`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorapro_jax import lorapro_adamw
from tests.support import oracle

pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")

M, N, RANK, SCALE, STEPS, EVERY = 8, 6, 3, 1.5, 100, 2
B1, B2, EPS, DECAY, BOUND = 0.9, 0.99, 1e-8, 0.1, 2.0
# An error of one rounding, 1e-16, costs cond² = 1e2 to 1e4 and grows in 100 steps.
TOLERANCE = 1e-9


def schedule(count):
    """Warm-up and cosine, in float64 where Optax's own would be in float32."""
    count = jnp.asarray(count, jnp.float64)
    return 0.05 * jnp.minimum(1, (count + 1) / 10) * jnp.cos(count / STEPS)


def rate(t):
    return 0.05 * min(1.0, (t + 1) / 10) * np.cos(t / STEPS)


@functools.cache
def problem():
    a, b, target = oracle.factors(0, M, N, RANK, b_scale=0.7)
    noise = 0.5 * np.random.default_rng(1).standard_normal((STEPS, EVERY, M, N))
    return a, b, target, noise


def restated():
    """Algorithm 1 with AdamW: closed forms of Theorems 2.1 and 2.3, NumPy."""
    a, b, target, noise = problem()
    mean, square = np.zeros((M, N)), np.zeros((M, N))

    def closed_form(full):
        grad_a, grad_b = oracle.lora_gradients(a, b, full, SCALE)
        inverse_b, inverse_a = np.linalg.inv(b.T @ b), np.linalg.inv(a @ a.T)
        off_b = np.eye(M) - b @ inverse_b @ b.T
        rhs = -inverse_b @ grad_a @ a.T / SCALE**2
        kron = np.kron(b.T @ b, np.eye(RANK)) + np.kron(np.eye(RANK), a @ a.T)
        x = np.linalg.solve(kron, rhs.ravel()).reshape(RANK, RANK)
        step_a = inverse_b @ grad_a / SCALE**2 + x @ a
        step_b = off_b @ grad_b @ inverse_a / SCALE**2 - b @ x
        return step_a, step_b

    for t in range(STEPS):
        full = SCALE * b @ a - target + noise[t].mean(0)
        e = oracle.equivalent(a, b, *closed_form(full), SCALE)
        e = e * min(1.0, BOUND / np.linalg.norm(e))
        mean, square = B1 * mean + (1 - B1) * e, B2 * square + (1 - B2) * e**2
        d = mean / (1 - B1 ** (t + 1))
        d = d / (np.sqrt(square / (1 - B2 ** (t + 1))) + EPS)
        step_a, step_b = closed_form(d)
        keep = np.sqrt(1 - rate(t) * DECAY)
        a, b = keep * a - rate(t) * step_a, keep * b - rate(t) * step_b
    return a, b


def trained(b2=B2):
    a, b, target, noise = problem()
    params = {"lora_a": jnp.asarray(a.T), "lora_b": jnp.asarray(b.T)}
    tx = optax.MultiSteps(
        lorapro_adamw(
            schedule, B1, b2, EPS, weight_decay=DECAY, moments="dense", damping=0.0,
            max_grad_norm=BOUND, scale=SCALE,
        ),
        every_k_schedule=EVERY,
        accumulator_dtype=jnp.float64,  # by default float32, which costs 1e-8
    )  # fmt: skip

    def step(carry, noise):
        params, state = carry
        weight = SCALE * (params["lora_a"] @ params["lora_b"]).T
        full = weight - target + noise
        grads = {
            "lora_a": (SCALE * params["lora_b"] @ full).T,
            "lora_b": (SCALE * full @ params["lora_a"]).T,
        }
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    flat = jnp.asarray(noise.reshape(-1, M, N))
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, flat)[0])
    params, _ = run((params, tx.init(params)))
    return np.asarray(params["lora_a"]).T, np.asarray(params["lora_b"]).T


def distance(got, want):
    return max(
        np.abs(x - y).max() / np.abs(y).max() for x, y in zip(got, want, strict=True)
    )


def test_dense_moments_undamped_are_the_papers_algorithm():
    assert distance(trained(), restated()) < TOLERANCE


def test_control_another_b2_is_seen():
    assert distance(trained(b2=0.991), restated()) > 1e3 * TOLERANCE
