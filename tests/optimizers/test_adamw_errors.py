"""What `lorapro_adamw` refuses, and that the message says what to change."""

import jax
import jax.numpy as jnp
import optax
import pytest

from lorapro_jax import lorapro_adamw, scale_by_lorapro_adam
from tests.support.runs import MOMENTS
from tests.support.trees import make_params

pytestmark = pytest.mark.usefixtures("quick_compiles")

BAD_OPTIONS = [
    ({"moments": "full"}, "moments"),
    ({"gauge": "best"}, "gauge"),
    ({"damping": -0.1}, "damping"),
    ({"damping": float("nan")}, "damping"),
    ({"b1": 1.0}, "b1"),
    ({"b1": -0.1}, "b1"),
    ({"b2": 1.0}, "b2"),
    ({"b2": 1.5}, "b2"),
    ({"eps": -1e-8}, "eps"),
    ({"max_grad_norm": -1.0}, "max_grad_norm"),
    ({"on_no_pairs": "maybe"}, "on_no_pairs"),
    ({"scale": 2.0, "alpha": 8.0}, "alpha"),
    ({"rslora": True}, "rslora"),
]


@pytest.mark.parametrize(("options", "name"), BAD_OPTIONS, ids=str)
def test_bad_option_is_named_at_construction(options, name):
    for make in (scale_by_lorapro_adam, lambda **x: lorapro_adamw(1e-3, **x)):
        with pytest.raises(ValueError, match=name):
            make(**options)


def test_bad_stack_axis_of_inject_hyperparams_says_static_args():
    tx = optax.inject_hyperparams(lorapro_adamw)(1e-3, stack_axis=0)
    with pytest.raises(TypeError, match="static_args"):
        tx.init(make_params())


@pytest.mark.parametrize("decay", [-0.1, float("nan")])
def test_bad_weight_decay_is_named_at_construction(decay):
    with pytest.raises(ValueError, match="weight_decay"):
        lorapro_adamw(1e-3, weight_decay=decay)


@pytest.mark.parametrize("moments", MOMENTS)
class TestTrees:
    """Errors of `init` and `update`, also under jit."""

    def test_tree_without_pairs_is_refused_unless_ignored(self, moments):
        params = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}
        with pytest.raises(ValueError, match="No LoRA pair"):
            lorapro_adamw(1e-3, moments=moments).init(params)

        tx = lorapro_adamw(1e-3, moments=moments, on_no_pairs="ignore")
        updates, _ = jax.jit(tx.update)(params, tx.init(params), params)

        adamw = optax.adamw(1e-3, weight_decay=0.0)
        expected, _ = jax.jit(adamw.update)(params, adamw.init(params), params)
        assert jax.tree.all(jax.tree.map(jnp.array_equal, updates, expected))

    def test_empty_tree_passes_where_no_pairs_are_ignored(self, moments):
        tx = lorapro_adamw(1e-3, moments=moments, on_no_pairs="ignore")
        assert tx.update({}, tx.init({}), {})[0] == {}

    def test_half_a_pair_is_named(self, moments):
        tx = lorapro_adamw(1e-3, moments=moments)
        with pytest.raises(ValueError, match=r"q/lora_a.*without its partner"):
            tx.init({"q": {"lora_a": jnp.ones((4, 2))}})

    def test_missing_params_say_what_to_call(self, moments):
        params, tx = make_params(), lorapro_adamw(1e-3, moments=moments)
        state = tx.init(params)
        for update in (tx.update, jax.jit(tx.update)):
            with pytest.raises(ValueError, match=r"tx.update\(grads, state, params\)"):
                update(params, state)

    def test_params_of_another_shape_are_named(self, moments):
        params, tx = make_params(), lorapro_adamw(1e-3, moments=moments)
        other = {**params, "head": {**params["head"], "lora_a": jnp.ones((9, 2))}}
        with pytest.raises(ValueError, match="head/lora_a"):
            jax.jit(tx.update)(params, tx.init(params), other)

    def test_params_without_a_factor_are_named(self, moments):
        params, tx = make_params(), lorapro_adamw(1e-3, moments=moments)
        other = {key: x for key, x in params.items() if key != "layers"}
        with pytest.raises(ValueError, match="layers/lora_"):
            jax.jit(tx.update)(params, tx.init(params), other)

    @pytest.mark.parametrize("where", ["head/lora_a", "head/lora_b", "norm"])
    def test_state_of_other_shapes_is_named(self, moments, where):
        """As after a change of the model with an old checkpoint."""
        params, tx = make_params(), lorapro_adamw(1e-3, moments=moments)
        old = {**params, "head": dict(params["head"])}
        shapes = {"head/lora_a": (9, 2), "head/lora_b": (2, 6), "norm": (11,)}
        if where == "norm":
            old["norm"] = jnp.ones(shapes[where])
        else:
            old["head"][where.removeprefix("head/")] = jnp.ones(shapes[where])
        match = "norm" if where == "norm" else "head/lora_"
        with pytest.raises(ValueError, match=match):
            jax.jit(tx.update)(params, tx.init(old), params)

    def test_state_of_another_rank_is_named(self, moments):
        """`resize_adapters` is for that."""
        params, tx = make_params(), lorapro_adamw(1e-3, moments=moments)
        head = {"lora_a": jnp.ones((8, 1)), "lora_b": jnp.ones((1, 5))}
        state = tx.init({**params, "head": {**params["head"], **head}})
        with pytest.raises(ValueError, match="head/lora_"):
            jax.jit(tx.update)(params, state, params)

    def test_state_of_another_tree_is_refused(self, moments):
        params, tx = make_params(), lorapro_adamw(1e-3, moments=moments)
        fewer = {key: x for key, x in params.items() if key != "layers"}
        with pytest.raises(ValueError, match="state"):
            jax.jit(tx.update)(params, tx.init(fewer), params)

    def test_state_of_the_other_moments_is_refused(self, moments):
        params = make_params()
        other = next(x for x in MOMENTS if x != moments)
        state = lorapro_adamw(1e-3, moments=other).init(params)
        with pytest.raises(ValueError, match=r"moments|state"):
            jax.jit(lorapro_adamw(1e-3, moments=moments).update)(params, state, params)
