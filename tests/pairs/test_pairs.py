"""Finding pairs: names, layouts, scales, the table, and every error's text."""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorapro_jax import LoRAPair, describe_pairs, find_pairs, lorapro
from lorapro_jax.pairs._axes import Axes, LayoutError
from lorapro_jax.pairs._infer import infer_axes
from lorapro_jax.pairs._names import normalize_path, parse_factor_name

pytestmark = pytest.mark.usefixtures("quick_compiles")


def ones(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def pair_tree(a, b, names=("lora_a", "lora_b")):
    return {"m": {names[0]: ones(*a), names[1]: ones(*b)}}


class Box(NamedTuple):
    value: object


@pytest.mark.parametrize(
    "path",
    [
        (jax.tree_util.DictKey("q"), jax.tree_util.DictKey("lora_a")),
        (jax.tree_util.DictKey("q/lora_a"), jax.tree_util.GetAttrKey("value")),
        (jax.tree_util.GetAttrKey("q"), jax.tree_util.DictKey("lora_a.array")),
        "['q']['lora_a'].value",
        "q.lora_a",
        "q/lora_a/raw_value",
    ],
)
def test_one_place_has_one_path_however_it_is_reached(path):
    assert normalize_path(path) == "q/lora_a"


@pytest.mark.parametrize(
    ("path", "owner", "role", "layouts"),
    [
        ("q/lora_a", "q", "a", ("jax",)),
        ("q/kernel_lora_b", "q", "b", ("jax",)),
        ("q/w_lora_a", "q", "a", ("jax",)),
        ("mha/query/lora_kernel_a", "mha/query", "a", ("jax",)),
        ("embed/lora_embeddings_b", "embed", "b", ("jax",)),
        ("query/lora_a/kernel", "query", "a", ("jax",)),
        ("q/lora/a", "q/lora", "a", ("jax",)),
        ("q/lora/down/weight", "q/lora", "a", ("jax", "torch")),
        ("adapter/lora_down/weight", "adapter", "a", ("jax", "torch")),
        ("adapter/lora_up/weight", "adapter", "b", ("jax", "torch")),
        ("q/lora_A/weight", "q", "a", ("torch",)),
        ("q/lora_B/default/weight", "q", "b", ("torch",)),
        ("wte/lora_embedding_A", "wte", "a", ("torch",)),
        ("q/lora_A", "q", "a", ("jax", "torch")),
        ("lora_a", "", "a", ("jax",)),
    ],
)
def test_names_of_factors_say_role_and_layout(path, owner, role, layouts):
    name = parse_factor_name(path)
    assert name is not None
    assert (name.owner, name.role, name.layouts) == (owner, role, layouts)


@pytest.mark.parametrize(
    "path",
    [
        "attn/q_lora_rank",
        "attn/kv_lora",
        "attn/q_a_proj/kernel",
        "q/lora_magnitude_vector",
        "flora_a",
        "flora/a",
        "attn/q_lora/a",
        "attn/kv_lora/down/kernel",
        "q/lora_alpha",
        "q/lora_a/bias",
        "block/a",
    ],
)
def test_other_names_are_no_factors(path):
    assert parse_factor_name(path) is None


@pytest.mark.parametrize("rank", [8, 32, 64])
@pytest.mark.parametrize(
    ("a", "b", "axes"),
    [
        (("D", "r"), ("r", "F"), Axes(1, 0)),
        (("D", "r"), ("r", "N", "H"), Axes(1, 0)),
        (("N", "H", "r"), ("r", "D"), Axes(2, 0)),
        (("D", "r"), ("r", 2, "K", "H"), Axes(1, 0)),
        ((3, 3, "D", "r"), ("r", "F"), Axes(3, 0)),
        (("E", "D", "r"), ("r", "F"), Axes(2, 0)),
        (("N", "H", "r"), ("r", "K", "F"), Axes(2, 0)),
        (("E", "D", "r"), ("E", "r", "F"), Axes(2, 1, (0,), (0,))),
        (("L", "D", "r"), ("L", "r", "F"), Axes(2, 1, (0,), (0,))),
        (("L", "D", "r"), ("L", "r", "K", "H"), Axes(2, 1, (0,), (0,))),
        (("L", "E", "D", "r"), ("L", "E", "r", "F"), Axes(3, 2, (0, 1), (0, 1))),
        (("D", "L", "r"), ("r", "L", "F"), Axes(2, 0, (1,), (1,))),
        (("D", "L", "r"), ("r", "L", "K", "H"), Axes(2, 0, (1,), (1,))),
    ],
)
def test_axes_follow_from_shapes_at_the_sizes_of_a_7b_model(a, b, axes, rank):
    """4096 features, 11008 hidden, 40 heads of 128, 36 layers, 16 experts."""
    sizes = {"D": 4096, "F": 11008, "N": 40, "H": 128, "K": 10, "L": 36, "E": 16}
    shapes = [tuple({**sizes, "r": rank}.get(x, x) for x in shape) for shape in (a, b)]
    assert infer_axes(*shapes, ("jax",)) == axes


@pytest.mark.parametrize(
    ("a", "b", "layouts", "axes"),
    [
        ((8, 64), (48, 8), ("torch",), Axes(0, 1)),
        ((8, 16, 3, 3), (48, 8, 1, 1), ("torch",), Axes(0, 1)),
        ((6, 8, 64), (6, 48, 8), ("torch",), Axes(1, 2, (0,), (0,))),
        ((8, 64), (64, 8), ("jax", "torch"), Axes(0, 1)),
        ((64, 8), (8, 64), ("jax", "torch"), Axes(1, 0)),
        ((64, 8), (8, 2), ("jax",), Axes(1, 0)),  # r = 8 on a head of 2 classes
        ((8, 64), (2, 8), ("torch",), Axes(0, 1)),
    ],
)
def test_pytorch_layout_is_read_by_name_or_by_low_rank(a, b, layouts, axes):
    """A square layer's (r, D), (D, r) would have rank D in JAX's layout."""
    assert infer_axes(a, b, layouts) == axes


TIE = ((32, 32, 128, 32), (32, 32, 4096))  # o_proj, 32 layers, heads and rank


def test_a_tie_is_an_error_that_names_the_readings_and_the_remedy():
    message = (
        r"`m/lora_a` \(32, 32, 128, 32\) and `m/lora_b` \(32, 32, 4096\) cannot be "
        r"read as one LoRA pair: they can be read as rank 32 on axes 3 and 1, stacked "
        r"on \(0,\) or rank 32 on axes 3 and 0, stacked on \(1,\)\. .*`stack_axis=`"
    )
    with pytest.raises(ValueError, match=message):
        find_pairs(pair_tree(*TIE))


@pytest.mark.parametrize(
    ("stack_axis", "axes"),
    [
        (0, Axes(3, 1, (0,), (0,))),
        (1, Axes(3, 0, (1,), (1,))),
        ((), Axes(3, 0)),
    ],
)
def test_stack_axis_settles_a_tie(stack_axis, axes):
    (pair,) = find_pairs(pair_tree(*TIE), stack_axis=stack_axis)
    assert pair[2:6] == axes


def test_stack_axis_leaves_unstacked_pairs_of_two_axes_alone():
    tree = {"head": pair_tree((64, 4), (4, 8))["m"], **pair_tree(*TIE)}
    head, stacked = find_pairs(tree, stack_axis=0)
    assert (head.a_batch_axes, stacked.a_batch_axes) == ((), (0,))


def test_stack_axis_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match=r"`stack_axis=1` does not fit them"):
        find_pairs(pair_tree((6, 64, 8), (6, 8, 32)), stack_axis=1)


