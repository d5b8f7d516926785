"""Trees that could be misread in silence: each is read rightly or is an error."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lorapro_jax import (
    LoRAPair,
    describe_pairs,
    find_pairs,
    lorapro,
    lorapro_adamw,
)
from lorapro_jax.pairs._axes import Axes, LayoutError
from lorapro_jax.pairs._infer import infer_axes
from tests.support import oracle
from tests.support.layouts import random_like

pytestmark = pytest.mark.usefixtures("quick_compiles")

MAKERS = {
    "lorapro": lorapro,
    "factored": lambda **x: lorapro_adamw(1e-2, **x),
    "dense": lambda **x: lorapro_adamw(1e-2, moments="dense", **x),
    "chain": lambda **x: optax.chain(lorapro(**x), optax.adamw(1e-2)),
}
each_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def zeros(*shape):
    return jnp.zeros(shape)


def pair_of(a, b, names=("lora_a", "lora_b")):
    return {name: zeros(*shape) for name, shape in zip(names, (a, b), strict=True)}


def step(tx, params, grads):
    return jax.jit(tx.update)(grads, tx.init(params), params)[0]


class TestAxes:
    """Factors of different numbers of axes, and windows of convolutions."""

    @pytest.mark.parametrize(
        ("a", "b", "layout", "readings"),
        [
            ((64, 8), (8, 8, 32), "jax", ["1, 0", "1, 1"]),
            ((64, 8), (8, 8, 4, 32), "jax", ["1, 0", "1, 1"]),
            ((6, 64, 8), (6, 8, 8, 32), "jax", [f"2, {x}, (0,), (0,)" for x in (1, 2)]),
            ((64, 6, 8), (8, 6, 8, 32), "jax", [f"2, {x}, (1,), (1,)" for x in (0, 2)]),
            ((8, 64), (4, 8, 8), "torch", ["0, 1", "0, 2"]),
            ((8, 8, 64), (32, 8), "torch", ["0, 1", "1, 1"]),
        ],
    )  # fmt: skip
    def test_experts_before_the_rank_of_one_factor_are_a_tie(
        self, a, b, layout, readings
    ):
        """One A for several Bs looks like one B of several heads."""
        names = ("lora_a", "lora_b") if layout == "jax" else ("lora_A", "lora_B")
        tree = {"m": pair_of(a, b, names)}
        if layout == "torch":
            tree = {"m": {name: {"weight": x} for name, x in tree["m"].items()}}
        with pytest.raises(ValueError, match="they can be read as") as error:
            find_pairs(tree)
        written = re.findall(r"`(LoRAPair\(.*?\))`", str(error.value))
        paths = re.findall(r"'(.*?)', '(.*?)'", written[0])[0]
        assert written == [f"LoRAPair{paths}"[:-1] + f", {x})" for x in readings]
        for text in written:  # and each of them is accepted as it stands
            (pair,) = find_pairs(tree, pairs=[eval(text)])
            assert pair.rank == 8

    @pytest.mark.parametrize(
        ("a", "b", "stack_axis", "axes"),
        [
            ((64, 8), (8, 4, 32), None, Axes(1, 0)),  # heads, not of the rank's size
            ((64, 8), (8, 2, 8, 32), None, Axes(1, 0)),  # keys and values of 8 heads
            ((8, 4, 8), (8, 64), None, Axes(2, 0)),  # an output projection
            ((8, 64, 8), (8, 32), None, Axes(2, 0)),  # experts with one B: exact
            ((64, 1), (1, 1, 32), None, Axes(1, 0)),  # rank 1: both readings are one
            ((64, 8), (8, 8, 32), (), Axes(1, 0)),
            ((6, 64, 8), (6, 8, 8, 32), 0, Axes(2, 1, (0,), (0,))),
        ],
    )
    def test_one_reading_is_taken(self, a, b, stack_axis, axes):
        assert infer_axes(a, b, ("jax",), stack_axis) == axes

    @pytest.mark.parametrize(
        "names",
        [("w_lora_a", "w_lora_b"), ("kernel_lora_a", "kernel_lora_b"), ("a", "b")],
    )
    def test_names_of_einsum_stacks_settle_it(self, names):
        """Llama 3 has 8 heads of keys: tunix at rank 8 has to go on working."""
        (pair,) = find_pairs({"lora": pair_of((64, 8), (8, 8, 32), names)})
        assert pair[2:6] == (1, 0, (), ())

    def test_stack_axis_of_other_factors_does_not_settle_it(self):
        with pytest.raises(LayoutError, match="they can be read as"):
            infer_axes((64, 8), (8, 8, 32), ("jax",), 0)

    def test_shared_a_is_adjusted_as_one_matrix_with_all_bs(self):
        """What the written-out pair of the error does."""
        params = random_like({"lora_a": zeros(10, 3), "lora_b": zeros(3, 3, 7)}, 0)

        def flat(tree):
            return tree["lora_a"].T, np.moveaxis(tree["lora_b"], 1, -1).reshape(-1, 3)

        full = np.random.default_rng(1).standard_normal((21, 10))
        grad_a, grad_b = oracle.lora_gradients(*flat(params), full, 1.0)
        experts = jnp.moveaxis(jnp.asarray(grad_b).reshape(3, 7, 3), -1, 1)
        grads = {"lora_a": jnp.asarray(grad_a.T), "lora_b": experts}
        tx = lorapro(pairs=[LoRAPair("lora_a", "lora_b", 1, 1)], damping=1e-2)

        got = step(tx, params, grads)

        expected = oracle.adjust(*flat(params), grad_a, grad_b, damping=1e-2)
        for x, y in zip(flat(got), expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize(
        ("a", "b", "axes"),
        [
            ((3, 3, 16, 4), (1, 1, 4, 8), Axes(3, 2)),
            ((1, 1, 16, 4), (1, 1, 4, 8), Axes(3, 2)),
            ((1, 7, 16, 4), (1, 1, 4, 8), Axes(3, 2)),
            ((5, 16, 4), (1, 4, 8), Axes(2, 1)),
            ((3, 3, 3, 16, 4), (1, 1, 1, 4, 8), Axes(4, 3)),
            ((6, 3, 3, 16, 4), (6, 1, 1, 4, 8), Axes(4, 3, (0,), (0,))),
            ((1, 16, 4), (1, 4, 8), Axes(2, 1, (0,), (0,))),  # one layer of a scan
            ((6, 1, 16, 4), (6, 1, 4, 8), Axes(3, 2, (0, 1), (0, 1))),  # one expert
        ],
    )
    def test_convolution_with_a_one_by_one_b_has_one_reading(self, a, b, axes):
        assert infer_axes(a, b, ("jax",)) == axes

    def test_one_by_one_b_is_adjusted_like_a_flat_one(self):
        params = {"lora_a": zeros(3, 3, 5, 2), "lora_b": zeros(1, 1, 2, 7)}
        params, grads = (random_like(params, seed) for seed in (0, 1))
        flat = lambda tree: {**tree, "lora_b": tree["lora_b"][0, 0]}

        got = step(lorapro(), params, grads)
        expected = step(lorapro(), flat(params), flat(grads))

        for x, y in zip(*map(jax.tree.leaves, (flat(got), expected)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4)
        assert got["lora_b"].shape == (1, 1, 2, 7)


PAIR = pair_of((8, 2), (2, 6))
INNER = {"x": {**pair_of((8, 2), (2, 6)), "base_module": pair_of((8, 3), (3, 6))}}
PEFT = {
    "x": {
        "lora_A": {"one": {"weight": zeros(2, 8)}, "two": {"weight": zeros(2, 8)}},
        "lora_B": {"one": {"weight": zeros(6, 2)}, "two": {"weight": zeros(6, 2)}},
    }
}
EMBEDDING = {
    "x": {
        "lora_embedding_A": {"one": zeros(2, 8), "two": zeros(2, 8)},
        "lora_embedding_B": {"one": zeros(6, 2), "two": zeros(6, 2)},
    }
}
LINEAR = {
    "x": {
        **pair_of((8, 2), (2, 6)),
        "base_module": {"lora": pair_of((8, 3), (3, 6)), "kernel": zeros(8, 6)},
    }
}
QWIX = {
    "x": {
        **pair_of((8, 2), (2, 6)),
        "base_layer": pair_of((8, 3), (3, 6), ("kernel_lora_a", "kernel_lora_b")),
    }
}


class TestTwoAdapters:
    """Each would be adjusted to all of the gradient of their one weight."""

    @each_maker
    @pytest.mark.parametrize(
        ("tree", "paths"),
        [
            (INNER, ["x/base_module/lora_a", "x/lora_a"]),
            (PEFT, ["x/lora_A/one/weight", "x/lora_A/two/weight"]),
            (EMBEDDING, ["x/lora_embedding_A/one", "x/lora_embedding_A/two"]),
            (LINEAR, ["x/base_module/lora/lora_a", "x/lora_a"]),
            (QWIX, ["x/base_layer/kernel_lora_a", "x/lora_a"]),
        ],
    )
    def test_that_the_names_show_are_an_error(self, tree, paths, make):
        named = re.escape(str(paths))
        with pytest.raises(ValueError, match=f"{named} are factors of adapters on one"):
            make().init(tree)

    def test_of_nnx_lora_around_nnx_lora(self):
        rngs = nnx.Rngs(0)
        inner = nnx.LoRA(8, 2, 6, base_module=nnx.Linear(8, 6, rngs=rngs), rngs=rngs)
        model = nnx.LoRA(8, 2, 6, base_module=inner, rngs=rngs)
        with pytest.raises(ValueError, match=r"'base_module/lora_a', 'lora_a'"):
            nnx.Optimizer(model, lorapro_adamw(1e-3), wrt=nnx.LoRAParam)

    @pytest.mark.parametrize(
        "tree",
        [
            {"x": {**PAIR, "base_module": {"up": PAIR}}},
            {"x": {"lora": PAIR, "y": {"lora": PAIR}}},
            {"x": {f"{x}_{name}": y for x in "qk" for name, y in PAIR.items()}},
            {"x": {"base_module": PAIR}},
        ],
    )
    def test_on_weights_of_their_own_are_none(self, tree):
        """A wrapped block is no weight, and `q` and `k` are two."""
        lorapro().init(tree)

    def test_pairs_that_the_user_lists_are_taken(self):
        """They may never be active in one step."""
        lorapro(pairs=find_pairs(PEFT)).init(PEFT)

    def test_are_listed_by_the_table(self):
        line = "on one weight: x/lora_A/one/weight, x/lora_A/two/weight"
        assert line in describe_pairs(PEFT).splitlines()


class TestTreesWithoutLeaves:
    """They train nothing; only Optax's placeholder has a reason to have none."""

    @each_maker
    @pytest.mark.parametrize("tree", [{}, [], None, {"m": None}, optax.MaskedNode()])
    def test_are_an_error_unless_ignored(self, make, tree):
        with pytest.raises(ValueError, match=r"has no leaf.*`on_no_pairs='ignore'`"):
            make().init(tree)
        make(on_no_pairs="ignore").init(tree)
        make(on_no_pairs="ignore", pairs=[("a", "b")], scale={"a": 2.0}).init(tree)

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda tx: optax.MultiSteps(tx, 2),
            lambda tx: optax.apply_if_finite(tx, 2),
            lambda tx: optax.named_chain(("tx", tx), ("sgd", optax.sgd(1.0))),
            lambda tx: optax.masked(tx, {"x": False}),
        ],
    )
    def test_are_an_error_within_what_optax_wraps(self, wrap):
        with pytest.raises(ValueError, match="has no leaf"):
            wrap(lorapro()).init({"x": {}})

    def test_label_without_a_leaf_is_named_as_a_cause(self):
        params = {"m": pair_of((8, 2), (2, 6))}
        labels = jax.tree.map(lambda _: "frozen", params)
        tx = optax.partition({"lora": lorapro(), "frozen": optax.set_to_zero()}, labels)
        match = r"\['m/lora_a', 'm/lora_b'\] masked or None.*label of `optax.partition`"
        with pytest.raises(ValueError, match=match):
            tx.init(params)

    def test_inject_hyperparams_does_not_hide_them(self):
        with pytest.raises(ValueError, match="has no leaf"):
            optax.inject_hyperparams(lorapro_adamw)(1e-3).init({"m": {}})

    def test_model_without_adapters_is_named_as_a_cause(self):
        model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=r"Does the model have adapters.*wrt=nnx"):
            nnx.Optimizer(model, lorapro_adamw(1e-3), wrt=nnx.LoRAParam)


