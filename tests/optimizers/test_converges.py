"""Optax's own functions for optimizers, on the entries of W = s A B.

They are those of `optax/contrib/_common_test.py`: a parabola and Rosenbrock's valley.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorapro_jax import lora_rite, lorapro, lorapro_adamw

pytestmark = pytest.mark.usefixtures("quick_compiles")

SCALE, STEPS = 2.0, 12_000
FUNCTIONS = {  # of W's entries; where they begin, and their minimum
    "parabola": (
        lambda w: jnp.sum((w - jnp.asarray([1.0, -1.0, 1.0])) ** 2),
        [-1.0, 10.0, 1.0],
        [1.0, -1.0, 1.0],
    ),
    "Rosenbrock": (
        lambda w: (1 - w[0]) ** 2 + 100 * (w[1] - w[0] ** 2) ** 2,
        [0.0, 0.0],
        [1.0, 1.0],
    ),
}


OPTIMIZERS = {
    "lorapro, sgd": lambda rate: optax.chain(
        lorapro(scale=SCALE, damping=1e-3), optax.sgd(rate / 20)
    ),
    "lorapro, adam": lambda rate: optax.chain(lorapro(scale=SCALE), optax.adam(rate)),
    "factored": functools.partial(lorapro_adamw, scale=SCALE),
    "dense": functools.partial(lorapro_adamw, scale=SCALE, moments="dense"),
    "lora_rite": functools.partial(lora_rite, scale=SCALE),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_minimum_is_reached(name, function):
    value, start, minimum = FUNCTIONS[function]
    params = {
        "lora_a": jnp.ones((1, 1)), "lora_b": jnp.asarray([start]) / SCALE
    }  # fmt: skip
    weight = lambda params: (SCALE * params["lora_a"] @ params["lora_b"])[0]
    schedule = optax.cosine_decay_schedule(0.1, STEPS)
    tx = OPTIMIZERS[name](2e-2 if "sgd" in name else schedule)

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            grads = jax.grad(lambda params: value(weight(params)))(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=STEPS)[0][0]

    np.testing.assert_allclose(weight(run(params)), minimum, atol=3e-2)
    # Negative control: it does not begin there.
    assert np.abs(np.asarray(weight(params)) - minimum).max() > 0.5