def test_pairs_come_in_the_order_of_the_tree_and_leave_the_rest():
    tree = {
        "b": {"lora_b": ones(2, 5), "lora_a": ones(8, 2), "kernel": ones(8, 5)},
        "a": [{"x_lora_a": ones(7, 3), "x_lora_b": ones(3, 6), "scale": ones(7)}],
        "two": {
            "q_lora_a": ones(9, 2), "q_lora_b": ones(2, 9),
            "k_lora_a": ones(9, 3), "k_lora_b": ones(3, 9),
        },
    }  # fmt: skip
    paths = [pair.a for pair in find_pairs(tree)]
    assert paths == ["a/0/x_lora_a", "b/lora_a", "two/k_lora_a", "two/q_lora_a"]


def test_table_shows_path_shapes_layout_stack_rank_and_scale():
    tree = {
        "q": {"kernel_lora_a": ones(6, 64, 8), "kernel_lora_b": ones(6, 8, 4, 16)},
        "v": {"lora_A": {"weight": ones(4, 64)}, "lora_B": {"weight": ones(32, 4)}},
    }
    table = [line.split() for line in describe_pairs(tree, alpha=16).splitlines()]
    heads, q, v = (" ".join(cells) for cells in table)
    assert heads == "pair A B layout stacked rank scale"
    assert q == (
        "q/kernel_lora_{a,b} (6, 64, 8) (6, 8, 4, 16) L·in·r L·r·out·out 0 8 2"
    )
    assert v == "v/lora_{A,B}/weight (4, 64) (32, 4) r·in out·r - 4 4"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1.0, 1.0]),
        ({"scale": 2}, [2.0, 2.0]),
        ({"scale": np.float32(0.5)}, [0.5, 0.5]),
        ({"alpha": 16.0}, [2.0, 4.0]),
        ({"alpha": 16.0, "rslora": True}, [16 / np.sqrt(8), 8.0]),
        ({"scale": {r"^k/": 3.0, ".*": 5.0}}, [3.0, 5.0]),
        ({"alpha": {"lora_a$": 8}}, [1.0, 2.0]),
        ({"scale": lambda pair: 100.0 / pair.rank}, [12.5, 25.0]),
    ],
)
def test_scale_is_resolved_pair_by_pair(options, expected):
    tree = {
        "k": {"lora_a": ones(64, 8), "lora_b": ones(8, 64)},
        "q": {"lora_a": ones(64, 4), "lora_b": ones(4, 64)},
    }
    scales = [pair.scale for pair in find_pairs(tree, **options)]
    np.testing.assert_allclose(scales, expected)


