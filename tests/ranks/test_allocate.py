"""Ranks within a budget, against the paper's formula in plain NumPy."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from lorapro_jax.ranks._allocate import allocate_ranks
from lorapro_jax.ranks._budget import desired_ranks, fit_ranks
from lorapro_jax.ranks._table import RankTable
from lorapro_jax.weights._estimate import estimate_gradients

# What qwix still calls is deprecated in Flax.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:qwix.*")
SEEDS = range(20)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def random_modules(seed):
    """Weights and gradients of random shapes and sizes, over six decades."""
    rng = np.random.default_rng(seed)
    shapes = rng.integers(4, 60, (int(rng.integers(1, 12)), 2))
    weights = {f"m{i}/kernel": rng.standard_normal(x) for i, x in enumerate(shapes)}
    size = lambda: 10.0 ** rng.uniform(-6, 0)
    gradients = {k: size() * rng.standard_normal(w.shape) for k, w in weights.items()}
    return weights, gradients


def published(importance, features, rank, low, high):
    """The ranks as GoRA rounds them."""
    budget = rank * np.sqrt(features).sum()
    share = importance / importance.sum()
    ranks = np.round(budget * share) // np.sqrt(features)
    return np.clip(ranks, low, high).astype(int)


def assert_fits(ranks, cost, low, high, budget):
    """Within limits and budget, and no module that may grow can be paid for."""
    total = int(ranks @ cost)
    assert (low <= ranks).all()
    assert (ranks <= high).all()
    assert total <= budget
    assert not ((ranks < high) & (cost <= budget - total)).any()


@pytest.mark.parametrize("seed", SEEDS)
def test_total_is_within_the_budget_and_short_of_it_by_less_than_one_rank(seed):
    weights, gradients = random_modules(seed)
    rank = int(np.random.default_rng(seed).integers(1, 9))

    table = allocate_ranks(weights, gradients, rank=rank)

    shapes = np.array([row.shape for row in table.rows])
    cost, side = shapes.sum(1), shapes.min(1)
    budget = rank * int(cost.sum())
    assert table.budget == budget
    assert table.parameters == sum(row.rank * sum(row.shape) for row in table.rows)
    low, high = (np.minimum(x, side) for x in (max(1, rank // 2), 4 * rank))
    assert_fits(np.array(list(table.values())), cost, low, high, budget)


def test_control_the_published_rounding_misses_the_budget_on_both_sides():
    """So the property above is not one of the formula itself."""
    excess = []
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        features, importance = rng.integers(8, 120, 9), rng.exponential(size=9)
        ranks = published(importance, features, 8, 4, 32)
        excess.append((ranks @ features) / (8 * features.sum()))
    assert max(excess) > 1.02
    assert min(excess) < 0.98


@pytest.mark.parametrize("seed", SEEDS)
def test_fit_ranks_holds_random_limits(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 15))
    desired = rng.exponential(10, n) * rng.integers(0, 2, n)
    desired[0] += 1.0
    cost, low = rng.integers(10, 2000, n), rng.integers(1, 5, n)
    high = low + rng.integers(0, 40, n)
    budget = int(low @ cost) + int(rng.integers(0, 20 * cost.sum()))

    ranks = fit_ranks(desired, cost, low, high, budget)

    assert_fits(ranks, cost, low, high, budget)


def test_equal_modules_get_the_reference_rank():
    weights = {f"m{i}/kernel": normal(0, 16, 24) for i in range(5)}
    table = allocate_ranks(weights, weights, rank=6)
    assert set(table.values()) == {6}
    assert table.parameters == table.budget


def test_ranks_are_the_papers_where_no_limit_and_no_rounding_interferes():
    """Equal shapes: rank_i = reference · importance_i / mean importance."""
    ones, sizes = np.ones((64, 64)), np.array([2.0, 3.0, 5.0, 6.0])
    gradients = {f"m{i}/kernel": x * ones for i, x in enumerate(sizes)}

    table = allocate_ranks(dict.fromkeys(gradients, ones), gradients, rank=8)

    assert list(table.values()) == [4, 6, 10, 12]
    paper = published(sizes, np.full(4, 128), 8, 4, 32)  # it rounds down
    assert ((paper == list(table.values())) | (paper + 1 == list(table.values()))).all()


def test_desired_ranks_are_the_formula():
    rng = np.random.default_rng(0)
    importance, features = rng.exponential(size=7), rng.integers(10, 300, 7)
    budget = 8 * np.sqrt(features).sum()
    expected = budget * importance / importance.sum() / np.sqrt(features)
    layers = np.ones(7, int)
    received = desired_ranks(1e-200 * importance, features, layers, 8)
    np.testing.assert_allclose(received, expected, rtol=1e-12)
    # Negative control: without the root it is another formula.
    wrong = 8 * features.sum() * importance / importance.sum() / features
    assert np.abs(received / wrong - 1).max() > 0.1


@pytest.mark.parametrize("seed", SEEDS)
def test_of_two_modules_of_one_shape_the_more_important_has_no_lower_rank(seed):
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** rng.uniform(-3, 0, 12)
    weights = {f"m{i}/kernel": np.ones((40, 50)) for i in range(12)}
    gradients = {f"m{i}/kernel": x * np.ones((40, 50)) for i, x in enumerate(sizes)}

    ranks = np.array(list(allocate_ranks(weights, gradients, rank=8).values()))

    assert (np.diff(ranks[np.argsort(sizes)]) >= 0).all()
    assert len(set(ranks)) > 2


def test_no_rank_is_above_the_smaller_side():
    weights = {"head/kernel": np.ones((50, 3)), "up/kernel": np.ones((50, 60))}
    gradients = {"head/kernel": 9 * np.ones((50, 3)), "up/kernel": np.ones((50, 60))}
    assert allocate_ranks(weights, gradients, rank=8)["head"] == 3
    # Negative control: the same importances in a wide kernel.
    weights["head/kernel"] = np.ones((50, 30))
    gradients["head/kernel"] = 9 * np.ones((50, 30))
    assert allocate_ranks(weights, gradients, rank=8)["head"] > 8


def test_limits_are_those_given():
    weights, gradients = random_modules(3)
    weights |= {"big/kernel": np.ones((40, 40)), "none/kernel": np.ones((40, 40))}
    gradients |= {
        "big/kernel": 99 * np.ones((40, 40)),
        "none/kernel": np.zeros((40, 40)),
    }
    table = allocate_ranks(weights, gradients, rank=4, min_rank=1, max_rank=11)
    assert table["big"] == 11
    wide = allocate_ranks(weights, gradients, rank=4, min_rank=1, max_rank=30)
    assert wide["big"] > 11
    assert wide["none"] == 1
    assert allocate_ranks(weights, gradients, rank=4, min_rank=3)["none"] == 3


IMPORTANCES = {
    "mean": lambda x: np.abs(x).sum() / x.size,
    "frobenius": lambda x: np.sqrt((x**2).sum()),
    "nuclear": lambda x: np.sqrt(np.linalg.eigvalsh(x.T @ x).clip(0)).sum(),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", IMPORTANCES)
def test_importance_is_of_the_product_of_weight_and_gradient(name, dtype):
    w = jnp.asarray(normal(0, 12, 9), dtype)
    g = normal(1, 12, 9).astype(np.float32)
    product = np.asarray(w, np.float64) * g

    table = allocate_ranks({"up/kernel": w}, {"up/kernel": g}, rank=2, importance=name)

    expected = IMPORTANCES[name](product)
    np.testing.assert_allclose(table.rows[0].importance, expected, rtol=1e-6)
    others = (f(product) for key, f in IMPORTANCES.items() if key != name)
    assert all(abs(x / expected - 1) > 0.01 for x in others)


def test_importance_may_be_a_function_of_both_as_m_by_n():
    w, g = normal(0, 5, 3, 7), normal(1, 5, 3, 7)
    received = []
    measure = lambda w, g: received.append((w, g)) or np.linalg.norm(g)

    table = allocate_ranks(
        {"q": {"kernel": w}}, {"q/kernel": g}, rank=2, importance=measure,
        input_axes={"q": 0},
    )  # fmt: skip

    ((a, b),) = received
    np.testing.assert_array_equal(a, w.reshape(5, 21).T)
    np.testing.assert_array_equal(b, g.reshape(5, 21).T)
    assert table.rows[0].importance == np.linalg.norm(g)


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("axis", [0, 1])
def test_a_stack_counts_as_its_layers_at_their_mean(axis, importance):
    """It gets what one of them would get, and so do the modules beside it."""
    layer, g_layer = normal(0, 12, 20), normal(1, 12, 20)
    others, g_others = ({"head/kernel": normal(i, 12, 9)} for i in (2, 3))
    options = {"rank": 4, "importance": importance, "min_rank": 1}
    names = [f"layers/{i}/kernel" for i in range(4)]
    stacks = ({"layers/kernel": np.stack([x] * 4, axis)} for x in (layer, g_layer))
    stack, g_stack = stacks

    apart = allocate_ranks(
        others | dict.fromkeys(names, layer),
        g_others | dict.fromkeys(names, g_layer), **options,
    )  # fmt: skip
    stacked = allocate_ranks(
        others | stack, g_others | g_stack, stack_axis=axis, **options
    )
    unlike = allocate_ranks(  # negative control: one module of the same mean
        others | {"layers/kernel": layer},
        g_others | {"layers/kernel": g_layer}, **options,
    )  # fmt: skip

    assert stacked.budget == apart.budget
    assert stacked.rows[1].importance == pytest.approx(apart.rows[1].importance)
    assert stacked["layers"] == min(apart[f"layers/{i}"] for i in range(4))
    desired = [
        desired_ranks(
            np.array([x.importance for x in table.rows]),
            np.array([21, 32, 32, 32, 32][: len(table)]), np.array(layers), 4,
        )[:2]
        for table, layers in ((apart, [1] * 5), (stacked, [1, 4]), (unlike, [1, 1]))
    ]  # fmt: skip
    np.testing.assert_allclose(desired[0], desired[1], rtol=1e-12)
    assert np.abs(desired[2] / desired[1] - 1).max() > 0.04


def test_axes_of_heads_and_windows_count_towards_inputs_or_outputs():
    shapes = {
        "query/kernel": (3, 12, 4, 5), "out/kernel": (3, 4, 5, 12),
        "conv/kernel": (3, 2, 2, 12, 7), "up/kernel": (3, 12, 24),
    }  # fmt: skip
    weights = {k: np.ones(v) for k, v in shapes.items()}
    axes = {"query": 1, "out": (1, -2), "conv": (1, 2, 3)}
    table = allocate_ranks(weights, weights, rank=1, stack_axis=0, input_axes=axes)
    features = {"query": 12 + 20, "out": 20 + 12, "conv": 48 + 7, "up": 12 + 24}
    assert {x.path: x.parameters // x.rank for x in table.rows} == {
        k: 3 * x for k, x in features.items()
    }


def test_table_survives_json(tmp_path):
    weights, gradients = random_modules(0)
    table = allocate_ranks(weights, gradients, rank=3)
    table.save(tmp_path / "ranks.json")
    loaded = RankTable.load(tmp_path / "ranks.json")
    assert loaded.rows == table.rows
    assert (loaded.reference, loaded.budget) == (table.reference, table.budget)
    assert str(loaded) == str(table)
    assert loaded == table == dict(table)
    content = json.loads((tmp_path / "ranks.json").read_text())
    content["rows"][0]["rank"] += 1
    (tmp_path / "ranks.json").write_text(json.dumps(content))
    assert RankTable.load(tmp_path / "ranks.json") != table


@pytest.mark.parametrize("content", ["{}", "[]", "not json", '{"format": "other"}'])
def test_another_file_is_no_table(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=r"x\.json` is no table of ranks"):
        RankTable.load(tmp_path / "x.json")


def test_table_prints_every_module_and_the_total():
    weights = {"up/kernel": np.ones((8, 24)), "down/kernel": np.ones((24, 8))}
    gradients = {"up/kernel": np.ones((8, 24)), "down/kernel": np.zeros((24, 8))}
    table = allocate_ranks(weights, gradients, rank=4)
    assert str(table).splitlines() == [
        "module  kernel   importance  rank  parameters",
        "up      (8, 24)           1     6         192",
        "down    (24, 8)           0     2          64",
        "256 parameters, 100.0 % of the 256 of rank 4",
    ]


def test_two_kernels_of_one_module_go_by_their_own_paths():
    weights = {"moe": {"wi": np.ones((8, 24)), "wo": np.ones((24, 8))}}
    gradients = {"moe/wi": np.ones((8, 24)), "moe/wo": np.ones((24, 8))}
    table = allocate_ranks(weights, gradients, rank=4)
    assert list(table) == ["moe/wi", "moe/wo"]
    pytest.importorskip("qwix")
    with pytest.raises(ValueError, match=r"\['moe/wi', 'moe/wo'\] share modules"):
        table.qwix_rules(scale=2.0)


def test_unknown_module_is_a_key_error_with_the_closest():
    table = allocate_ranks({"up/kernel": np.eye(3)}, {"up/kernel": np.eye(3)}, rank=1)
    assert "upp" not in table
    with pytest.raises(KeyError, match=r"'upp' has no rank.*\['up'\]"):
        table["upp"]


EYE = {"up/kernel": np.eye(3)}
ERRORS = {
    "no gradient": (EYE, {}, {}, "`gradients` is empty"),
    "no weight": (EYE, {"down/kernel": np.eye(3)}, {}, "`down/kernel`.*no path"),
    "shape": (EYE, {"up/kernel": np.ones(3)}, {}, r"shape \(3,\).*is \(3, 3\)"),
    "zero": (EYE, {"up/kernel": np.zeros((3, 3))}, {}, "of every module is 0"),
    "nan": (EYE, {"up/kernel": np.full((3, 3), np.nan)}, {}, "`up/kernel` is nan"),
    "name": (EYE, EYE, {"importance": "max"}, "has to be one of"),
    "minimum": (EYE, EYE, {"min_rank": 3}, "alone takes 18 parameters.*12"),
    "order": (EYE, EYE, {"min_rank": 2, "max_rank": 1}, "`min_rank=2` is above"),
    "none": (EYE, EYE, {"min_rank": 0}, "at least 1"),
    "half": (EYE, EYE, {"max_rank": 2.5}, "an integer of"),
    "heads": (
        {"q": np.ones((3, 3, 3))}, {"q": np.ones((3, 3, 3))}, {}, "`input_axes=`"
    ),
    "axes": (
        {"q": np.ones((3, 3, 3))}, {"q": np.ones((3, 3, 3))},
        {"input_axes": {"q": (0, 1, 2)}}, "some and not all",
    ),
    "axis": (
        {"q": np.ones((3, 3, 3))}, {"q": np.ones((3, 3, 3))}, {"stack_axis": 3},
        "`q`.*no axes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_was_found(name):
    weights, gradients, options, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        allocate_ranks(weights, gradients, rank=2, **options)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.MultiHeadDotProductAttention(2, name="attention")(x)
        return nn.Dense(3, name="head")(nn.tanh(nn.Dense(24, name="up")(x)))


def mean_square(output):
    return jnp.mean((output - 1) ** 2)


def test_a_linen_model_gets_these_ranks_from_qwix(quick_compiles):
    """From the base model's gradients to the adapted model, and its scale."""
    qwix = pytest.importorskip("qwix")
    base, x = Block(), jnp.asarray(normal(0, 2, 5, 12), jnp.float32)
    params = base.init(jax.random.key(0), x)["params"]
    loss = lambda params, x: mean_square(base.apply({"params": params}, x))
    gradients = estimate_gradients(loss, params, [x], kernels="kernel$", progress=False)
    axes = {"query|key|value": 0, "out": (0, 1)}
    table = allocate_ranks(params, gradients, rank=2, input_axes=axes)
    assert len(set(table.values())) > 1  # otherwise one rule would do

    provider = qwix.LoraProvider(table.qwix_rules(scale=2.0))
    model = qwix.apply_lora_to_model(base, provider)
    adapted = model.init(jax.random.key(1), x)["params"]

    received, count = {}, 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(adapted):
        *owner, name = (key.key for key in path)
        if name == "kernel_lora_a":
            received["/".join(owner)] = leaf.shape[-1]
        count += leaf.size if "_lora_" in name else 0
    assert received == dict(table)
    assert count == table.parameters <= table.budget
    assert not provider.get_unused_rules()
    assert all(rule.alpha / rule.rank == 2.0 for rule in table.qwix_rules(scale=2.0))


