"""`lorapro_adamw` at the edge: narrow dtypes, lost ranks, extreme numbers."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorapro_jax import lorapro_adamw, scale_by_lorapro_adam
from tests.support import oracle
from tests.support.runs import MOMENTS

pytestmark = pytest.mark.usefixtures("quick_compiles")

SHAPES = {"x": (12, 9, 3), "y": (8, 10, 1), "z": (10, 7, 4)}  # m, n, r


def tree_of(a, b):
    """One pair in JAX's layout, from the paper's."""
    return {"lora_a": jnp.float32(a.T), "lora_b": jnp.float32(b.T)}


def problem(size=1.0, seed=0):
    """Three pairs of three ranks and a bias, and the gradients of one G each."""
    params, grads = {}, {}
    for k, (name, shape) in enumerate(SHAPES.items()):
        a, b, full = oracle.factors(seed + k, *shape)
        params[name] = tree_of(a, b)
        grads[name] = tree_of(*oracle.lora_gradients(a, b, size * full, 1.0))
    params["bias"] = jnp.float32([1.0, 2.0, 3.0, 4.0])
    grads["bias"] = size * jnp.float32([1.0, -2.0, 0.5, 3.0])
    return params, grads


def directions(params, sequence, moments, *, damping=1e-2, bound=np.inf, mu_dtype=None):
    """The direction of each step of a list, with factors that stay, and the state."""
    tx = scale_by_lorapro_adam(moments=moments, mu_dtype=mu_dtype)
    state, result = tx.init(params), []
    for grads in sequence:
        step, state = _update(grads, state, params, damping, bound, moments, mu_dtype)
        result.append(step)
    return result, state


@functools.partial(jax.jit, static_argnums=(5, 6))
def _update(grads, state, params, damping, bound, moments, mu_dtype):
    """Damping and bound are traced: one program for all their values."""
    options = {"damping": damping, "max_grad_norm": bound, "mu_dtype": mu_dtype}
    tx = scale_by_lorapro_adam(moments=moments, **options)
    return tx.update(grads, state, params)


def assert_close(tree, expected, rtol):
    """In units of the largest entry of each leaf."""
    for got, want in zip(*map(jax.tree.leaves, (tree, expected)), strict=True):
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        np.testing.assert_allclose(got, want, rtol=0, atol=rtol * np.abs(want).max())


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("damping", [0.0, 1e-4, 0.1])
@pytest.mark.parametrize("lost", ["nothing", "A", "B", "A and B", "all of B", "all"])
def test_lost_directions_of_the_factors_do_not_amplify_noise(lost, damping, moments):
    """‖J(a, b)‖ ≤ ‖D‖, where |D| is about 1: the damped projection only shortens."""
    a, b, full = oracle.factors(1, 12, 9, 4, cond=3.0)
    keep = np.diag([1.0, 1.0, 0.0, 0.0])
    mix = np.linalg.qr(np.random.default_rng(1).standard_normal((4, 4)))[0]
    part = mix @ keep @ mix.T
    a = {"A": part @ a, "A and B": part @ a, "all": 0 * a}.get(lost, a)
    b = {"B": b @ part, "A and B": b @ part, "all": 0 * b, "all of B": 0 * b}.get(
        lost, b
    )
    params = tree_of(a, b)
    a, b = (np.float64(params[key]).T for key in ("lora_a", "lora_b"))
    grads = tree_of(*oracle.lora_gradients(a, b, full, 1.0))

    received, state = directions(params, [grads] * 3, moments, damping=damping)

    chex.assert_tree_all_finite((received, state))
    for step in received:
        pair = [np.float64(step[key]).T for key in ("lora_a", "lora_b")]
        moved = oracle.equivalent(a, b, *pair, 1.0)
        assert np.linalg.norm(moved) < 2 * np.sqrt(full.size)
        assert np.linalg.norm(moved) > 0.1 * np.sqrt(full.size) or lost == "all"


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_first_update_from_zero_b_leaves_a_where_it_is(damping, moments):
    params, _ = problem()
    for name in SHAPES:
        params[name]["lora_b"] = jnp.zeros_like(params[name]["lora_b"])
    grads = jax.tree.map(jnp.ones_like, params)
    for name in SHAPES:
        grads[name]["lora_a"] = jnp.zeros_like(grads[name]["lora_a"])

    (step,), state = directions(params, [grads], moments, damping=damping)

    moved = jax.tree.map(lambda x, d: x - 0.1 * d, params, step)
    for name in SHAPES:
        chex.assert_trees_all_equal(moved[name]["lora_a"], params[name]["lora_a"])
        assert jnp.abs(moved[name]["lora_b"]).max() > 1e-3
    chex.assert_tree_all_finite((moved, state))
    (again,), _ = directions(moved, [grads], moments, damping=damping)
    chex.assert_tree_all_finite(again)


@pytest.mark.parametrize("moments", MOMENTS)
def test_zero_gradients_move_nothing_and_later_ones_are_finite(moments):
    params, grads = problem()
    zeros = jax.tree.map(jnp.zeros_like, grads)

    steps, state = directions(params, [zeros, zeros, grads, zeros], moments)

    chex.assert_trees_all_equal(steps[0], zeros)
    chex.assert_trees_all_equal(steps[1], zeros)
    chex.assert_tree_all_finite((steps, state))
    assert all(jnp.abs(x).max() > 0 for x in jax.tree.leaves(steps[2:]))


@pytest.mark.parametrize("moments", MOMENTS)
def test_gradients_whose_squares_overflow_stay_finite_and_in_their_pair(moments):
    """As in Adam the direction is 0 where V overflows: with sums, in all of a pair."""
    (params, grads), (_, huge) = problem(), problem(1e21)
    mixed = {**grads, "x": huge["x"]}

    received, _ = directions(params, [mixed, grads], moments)

    expected, _ = directions(params, [grads, grads], moments)
    for step, plain in zip(received, expected, strict=True):
        chex.assert_tree_all_finite(step["x"])
        if moments == "factored":
            assert not any(x.any() for x in step["x"].values())
        assert_close([step["y"], step["z"]], [plain["y"], plain["z"]], 1e-6)


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("bound", [np.inf, 1.0])
def test_huge_gradients_keep_the_direction(bound, moments):
    """Adam divides the size out, also 1e15, whose squares' products overflow."""
    (params, grads), (_, huge) = problem(), problem(1e15)

    received, state = directions(params, [huge] * 2, moments, bound=bound)

    chex.assert_tree_all_finite((received, state))
    expected, _ = directions(params, [grads] * 2, moments, bound=bound)
    assert_close(received, expected, 1e-4)


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("bound", [np.inf, 1.0])
def test_tiny_gradients_are_finite_and_small_against_eps(bound, moments):
    """|g| = 1e-20 « eps = 1e-8: directions of 1e-12, not 1 and not NaN."""
    params, grads = problem(1e-20)

    steps, state = directions(params, [grads] * 2, moments, bound=bound)

    chex.assert_tree_all_finite((steps, state))
    for x in jax.tree.leaves(steps):
        assert 0 < jnp.abs(x).max() < 1e-9


