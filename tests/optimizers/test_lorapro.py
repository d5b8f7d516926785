"""What `lorapro` does beyond the contract of `test_contract.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorapro_jax import lorapro
from tests.support import oracle
from tests.support.trees import loss_fn, make_params, others

pytestmark = pytest.mark.usefixtures("quick_compiles")

gradient = jax.jit(jax.grad(loss_fn))


def head_of(tree):
    """A and B of one pair, as in the paper."""
    return [tree["head"][x].T for x in ("lora_a", "lora_b")]


def test_defaults_adjust_undoing_a_scale_of_one_with_a_damping_of_a_tenth():
    """And there is no state."""
    params = make_params()
    grads, tx = gradient(params), lorapro()

    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)

    assert state == tx.init(params) == optax.EmptyState()
    expected = oracle.adjust(*head_of(params), *head_of(grads), 1.0, 0.1)
    for got, want in zip(head_of(updates), expected, strict=True):
        # Roundings of float32, amplified by 1/damping.
        np.testing.assert_allclose(got, want, rtol=1e-4)


def test_other_leaves_come_back_as_the_same_objects():
    params = make_params()
    tx = lorapro()
    updates, _ = tx.update(params, tx.init(params), params)
    same = zip(*map(jax.tree.leaves, map(others, (updates, params))), strict=True)
    assert all(x is y for x, y in same)
    assert updates["head"]["lora_a"] is not params["head"]["lora_a"]


def test_a_partition_behind_it_drops_what_is_not_to_train():
    params = make_params()
    grads, label = gradient(params), lambda path, _: path[0].key
    parts = {"layers": optax.identity(), "head": optax.identity()}
    labels = lambda tree: jax.tree.map_with_path(label, tree)
    drop = optax.partition({**parts, "norm": optax.set_to_zero()}, labels)
    both, alone = optax.chain(lorapro(), drop), lorapro()

    updates, _ = jax.jit(both.update)(grads, both.init(params), params)

    np.testing.assert_array_equal(updates["norm"], 0)
    expected, _ = jax.jit(alone.update)(grads, alone.init(params), params)
    np.testing.assert_allclose(
        updates["head"]["lora_a"], expected["head"]["lora_a"], rtol=1e-4
    )


def test_inject_hyperparams_accepts_alpha_and_schedules():
    params = make_params()
    grads = gradient(params)
    tx = optax.inject_hyperparams(lorapro)(
        alpha=8.0, damping=optax.constant_schedule(0.01)
    )

    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)

    expected = oracle.adjust(*head_of(params), *head_of(grads), 8.0 / 2, 0.01)
    for got, want in zip(head_of(updates), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3)  # 1/damping


def test_donated_gradients_are_overwritten_by_the_adjusted_ones():
    """With the same result."""
    params, tx = make_params(), lorapro()
    grads, state = gradient(params), tx.init(params)
    expected, _ = jax.jit(tx.update)(grads, state, params)

    donating = jax.jit(tx.update, donate_argnums=0)
    compiled = donating.lower(grads, state, params).compile()
    updates, _ = compiled(grads, state, params)

    for got, want in zip(*map(jax.tree.leaves, (updates, expected)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes == sum(x.nbytes for x in jax.tree.leaves(params))


def test_sgd_on_the_adjusted_gradient_reaches_the_target_it_can_reach():
    """600 steps to a fit that rank 2 can express, from B = 0."""
    key = jax.random.split(jax.random.key(1), 3)
    target = jax.random.normal(key[0], (8, 2)) @ jax.random.normal(key[1], (2, 5))
    params = {"lora_a": jax.random.normal(key[2], (8, 2)), "lora_b": jnp.zeros((2, 5))}
    loss = lambda p: jnp.sum((2.0 * p["lora_a"] @ p["lora_b"] - target) ** 2)
    tx = optax.chain(lorapro(scale=2.0, damping=1e-3), optax.sgd(0.05))

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=600)[0][0]

    assert loss(run(params)) < 1e-6 * loss(params)
