"""JAX's strict settings: what Optax passes under them, the package passes too."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.support.transforms import TRANSFORMS
from tests.support.trees import loss_fn, make_params

pytestmark = pytest.mark.usefixtures("quick_compiles")

SETTINGS = {
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    # Optax's own Adam fails under it; the package shields the leaves that Adam gets.
    "dtype promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "leaks": jax.checking_leaks,
    "transfers": lambda: jax.transfer_guard("disallow"),
    "NaNs": lambda: jax.debug_nans(True),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_two_steps_pass_and_are_what_they_are_without(setting, name):
    params = make_params()
    params["head"]["lora_b"] = jnp.zeros_like(params["head"]["lora_b"])
    grads = jax.jit(jax.grad(loss_fn))(params)

    def two(context):
        tx = TRANSFORMS[name].make()
        state = tx.init(params)
        with context:
            update = jax.jit(tx.update)
            for _ in range(2):
                updates, state = update(grads, state, params)
        return updates

    expected = two(contextlib.nullcontext())
    if setting == "dtype promotion" and fails_in_optax(name):
        pytest.skip("Optax's part of this chain fails, as it does alone")
    received = two(SETTINGS[setting]())

    for got, want in zip(*map(jax.tree.leaves, (received, expected)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


def fails_in_optax(name):
    """Whether the row chains an optimizer of Optax behind ours."""
    return "adamw" in name and "lorapro_adamw" not in name


def test_control_optax_fails_under_strict_dtype_promotion():
    tx, params = optax.adamw(1e-3), {"x": jnp.ones(3)}
    with (
        jax.numpy_dtype_promotion("strict"),
        pytest.raises(Exception, match="promotion"),
    ):
        tx.update(params, tx.init(params), params)