def test_pairs_from_a_generator_are_still_there_at_the_first_update():
    params = {"m": {"x": jnp.ones((64, 4)), "y": jnp.ones((4, 8))}}
    tx = lorapro(pairs=(pair for pair in [("m/x", "m/y")]))
    step, _ = tx.update(params, tx.init(params), params)
    assert not np.array_equal(step["m"]["x"], params["m"]["x"])


def test_scale_of_an_explicit_pair_goes_before_the_option():
    pairs = [LoRAPair("m/lora_a", "m/lora_b", scale=7.0)]
    (pair,) = find_pairs(pair_tree((64, 4), (4, 8)), pairs=pairs, scale=2.0)
    assert pair.scale == 7.0


@pytest.mark.parametrize("wrap", [list, lambda pairs: lambda tree: pairs])
def test_explicit_pairs_by_path_or_function(wrap):
    """Keras hands over a list without names; AXLearn has the rank axis in front."""
    tree = [ones(64, 4), ones(4, 8), ones(8), ones(4, 3, 2, 8), ones(3, 5, 4)]
    pairs = wrap([("0", "1"), LoRAPair("3", "4", 0, -1, (1,), (0,))])
    first, second = find_pairs(tree, pairs=pairs)
    assert first == LoRAPair("0", "1", 1, 0, (), (), 1.0, 4)
    assert second == LoRAPair("3", "4", 0, 2, (1,), (0,), 1.0, 4)


def test_boxes_around_leaves_do_not_change_the_pairs():
    tree = pair_tree((64, 4), (4, 8))
    boxed = jax.tree.map(Box, tree, is_leaf=lambda x: isinstance(x, type(ones())))
    assert find_pairs(boxed) == find_pairs(tree)


def test_two_adapters_of_peft_in_one_module_are_two_pairs():
    sides = {"lora_A": (4, 64), "lora_B": (32, 4)}
    tree = {
        "q": {
            side: {name: {"weight": ones(*shape)} for name in ("default", "task")}
            for side, shape in sides.items()
        }
    }
    paths = [pair[:2] for pair in find_pairs(tree)]
    assert paths == [
        (f"q/lora_A/{name}/weight", f"q/lora_B/{name}/weight")
        for name in ("default", "task")
    ]


