"""What Optax does to a transform, with and without jit."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from absl.testing import parameterized

from lorapro_jax import lorapro


def make_params(dtype=jnp.float32, seed=0):
    """Two pairs of different rank, one of them stacked, and two other leaves."""
    key = iter(jax.random.split(jax.random.key(seed), 8))
    normal = lambda *shape: jax.random.normal(next(key), shape).astype(dtype)
    return {
        "layers": {"lora_a": normal(3, 10, 4), "lora_b": normal(3, 4, 6)},
        "head": {"lora_a": normal(8, 2), "lora_b": normal(2, 5), "bias": normal(5)},
        "norm": normal(10),
    }


def loss_fn(params, scale=1.0):
    """A least-squares fit of W0 + s A B to a target, W0 = 0."""
    product = lambda x: scale * jnp.einsum("...ir,...ro->...io", *x)
    total = 0.0
    for name in ("layers", "head"):
        pair = params[name]["lora_a"], params[name]["lora_b"]
        total += jnp.sum((product(pair) - 1.0) ** 2)
    return total + jnp.sum(params["norm"] ** 2) + jnp.sum(params["head"]["bias"] ** 2)


def adjusted(grads, params, **options):
    tx = lorapro(**options)
    return tx.update(grads, tx.init(params), params)[0]


def assert_close(tree, expected):
    """Equal but for float32 rounding in another order."""
    chex.assert_trees_all_close(tree, expected, rtol=1e-3, atol=1e-5)


class ContractTest(chex.TestCase):
    """One claim a test, under `jit` and without."""

    def setUp(self):
        super().setUp()
        self.params = make_params()
        self.grads = jax.grad(loss_fn)(self.params)

    @chex.variants(with_jit=True, without_jit=True)
    def test_update_equals_the_oracle_and_passes_other_leaves(self):
        tx = lorapro()

        step, state = self.variant(tx.update)(
            self.grads, tx.init(self.params), self.params
        )

        assert state == optax.EmptyState()
        head, grad = self.params["head"], self.grads["head"]
        expected = oracle.adjust(
            head["lora_a"].T, head["lora_b"].T, grad["lora_a"].T, grad["lora_b"].T,
            damping=0.1,
        )  # fmt: skip
        np.testing.assert_allclose(step["head"]["lora_a"].T, expected[0], rtol=1e-4)
        np.testing.assert_allclose(step["head"]["lora_b"].T, expected[1], rtol=1e-4)
        chex.assert_trees_all_equal(step["norm"], self.grads["norm"])
        chex.assert_trees_all_equal(step["head"]["bias"], self.grads["head"]["bias"])

    @chex.variants(with_jit=True, without_jit=True)
    def test_unknown_extra_arguments_are_accepted(self):
        tx = lorapro()
        update = self.variant(
            lambda grads, params, value: tx.update(
                grads, optax.EmptyState(), params, value=value, unknown=1
            )
        )

        step, _ = update(self.grads, self.params, 0.5)

        assert_close(step, adjusted(self.grads, self.params))

    @chex.variants(with_jit=True, without_jit=True)
    def test_keyword_names_are_those_of_optax(self):
        tx = lorapro()

        step, _ = self.variant(tx.update)(
            updates=self.grads, state=tx.init(self.params), params=self.params
        )

        chex.assert_trees_all_equal_shapes_and_dtypes(step, self.params)

    @chex.variants(with_jit=True, without_jit=True)
    def test_inject_hyperparams_changes_nothing_and_exposes_scale_and_damping(self):
        tx = optax.inject_hyperparams(lorapro)(scale=2.0, damping=0.01)
        state = tx.init(self.params)

        step, state = self.variant(tx.update)(self.grads, state, self.params)

        expected = adjusted(self.grads, self.params, scale=2.0, damping=0.01)
        assert_close(step, expected)
        chex.assert_trees_all_equal_dtypes(step, self.grads)
        assert {"scale", "damping"} <= set(state.hyperparams)

    @chex.variants(with_jit=True, without_jit=True)
    def test_inject_hyperparams_accepts_alpha_and_schedules(self):
        tx = optax.inject_hyperparams(lorapro)(
            alpha=8.0, damping=optax.constant_schedule(0.01)
        )

        step, _ = self.variant(tx.update)(self.grads, tx.init(self.params), self.params)

        expected = adjusted(self.grads, self.params, alpha=8.0, damping=0.01)
        assert_close(step, expected)

    @chex.variants(with_jit=True, without_jit=True)
    def test_multi_steps_adjusts_the_accumulated_gradient(self):
        tx = optax.MultiSteps(lorapro(), every_k_schedule=2)
        state = tx.init(self.params)
        update = self.variant(tx.update)
        half = jax.tree.map(lambda x: 0.5 * x, self.grads)
        rest = jax.tree.map(lambda x: 1.5 * x, self.grads)

        first, state = update(half, state, self.params)
        second, state = update(rest, state, self.params)

        chex.assert_trees_all_equal(first, jax.tree.map(jnp.zeros_like, first))
        expected = adjusted(self.grads, self.params)
        assert_close(second, expected)

    @chex.variants(with_jit=True, without_jit=True)
    def test_masked_adjusts_what_it_sees_and_passes_the_rest(self):
        mask = {"layers": True, "head": False, "norm": False}
        tx = optax.masked(lorapro(), mask)

        step, _ = self.variant(tx.update)(self.grads, tx.init(self.params), self.params)

        expected = adjusted(self.grads, self.params)
        assert_close(step["layers"], expected["layers"])
        chex.assert_trees_all_equal(step["head"], self.grads["head"])

    @chex.variants(with_jit=True, without_jit=True)
    def test_partition_after_lorapro_and_lorapro_inside_a_partition(self):
        label = lambda path, _: "rest" if path[0].key == "norm" else "lora"
        labels = lambda tree: jax.tree.map_with_path(label, tree)
        expected = adjusted(self.grads, self.params)
        expected["norm"] = jnp.zeros_like(expected["norm"])
        outside = optax.chain(
            lorapro(),
            optax.partition(
                {"lora": optax.identity(), "rest": optax.set_to_zero()}, labels
            ),
        )
        inside = optax.partition(
            {"lora": lorapro(), "rest": optax.set_to_zero()}, labels
        )
        for tx in (outside, inside):
            step, _ = self.variant(tx.update)(
                self.grads, tx.init(self.params), self.params
            )
            assert_close(step, expected)

    @chex.variants(with_jit=True, without_jit=True)
    def test_apply_if_finite_drops_a_non_finite_step(self):
        tx = optax.apply_if_finite(lorapro(), max_consecutive_errors=3)
        state = tx.init(self.params)
        bad = {**self.grads, "norm": self.grads["norm"]}
        bad["head"] = {**bad["head"], "lora_a": jnp.full((8, 2), jnp.nan)}
        update = self.variant(tx.update)

        dropped, state = update(bad, state, self.params)
        step, state = update(self.grads, state, self.params)

        chex.assert_trees_all_equal(dropped, jax.tree.map(jnp.zeros_like, dropped))
        assert_close(step, adjusted(self.grads, self.params))

    @chex.variants(with_jit=True, without_jit=True)
    def test_vmap_over_seeds_equals_a_loop(self):
        many = [make_params(seed=seed) for seed in range(3)]
        grads = [jax.grad(loss_fn)(params) for params in many]
        stack = lambda trees: jax.tree.map(lambda *xs: jnp.stack(xs), *trees)

        step = self.variant(jax.vmap(adjusted))(stack(grads), stack(many))

        expected = [adjusted(*args) for args in zip(grads, many, strict=True)]
        assert_close(step, stack(expected))

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(jnp.float16, jnp.bfloat16, jnp.float32)
    def test_shapes_and_dtypes_are_stable_through_cond_and_scan(self, dtype):
        params = make_params(dtype)
        tx = optax.chain(lorapro(), optax.adamw(1e-2))

        def step(carry, _):
            params, state = carry

            def train(params, state):
                updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
                return optax.apply_updates(params, updates), state

            carry = jax.lax.cond(True, train, lambda *xs: xs, params, state)
            return carry, loss_fn(params)

        run = self.variant(lambda carry: jax.lax.scan(step, carry, length=4))
        before = (params, tx.init(params))

        after, losses = run(before)

        chex.assert_trees_all_equal_shapes_and_dtypes(after, before)
        assert losses[-1] < losses[0]

    @chex.variants(with_jit=True, without_jit=True)
    def test_update_without_params_says_what_to_call(self):
        tx = lorapro()
        update = self.variant(lambda grads: tx.update(grads, optax.EmptyState()))

        with pytest.raises(ValueError, match=r"`tx.update\(grads, state, params\)`"):
            update(self.grads)

    @chex.variants(with_jit=True, without_jit=True)
    def test_global_norm_clipping_may_stand_before(self):
        """A common factor passes through; per-leaf factors would not."""
        clip = optax.chain(optax.clip_by_global_norm(0.5), lorapro())
        norm = jnp.sqrt(sum(jnp.vdot(x, x) for x in jax.tree.leaves(self.grads)))

        step, _ = self.variant(clip.update)(
            self.grads, clip.init(self.params), self.params
        )

        expected = jax.tree.map(
            lambda x: 0.5 / norm * x, adjusted(self.grads, self.params)
        )
        assert_close(step, expected)


def test_second_call_does_not_trace_again():
    params = make_params()
    tx = optax.chain(lorapro(), optax.adam(1e-3))
    step = jax.jit(chex.assert_max_traces(tx.update, n=1))
    state = tx.init(params)
    for _ in range(3):
        updates, state = step(jax.grad(loss_fn)(params), state, params)
        params = optax.apply_updates(params, updates)


def test_map_params_reaches_the_rest_of_the_chain():
    """`tree.map_params` calls `init` with a placeholder that has no leaves."""
    params = make_params()
    tx = optax.chain(lorapro(), optax.adam(1e-3))

    state = optax.tree.map_params(tx, lambda x: x + 1, tx.init(params))

    chex.assert_trees_all_equal(state[1][0].mu, jax.tree.map(jnp.ones_like, params))


def test_state_is_empty_and_init_works_on_abstract_parameters():
    params = make_params()
    shapes = jax.eval_shape(lambda: params)

    assert lorapro().init(shapes) == optax.EmptyState()
    tx = optax.chain(lorapro(), optax.adam(1e-3))
    abstract = jax.eval_shape(tx.init, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, tx.init(params))


def test_donated_buffers_are_reused():
    """Gradients are overwritten by the adjusted ones, with the same result."""
    params = make_params()
    grads = jax.grad(loss_fn)(params)
    expected = jax.jit(adjusted)(grads, params)
    donating = jax.jit(adjusted, donate_argnums=0)

    compiled = donating.lower(grads, params).compile()
    step = compiled(grads, params)

    assert_close(step, expected)
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes == size


def test_same_container_types_come_back():
    """Structures of updates are kept, so the rest of the chain matches."""
    params = make_params()
    grads = jax.grad(loss_fn)(params)
    for wrap in (lambda x: (x, None), lambda x: [x, optax.MaskedNode()]):
        step = adjusted(wrap(grads), wrap(params))
        chex.assert_trees_all_equal_structs(step, wrap(grads))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_apply_updates_keeps_the_dtype_of_the_parameters(dtype):
    params = make_params(dtype)
    tx = optax.chain(lorapro(), optax.sgd(0.1))
    updates, _ = tx.update(jax.grad(loss_fn)(params), tx.init(params), params)
    chex.assert_trees_all_equal_dtypes(updates, params)


def test_sgd_on_the_adjusted_gradient_reaches_the_target_it_can_reach():
    """600 steps to a fit that rank 2 can express, from B = 0."""
    key = jax.random.split(jax.random.key(1), 3)
    target = jax.random.normal(key[0], (8, 2)) @ jax.random.normal(key[1], (2, 5))
    params = {"lora_a": jax.random.normal(key[2], (8, 2)), "lora_b": jnp.zeros((2, 5))}
    loss = lambda p: jnp.sum((2.0 * p["lora_a"] @ p["lora_b"] - target) ** 2)
    tx = optax.chain(lorapro(2.0, damping=1e-3), optax.sgd(0.05))

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=600)[0][0]

    assert loss(run(params)) < 1e-6 * loss(params)
