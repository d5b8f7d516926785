"""Sharded factors, on eight simulated CPU devices."""

import re

import chex
import jax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lorapro_jax import lorapro

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
SHAPES = {
    "lora_a": (16, 4), "lora_b": (4, 24),
    "layers": {"lora_a": (6, 16, 4), "lora_b": (6, 4, 24)},
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


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sharded_result_equals_one_device_and_keeps_the_sharding(layout, axis_type):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    params, grads = random_tree(0), random_tree(1)
    tx = lorapro()
    run = lambda grads, params: tx.update(grads, tx.init(params), params)[0]
    expected = jax.jit(run)(grads, params)
    sharded = [put(tree, mesh, LAYOUTS[layout]) for tree in (grads, params)]

    with jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else mesh:
        step = jax.jit(run)(*sharded)

    chex.assert_trees_all_close(step, expected, rtol=1e-3, atol=1e-5)
    for new, old in zip(
        jax.tree.leaves(step), jax.tree.leaves(sharded[0]), strict=True
    ):
        assert new.sharding.is_equivalent_to(old.sharding, new.ndim)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_only_rank_sized_blocks_travel_between_devices(axis_type):
    """No all-gather; all-reduces of at most (layers, r, r) elements a pair."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    sharded = [put(random_tree(seed), mesh, LAYOUTS["features"]) for seed in (0, 1)]
    tx = lorapro()
    run = jax.jit(lambda grads, params: tx.update(grads, tx.init(params), params)[0])

    program = run.lower(*sharded).compile().as_text()

    assert "all-gather" not in program
    assert "all-to-all" not in program
    reduced = re.findall(r"= \(?(f32\[[\d,]*\].*?) all-reduce\(", program)
    assert reduced
    sizes = {
        shape for line in reduced for shape in re.findall(r"f32\[([\d,]*)\]", line)
    }
    assert sizes <= {"", "6", "4,4", "3,3", "6,4,4"}, sizes


def test_control_reshaping_a_sharded_factor_would_gather_it():
    """What the contraction over separate axes avoids, and that the check sees it."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    heads = put(random_tree(0), mesh, LAYOUTS["features"])["heads"]["lora_a"]
    gram = jax.jit(lambda x: x.reshape(-1, 3) @ x.reshape(-1, 3).T)
    assert "all-gather" in gram.lower(heads).compile().as_text()