def test_tuple_keys_of_a_flattened_tree_are_paths():
    tree = {("q", "lora_a"): ones(64, 4), ("q", "lora_b"): ones(4, 8)}
    assert find_pairs(tree)[0][:2] == ("q/lora_a", "q/lora_b")


def test_table_names_what_looks_like_lora_but_is_in_no_pair():
    tree = {**pair_tree((64, 4), (4, 8)), "k": {"loraA": ones(64, 4)}}
    assert describe_pairs(tree).splitlines()[-1] == "not in a pair: k/loraA"


def test_empty_trees_and_trees_of_placeholders_have_no_pairs():
    for tree in ({}, [], None, {"m": optax.MaskedNode()}):
        assert find_pairs(tree) == ()
        tx = lorapro(on_no_pairs="ignore")
        assert tx.init(tree) == optax.EmptyState()


GOOD = pair_tree((64, 4), (4, 8))
ERRORS = {
    "half a pair": (
        {"attn": {"lora_a": ones(64, 4), "kernel": ones(64, 8)}},
        {},
        r"`attn/lora_a` is a LoRA factor without its partner `attn/lora_b` \(leaves in "
        r"`attn`: \['kernel', 'lora_a'\]\)\. .*`pairs=.*`optax.set_to_zero\(\)`",
    ),
    "masked partner": (
        {"attn": {"lora_a": ones(64, 4), "lora_b": optax.MaskedNode()}},
        {},
        r"`attn/lora_a` .*masked or None: \['lora_b'\].*or put `lorapro\(\)` before it",
    ),
    "frozen partner": (
        {"attn": {"lora_a": None, "lora_b": ones(4, 8)}},
        {},
        r"`attn/lora_b` is .* without its partner.*masked or None: \['lora_a'\]",
    ),
    "two leaves for one factor": (
        {"m": {"lora_a": ones(64, 4), "lora_A": ones(64, 4), "lora_b": ones(4, 8)}},
        {},
        r"\['m/lora_A', 'm/lora_a'\] all look like the same factor.*`pairs=`",
    ),
    "shapes without a rank": (
        pair_tree((64, 4), (5, 8)),
        {},
        r"`m/lora_a` \(64, 4\) and `m/lora_b` \(5, 8\) cannot .*they share no rank",
    ),
    "square layer in PyTorch's layout under JAX's names": (
        pair_tree((8, 64), (64, 8)),
        {},
        r"they can be read as rank 64 on axes 1 and 0, unstacked or rank 8 on axes 0",
    ),
    "one axis": (
        pair_tree((64,), (4, 8)),
        {},
        r"a factor has a rank axis and at least one feature axis",
    ),
    "empty factor": (pair_tree((64, 0), (0, 8)), {}, r"a factor has no elements"),
    "integer factor": (
        {"m": {"lora_a": ones(64, 4, dtype=jnp.int8), "lora_b": ones(4, 8)}},
        {},
        r"`m/lora_a` has dtype int8.*freeze it: `optax.partition",
    ),
    "complex factor": (
        {"m": {"lora_a": ones(64, 4), "lora_b": ones(4, 8, dtype=jnp.complex64)}},
        {},
        r"`m/lora_b` has dtype complex64.*name all other pairs with `pairs=`",
    ),
    "not an array": (
        {"m": {"lora_a": 3.0, "lora_b": ones(4, 8)}},
        {},
        r"`m/lora_a` is named like a LoRA factor, but it is a float, not an array",
    ),
    "one path twice": (
        {"m": {"lora_a": ones(64, 4), "lora_b": ones(4, 8)}, "m/lora_a": ones(64, 4)},
        {},
        r"Two leaves have the path `m/lora_a`",
    ),
    "unknown path": (
        GOOD,
        {"pairs": [("m/lora_x", "m/lora_b")]},
        r"`m/lora_x` of the given `pairs` is no path of this tree of 2 leaves\. "
        r"Close to it: \['m/lora_",
    ),
    "masked explicit path": (
        {"m": {"x": optax.MaskedNode(), "y": ones(4, 8)}},
        {"pairs": [("m/x", "m/y")]},
        r"`m/x` of the given `pairs` is masked or None here\. Leave its pair",
    ),
    "factor in two pairs": (
        GOOD,
        {"pairs": [("m/lora_a", "m/lora_b"), ("m/lora_a", "m/lora_b")]},
        r"`m/lora_a` belongs to two of the given `pairs`",
    ),
    "one pair without a list": (
        GOOD,
        {"pairs": LoRAPair("m/lora_a", "m/lora_b")},
        r"`pairs` contains 'm/lora_a'\. It is a list of `LoRAPair`s or of tuples",
    ),
    "bare tuple": (
        GOOD,
        {"pairs": ("m/lora_a", "m/lora_b")},
        r"`pairs` contains 'm/lora_a'\.",
    ),
    "path that is no string": (
        GOOD,
        {"pairs": [(0, 1)]},
        r"`pairs` contains \(0, 1\); both paths have to be strings",
    ),
    "axes that are no integers": (
        GOOD,
        {"pairs": [("m/lora_a", "m/lora_b", 2.0, 1)]},
        r"\(2.0,\) is no axis and no tuple of axes",
    ),
    "batch axes without rank axes": (
        pair_tree((3, 16, 4), (3, 4, 12)),
        {"pairs": [LoRAPair("m/lora_a", "m/lora_b", None, None, (0,), (0,))]},
        r"go together, and with batch axes both are needed",
    ),
    "wrong rank": (
        GOOD,
        {"pairs": [LoRAPair("m/lora_a", "m/lora_b", 1, 0, rank=9)]},
        r"`m/lora_a` has rank 4 on axis 1, not the given `rank=9`",
    ),
    "half of the axes": (
        GOOD,
        {"pairs": [LoRAPair("m/lora_a", "m/lora_b", a_rank_axis=1)]},
        r"`a_rank_axis=1` and `b_rank_axis=None` go together",
    ),
    "axis out of range": (
        GOOD,
        {"pairs": [LoRAPair("m/lora_a", "m/lora_b", 2, 0)]},
        r"A has no axes \(2,\)",
    ),
    "axis twice": (
        pair_tree((3, 64, 4), (3, 4, 8)),
        {"pairs": [LoRAPair("m/lora_a", "m/lora_b", 2, 1, (0,), (1,))]},
        r"the axes \(1, 1\) of B name one axis twice",
    ),
    "no feature axis": (
        GOOD,
        {"pairs": [LoRAPair("m/lora_a", "m/lora_b", 1, 0, (0,), (1,))]},
        r"the axes \(1, 0\) of A leave no feature axis",
    ),
    "ranks differ": (
        GOOD,
        {"pairs": [LoRAPair("m/lora_a", "m/lora_b", 0, 0)]},
        r"the rank is 64 in A and 4 in B",
    ),
    "batches differ": (
        pair_tree((3, 64, 4), (5, 4, 8)),
        {"pairs": [LoRAPair("m/lora_a", "m/lora_b", 2, 1, (0,), (0,))]},
        r"the batch axes have sizes \[3\] and \[5\]",
    ),
    "batch axes out of order": (
        pair_tree((3, 5, 64, 4), (3, 5, 4, 8)),
        {"pairs": [LoRAPair("m/lora_a", "m/lora_b", 3, 2, (1, 0), (1, 0))]},
        r"the batch axes of A are not in ascending order",
    ),
    "scale and alpha": (GOOD, {"scale": 2.0, "alpha": 8.0}, r"Both `scale=2.0` and "),
    "rslora without alpha": (GOOD, {"rslora": True}, r"`rslora=True` divides `alpha`"),
    "pattern without a match": (
        GOOD,
        {"scale": {"q_proj": 2.0}},
        r"The pattern 'q_proj' of `scale=\{'q_proj': 2.0\}` occurs in no path of a",
    ),
    "bad pattern": (GOOD, {"scale": {"(": 2.0}}, r"'\(' of `scale=` is no regular exp"),
    "tiny scale": (
        GOOD,
        {"scale": 1e-40},
        r"The scale of `m/lora_a` is 1e-40\..*float32",
    ),
    "scale array": (GOOD, {"scale": jnp.array(jnp.nan)}, r"of `m/lora_a` is nan"),
    "huge alpha": (GOOD, {"alpha": 10**400}, r"The alpha of `m/lora_a` is 1000"),
    "scale zero": (GOOD, {"scale": 0.0}, r"The scale of `m/lora_a` is 0.0"),
    "alpha infinite": (GOOD, {"alpha": np.inf}, r"The alpha of `m/lora_a` is inf"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_error_names_the_path_what_was_found_and_the_remedy(case):
    tree, options, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        lorapro(**options).init(tree)


@pytest.mark.parametrize("scale", ["2", True, [1.0, 2.0], None, 1j])
def test_scale_that_is_no_number_is_a_type_error(scale):
    with pytest.raises(TypeError, match=r"The scale of `m/lora_a` is .* real number"):
        find_pairs(GOOD, scale=scale)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gauge": "kronecker"}, r"`gauge='kronecker'` has to be one of .*'sylvester'"),
        ({"damping": -1.0}, r"`damping=-1.0` has to be a finite number of at least 0"),
        ({"damping": np.nan}, r"`damping=nan` has to be a finite number"),
        ({"damping": jnp.array(-1.0)}, r"`damping=Array\(-1., .*` has to be a finite"),
        ({"damping": None}, r"`damping=None` has to be a finite number"),
        ({"damping": np.array([0.1, 0.2])}, r"has to be a finite number"),
        ({"on_no_pairs": "warn"}, r"`on_no_pairs='warn'` has to be one of"),
    ],
)
def test_bad_options_fail_where_they_are_written(options, message):
    with pytest.raises(ValueError, match=message):
        lorapro(**options)


