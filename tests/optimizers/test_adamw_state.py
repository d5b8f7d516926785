"""The state of `scale_by_lorapro_adam`: what it holds, where, and how large."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.trees import weights
from lorapro_jax import lorapro_adamw, scale_by_lora_rite, scale_by_lorapro_adam
from tests.support.meshes import put
from tests.support.runs import MOMENTS, counted
from tests.support.trees import make_params

pytestmark = pytest.mark.usefixtures("quick_compiles")


def is_masked(x):
    return isinstance(x, optax.MaskedNode)


@pytest.mark.parametrize("moments", MOMENTS)
def test_state_lies_at_the_places_that_the_spec_names(moments):
    params = make_params()

    state = scale_by_lorapro_adam(moments=moments).init(params)

    shapes = lambda tree: jax.tree.map(
        lambda x: None if is_masked(x) else x.shape, tree, is_leaf=is_masked
    )
    names = "lora_a", "lora_b"
    at = lambda layers, head, bias=None, norm=None: {
        "layers": dict(zip(names, layers, strict=True)),
        "head": {**dict(zip(names, head, strict=True)), "bias": bias},
        "norm": norm,
    }
    factors = at([(3, 10, 4), (3, 4, 6)], [(8, 2), (2, 5)])
    assert shapes(state.pairs.factors) == factors
    chex.assert_trees_all_equal(state.pairs.factors["layers"], params["layers"])
    assert state.pairs._fields == ("mu", "nu", "factors")
    if moments == "factored":
        assert shapes(state.pairs.mu) == factors
        sums = at([(3, 10, 1), (3, 1, 6)], [(8, 1), (1, 5)])
        assert shapes(state.pairs.nu) == sums
    else:
        dense = at([(3, 6, 10), None], [(5, 8), None])
        assert shapes(state.pairs.mu) == shapes(state.pairs.nu) == dense
    # The others' are Optax's, of a tree without the factors.
    rest = at([None, None], [None, None], (5,), (10,))
    assert shapes(state.others.mu) == shapes(state.others.nu) == rest
    assert isinstance(state.others, optax.ScaleByAdamState)


def nbytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("rank", [4, 8, 64])
@pytest.mark.parametrize("dtype", [jnp.float32])
def test_factored_state_is_at_most_a_quarter_larger_than_adamws(rank, dtype):
    """All adapters of Llama-2-7B; nothing is allocated."""
    params: dict = {}
    for block, layer, (n, m) in weights("llama2-7b"):
        params.setdefault(block, {})[layer] = {
            "lora_a": jax.ShapeDtypeStruct((n, rank), dtype),
            "lora_b": jax.ShapeDtypeStruct((rank, m), dtype),
        }

    sizes = {
        name: nbytes(jax.eval_shape(tx.init, params))
        for name, tx in {
            "factored": lorapro_adamw(1e-3, moments="factored"),
            "dense": lorapro_adamw(1e-3, moments="dense"),
            "adamw": optax.adamw(1e-3),
        }.items()
    }

    assert sizes["factored"] <= 1.25 * sizes["adamw"]
    assert sizes["dense"] > 8 * sizes["adamw"]  # negative control


def largest_array(program):
    """Elements of the largest array in the text of a lowered or compiled program."""
    hlo = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", program)
    mlir = re.findall(r"tensor<((?:\d+x)+)[a-z]", program)
    shapes = [x.split(",") for x in hlo] + [x.rstrip("x").split("x") for x in mlir]
    return max(int(np.prod([int(size) for size in shape])) for shape in shapes)


def test_factored_program_holds_no_array_of_the_weights_size():
    """Not even a temporary, neither as traced nor as compiled; the dense one does."""
    m, n, r = 160, 96, 3
    params = {
        "x": {"lora_a": jnp.ones((n, r)), "lora_b": jnp.zeros((r, m))},
        "y": {"lora_a": jnp.ones((2, 4, 24, r)), "lora_b": jnp.zeros((2, r, m))},
    }
    largest = {}
    for moments in MOMENTS:
        tx = lorapro_adamw(1e-3, moments=moments, max_grad_norm=1.0, weight_decay=0.1)
        state = jax.eval_shape(tx.init, params)
        lowered = jax.jit(tx.update).lower(params, state, params)
        programs = lowered.as_text(), lowered.compile().as_text()
        largest[moments] = [largest_array(x) for x in programs]

    assert max(largest["factored"]) < 10 * r * (m + n) < m * n
    assert min(largest["dense"]) >= 2 * m * n


SHARDED = {
    "features": {
        "lora_a": P(None, "x", None, None), "lora_b": P(None, None, "y"),
        "kernel": P("x", "y"),
    },
    "both factors on one axis": {
        "lora_a": P(None, "x", "y", None), "lora_b": P(None, None, "y"),
        "kernel": P("x", None),
    },
}  # fmt: skip
SHAPES = {"lora_a": (2, 4, 6, 3), "lora_b": (2, 3, 8), "kernel": (8, 6)}


def mesh_problem(layout, axis_type):
    """Parameters and two gradients, on one device and on a mesh of eight."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    rng = np.random.default_rng(0)
    is_shape = lambda x: isinstance(x, tuple)
    draw = lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    trees = [jax.tree.map(draw, SHAPES, is_leaf=is_shape) for _ in range(3)]
    return mesh, trees, [put(tree, mesh, SHARDED[layout]) for tree in trees]


