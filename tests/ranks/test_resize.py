"""Adapters of other ranks: against the singular value decomposition in NumPy, float64.

Layouts are those of `support.runs`: seven pairs, one of them of rank 1, with a scale
each, plain, stacked, with heads, and as PyTorch has them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lorapro_jax import (
    LoRAPair,
    RankTable,
    find_pairs,
    lorapro_adamw,
    resize_adapters,
)
from lorapro_jax.ranks._table import RankRow
from tests.support import oracle
from tests.support.layers import (
    ALPHA,
    MODELS,
    RANK,
    TOLERANCE,
    qwix_nnx,
    replaced,
)
from tests.support.layouts import distance, leaves_by_path, random_like
from tests.support.runs import TREE, initial, matrices, scales

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:qwix.*"),
    pytest.mark.usefixtures("quick_compiles"),
]

KEY = jax.random.key(3)
EXACT = 1e-13  # some hundred roundings of float64
SCALES = scales(TREE)


@functools.cache
def resized(rank, b_scale=0.5, **options):
    """The tree, the result, and both as lists of (A, B), one for each layer."""
    params = initial(TREE, b_scale)
    options = {"scale": SCALES, "key": KEY, **options}
    return params, resize_adapters(params, rank, **options)


def layers(params):
    """(A, B) of all layers in float64, with s and the path of its A."""
    leaves = leaves_by_path(params)
    return [
        (pair.a, pair.scale, a, b) for pair in TREE for a, b in matrices(leaves, pair)
    ]


def best(product, rank):
    """The closest matrix of a rank, and its relative error."""
    u, values, vt = np.linalg.svd(product, full_matrices=False)
    near = (u[:, :rank] * values[:rank]) @ vt[:rank]
    return near, np.sqrt(np.sum(values[rank:] ** 2) / np.sum(values**2))


def test_a_lower_rank_is_the_closest_product_of_that_rank(x64):
    rank = 1
    params, result = resized(rank)
    assert jax.tree.structure(result.params) == jax.tree.structure(params)

    errors = {path: iter(np.ravel(x)) for path, x in result.errors.items()}
    lowered = 0
    for old, new in zip(layers(params), layers(result.params), strict=True):
        (path, _, a, b), (_, _, new_a, new_b) = old, new
        want, error = best(b @ a, rank)
        assert len(new_a) == rank
        assert np.abs(new_b @ new_a - want).max() < EXACT * np.abs(b @ a).max()
        assert abs(next(errors[path]) - error) < EXACT
        if len(a) > rank:
            lowered += 1
            # Negative control: leaving the last directions out is worse.
            cut = np.linalg.norm(b[:, :rank] @ a[:rank] - b @ a)
            assert cut > 1.01 * np.linalg.norm(want - b @ a)
    assert lowered > 6


def test_the_larger_factor_keeps_its_length_and_the_other_the_singular_values(x64):
    """So that A, which starts large, stays what learning rates were made for."""
    for size, leads in ((0.5, "a"), (3.0, "b")):
        params, result = resized(1, size)
        for old, new in zip(layers(params), layers(result.params), strict=True):
            (_, _, a, b), (_, _, new_a, new_b) = old, new
            if len(a) == 1:
                continue
            x, y = (a, new_a) if leads == "a" else (b.T, new_b.T)
            length = np.sqrt(np.mean(np.sum(x**2, 1)))
            np.testing.assert_allclose(np.linalg.norm(y, axis=1), length, rtol=1e-12)


def test_a_higher_rank_leaves_the_product_bit_by_bit(x64):
    """Even where it is above the number of inputs."""
    rank = 7
    params, result = resized(rank)
    for old, new in zip(layers(params), layers(result.params), strict=True):
        (path, _, a, b), (_, _, new_a, new_b) = old, new
        r = len(a)
        np.testing.assert_array_equal(new_a[:r], a)
        np.testing.assert_array_equal(new_b[:, :r], b)
        np.testing.assert_array_equal(new_b[:, r:], 0)
        assert new_a.shape == (rank, a.shape[1])
        assert not np.any(result.errors[path])


def test_new_directions_widen_what_a_step_can_do_to_w(x64):
    """By all that as many rows can give, and at once: they are rows of A.

    Rows are orthogonal to the old ones and to each other, as far as there are inputs.
    """
    rank = 7
    params, result = resized(rank)
    rng = np.random.default_rng(0)
    for old, new in zip(layers(params), layers(result.params), strict=True):
        (_, _, a, b), (_, _, new_a, new_b) = old, new
        r, n = a.shape
        fresh, free = new_a[r:], min(rank, n) - r
        length = np.sqrt(np.mean(np.sum(a**2, 1)))
        np.testing.assert_allclose(np.linalg.norm(fresh, axis=1), length, rtol=1e-12)
        assert np.abs(fresh[:free] @ a.T).max() < 1e-12
        np.testing.assert_allclose(
            fresh[:free] @ fresh[:free].T, length**2 * np.eye(free), atol=1e-12
        )
        full = rng.standard_normal((len(b), n))
        reach = lambda a, b, full=full: np.linalg.norm(oracle.projection(a, b, full))
        assert reach(new_a, new_b) > 1.001 * reach(a, b)
        # Zeros would change nothing, and neither factor would ever move.
        dead = np.pad(a, ((0, rank - r), (0, 0)))
        assert abs(reach(dead, new_b) - reach(a, b)) < EXACT * reach(a, b)


@pytest.mark.parametrize("rank", [1, 7])
def test_after_the_start_with_b_zero_all_directions_are_alive(rank, x64):
    """B = 0 stays 0, and every row of A has a gradient to hand to B."""
    _, result = resized(rank, 0.0)
    for _, _, a, b in layers(result.params):
        assert not b.any()
        assert np.linalg.norm(a, axis=1).min() > 0.1
        assert np.linalg.matrix_rank(a) == min(a.shape)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("rank", [1, 7])
def test_with_alpha_the_new_scale_times_the_new_product_is_the_old(rank, rslora, x64):
    """s = alpha / r differs before and after; alpha is one for each pair here."""
    alpha = {"plain": 3.0, ".*": 8.0}
    params = initial(TREE, 0.5)
    result = resize_adapters(params, rank, alpha=alpha, rslora=rslora, key=KEY)

    power = 0.5 if rslora else 1.0
    for old, new in zip(layers(params), layers(result.params), strict=True):
        (path, _, a, b), (_, _, new_a, new_b) = old, new
        top = 3.0 if "plain" in path else 8.0
        scale, new_scale = (top / len(x) ** power for x in (a, new_a))
        want = scale * b @ a
        if rank < len(a):
            want, _ = best(want, rank)
        elif rank > len(a):
            np.testing.assert_array_equal(new_a[: len(a)], a)
        assert np.abs(new_scale * new_b @ new_a - want).max() < 1e-12
        if rank != len(a):  # negative control: with the old scale it is another product
            assert np.abs(scale * new_b @ new_a - want).max() > 1e-3


def test_a_pair_with_its_own_scale_and_a_scale_for_each_layer_keep_them(x64):
    """A scale that does not depend on the rank stays, and so does B."""
    params = {"layers": initial(TREE, 0.5)["layers"]}
    given = [LoRAPair("layers/lora_a", "layers/lora_b", scale=np.array([2.0, 0.5]))]
    result = resize_adapters(params, 3, key=KEY, pairs=given)
    b, new = params["layers"]["lora_b"], result.params["layers"]["lora_b"]
    np.testing.assert_array_equal(new[:, :2], b)
    # By a function of the pair, which sees the new rank: layer by layer.
    scale = lambda pair: np.array([2.0, 0.5]) / pair.rank
    result = resize_adapters(params, 3, key=KEY, scale=scale)
    np.testing.assert_allclose(
        result.params["layers"]["lora_b"][:, :2], b * 3 / 2, rtol=1e-14
    )


RANK_FREE = ["nnx, stacked on axis 1", "gemma"]


@pytest.mark.parametrize("name", RANK_FREE)
def test_a_model_with_more_rank_computes_the_same(name):
    made = MODELS[name]()
    params, apply = random_like(made.params, 1), jax.jit(made.apply)
    scale = ALPHA / RANK if made.options else 1.0

    result = resize_adapters(params, RANK + 3, key=KEY, scale=scale)

    before = apply(params)
    assert distance(apply(result.params), before) < TOLERANCE
    assert {pair.rank for pair in find_pairs(result.params)} == {RANK + 3}
    # Negative control: the output knows of every pair, and rank 1 is another model.
    leaves = {key.replace(".", "/"): x for key, x in leaves_by_path(params).items()}
    for pair in find_pairs(result.params):
        b = {pair.b: jnp.zeros(jnp.shape(leaves[pair.b]))}
        assert distance(apply(replaced(params, b)), before) > 20 * TOLERANCE, pair
    less = resize_adapters(params, 1, scale=scale)
    assert distance(apply(less.params), before) > 20 * TOLERANCE
    assert min(np.min(x) for x in less.errors.values()) > 1e-3


def test_a_qwix_model_made_with_the_new_rank_takes_the_factors():
    """Its scale is alpha / rank, before and after."""
    rank = RANK + 2
    model, x = qwix_nnx()
    state = random_like(nnx.state(model), 1, 0.2)
    nnx.update(model, state)
    before = model(x)

    result = resize_adapters(state, rank, key=KEY, alpha=ALPHA)
    other, _ = qwix_nnx(rank=rank)
    nnx.update(other, result.params)

    assert distance(other(x), before) < TOLERANCE
    # Negative control: without alpha the scale would change the model.
    nnx.update(other, resize_adapters(state, rank, key=KEY).params)
    assert distance(other(x), before) > 20 * TOLERANCE


def small(dtype=jnp.float32, seed=0):
    """Two pairs of rank 4 and another leaf."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    return {
        "up": {"lora_a": draw(16, 4), "lora_b": draw(4, 24), "bias": draw(3)},
        "down": {"layers": {"lora_a": draw(2, 24, 4), "lora_b": draw(2, 4, 16)}},
    }


