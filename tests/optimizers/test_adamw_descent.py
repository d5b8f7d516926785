"""Rate, decay and masks, and that the leaves that are no factors are AdamW's."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorapro_jax import lorapro_adamw, scale_by_lorapro_adam
from tests.support.runs import MOMENTS
from tests.support.trees import RATE, make, make_params, others, with_others

pytestmark = pytest.mark.usefixtures("quick_compiles")


def as_masks(tree):
    """What Optax accepts: a tree or a prefix of it, or a function."""
    return {
        "prefix": {"layers": False, "head": True, "norm": False},
        "function": lambda tree: jax.tree.map(lambda x: x.ndim != 1, tree),
        "none": None,
    }


@pytest.mark.parametrize("form", ["none", "prefix", "function"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_other_leaves_are_bit_equal_to_adamw_with_decay_and_mask(
    form, nesterov, full_compiles
):
    """And factors that the mask leaves out do not decay."""
    params = make_params()
    mask, hyper = as_masks(params)[form], {"b1": 0.8, "b2": 0.95, "eps": 1e-6}
    hyper["nesterov"] = nesterov
    moments = "factored" if form == "function" else "dense"
    tx = make(moments, **hyper, mask=mask)
    other_mask = mask
    if form == "prefix":
        broad = jax.tree.map(lambda m, p: jax.tree.map(lambda _: m, p), mask, params)
        other_mask = others(broad)
    adamw = optax.adamw(RATE, **hyper, weight_decay=0.1, mask=other_mask)
    update, plain = jax.jit(tx.update), jax.jit(adamw.update)
    state, plain_state = tx.init(params), adamw.init(others(params))
    for seed in range(3):
        grads = make_params(seed=seed + 5)

        updates, state = update(grads, state, params)

        expected, plain_state = plain(others(grads), plain_state, others(params))
        chex.assert_trees_all_equal(others(updates), expected)

    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = update(zeros, tx.init(params), params)  # nothing but the decay
    decay = {"layers": 0.0 if form == "prefix" else np.sqrt(1 - 0.1 * RATE) - 1}
    decay["head"] = np.sqrt(1 - 0.1 * RATE) - 1
    for name, factor in decay.items():
        for factor_name in ("lora_a", "lora_b"):
            x, moved = params[name][factor_name], updates[name][factor_name]
            # The root is taken in float32, of 0.998.
            np.testing.assert_allclose(moved, factor * x, rtol=1e-3)


@pytest.mark.parametrize("moments", MOMENTS)
def test_other_leaves_in_bfloat16_get_float32_moments(moments):
    """The step of AdamW on the same numbers in float32, rounded."""
    params, grads = make_params(jnp.bfloat16), make_params(jnp.bfloat16, seed=3)
    tx, adamw = make(moments), optax.adamw(RATE, weight_decay=0.1)

    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)

    wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), others(tree))
    expected, _ = adamw.update(wide(grads), adamw.init(wide(params)), wide(params))
    chex.assert_trees_all_close(
        wide(updates), expected, rtol=2 * float(jnp.finfo(jnp.bfloat16).eps)
    )
    assert state[0].others.nu["norm"].dtype == jnp.float32


@pytest.mark.parametrize("option", ["weight_decay", "scale", "alpha", "damping", "eps"])
def test_options_may_be_concrete_arrays_under_jit(option):
    """A trace turns comparisons of these into tracers."""
    params = make_params()
    updates = []
    for number in (0.1, jnp.float32(0.1)):
        tx = lorapro_adamw(RATE, **{option: number})
        updates.append(jax.jit(tx.update)(params, tx.init(params), params)[0])
    chex.assert_trees_all_close(*updates, rtol=1e-5)


def test_updates_are_as_wide_as_the_parameters():
    """bfloat16 gradients of float32 parameters: the step is not rounded to 8 bits."""
    params, tx = make_params(), lorapro_adamw(RATE)
    grads = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)

    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)

    chex.assert_trees_all_equal_dtypes(updates, params)
    assert float(updates["norm"][0].astype(jnp.bfloat16)) != float(updates["norm"][0])


def test_rate_may_be_a_schedule_for_step_and_decay():
    """√(1 - lr λ) on each factor with the rate of the step, AdamW's on the rest."""
    params, rates = make_params(), [0.02, 0.0, 0.5]
    tx = make("factored", lambda count: jnp.asarray(rates)[count])
    inner = scale_by_lorapro_adam(moments="factored", damping=0.01, scale=1.5)
    update, direct = jax.jit(tx.update), jax.jit(inner.update)
    grads, state = make_params(seed=5), tx.init(params)
    inner_state = inner.init(params)

    for rate in rates:
        updates, state = update(grads, state, params)

        step, inner_state = direct(grads, inner_state, params)
        factor = lambda d, p, r=rate: (np.sqrt(1 - 0.1 * r) - 1) * p - r * d
        other = lambda d, p, r=rate: -r * (d + 0.1 * p)
        expected = jax.tree.map(factor, step, params)
        rest = jax.tree.map(other, others(step), others(params))
        chex.assert_trees_all_close(
            updates, with_others(expected, rest), rtol=1e-3, atol=1e-5
        )