class Network(nnx.Module):
    def __init__(self, rngs, ranks=None):
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(3)])
        self.head = nnx.Linear(8, 3, rngs=rngs)
        if ranks:
            self.adapter = nnx.LoRA(8, ranks["head"], 3, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.tanh(layer(x))
        return self.head(x)


def test_an_nnx_model_gets_these_ranks_from_qwix_or_from_a_lookup():
    qwix = pytest.importorskip("qwix")
    base, x = Network(nnx.Rngs(0)), jnp.asarray(normal(0, 5, 8), jnp.float32)
    graphdef, params = nnx.split(base)
    loss = lambda params, x: mean_square(nnx.merge(graphdef, params)(x))
    gradients = estimate_gradients(loss, params, [x], kernels="kernel$", progress=False)
    table = allocate_ranks(params, gradients, rank=2, min_rank=1)
    assert list(table) == ["head", "layers/0", "layers/1", "layers/2"]

    provider = qwix.LoraProvider(table.qwix_rules(scale=1.0))
    model = qwix.apply_lora_to_model(base, provider, x, rngs=nnx.Rngs(1))

    assert model.head.kernel_lora_a.shape == (8, table["head"])
    for i, layer in enumerate(model.layers):
        assert layer.kernel_lora_b.shape == (table[f"layers/{i}"], 8)
    assert len(set(table.values())) > 1
    adapter = Network(nnx.Rngs(0), table).adapter
    assert adapter.lora_a.shape == (8, table["head"])
