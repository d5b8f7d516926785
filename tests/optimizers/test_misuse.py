"""What would be wrong in silence, or an error of JAX's: each names the option."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorapro_jax import lorapro, lorapro_adamw, scale_by_lorapro_adam
from tests.support.trees import make_params

pytestmark = pytest.mark.usefixtures("quick_compiles")

MAKERS = {
    "lorapro": lorapro,
    "scale_by_lorapro_adam": scale_by_lorapro_adam,
    "lorapro_adamw": lambda **x: lorapro_adamw(1e-3, **x),
}
each_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@each_maker
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stack_axis": "0"}, "`stack_axis='0'` has to be an axis"),
        ({"stack_axis": 1.5}, "`stack_axis=1.5` has to be an axis"),
        ({"stack_axis": True}, "`stack_axis=True` has to be an axis"),
        ({"stack_axis": -1}, "`stack_axis=-1` has to be an axis"),
        ({"stack_axis": (0, 1.0)}, "`stack_axis=(0, 1.0)` has to be an axis"),
        ({"rslora": "yes", "alpha": 8}, "`rslora='yes'` has to be True or False"),
        ({"rslora": 1, "alpha": 8}, "`rslora=1` has to be True or False"),
        ({"pairs": 5}, "`pairs=5` has to be a list of `LoRAPair`s"),
        ({"pairs": "m/lora_a"}, "`pairs='m/lora_a'` has to be a list"),
        ({"pairs": {"a": "b"}}, "`pairs={'a': 'b'}` has to be a list"),
    ],
)
def test_bad_option_of_the_pairs_is_named_where_it_is_written(make, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**options)


@each_maker
@pytest.mark.parametrize(
    "options",
    [
        {"stack_axis": np.int64(0)},
        {"stack_axis": [0]},
        {"rslora": np.True_, "alpha": 8},
        {"pairs": "an iterator"},
        {"scale": np.float32(1), "alpha": 8.0},
    ],
)
def test_good_options_of_other_types_are_taken(make, options):
    params = make_params()
    if "pairs" in options:
        options = {"pairs": iter([("head/lora_a", "head/lora_b")])}
    tx = make(**options)
    for _ in range(2):  # an iterator could be read only once
        tx.init(params)


@pytest.mark.parametrize(
    "rate", ["1e-3", None, True, -1e-3, float("nan"), np.inf, np.ones(2), 1j]
)
def test_learning_rate_that_is_no_number_of_at_least_zero_is_an_error(rate):
    with pytest.raises(ValueError, match=r"`learning_rate=.*or a schedule of Optax"):
        lorapro_adamw(rate)


@pytest.mark.parametrize(
    "rate",
    [0, 0.0, np.float32(1e-3), jnp.float32(1e-3), optax.constant_schedule(1e-3)],
)
def test_other_learning_rates_are_taken(rate):
    params = make_params()
    tx = lorapro_adamw(rate)
    jax.jit(tx.update)(params, tx.init(params), params)


def test_concrete_arrays_are_checked_under_a_trace_too():
    """There, even a concrete array compares to a tracer."""
    params, options = make_params(), {"b1": jnp.float32(0.9), "eps": jnp.float32(1e-8)}
    options |= {"weight_decay": jnp.float32(0.1), "max_grad_norm": jnp.float32(1.0)}
    options |= {"scale": jnp.float32(2.0)}
    make = lambda: lorapro_adamw(jnp.float32(1e-3), **options)

    def update(grads):
        tx = make()
        return tx.update(grads, tx.init(params), params)[0]

    jax.jit(update)(params)
    with pytest.raises(ValueError, match="`b2="):
        jax.jit(lambda x: lorapro_adamw(1e-3, b2=options["scale"]).init(x))(params)


@pytest.mark.parametrize("dtype", [int, jnp.int8, "int32", "text", bool, jnp.complex64])
@pytest.mark.parametrize("make", [scale_by_lorapro_adam, MAKERS["lorapro_adamw"]])
def test_moments_have_to_be_of_floating_point(make, dtype):
    with pytest.raises(ValueError, match=r"`mu_dtype=.*real floating point"):
        make(mu_dtype=dtype)
    for good in (None, "bfloat16", jnp.float32, np.dtype("float64"), float):
        make(mu_dtype=good)


def test_dtype_that_inject_hyperparams_calls_says_static_args():
    """It takes a class for a schedule."""
    params = make_params()
    tx = optax.inject_hyperparams(lorapro_adamw)(1e-3, mu_dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match="name `mu_dtype` in `static_args`"):
        tx.init(params)
    make = optax.inject_hyperparams(lorapro_adamw, static_args="mu_dtype")
    make(1e-3, mu_dtype=jnp.bfloat16).init(params)


@pytest.mark.parametrize("value", [-1e-3, float("nan")])
def test_inject_hyperparams_does_not_hide_a_bad_learning_rate(value):
    with pytest.raises(ValueError, match="`learning_rate="):
        optax.inject_hyperparams(lorapro_adamw)(value).init(make_params())


class TestMask:
    """Of the weight decay."""

    @pytest.mark.parametrize(
        ("mask", "message"),
        [
            ("x", "`mask` has 'x', which is no bool"),
            (1, "`mask` has 1, which is no bool"),
            ({"layers": 0.5, "head": True, "norm": True}, "has 0.5 at `layers`, which"),
            (np.ones(2, bool), r"`mask` has array\(\[.*which is no bool"),
        ],
    )
    def test_of_something_else_than_bools_is_named_at_once(self, mask, message):
        with pytest.raises(ValueError, match=message):
            lorapro_adamw(1e-3, mask=mask)

    @pytest.mark.parametrize(
        ("mask", "message"),
        [
            ({"layers": True, "head": True}, r"parameters: no bool for \['norm'\]\. "),
            (
                {"layers": True, "head": True, "norm": True, "x": False},
                r"bools at \['x'\], where no parameter is",
            ),
            (
                {"layers": True, "head": {"lora_a": True}, "norm": True},
                r"no bool for \['head/bias', 'head/lora_b'\]",
            ),
            ([True, True, False], r"no bool for .*, bools at \['0', '1', '2'\]"),
            (lambda params: {"layers": True}, r"no bool for .*'norm'"),
            (lambda params: "x", "`mask` has 'x', which is no bool"),
        ],
    )
    def test_of_another_structure_names_the_leaves(self, mask, message):
        with pytest.raises(ValueError, match=message):
            lorapro_adamw(1e-3, weight_decay=0.1, mask=mask).init(make_params())

    def test_that_fits_is_taken(self):
        params = make_params()
        masks = [
            None, True, False, np.True_, {"layers": True, "head": False, "norm": True},
            jax.tree.map(lambda _: True, params), lambda x: jax.tree.map(bool, True),
            {"layers": jnp.bool_(1), "head": np.False_, "norm": True},
        ]  # fmt: skip
        for mask in masks:
            tx = lorapro_adamw(1e-3, weight_decay=0.1, mask=mask)
            tx.update(params, tx.init(params), params)


@each_maker
@pytest.mark.parametrize(
    "leaf", ["text", b"text", jnp.tanh, object(), np.array("text")]
)
def test_leaf_that_is_no_array_is_named(make, leaf):
    with pytest.raises(ValueError, match=r"`extra/x` is .*, no array of numbers"):
        make().init({**make_params(), "extra": {"x": leaf}})


@each_maker
@pytest.mark.parametrize("leaf", [2.0, 3, True, np.float32(1), np.ones(3), None])
def test_numbers_are_leaves(make, leaf):
    params = {**make_params(), "extra": {"x": leaf}}
    make().init(params)
    make().init(jax.eval_shape(lambda: {**make_params(), "extra": {"x": leaf}}))


def test_decay_without_parameters_says_what_to_call():
    tx = lorapro_adamw(1e-3, weight_decay=0.1, on_no_pairs="ignore")
    params = {"x": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"call `tx.update\(grads, state, params\)`"):
        tx.update(params, tx.init(params))
    tx.update(params, tx.init(params), params)


def narrow(params):
    """The same tree with another shape at one factor."""
    return {**params, "head": {**params["head"], "lora_a": jnp.ones((9, 2))}}


def without_head(params):
    return {key: x for key, x in params.items() if key != "head"}


class TestRemedies:
    """Of the errors of `update`, followed to the letter."""

    @each_maker
    @pytest.mark.parametrize(
        ("wrong", "says"),
        [
            (lambda params: None, r"call `tx.update\(grads, state, params\)`"),
            (
                without_head,
                r"no leaf `head/lora_a`.* Pass the parameters that the grad",
            ),
            (narrow, r"`head/lora_a` has shape \(9, 2\) in `params` .* Pass the param"),
        ],
    )
    def test_parameters_that_the_gradients_were_taken_of(self, make, wrong, says):
        params, tx = make_params(), make()
        state = tx.init(params)
        with pytest.raises(ValueError, match=says):
            jax.jit(tx.update)(params, state, wrong(params))
        jax.jit(tx.update)(params, state, params)

    @pytest.mark.parametrize("moments", ["factored", "dense"])
    @pytest.mark.parametrize("wrong", [narrow, without_head])
    def test_state_of_other_parameters(self, moments, wrong):
        params, tx = make_params(), lorapro_adamw(1e-3, moments=moments)
        match = r"Call `tx.init` with the parameters that they were taken of"
        with pytest.raises(ValueError, match=match):
            jax.jit(tx.update)(params, tx.init(wrong(params)), params)
        jax.jit(tx.update)(params, tx.init(params), params)

    def test_state_of_other_options(self):
        params, dense = make_params(), lorapro_adamw(1e-3, moments="dense")
        state = lorapro_adamw(1e-3).init(params)
        with pytest.raises(
            ValueError, match=r"with the same options \(as `moments=` or"
        ):
            jax.jit(dense.update)(params, state, params)
        jax.jit(dense.update)(params, dense.init(params), params)

    @each_maker
    def test_stack_axis_is_static(self, make):
        params = make_params()
        inject = optax.inject_hyperparams
        bare = lambda stack_axis=None: make(stack_axis=stack_axis)
        with pytest.raises(TypeError, match=r"static_args=\('stack_axis',\)"):
            inject(bare)(stack_axis=0).init(params)
        tx = inject(bare, static_args=("stack_axis",))(stack_axis=0)
        jax.jit(tx.update)(params, tx.init(params), params)