def test_stack_axis_has_to_be_static_under_inject_hyperparams():
    params = {"m": {"lora_a": jnp.ones((6, 64, 8)), "lora_b": jnp.ones((6, 8, 32))}}
    make = optax.inject_hyperparams(lorapro)
    with pytest.raises(TypeError, match=r"static_args=\('stack_axis',\)"):
        make(stack_axis=0).init(params)
    make = optax.inject_hyperparams(lorapro, static_args=("stack_axis", "scale"))
    tx = make(scale=lambda pair: 8.0 / pair.rank, stack_axis=np.int64(0))
    tx.update(params, tx.init(params), params)


def test_inject_hyperparams_does_not_hide_bad_options():
    params = {"m": {"lora_a": jnp.ones((64, 8)), "lora_b": jnp.ones((8, 32))}}
    make = optax.inject_hyperparams(lorapro)
    for options in ({"damping": -1.0}, {"scale": 0.0}, {"scale": 2.0, "alpha": 4.0}):
        with pytest.raises(ValueError, match=r"damping|scale"):
            make(**options).init(params)


def test_tree_without_pairs_is_an_error_that_lists_leaves_unless_ignored():
    tree = {"mlp": {"kernel": jnp.ones((3, 3))}}
    message = r"No LoRA pair among the 1 leaves, such as \['mlp/kernel'\]"
    with pytest.raises(ValueError, match=message):
        lorapro().init(tree)
    tx = lorapro(on_no_pairs="ignore")
    step, _ = tx.update(tree, tx.init(tree))
    assert step is tree


def test_gradients_and_params_have_to_match():
    grads = {"m": {"lora_a": jnp.ones((64, 4)), "lora_b": jnp.ones((4, 8))}}
    tx = lorapro()
    state = tx.init(grads)
    with pytest.raises(ValueError, match=r"`params` has no leaf `m/lora_a`"):
        tx.update(grads, state, {"other": grads["m"]})
    narrow = {"m": {"lora_a": jnp.ones((32, 4)), "lora_b": jnp.ones((4, 8))}}
    message = r"`m/lora_a` has shape \(32, 4\) in `params` and \(64, 4\) in the grad"
    with pytest.raises(ValueError, match=message):
        tx.update(grads, state, narrow)


def test_layout_errors_never_escape_without_a_path():
    with pytest.raises(LayoutError) as bare:
        infer_axes((64, 4), (5, 8), ("jax",))
    with pytest.raises(ValueError, match=re.escape(str(bare.value))) as named:
        find_pairs(pair_tree((64, 4), (5, 8)))
    assert type(named.value) is ValueError
    assert "m/lora_a" in str(named.value)
