"""The damping of `lorapro_adamw`, which goes by how far the last step went.

That it is the formula's is in `test_adamw.py`, by simulation; here is what it is for.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorapro_jax import lorapro_adamw
from tests.support import oracle

pytestmark = pytest.mark.usefixtures("quick_compiles")

M, N, R, STEPS, RATE = 9, 12, 3, 10, 1e-3


@functools.partial(jax.jit, static_argnames="kind")
def trained(a, b, target, scale, kind):
    """s B A after each step towards a target."""
    tx = lorapro_adamw(RATE, scale=scale) if kind == "ours" else optax.adam(RATE)
    weight = lambda params: scale * (params["lora_a"] @ params["lora_b"]).mT
    loss = lambda params: 0.5 * jnp.sum((weight(params) - target) ** 2)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), weight(params)

    params = {"lora_a": a, "lora_b": b}
    return jax.lax.scan(step, (params, tx.init(params)), length=STEPS)[1]


@pytest.mark.parametrize("scale", [1 / 16, 4.0, 64.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_weight_moves_alike_at_every_scale_of_the_forward_pass(seed, scale, x64):
    """From B = 0. What is left is of second order in the rate, or of e beside AAᵀ.

    At the hundredth of A that ten steps move, that is some per cent; it was seen to
    fall with the rate. Negative control: Adam of the factors.
    """
    a, _, target = oracle.factors(seed, M, N, R)
    start = jnp.asarray(a.T), jnp.zeros((R, M)), target

    def difference(kind):
        one, other = (trained(*start, s, kind) for s in (1.0, scale))
        return jnp.linalg.norm(one[-1] - other[-1]) / jnp.linalg.norm(one[-1])

    assert difference("ours") < 0.1
    assert difference("adam") > 0.5


@pytest.mark.parametrize("moments", ["dense", "factored"])
@pytest.mark.parametrize("size", [1e-3, 1e-6])
def test_a_tiny_b_does_not_send_a_away(size, moments):
    """Neither in the first step, of which nothing is known before it, nor later."""
    a, b, full = (jnp.asarray(x, jnp.float32) for x in oracle.factors(2, M, N, R))
    params = {"lora_a": a.T, "lora_b": size * b.T}
    grads = dict(zip(params, (x.T for x in oracle.lora_gradients(
        *(np.asarray(x) for x in (a, size * b, full)), 1.0)), strict=True))  # fmt: skip

    def farthest(damping):
        tx = lorapro_adamw(0.01, damping=damping, moments=moments)
        now, state, moved = params, tx.init(params), []
        update = jax.jit(tx.update)
        for _ in range(3):
            updates, state = update(grads, state, now)
            now = optax.apply_updates(now, updates)
            moved.append(jnp.linalg.norm(updates["lora_a"]))
        return max(moved) / jnp.linalg.norm(a)

    assert farthest(1.0) < 1
    assert farthest(0.0) > 10  # negative control
