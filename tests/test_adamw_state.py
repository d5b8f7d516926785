"""The state of `scale_by_lorapro_adam`: what it holds, where, and how large."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from adamw_runs import MOMENTS, counted
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_mesh import put
from test_optax_contract import loss_fn, make_params

from benchmarks.trees import weights
from lorapro_jax import lorapro_adamw, scale_by_lorapro_adam

pytestmark = pytest.mark.usefixtures("quick_compiles")

make = functools.cache(  # one transform, so that its programs are kept
    lambda moments: lorapro_adamw(1e-2, weight_decay=0.1, moments=moments)
)


@functools.cache
def step_of(tx):
    """A jitted training step on the gradients of `loss_fn`."""

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
        return optax.apply_updates(params, updates), state

    return step


def is_masked(x):
    return isinstance(x, optax.MaskedNode)


@pytest.mark.parametrize("moments", MOMENTS)
def test_state_consists_of_arrays_and_keeps_its_shapes(moments):
    params, tx = make_params(), make(moments)
    state = tx.init(params)

    _, after = step_of(tx)(params, state)

    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    chex.assert_trees_all_equal_structs(after, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    # Weakly typed arrays would compile the second step anew.
    weak = lambda tree: [x.aval.weak_type for x in jax.tree.leaves(tree)]
    assert not any(weak(state) + weak(after))
    assert state[0].count.dtype == jnp.int32
    assert (int(state[0].count), int(after[0].count)) == (0, 1)


@pytest.mark.parametrize("moments", MOMENTS)
def test_state_lies_at_the_places_that_the_spec_names(moments):
    params = make_params()

    state = scale_by_lorapro_adam(moments=moments).init(params)

    shapes = lambda tree: jax.tree.map(
        lambda x: None if is_masked(x) else x.shape, tree, is_leaf=is_masked
    )
    bias, norm = (5,), (10,)
    if moments == "factored":
        assert shapes(state.mu) == shapes(params)
        assert shapes(state.nu) == {
            "layers": {"lora_a": (3, 10, 1), "lora_b": (3, 1, 6)},
            "head": {"lora_a": (8, 1), "lora_b": (1, 5), "bias": bias},
            "norm": norm,
        }
        chex.assert_trees_all_equal(state.factors["layers"], params["layers"])
        rest = state.factors["head"]["bias"], state.factors["norm"]
        assert all(map(is_masked, rest))
    else:
        assert (
            shapes(state.mu)
            == shapes(state.nu)
            == {
                "layers": {"lora_a": (3, 6, 10), "lora_b": None},
                "head": {"lora_a": (5, 8), "lora_b": None, "bias": bias},
                "norm": norm,
            }
        )
        assert not jax.tree.leaves(state.factors)
        chex.assert_trees_all_equal_structs(
            state.factors, jax.tree.map(lambda x: optax.MaskedNode(), params)
        )


@pytest.mark.parametrize("moments", MOMENTS)
def test_init_works_on_abstract_parameters(moments):
    params = make_params()
    tx = lorapro_adamw(1e-3, moments=moments)

    abstract = jax.eval_shape(tx.init, params)

    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, tx.init(params))


@pytest.mark.parametrize("moments", MOMENTS)
def test_map_params_reaches_all_that_is_like_the_parameters(moments):
    """It calls `init` with a placeholder that has no leaves; the count is no part."""
    params = make_params()
    tx = optax.chain(lorapro_adamw(1e-3, moments=moments), optax.trace(0.9))
    state = tx.init(params)

    shifted = optax.tree.map_params(tx, lambda x: x + 1, state)

    before, after = state[0][0], shifted[0][0]
    for name in ("mu", "nu", "factors"):
        expected = jax.tree.map(lambda x: x + 1, getattr(before, name))
        chex.assert_trees_all_equal(getattr(after, name), expected)
    assert after.count == before.count
    chex.assert_trees_all_equal(shifted[1].trace, jax.tree.map(jnp.ones_like, params))


@pytest.mark.filterwarnings("ignore:Sharding info not provided")  # old Orbax
@pytest.mark.parametrize("moments", MOMENTS)
def test_training_goes_on_bit_by_bit_from_an_orbax_checkpoint(moments, tmp_path):
    tx = make(moments)
    step, params = step_of(tx), make_params()
    run = step(*step(params, tx.init(params)))

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", run)
        checkpointer.wait_until_finished()
        template = jax.eval_shape(lambda: (params, tx.init(params)))
        restored = checkpointer.restore(tmp_path / "run", template)

    chex.assert_trees_all_equal(tuple(restored), run)
    chex.assert_trees_all_equal_structs(tuple(restored), run)
    chex.assert_trees_all_equal(step(*restored), step(*run))
    fresh = step(run[0], tx.init(run[0]))[0]  # negative control: the state matters
    assert jnp.abs(fresh["norm"] - step(*run)[0]["norm"]).max() > 1e-6


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
        "mu": (factored.mu["lora_a"], P(None, "x")),
        "factors": (factored.factors["lora_b"], P(None, None, "y")),
        "columns": (factored.nu["lora_a"], P(None, "x")),
        "rows": (factored.nu["lora_b"], P(None, None, "y")),
        "M": (dense.mu["lora_a"], P(None, "y", "x")),
        "V": (dense.nu["lora_a"], P(None, "y", "x", None)),
        "other": (dense.nu["kernel"], P("x", "y")),
    }
    for name, (x, spec) in expected.items():
        sharding = NamedSharding(mesh, spec)
        assert x.sharding.is_equivalent_to(sharding, x.ndim), (name, x.sharding)
