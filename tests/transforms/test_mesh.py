"""Sharded factors, on eight simulated CPU devices."""

import functools
import itertools
import math
import re

import chex
import jax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from lorapro_jax import lora_rite, lorapro, lorapro_adamw
from lorapro_jax.algebra import _divided
from tests.support.meshes import LAYOUTS, collectives, put, random_tree

TRANSFORMS = {
    "lorapro": lorapro,
    "lorapro_adamw": lambda: lorapro_adamw(0.1),
    "lora_rite": lambda: lora_rite(0.1),
}

KEPT = {"features", "layers", "replicated"}


ONE_AXIS = {  # which axis is sharded, as with FSDP
    "lora_a": (True, False), "lora_b": (False, True),
    "layers": {"lora_a": (False, True, False), "lora_b": (False, False, True)},
    "heads": {"lora_a": (False, True, False), "lora_b": (False, True)},
}  # fmt: skip


def two_steps(tx, params, state, *grads):
    """Of one program, compiled once where shardings are stable."""
    update = jax.jit(tx.update)
    for x in grads:
        updates, state = update(x, state, params)
    return updates, state


@functools.cache
def on_one_device(name):
    params, *grads = (random_tree(seed) for seed in range(3))
    tx = TRANSFORMS[name]()
    return two_steps(tx, params, tx.init(params), *grads)


def cases(layouts, *more):
    """All of two transforms, and more of LoRA-RITE, whose own are the r×r products."""
    types = AxisType.Auto, AxisType.Explicit
    return [
        *itertools.product(("lorapro", "lorapro_adamw"), layouts, types),
        *(("lora_rite", *x) for x in more),
    ]


LAYERS = "layers", AxisType.Auto


@pytest.mark.parametrize(
    ("name", "layout", "axis_type"),
    cases(LAYOUTS, LAYERS, ("layers of one factor", AxisType.Explicit)),
)
def test_sharded_result_equals_one_device_and_keeps_the_sharding(
    name, layout, axis_type, quick_compiles
):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    params, *grads = (put(random_tree(i), mesh, LAYOUTS[layout]) for i in range(3))
    tx = TRANSFORMS[name]()
    state = tx.init(params)

    with jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else mesh:
        received = two_steps(tx, params, state, *grads)

    chex.assert_trees_all_close(received, on_one_device(name), rtol=1e-3, atol=1e-5)
    if axis_type is AxisType.Auto and layout not in KEPT:
        return  # there the compiler may put a step where its other operands are
    for old, new in zip(
        *map(jax.tree.leaves, ((params, state), received)), strict=True
    ):
        if new.ndim:  # a count may come from one device, as Optax's own does
            assert new.sharding.is_equivalent_to(old.sharding, new.ndim)


# One element, r and r×r a layer, of each pair: all that ever has to travel.
BLOCKS = {
    "", "1", "3", "4", "6", "6,4", "3,3", "4,4", "1,4,4", "3,4,4", "4,4,4", "6,4,4",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "layout", "axis_type"),
    cases(
        ["features", "layers", "replicated"], LAYERS, ("features", AxisType.Explicit)
    ),
)
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
        # Gram matrices of all pairs and layers; second moments before and after a turn.
        stacks = [2 * (1 + 6 + 1)] + [4 * (1 + 6 + 1)] * (name == "lora_rite")
        # The products of a factor's layers: six at first, two with the second moment.
        products = [6 * 6, 6 * 2] if name == "lorapro_adamw" else []
        share = 6 * 64 * 4 / 2  # of a factor
        assert largest <= max(stacks + products) * 4 * 4 < share
        gathered = {shape for kind, shape in sent if kind == "all-gather"}
        blocks = {"6,6,4,4", "6,2,4,4"} if products else set()
        blocks |= {f"{x},4,4" for x in stacks}
        assert gathered <= blocks | {"6", "6,4", "6,4,4"}
    else:
        assert kinds == ({"all-reduce"} if layout == "features" else set())
        assert {shape for _, shape in sent} <= BLOCKS


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_lorapro_adamw_reduces_three_times_a_step(axis_type, quick_compiles):
    """For units, for Gram matrices, and for those that the second moment weighs."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    specs = jax.tree.map(
        lambda spec: P(*("x" if axis else None for axis in spec)),
        ONE_AXIS,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    params, grads = (put(random_tree(seed), mesh, specs) for seed in (0, 1))
    tx = lorapro_adamw(0.1, max_grad_norm=1.0)

    compiled = jax.jit(tx.update).lower(grads, tx.init(params), params).compile()

    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    program = compiled.as_text()
    assert re.findall(rf" ({kinds})(?:-start)?\(", program) == ["all-reduce"] * 3


@pytest.mark.parametrize(
    ("axis_type", "left_out"), [(AxisType.Auto, None), (AxisType.Explicit, "heads")]
)
def test_r_by_r_problems_divided_among_devices_are_exact(
    axis_type, left_out, quick_compiles, monkeypatch
):
    """Of mixed ranks, a matrix a device; of one rank, one less: the rest is padding.

    What is gathered are r×r matrices: once for the moments, once for the step.
    """
    monkeypatch.setattr(_divided, "_FEW", 4)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    whole = [random_tree(seed) for seed in range(2)]
    specs = dict(LAYOUTS["features"])
    for tree in (specs, *whole):
        tree.pop(left_out, None)
    tx = lorapro_adamw(0.1, max_grad_norm=1.0, nesterov=True)
    params, grads = (put(tree, mesh, specs) for tree in whole)
    state = tx.init(params)

    compiled = jax.jit(tx.update).lower(grads, state, params).compile()
    received = compiled(grads, state, params)

    alone = two_steps(tx, whole[0], tx.init(whole[0]), whole[1])
    chex.assert_trees_all_close(received, alone, rtol=1e-3, atol=1e-5)
    program = compiled.as_text()
    gathered = re.findall(r"\[([\d,]*)\]\S* all-gather(?:-start)?\(", program)
    blocks = [shape for shape in gathered if shape.endswith(",4,4")]
    assert len(blocks) == 2
    assert set(gathered) - {*blocks} <= {"7", "8"}  # norms


def test_control_reshaping_a_sharded_factor_would_gather_it(quick_compiles):
    """What the contraction over separate axes avoids, and that the check sees it."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    heads = put(random_tree(0), mesh, LAYOUTS["features"])["heads"]["lora_a"]
    gram = jax.jit(lambda x: x.reshape(-1, 3) @ x.reshape(-1, 3).T)
    assert "all-gather" in gram.lower(heads).compile().as_text()