class TestPlaceholder:
    """`optax.tree.map_params` calls `init` with one, which has none of the paths."""

    @each_maker
    @pytest.mark.parametrize(
        "options",
        [
            {"pairs": [("m/x", "m/y")]},
            {"pairs": lambda tree: [("m/x", "m/y")]},
            {"pairs": [("m/x", "m/y")], "scale": {"x": 2.0}},
            {"pairs": [("m/x", "m/y")], "stack_axis": 0},
        ],
    )
    def test_passes_whatever_names_the_pairs(self, make, options):
        params = {"m": {"x": jnp.ones((8, 2)), "y": jnp.ones((2, 6))}, "n": jnp.ones(3)}
        tx = make(**options)
        state = tx.init(params)

        marked = optax.tree.map_params(tx, lambda x: x + 1, state)

        changed = jax.tree.map(lambda x, y: bool(jnp.any(x != y)), state, marked)
        count = sum(jax.tree.leaves(changed))
        assert (count > 0) == (jax.tree.leaves(state) != [])

    def test_passes_a_mask_of_decay(self):
        params = {"m": pair_of((8, 2), (2, 6))}
        tx = lorapro_adamw(
            1e-3, weight_decay=0.1, mask={"m": {"lora_a": True, "lora_b": False}}
        )
        optax.tree.map_params(tx, lambda x: x, tx.init(params))

    def test_passes_through_a_partition(self):
        params = {"m": {"x": jnp.ones((8, 2)), "y": jnp.ones((2, 6))}, "n": jnp.ones(3)}
        labels = {"m": "lora", "n": "frozen"}
        transforms = {"lora": lorapro_adamw(1e-3, pairs=[("m/x", "m/y")])}
        tx = optax.partition({**transforms, "frozen": optax.set_to_zero()}, labels)
        optax.tree.map_params(tx, lambda x: x, tx.init(params))


