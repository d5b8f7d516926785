"""Like pairs stacked, as on a GPU: the same steps, in fewer and larger products."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from lorapro_jax import find_pairs, lorapro, lorapro_adamw
from lorapro_jax.transforms import _groups
from lorapro_jax.transforms._view import View
from tests.support.meshes import collectives, put
from tests.support.programs import products

BLOCKS = 4
TRANSFORMS = {
    "lorapro": lambda **options: lorapro(damping=1e-3, **options),
    "lorapro_adamw": lambda **options: lorapro_adamw(1e-2, **options),
    "lorapro_adamw, dense": lambda **options: lorapro_adamw(
        1e-2, moments="dense", weight_decay=0.1, max_grad_norm=1.0, **options
    ),
}


def _block(rng, dtype=np.float32):
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    return {
        "q": {"lora_a": normal(16, 4), "lora_b": normal(4, 16)},
        "o": {"lora_a": normal(2, 8, 4), "lora_b": normal(4, 16)},
        "experts": {"lora_a": normal(3, 16, 2), "lora_b": normal(3, 2, 24)},
        "torch": {
            "lora_A": {"weight": normal(4, 16)},
            "lora_B": {"weight": normal(24, 4)},
        },
    }


def _model(seed):
    rng = np.random.default_rng(seed)
    blocks = {f"blocks_{i}": _block(rng) for i in range(BLOCKS)}
    return blocks | {"head": {"lora_a": jnp.ones((16, 3)), "lora_b": jnp.ones((3, 5))}}


def _run(tx, params, grads):
    """Three steps."""
    state = tx.init(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for x in grads:
        params, state = step(params, state, x)
    return params, state


def _products(tx, params):
    """The number of products in an update."""
    return len(products(tx.update, params, tx.init(params), params))


@pytest.fixture
def stacking(monkeypatch):
    monkeypatch.setattr(_groups, "_stacking_pays", lambda: True)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_stacked_pairs_step_as_single_ones_do(name, monkeypatch, quick_compiles):
    params, *grads = map(_model, range(4))
    tx = TRANSFORMS[name](scale={r".*/q": 2.0, r".*": 0.5})
    monkeypatch.setattr(_groups, "_stacking_pays", lambda: False)
    single, count = _run(tx, params, grads), _products(tx, params)
    monkeypatch.setattr(_groups, "_stacking_pays", lambda: True)

    stacked = _run(tx, params, grads)

    chex.assert_trees_all_close(stacked, single, rtol=2e-3, atol=2e-5)
    # One of each kind and the head's, of 4 and the head's; some are not per pair.
    assert _products(tx, params) < count / 2


def test_only_pairs_alike_are_stacked(stacking):
    def groups(params, **options):
        found = find_pairs(params, **options)
        arrays = View.of(found, params).take(params, params)
        members = _groups.group_pairs(found, arrays).members
        return sorted(map(len, members))

    params = _model(0)
    # Of q, o, the experts and the torch layer; and the head.
    assert groups(params) == [1, BLOCKS, BLOCKS, BLOCKS, BLOCKS]

    scales = {r"blocks_2/.*": 2.0, r".*": 1.0}
    assert groups(params, scale=scales) == [1] * 5 + [BLOCKS - 1] * 4

    params["blocks_1"]["q"] = jax.tree.map(
        lambda x: x.astype("bfloat16"), params["blocks_1"]["q"]
    )
    assert groups(params) == [1, 1, BLOCKS - 1, BLOCKS, BLOCKS, BLOCKS]


def test_a_gradient_that_is_not_finite_stays_in_its_pair(stacking, quick_compiles):
    params, grads = _model(0), _model(1)
    tx = lorapro()
    expected, _ = tx.update(grads, tx.init(params), params)
    bad = grads["blocks_2"]["q"]
    grads["blocks_2"]["q"] = bad | {"lora_a": bad["lora_a"].at[0, 0].set(jnp.nan)}

    received, _ = tx.update(grads, tx.init(params), params)

    assert not np.isfinite(received["blocks_2"]["q"]["lora_a"]).all()
    for tree in (expected, received):
        del tree["blocks_2"]["q"]
    chex.assert_trees_all_equal(received, expected)


def _sharded(seed, mesh, swapped=()):
    """Two kinds of layers of one shape, sharded on different axes as is usual."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    pair = lambda: {"lora_a": normal(32, 4), "lora_b": normal(4, 32)}
    column = {"lora_a": P("x", None), "lora_b": P(None, "y")}
    row = {"lora_a": P("y", None), "lora_b": P(None, "x")}
    tree = {f"blocks_{i}": {"q": pair(), "o": pair()} for i in range(BLOCKS)}
    specs = {
        f"blocks_{i}": {"q": row if i in swapped else column, "o": row}
        for i in range(BLOCKS)
    }
    return put(tree, mesh, specs)


def _largest_sent(mesh, swapped=()):
    params, grads = (_sharded(seed, mesh, swapped) for seed in (0, 1))
    tx = lorapro()
    compiled = jax.jit(tx.update).lower(grads, tx.init(params), params).compile()
    sizes = [shape.split(",") for _, shape in collectives(compiled.as_text())]
    return max(int(np.prod([int(x) for x in size if x])) for size in sizes)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_stacking_sends_no_factor_between_devices(axis_type, stacking, quick_compiles):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    blocks = BLOCKS * 4 * 4
    assert _largest_sent(mesh) <= blocks
    if axis_type is AxisType.Auto:  # control: one kind of layer, sharded in two ways
        assert _largest_sent(mesh, swapped=(1, 3)) > blocks