def test_tiny_decay_is_not_lost_in_rounding():
    """√(1 - 1e-6) - 1 has one digit in float32; the factors still decay by 5e-7."""
    params, grads = problem()
    tx = lorapro_adamw(1e-3, weight_decay=1e-3)
    zeros = jax.tree.map(jnp.zeros_like, grads)

    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)

    for name in SHAPES:
        expected = jax.tree.map(lambda x: -5e-7 * x, params[name])
        chex.assert_trees_all_close(updates[name], expected, rtol=1e-5)
    rounded = jnp.sqrt(jnp.float32(1 - 1e-6)) - 1  # negative control
    assert abs(rounded / -5e-7 - 1) > 1e-2


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_leaves_have_wide_moments_and_updates_of_their_own_dtype(dtype, moments):
    """The result is that of the same numbers in float32, rounded at the end."""
    params, grads = jax.tree.map(lambda x: x.astype(dtype), problem())
    widen = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    received, state = directions(params, [grads] * 3, moments)

    chex.assert_trees_all_equal_dtypes(received[-1], params)
    kept = state.pairs, state.others
    for x in jax.tree.leaves([(x.mu, x.nu) for x in kept]):
        assert x.dtype == jnp.float32
    for x in jax.tree.leaves(state.pairs[2:]):  # the factors, where they are kept
        assert x.dtype == dtype
    expected, _ = directions(widen(params), [widen(grads)] * 3, moments)
    assert_close(received, expected, float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("moments", MOMENTS)
def test_mu_dtype_narrows_the_first_moment_only(moments):
    params, grads = problem()

    received, state = directions(params, [grads] * 3, moments, mu_dtype=jnp.bfloat16)

    for kept in (state.pairs, state.others):
        assert {x.dtype for x in jax.tree.leaves(kept.mu)} == {jnp.dtype(jnp.bfloat16)}
        assert {x.dtype for x in jax.tree.leaves(kept.nu)} == {jnp.dtype(jnp.float32)}
    expected, _ = directions(params, [grads] * 3, moments)
    # Three roundings of 2^-8, and the damped inverse amplifies up to cond = 10.
    assert_close(received, expected, 0.1)
    chex.assert_trees_all_equal_dtypes(received[-1], params)


@pytest.mark.parametrize("moments", MOMENTS)
def test_float64_is_kept_for_the_pair_that_has_it(moments, x64):
    params, grads = problem()
    wide = {"lora_a": jnp.float64, "lora_b": jnp.bfloat16}
    for tree in (params, grads):
        tree["y"] = {key: x.astype(wide[key]) for key, x in tree["y"].items()}

    received, state = directions(params, [grads] * 2, moments)

    chex.assert_trees_all_equal_dtypes(received[-1], params)
    dtypes = lambda tree: {str(x.dtype) for x in jax.tree.leaves(tree)}
    for moments_of in (lambda x: x.mu, lambda x: x.nu):
        pairs, others = moments_of(state.pairs), moments_of(state.others)
        assert dtypes(pairs["y"]) == {"float64"}
        narrow = pairs["x"], pairs["z"], others["bias"]
        assert all(dtypes(tree) == {"float32"} for tree in narrow)


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("bound", [np.inf, 0.5])
@pytest.mark.parametrize("where", ["y/lora_a", "y/lora_b", "bias"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_gradient_spoils_its_own_pair_only(bad, where, bound, moments):
    """The others go on, bit by bit, as if that pair had had no gradient."""
    params, grads = problem()
    group, *name = where.split("/")
    spoiled = jax.tree.map(lambda x: x, grads)
    clean = {**grads, group: jax.tree.map(jnp.zeros_like, grads[group])}
    if name:
        spoiled[group][name[0]] = spoiled[group][name[0]].at[0, 0].set(bad)
    else:
        spoiled[group] = spoiled[group].at[0].set(bad)

    received, _ = directions(params, [spoiled, grads], moments, bound=bound)

    expected, _ = directions(params, [clean, grads], moments, bound=bound)
    for step, want in zip(received, expected, strict=True):
        for other in step.keys() - {group}:
            chex.assert_trees_all_equal(step[other], want[other])
    own = jax.tree.leaves(received[0][group])
    assert not all(bool(jnp.isfinite(x).all()) for x in own)
    if bound < np.inf:  # negative control: a finite one would take part
        taking_part, _ = directions(params, [grads, grads], moments, bound=bound)
        chex.assert_trees_all_equal_shapes(taking_part, expected)
        assert jnp.abs(taking_part[1]["x"]["lora_a"] - received[1]["x"]["lora_a"]).max()


@pytest.mark.parametrize("moments", MOMENTS)
def test_non_finite_layer_leaves_the_other_layers_of_its_stack_bit_identical(moments):
    params, grads = problem()
    stack = lambda tree: jax.tree.map(lambda x: jnp.stack([x] * 4), tree["x"])
    params, grads = stack(params), stack(grads)
    bad = {**grads, "lora_a": grads["lora_a"].at[2, 0, 0].set(jnp.nan)}

    received, _ = directions(params, [bad, grads], moments)

    expected, _ = directions(params, [grads, grads], moments)
    keep = jnp.array([0, 1, 3])
    others = lambda trees: jax.tree.map(lambda x: x[keep], trees)
    chex.assert_trees_all_equal(others(received), others(expected))
    assert jnp.isnan(received[0]["lora_a"][2]).any()