def two_steps(update, params, state, grads):
    for x in grads:
        updates, state = update(x, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return updates, params, state


def sharded_adamw(moments):
    return lorapro_adamw(0.1, weight_decay=0.1, moments=moments, max_grad_norm=1.0)


@functools.cache
def on_one_device(moments):
    _, (params, *grads), _ = mesh_problem("features", AxisType.Auto)
    tx = sharded_adamw(moments)
    return two_steps(jax.jit(tx.update), params, tx.init(params), grads)


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize(
    ("layout", "axis_type"),
    [
        ("features", AxisType.Auto),
        ("features", AxisType.Explicit),
        ("both factors on one axis", AxisType.Explicit),
    ],
)
def test_sharded_steps_equal_one_device_and_shardings_are_stable(
    layout, axis_type, moments
):
    mesh, _, (params, *grads) = mesh_problem(layout, axis_type)
    adamw, tx = optax.adamw(0.1), sharded_adamw(moments)
    (plain, plain_traces), (update, traces) = counted(adamw.update), counted(tx.update)

    with jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else mesh:
        two_steps(plain, params, adamw.init(params), grads)
        state = tx.init(params)
        received = two_steps(update, params, state, grads)

    chex.assert_trees_all_close(received, on_one_device(moments), rtol=2e-3, atol=1e-5)
    before = params, params, state
    for old, new in zip(*map(jax.tree.leaves, (before, received)), strict=True):
        if new.ndim:  # a count may come from one device, as Optax's own does
            assert new.sharding.is_equivalent_to(old.sharding, new.ndim)
    assert len(traces) == len(plain_traces)  # 1, but for a count of old JAX


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_state_lies_where_its_factors_lie(axis_type):
    """μ like the factors; energies and dense moments on the features' devices."""
    mesh, _, (params, *_) = mesh_problem("features", axis_type)
    with jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else mesh:
        factored = scale_by_lorapro_adam(moments="factored").init(params)
        dense = scale_by_lorapro_adam(moments="dense").init(params)

    expected = {
        "mu": (factored.pairs.mu["lora_a"], P(None, "x")),
        "factors": (factored.pairs.factors["lora_b"], P(None, None, "y")),
        "columns": (factored.pairs.nu["lora_a"], P(None, "x")),
        "rows": (factored.pairs.nu["lora_b"], P(None, None, "y")),
        "M": (dense.pairs.mu["lora_a"], P(None, "y", "x")),
        "V": (dense.pairs.nu["lora_a"], P(None, "y", "x", None)),
        "other": (dense.others.nu["kernel"], P("x", "y")),
    }
    for name, (x, spec) in expected.items():
        sharding = NamedSharding(mesh, spec)
        assert x.sharding.is_equivalent_to(sharding, x.ndim), (name, x.sharding)


RULES = {
    "factored": scale_by_lorapro_adam,
    "dense": lambda: scale_by_lorapro_adam(moments="dense"),
    "lora_rite": scale_by_lora_rite,
}


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", RULES)
def test_state_of_abstract_parameters_is_that_of_real_ones(name, axis_type):
    """Shapes, dtypes and shardings: enough to restore into, or to start from."""
    mesh, _, (params, *_) = mesh_problem("features", axis_type)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )
    with jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else mesh:
        state, expected = RULES[name]().init(shapes), RULES[name]().init(params)

    chex.assert_trees_all_equal_shapes_and_dtypes(state, expected)
    for got, want in zip(*map(jax.tree.leaves, (state, expected)), strict=True):
        assert isinstance(got, jax.Array)
        assert got.sharding.is_equivalent_to(want.sharding, got.ndim)
