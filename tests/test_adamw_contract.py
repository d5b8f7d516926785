"""What Optax does to `lorapro_adamw`, with and without jit."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from adamw_runs import MOMENTS, counted
from test_adamw_others import RATE, make, others
from test_optax_contract import loss_fn, make_params

from lorapro_jax import lorapro_adamw, scale_by_lorapro_adam

pytestmark = pytest.mark.usefixtures("quick_compiles")

gradient = jax.jit(jax.grad(loss_fn))
default = functools.cache(make)  # one transform, so that its programs are kept


def train(update, state, params, steps=3):
    """Updates and parameters after each step, on the gradients of `loss_fn`."""
    result = []
    for _ in range(steps):
        updates, state = update(gradient(params), state, params)
        params = jax.tree.map(jnp.add, params, updates)
        result.append((updates, params))
    return result, state


def assert_close(tree, expected):
    """Equal but for float32 rounding in another order, amplified by 1/damping."""
    chex.assert_trees_all_close(tree, expected, rtol=1e-3, atol=1e-5)


@functools.cache
def plain_steps(moments):
    """Three steps of `train` with the default options, under jit."""
    tx, params = default(moments), make_params()
    return train(jax.jit(tx.update), tx.init(params), params)[0]


class ContractTest(chex.TestCase):
    """One claim a test."""

    def setUp(self):
        super().setUp()
        self.params = make_params()
        self.grads = gradient(self.params)

    @chex.variants(without_jit=True)
    @parameterized.parameters(*MOMENTS)
    def test_jit_changes_nothing_and_the_loss_falls(self, moments):
        tx = default(moments)

        steps, state = train(self.variant(tx.update), tx.init(self.params), self.params)

        assert_close(steps, plain_steps(moments))
        assert state[0].count == 3
        chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(self.params))
        assert loss_fn(steps[-1][1]) < loss_fn(self.params)

    @chex.variants(with_jit=True)
    def test_unknown_extra_arguments_and_optax_names_are_accepted(self):
        moments = "factored"
        tx = default(moments)
        update = self.variant(
            lambda grads, state, params, value: tx.update(
                updates=grads, state=state, params=params, value=value, unknown=1
            )
        )

        updates, _ = update(self.grads, tx.init(self.params), self.params, 0.5)

        assert_close(updates, plain_steps(moments)[0][0])

    @chex.variants(with_jit=True)
    def test_rate_may_be_a_schedule_for_step_and_decay(self):
        moments = "factored"
        rates = [0.02, 0.0, 0.5]
        tx = make(moments, lambda count: jnp.asarray(rates)[count])
        inner = scale_by_lorapro_adam(moments=moments, damping=0.01, scale=1.5)
        update, direct = self.variant(tx.update), jax.jit(inner.update)
        state, inner_state = tx.init(self.params), inner.init(self.params)

        for rate in rates:
            updates, state = update(self.grads, state, self.params)

            step, inner_state = direct(self.grads, inner_state, self.params)
            factor = lambda d, p, r=rate: (np.sqrt(1 - 0.1 * r) - 1) * p - r * d
            expected = jax.tree.map(factor, step, self.params)
            assert_close(updates["layers"], expected["layers"])
            other = lambda d, p, r=rate: -r * (d + 0.1 * p)
            expected = jax.tree.map(other, others(step), others(self.params))
            assert_close(others(updates), expected)

    @chex.variants(with_jit=True)
    def test_inject_hyperparams_exposes_numbers_and_lets_them_change(self):
        moments = "factored"
        tx = optax.inject_hyperparams(lorapro_adamw)(
            RATE, weight_decay=0.1, moments=moments, damping=0.01, scale=1.5,
            max_grad_norm=1.0,
        )  # fmt: skip
        update = self.variant(tx.update)
        state = tx.init(self.params)

        first, state = update(self.grads, state, self.params)
        assert {"learning_rate", "weight_decay", "b1", "b2", "eps", "damping"} <= set(
            state.hyperparams
        )
        state.hyperparams["learning_rate"] = jnp.float32(3 * RATE)
        second, state = update(self.grads, state, self.params)

        plain = make(moments, lambda count: RATE * (1 + 2 * count), max_grad_norm=1.0)
        plain_state, plain_update = plain.init(self.params), jax.jit(plain.update)
        for received in (first, second):
            expected, plain_state = plain_update(self.grads, plain_state, self.params)
            assert_close(received, expected)
        chex.assert_trees_all_equal_dtypes(second, self.params)

    @chex.variants(with_jit=True)
    def test_chain_clips_the_gradients_before(self):
        moments = "factored"
        tx = optax.chain(optax.clip_by_global_norm(0.5), make(moments))
        norm = optax.tree.norm(self.grads)

        updates, _ = self.variant(tx.update)(
            self.grads, tx.init(self.params), self.params
        )

        plain = default(moments)
        clipped = jax.tree.map(lambda x: 0.5 / norm * x, self.grads)
        expected, _ = jax.jit(plain.update)(
            clipped, plain.init(self.params), self.params
        )
        assert_close(updates, expected)

    @chex.variants(with_jit=True)
    @parameterized.parameters(*MOMENTS)
    def test_multi_steps_takes_one_step_on_the_mean_gradient(self, moments):
        tx = optax.MultiSteps(make(moments), every_k_schedule=2)
        state, update = tx.init(self.params), self.variant(tx.update)
        half, rest = (
            jax.tree.map(lambda x, c=c: c * x, self.grads) for c in (0.5, 1.5)
        )

        first, state = update(half, state, self.params)
        second, state = update(rest, state, self.params)

        chex.assert_trees_all_equal(first, jax.tree.map(jnp.zeros_like, first))
        assert_close(second, plain_steps(moments)[0][0])

    @chex.variants(with_jit=True)
    def test_masked_and_partition_hide_the_rest(self):
        mask = {"layers": True, "head": False, "norm": False}
        label = lambda path, _: "lora" if path[0].key == "layers" else "rest"
        labels = lambda tree: jax.tree.map_with_path(label, tree)
        rest = optax.identity()
        hidden = {
            "dense": optax.masked(make("dense"), mask),
            "factored": optax.partition(
                {"lora": make("factored"), "rest": rest}, labels
            ),
        }
        for moments, tx in hidden.items():
            updates, _ = self.variant(tx.update)(
                self.grads, tx.init(self.params), self.params
            )

            assert_close(updates["layers"], plain_steps(moments)[0][0]["layers"])
            chex.assert_trees_all_equal(updates["head"], self.grads["head"])

    @chex.variants(with_jit=True)
    def test_apply_if_finite_drops_a_step_and_its_moments(self):
        moments = "factored"
        tx = optax.apply_if_finite(make(moments), max_consecutive_errors=3)
        state, update = tx.init(self.params), self.variant(tx.update)
        bad = {**self.grads, "norm": self.grads["norm"] * jnp.nan}

        dropped, state = update(bad, state, self.params)
        step, state = update(self.grads, state, self.params)

        chex.assert_trees_all_equal(dropped, jax.tree.map(jnp.zeros_like, dropped))
        assert_close(step, plain_steps(moments)[0][0])

    @chex.variants(with_jit=True)
    @parameterized.parameters(("factored", jnp.float16), ("dense", jnp.bfloat16))
    def test_shapes_and_dtypes_are_stable_through_cond_and_scan(self, moments, dtype):
        params = make_params(dtype)
        tx = make(moments)

        def step(carry, _):
            def work(params, state):
                updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
                return optax.apply_updates(params, updates), state

            carry = jax.lax.cond(True, work, lambda *xs: xs, *carry)
            return carry, loss_fn(carry[0])

        run = self.variant(lambda carry: jax.lax.scan(step, carry, length=4))
        before = (params, tx.init(params))

        after, losses = run(before)

        chex.assert_trees_all_equal_shapes_and_dtypes(after, before)
        assert losses[-1] < losses[0]


@pytest.mark.parametrize("moments", MOMENTS)
def test_steps_are_compiled_once_whatever_the_rate(moments):
    tx = optax.inject_hyperparams(lorapro_adamw)(RATE, moments=moments)
    update, traces = counted(tx.update)
    params = make_params()
    state = tx.init(params)
    for rate in (0.1, 0.2, 0.3):
        state.hyperparams["learning_rate"] = jnp.float32(rate)
        updates, state = update(gradient(params), state, params)
        params = jax.tree.map(jnp.add, params, updates)
    assert len(traces) == 1


@pytest.mark.parametrize("moments", MOMENTS)
def test_parameters_and_state_can_be_donated_from_the_first_step(moments):
    """The stored factors are copies: no buffer is donated twice, all are reused."""
    tx, params = default(moments), make_params()

    def step(params, state):
        updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    size = sum(x.nbytes for x in jax.tree.leaves((params, state)))
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state).compile()
    for _ in range(3):
        params, state = compiled(params, state)

    assert_close(params, plain_steps(moments)[-1][1])
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes == size


def test_vmap_over_seeds_equals_a_loop():
    many = [make_params(seed=seed) for seed in range(3)]
    grads = [gradient(params) for params in many]
    stack = lambda trees: jax.tree.map(lambda *xs: jnp.stack(xs), *trees)
    tx = default("factored")

    received, _ = jax.jit(jax.vmap(tx.update))(
        stack(grads), stack([tx.init(params) for params in many]), stack(many)
    )

    one = jax.jit(tx.update)
    expected = [
        one(g, tx.init(params), params)[0]
        for g, params in zip(grads, many, strict=True)
    ]
    assert_close(received, stack(expected))