STACK = {"layers": pair_of((3, 8, 2), (3, 2, 6)), "head": pair_of((8, 2), (2, 6))}
EACH = np.array([1.0, 2.0, 4.0])


class TestScaleOfEachLayer:
    """Patterns of alphas by layer end up in one stack."""

    @pytest.mark.parametrize(
        ("options", "due"),
        [
            ({"scale": {"layers": EACH, "head": 1}}, EACH),
            ({"alpha": {"layers": EACH, "head": 1}}, EACH / 2),
            ({"alpha": {"layers": jnp.asarray(EACH), ".*": 2}}, EACH / 2),
            ({"alpha": {"layers": EACH, ".*": 2}, "rslora": True}, EACH / 2**0.5),
            ({"scale": lambda x: EACH if "layers" in x.a else 1.0}, EACH),
            (
                {
                    "pairs": [
                        LoRAPair("layers/lora_a", "layers/lora_b", scale=EACH),
                        ("head/lora_a", "head/lora_b"),
                    ]
                },
                EACH,
            ),
        ],
    )
    def test_is_a_float_array_of_the_pair(self, options, due):
        pairs = {pair.a: pair for pair in find_pairs(STACK, **options)}
        scale = pairs["layers/lora_a"].scale
        assert isinstance(scale, np.ndarray)
        np.testing.assert_allclose(scale, due)
        assert isinstance(pairs["head/lora_a"].scale, float)

    @pytest.mark.parametrize("name", ["scale", "alpha"])
    @pytest.mark.parametrize("value", [np.ones(2), jnp.ones((3, 1)), np.ones(0)])
    def test_of_another_shape_names_path_found_and_due(self, name, value):
        found = re.escape(str(value.shape))
        match = (
            rf"The {name} of `layers/lora_a` has shape {found}; due is \(\) or \(3,\)"
        )
        with pytest.raises(ValueError, match=match):
            find_pairs(STACK, **{name: {"layers": value, ".*": 1}})
        match = r"of `head/lora_a` has shape \(3,\); due is \(\)\. Where pairs differ"
        with pytest.raises(ValueError, match=match):
            find_pairs(STACK, **{name: EACH})

    @pytest.mark.parametrize("bad", [0.0, np.nan, np.inf, 1e-40])
    def test_with_one_bad_number_is_an_error(self, bad):
        with pytest.raises(ValueError, match=r"The scale of `layers/lora_a` is \["):
            find_pairs(STACK, scale={"layers": np.array([1.0, bad, 2.0]), ".*": 1})

    @pytest.mark.parametrize("value", [[1.0, 2.0, 4.0], np.array([True, True, False])])
    def test_that_is_no_array_of_numbers_says_what_to_pass(self, value):
        with pytest.raises(TypeError, match=r"for stacked layers an array"):
            find_pairs(STACK, scale={"layers": value, ".*": 1})

    def test_may_be_traced(self):
        found = []

        def update(scale):
            (pair,) = find_pairs({"layers": STACK["layers"]}, scale=scale)
            found.append(pair.scale)
            with pytest.raises(ValueError, match=r"shape \(3,\); due is \(\)\."):
                find_pairs({"head": STACK["head"]}, scale=scale)
            return jnp.sum(pair.scale)

        assert jax.jit(update)(EACH) == EACH.sum()
        assert isinstance(found[0], jax.core.Tracer)

    def test_is_a_range_in_the_table(self):
        options = {"alpha": {"layers": 2 * EACH, ".*": 8}}
        rows = [
            line.split("  ") for line in describe_pairs(STACK, **options).split("\n")
        ]
        assert [row[-1].strip() for row in rows] == ["scale", "4", "1 to 4"]
        same = describe_pairs({"x": STACK["layers"]}, scale=np.full(3, 2.0))
        assert same.endswith(" 2")

    def test_of_two_stacked_axes_has_both(self):
        tree = {"m": pair_of((3, 2, 8, 4), (3, 2, 4, 6))}
        (pair,) = find_pairs(tree, scale=np.ones((3, 2)))
        assert np.shape(pair.scale) == (3, 2)
        with pytest.raises(ValueError, match=r"due is \(\) or \(3, 2\)"):
            find_pairs(tree, scale=np.ones((2, 3)))

    @each_maker
    def test_gives_every_layer_what_it_gets_alone(self, make):
        params = {"m": random_like(STACK["layers"], 0)}
        grads = random_like(params, 1)
        got = step(make(scale=EACH), params, grads)
        for i, scale in enumerate(EACH):
            one = lambda tree, i=i: [x[i] for x in tree["m"].values()]
            named = lambda tree, one=one: dict(zip(PAIR, one(tree), strict=True))
            due = step(make(scale=scale), named(params), named(grads))
            for x, y in zip(one(got), due.values(), strict=True):
                np.testing.assert_allclose(x, y, rtol=2e-3, atol=1e-4)
        # Negative control: one scale for all is another step.
        if make is lorapro:
            plain = step(make(), params, grads)
            assert not np.allclose(plain["m"]["lora_a"][2], got["m"]["lora_a"][2])


TREE = {"q": PAIR, "k": PAIR, "norm": zeros(3)}


class TestTable:
    """What `describe_pairs` says of all other leaves."""

    def test_counts_other_leaves_and_says_what_they_get(self):
        assert describe_pairs(TREE).splitlines()[-1] == (
            "other leaves: 1, passed on as they are by lorapro, plain AdamW in "
            "lorapro_adamw"
        )
        assert "other leaves" not in describe_pairs({"q": TREE["q"]})

    def test_lists_what_explicit_pairs_leave_out_whatever_its_name(self):
        lines = describe_pairs(TREE, pairs=[("q/lora_a", "q/lora_b")]).splitlines()
        assert lines[-2].startswith("other leaves: 3, ")
        assert lines[-1] == "not in a pair: k/lora_a, k/lora_b, norm"

    def test_does_not_list_a_whole_model(self):
        tree = {"m": TREE["q"], **{f"x{i:03}": zeros(2) for i in range(100)}}
        last = describe_pairs(tree, pairs=[("m/lora_a", "m/lora_b")]).splitlines()[-1]
        assert last.endswith("x039 and 60 more")