def table_of(**ranks):
    """A `RankTable` of modules, `__` for `/`; and of kernels, if they end in `_`."""
    rows = []
    for name, rank in ranks.items():
        path = name.rstrip("_").replace("__", "/")
        kernel = path if name.endswith("_") else f"{path}/kernel"
        rows.append(RankRow(path, kernel, (16, 24), 1.0, rank, 1))
    return RankTable(tuple(rows), 4, 1)


def test_ranks_by_number_by_pattern_and_by_table():
    params = small()

    def ranks(spec):
        resize = lambda params: resize_adapters(params, spec, key=KEY).params
        shapes = jax.eval_shape(resize, params)
        return {pair.a: pair.rank for pair in find_pairs(shapes)}

    down, up = "down/layers/lora_a", "up/lora_a"
    assert ranks(3) == ranks(np.int32(3)) == {down: 3, up: 3}
    assert ranks({"up": 2, ".*": 6}) == {down: 6, up: 2}
    assert ranks(table_of(up=5, down__layers=2)) == {down: 2, up: 5}
    # The innermost module counts, and a table may name the kernels of a module.
    params = {"mlp": {**small()["up"], "gate": small()["up"]}}
    found = ranks(table_of(mlp=5, mlp__gate=2))
    assert found == {"mlp/lora_a": 5, "mlp/gate/lora_a": 2}
    a, b = jnp.ones((16, 4)), jnp.ones((4, 24))
    params = {"at": {"q_lora_a": a, "q_lora_b": b, "k_lora_a": a, "k_lora_b": b}}
    assert ranks(table_of(at__q_=3, at__k_=2)) == {"at/q_lora_a": 3, "at/k_lora_a": 2}


