"""Derivatives through an update, where eigenvectors have none: at B = 0 for one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorapro_jax import lorapro, lorapro_adamw
from tests.support import oracle

pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")

M, N, RANK, SCALE = 6, 5, 3, 1.7
rng = np.random.default_rng(0)
WEIGHTS = rng.standard_normal((RANK, N)), rng.standard_normal((M, RANK))
FULL = rng.standard_normal((M, N))
ORTHONORMAL = np.linalg.qr(rng.standard_normal((N, RANK)))[0].T
FACTORS = {
    "general": oracle.factors(1, M, N, RANK)[:2],
    "B = 0": (oracle.factors(2, M, N, RANK)[0], np.zeros((M, RANK))),
    "equal eigenvalues": (ORTHONORMAL, np.eye(M)[:, :RANK]),
    "deficient": (np.diag([1.0, 1.0, 0.0]) @ ORTHONORMAL, np.zeros((M, RANK))),
}


def gradients(a, b):
    return SCALE * b.T @ FULL, SCALE * FULL @ a.T


def dense(a, b, damping):
    """(JᵀJ + s²e I)⁻¹ Jᵀ G by a dense solve that JAX differentiates."""
    jac = SCALE * jnp.hstack([jnp.kron(b, jnp.eye(N)), jnp.kron(jnp.eye(M), a.T)])
    e = damping * (jnp.sum(a**2) + jnp.sum(b**2)) / RANK
    rhs = jnp.concatenate([x.ravel() for x in gradients(a, b)])
    ridge = SCALE**2 * e * jnp.eye(jac.shape[1])
    step = jnp.linalg.solve(jac.T @ jac + ridge, rhs)
    return step[: a.size].reshape(a.shape), step[a.size :].reshape(b.shape)


def tree_of(a, b):
    return {"lora_a": a.T, "lora_b": b.T}


def package(a, b, damping, gauge="sylvester"):
    tx = lorapro(scale=SCALE, damping=damping, gauge=gauge)
    step, _ = tx.update(tree_of(*gradients(a, b)), optax.EmptyState(), tree_of(a, b))
    return step["lora_a"].T, step["lora_b"].T


def value(function, *args):
    """A number that depends on all of a step, and not only linearly."""
    return sum(
        jnp.sum(w * x + x**2) for w, x in zip(WEIGHTS, function(*args), strict=True)
    )


@pytest.mark.parametrize("damping", [0.1, 1e-2])
@pytest.mark.parametrize("name", FACTORS)
def test_derivatives_are_those_of_a_dense_solve(name, damping):
    """With respect to A, B and the damping, forward and backward."""
    args = *map(jnp.asarray, FACTORS[name]), damping
    each = (0, 1, 2)

    received = jax.jit(jax.grad(functools.partial(value, package), each))(*args)

    expected = jax.jit(jax.grad(functools.partial(value, dense), each))(*args)
    for got, want in zip(received, expected, strict=True):
        scale = np.abs(want).max()
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-9 * scale)
    moved = lambda f: jax.jvp(lambda a: value(f, a, *args[1:]), args[:1], WEIGHTS[:1])
    np.testing.assert_allclose(moved(package)[1], moved(dense)[1], rtol=1e-9)


def difference(function, a, b):
    """The derivative along WEIGHTS, by central differences: to 1e-7 or so."""
    t = 1e-5
    step = lambda t: function(a + t * WEIGHTS[0], b + t * WEIGHTS[1])
    return (step(t) - step(-t)) / (2 * t)


@pytest.mark.parametrize("gauge", ["symmetric", "zero"])
@pytest.mark.parametrize("name", FACTORS)
def test_derivatives_in_the_other_gauges_are_those_of_differences(name, gauge):
    a, b = map(jnp.asarray, FACTORS[name])
    function = jax.jit(lambda a, b: value(package, a, b, 0.1, gauge))

    grads = jax.grad(function, (0, 1))(a, b)

    received = sum(jnp.vdot(*x) for x in zip(grads, WEIGHTS, strict=True))
    np.testing.assert_allclose(received, difference(function, a, b), rtol=1e-6)


@pytest.mark.parametrize("moments", ["dense", "factored"])
@pytest.mark.parametrize("name", ["general", "B = 0"])
def test_derivatives_through_two_steps_of_lorapro_adamw(name, moments):
    tx = lorapro_adamw(
        1e-2, moments=moments, scale=SCALE, weight_decay=0.1, max_grad_norm=1.0
    )

    def function(a, b):
        params = tree_of(a, b)
        state = tx.init(params)
        for _ in range(2):
            grads = tree_of(*gradients(params["lora_a"].T, params["lora_b"].T))
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return sum(
            jnp.vdot(w, x.T) for w, x in zip(WEIGHTS, updates.values(), strict=True)
        )

    a, b = map(jnp.asarray, FACTORS[name])

    grads = jax.jit(jax.grad(function, (0, 1)))(a, b)

    received = sum(jnp.vdot(*x) for x in zip(grads, WEIGHTS, strict=True))
    expected = difference(jax.jit(function), a, b)
    np.testing.assert_allclose(received, expected, rtol=1e-5)


def test_second_derivatives_raise_because_they_would_be_wrong():
    a, b = map(jnp.asarray, FACTORS["general"])
    with pytest.raises(NotImplementedError, match="stop_gradient"):
        jax.hessian(lambda a: value(package, a, b, 0.1))(a)
