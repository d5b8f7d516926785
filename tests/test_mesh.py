"""Sharded factors, on eight simulated CPU devices."""

import functools
import math
import re

import chex
import jax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lorapro_jax import lorapro, lorapro_adamw

TRANSFORMS = {"lorapro": lorapro, "lorapro_adamw": lambda: lorapro_adamw(0.1)}

LAYOUTS = {
    "features": {
        "lora_a": P("x", None), "lora_b": P(None, "y"),
        "layers": {"lora_a": P(None, "x", None), "lora_b": P(None, None, "y")},
        "heads": {"lora_a": P("y", "x", None), "lora_b": P(None, "x")},
    },
    "layers": {
        "lora_a": P(), "lora_b": P(None, "y"),
        "layers": {"lora_a": P("y"), "lora_b": P("y", None, "x")},
        "heads": {"lora_a": P("y"), "lora_b": P()},
    },
    "layers of one factor": {
        "lora_a": P("y", None), "lora_b": P(),
        "layers": {"lora_a": P("y"), "lora_b": P(None, None, "y")},
        "heads": {"lora_a": P("y", "x", None), "lora_b": P(None, "x")},
    },
    "layers of the other": {
        "lora_a": P(), "lora_b": P(),
        "layers": {"lora_a": P(None, "x"), "lora_b": P("y", None, "x")},
        "heads": {"lora_a": P(), "lora_b": P()},
    },
    "rank": {
        "lora_a": P(None, "y"), "lora_b": P("y"),
        "layers": {"lora_a": P(None, None, "y"), "lora_b": P(None, "y")},
        "heads": {"lora_a": P(), "lora_b": P()},
    },
    "replicated": {
        "lora_a": P(), "lora_b": P(),
        "layers": {"lora_a": P(), "lora_b": P()},
        "heads": {"lora_a": P(), "lora_b": P()},
    },
}  # fmt: skip
KEPT = {"features", "layers", "replicated"}
SHAPES = {
    "lora_a": (16, 4), "lora_b": (4, 24),
    "layers": {"lora_a": (6, 64, 4), "lora_b": (6, 4, 24)},
    "heads": {"lora_a": (8, 16, 3), "lora_b": (3, 32)},
}  # fmt: skip


def random_tree(seed):
    leaves, treedef = jax.tree.flatten(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    arrays = [jax.random.normal(k, s) for k, s in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, arrays)


def put(tree, mesh, specs):
    is_spec = lambda x: isinstance(x, P)
    shardings = jax.tree.map(lambda p: NamedSharding(mesh, p), specs, is_leaf=is_spec)
    return jax.device_put(tree, shardings)


def two_steps(tx, params, state, *grads):
    for x in grads:
        updates, state = tx.update(x, state, params)
    return updates, state


@functools.cache
def on_one_device(name):
    params, *grads = (random_tree(seed) for seed in range(3))
    tx = TRANSFORMS[name]()
    run = jax.jit(functools.partial(two_steps, tx))
    return run(params, tx.init(params), *grads)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_sharded_result_equals_one_device_and_keeps_the_sharding(
    name, layout, axis_type, quick_compiles
):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    params, *grads = (put(random_tree(i), mesh, LAYOUTS[layout]) for i in range(3))
    tx = TRANSFORMS[name]()
    state = tx.init(params)

    with jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else mesh:
        received = jax.jit(functools.partial(two_steps, tx))(params, state, *grads)

    chex.assert_trees_all_close(received, on_one_device(name), rtol=1e-3, atol=1e-5)
    if axis_type is AxisType.Auto and layout not in KEPT:
        return  # there the compiler may put a step where its other operands are
    for old, new in zip(
        *map(jax.tree.leaves, ((params, state), received)), strict=True
    ):
        if new.ndim:  # a count may come from one device, as Optax's own does
            assert new.sharding.is_equivalent_to(old.sharding, new.ndim)


# One element a layer and r×r a layer, of each pair: all that ever has to travel.
BLOCKS = {"", "1", "3", "6", "3,3", "4,4", "1,4,4", "3,4,4", "4,4,4", "6,4,4"}


def collectives(program):
    """`(operation, shape)` of all that a compiled program sends between devices."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", program)
    return {
        (kind, shape)
        for result, kind in found
        for shape in re.findall(r"\w+\[([\d,]*)\]", result)
    }


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("layout", ["features", "layers", "replicated"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_only_rank_sized_blocks_travel_between_devices(
    name, layout, axis_type, quick_compiles
):
    """Reductions where features are sharded; a layer's Grams where layers are.

    The one eigendecomposition of all pairs needs the Gram matrices of all layers.
    """
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    params, grads = (put(random_tree(seed), mesh, LAYOUTS[layout]) for seed in (0, 1))
    tx = TRANSFORMS[name]()

    compiled = jax.jit(tx.update).lower(grads, tx.init(params), params).compile()

    sent = collectives(compiled.as_text())
    kinds = {kind for kind, _ in sent}
    if layout == "layers":
        # An all-to-all shows its blocks with an axis for the devices.
        largest = max(math.prod(map(int, re.findall(r"\d+", x))) for _, x in sent)
        grams = 2 * (1 + 6 + 1)  # of all pairs and layers
        assert largest <= grams * 4 * 4 < 6 * 64 * 4 / 2  # less than a factor's share
        gathered = {shape for kind, shape in sent if kind == "all-gather"}
        assert gathered <= {"6", "6,4,4", f"{grams},4,4"}
    else:
        assert kinds == ({"all-reduce"} if layout == "features" else set())
        assert {shape for _, shape in sent} <= BLOCKS


def test_control_reshaping_a_sharded_factor_would_gather_it(quick_compiles):
    """What the contraction over separate axes avoids, and that the check sees it."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    heads = put(random_tree(0), mesh, LAYOUTS["features"])["heads"]["lora_a"]
    gram = jax.jit(lambda x: x.reshape(-1, 3) @ x.reshape(-1, 3).T)
    assert "all-gather" in gram.lower(heads).compile().as_text()