def test_what_does_not_change_is_the_same_object():
    params = small()
    result = resize_adapters(params, {"up": 4, ".*": 2})
    assert all(result.params["up"][key] is x for key, x in params["up"].items())
    assert result.errors["up/lora_a"] == 0
    assert result.state is None


WRONG = {
    "no pair": ({"w": np.ones((3, 3))}, 2, "No LoRA pair among the 1 leaves"),
    "rank 0": (small(), 0, r"`ranks=0` has to be an integer of at least 1"),
    "a bool": (small(), {"up": True, ".*": 1}, r"`ranks\['up'\]=True` has to be"),
    "no pattern": (small(), {"up": 2}, r"No pattern of `ranks=.*Add one that does"),
    "a stale pattern": (small(), {"q": 2, ".*": 2}, r"'q' of `ranks=.*in no path"),
    "not in the table": (small(), table_of(up=2), "table of ranks has the factor `dow"),
    "stale in the table": (
        small(), table_of(up=2, down__layers=2, q=3), "has `q`, where this tree has no",
    ),
    "no key": (small(), 5, r"`down/layers/lora_a` rises from 4 to 5.*Pass `key="),
    "shapes": (
        jax.eval_shape(small), 2, "`down/layers/lora_a` is a shape without values",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_an_error_says_what_to_do(case):
    params, ranks, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        resize_adapters(params, ranks)


@pytest.mark.parametrize("key", [0, "x", 1.5, np.zeros(3), jnp.zeros(2)])
@pytest.mark.parametrize("rank", [2, 5])
def test_a_key_that_is_none_is_an_error_whose_remedy_works(rank, key):
    with pytest.raises(ValueError, match=r"is no key of `jax.random`"):
        resize_adapters(small(), rank, key=key)
    for good in (jax.random.key(0), jax.random.PRNGKey(0)):
        resize_adapters(small(), rank, key=good)


def test_dtypes_stay_and_the_error_is_that_of_the_rounded_factors():
    params = small(jnp.bfloat16)
    params["up"]["lora_b"] = params["up"]["lora_b"].astype(jnp.float32)
    b = params["down"]["layers"]["lora_b"]
    params["down"]["layers"]["lora_b"] = b.at[:, 3].multiply(1e-3)
    result = resize_adapters(params, 3, scale={"up": 3.0, ".*": 1.0})
    dtypes = lambda tree: [x.dtype for x in jax.tree.leaves(tree)]
    assert dtypes(result.params) == dtypes(params)
    wide = lambda tree: {
        key: np.asarray(x, np.float64) for key, x in tree["down"]["layers"].items()
    }
    old, new = wide(params), wide(result.params)
    for k in range(2):
        product = old["lora_a"][k] @ old["lora_b"][k]
        moved = np.linalg.norm(new["lora_a"][k] @ new["lora_b"][k] - product)
        error = moved / np.linalg.norm(product)
        got = result.errors["down/layers/lora_a"][k]
        np.testing.assert_allclose(got, error, rtol=1e-4)
        assert got > 1.1 * best(product, 3)[1]  # control: rounding counts


def test_what_is_not_finite_stays_in_its_layer_and_nothing_overflows():
    params = small()
    layers = params["down"]["layers"]
    layers["lora_a"] = layers["lora_a"].at[1, 3, 2].set(jnp.nan)
    huge = {"lora_a": 1e30 * layers["lora_a"][0], "lora_b": 1e-30 * layers["lora_b"][0]}
    tiny = {key: 1e-30 * x[0] for key, x in layers.items()}
    zeros = {key: 0 * x[0] for key, x in layers.items()}
    tree = {**params, "huge": huge, "tiny": tiny, "zeros": zeros}
    for rank in (2, 6):
        result = resize_adapters(tree, rank, key=KEY, alpha=1.0)
        for path, x in leaves_by_path(result.params).items():
            finite = np.isfinite(x)
            if path.startswith("down"):
                assert finite[0].all()
                assert not finite[1].any()
            else:
                assert finite.all(), path
        error = result.errors
        assert np.isfinite(error["down/layers/lora_a"]).tolist() == [True, False]
        for name in ("huge/lora_a", "tiny/lora_a"):  # as without the powers of ten
            want = error["down/layers/lora_a"][0]
            np.testing.assert_allclose(error[name], want, rtol=1e-4, atol=1e-6)
        assert error["zeros/lora_a"] == 0


def test_new_directions_come_from_the_key_and_the_path():
    params = {**small(), "other": small()["up"]}
    a = lambda tree, key=KEY: np.asarray(
        leaves_by_path(resize_adapters(tree, 6, key=key).params)["up/lora_a"][:, 4:]
    )
    alone = a({"up": params["up"]})
    np.testing.assert_array_equal(alone, a(params))
    other = resize_adapters(params, 6, key=KEY).params["other"]["lora_a"][:, 4:]
    assert distance(alone, other) > 0.1
    assert distance(alone, a(params, jax.random.key(4))) > 0.1
    layers = resize_adapters(params, 6, key=KEY).params["down"]["layers"]["lora_a"]
    assert distance(layers[0, :, 4:], layers[1, :, 4:]) > 0.1


def test_under_jit_it_is_the_same():
    """With a traced alpha, and with a state that comes along."""
    params, rank = small(), 2
    state = with_moments(lorapro_adamw(0.1).init(params))
    run = lambda params, state, alpha: resize_adapters(
        params, rank, key=KEY, state=state, alpha=alpha
    )
    plain, jitted = (f(params, state, 8.0) for f in (run, jax.jit(run)))
    for x, y in zip(jax.tree.leaves(plain), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_allclose(x, y, atol=TOLERANCE)
    shapes = jax.eval_shape(run, params, state, 8.0)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, plain)


SPECS = {
    "up": {"lora_a": P("x"), "lora_b": P(None, ("x", "y")), "bias": P()},
    "down": {"layers": {"lora_a": P("y", "x"), "lora_b": P("y", None, "x")}},
}


@pytest.mark.parametrize(("rank", "kind"), [(2, AxisType.Explicit), (6, AxisType.Auto)])
def test_shardings_stay_and_values_are_those_of_one_device(rank, kind):
    """Those of the parameters, and of the state that comes along."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    tx, params = lorapro_adamw(0.1), jax.tree.map(place, small(), SPECS)
    resize = lambda params, state: resize_adapters(
        params, rank, key=KEY, state=with_moments(state)
    )
    with jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else mesh:
        state = tx.init(params)
        result = resize(params, state)
    due = resize(small(), tx.init(small()))
    same = lambda x, y: np.testing.assert_allclose(x, y, atol=TOLERANCE)
    jax.tree.map(same, result, due)
    kept = lambda x, old: x.sharding.is_equivalent_to(old.sharding, x.ndim)
    assert jax.tree.all(jax.tree.map(kept, result.params, params))
    assert jax.tree.all(jax.tree.map(kept, result.state, state))


def with_moments(state):
    """Factors in place of zeros, so that there is something to carry."""
    adam, *rest = state
    return adam._replace(pairs=adam.pairs._replace(mu=adam.pairs.factors)), *rest


def test_a_rank_that_a_mesh_cannot_divide_is_an_error():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    sharded = NamedSharding(mesh, P(None, "x"))
    params = small()
    params["up"]["lora_a"] = jax.device_put(params["up"]["lora_a"], sharded)
    with pytest.raises(ValueError, match=r"`up/lora_a` \(16, 4\) is sharded along its"):
        resize_adapters(params, 2)
    same = resize_adapters(params, 4)  # negative control: nothing changes
    assert same.params["up"]["lora_a"].sharding == sharded
