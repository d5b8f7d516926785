"""float32 and narrower, and inputs at the edge: finite stays finite and contained."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorapro_jax import LoRAPair, lorapro
from tests.support import oracle

pytestmark = pytest.mark.usefixtures("quick_compiles")

DAMPINGS = [0.0, 1e-8, 1e-4, 0.1]
GAUGES = ["sylvester", "symmetric", "zero"]


def tree_of(a, b, dtype=jnp.float32):
    """One pair in JAX's layout, from the paper's."""
    return {"lora_a": jnp.asarray(a.T, dtype), "lora_b": jnp.asarray(b.T, dtype)}


def problem(*args, scale=1.0, **kwargs):
    """Factors, and LoRA's gradients of them, in float64."""
    a, b, full = oracle.factors(*args, **kwargs)
    return (a, b), oracle.lora_gradients(a, b, full, scale)


def update(
    params, grads, scale=1.0, damping=0.1, gauge="sylvester", pairs=None
):  # fmt: skip
    """`lorapro` under jit, compiled once for all scales and dampings."""
    numbers = jnp.float32(scale), jnp.float32(damping)
    return _update(params, grads, *numbers, gauge, pairs)


@functools.partial(jax.jit, static_argnames=("gauge", "pairs"))
def _update(params, grads, scale, damping, gauge, pairs):
    tx = lorapro(scale=scale, damping=damping, gauge=gauge, pairs=pairs)
    return tx.update(grads, tx.init(params), params)[0]


@pytest.mark.parametrize("damping", [0.0, 1e-4, 0.1])
@pytest.mark.parametrize("cond", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("shape", [(40, 30, 4), (25, 33, 8)])
def test_float32_error_is_rounding_times_the_squared_condition_number(
    shape, cond, damping, full_compiles
):
    """‖E - E*‖/‖E*‖ ≤ 10 eps cond² against the float64 oracle."""
    m, n, r = shape
    factors, grads = problem(0, m, n, r, cond=cond, dtype=np.float32)

    step = update(tree_of(*factors), tree_of(*grads), damping=damping)

    received = [np.float64(step[key]).T for key in ("lora_a", "lora_b")]
    best = oracle.adjust(*factors, *grads, 1.0, damping)
    distance = np.linalg.norm(
        oracle.equivalent(*factors, *received, 1.0)
        - oracle.equivalent(*factors, *best, 1.0)
    )
    relative = distance / np.linalg.norm(oracle.equivalent(*factors, *best, 1.0))
    assert relative < 10 * np.finfo(np.float32).eps * max(cond, 3.0) ** 2
    plain = oracle.equivalent(*factors, *grads, 1.0)
    assert np.linalg.norm(plain - oracle.equivalent(*factors, *best, 1.0)) > distance


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize(
    ("a_size", "b_size"), [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0)], ids=["B=0", "A=0", "0"]
)
def test_zero_factors_give_finite_steps(a_size, b_size, gauge, damping):
    """And a factor whose partner is 0 has no gradient, hence no step."""
    (a, b), _ = problem(1, 12, 9, 3)
    a, b = a_size * a, b_size * b
    grads = oracle.lora_gradients(a, b, np.ones((12, 9)), 1.0)

    step = update(tree_of(a, b), tree_of(*grads), gauge=gauge, damping=damping)

    chex.assert_tree_all_finite(step)
    if not b_size:
        np.testing.assert_array_equal(step["lora_a"], 0)
    if not a_size:
        np.testing.assert_array_equal(step["lora_b"], 0)


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("lost", [1, 3])
def test_rank_deficient_factors_give_the_projection(lost, damping):
    """Directions that A lacks are left out; undamped, E is still P_B G + … P_A."""
    (a, b), _ = problem(2, 12, 9, 4, dtype=np.float32)
    left, sigma, right = np.linalg.svd(a, full_matrices=False)
    sigma[-lost:] = 0
    a = ((left * sigma) @ right).astype(np.float32).astype(np.float64)
    full = np.random.default_rng(2).standard_normal((12, 9))

    step = update(
        tree_of(a, b),
        tree_of(*oracle.lora_gradients(a, b, full, 1.0)),
        damping=damping,
    )

    chex.assert_tree_all_finite(step)
    if damping == 0.0:
        received = [np.float64(step[key]).T for key in ("lora_a", "lora_b")]
        a = (left * sigma) @ right  # exactly deficient again
        np.testing.assert_allclose(
            oracle.equivalent(a, b, *received, 1.0),
            oracle.projection(a, b, full),
            atol=2e-3,  # 1e-7 rounding of A times cond(B)² = 100, times ‖G‖ = 10
        )


EXTREMES = [
    sizes
    for sizes in itertools.product([1e-20, 1.0, 1e20], repeat=3)
    # Elsewhere the gradients or the exact result overflow: s max(A, B) = 1e±40.
    if 1e-37 < max(sizes[:2]) * sizes[2] < 1e37
]


@pytest.mark.parametrize("damping", [0.0, 1e-8, 1e-7, 1e-6, 1e-3])
@pytest.mark.parametrize("lost", [0, 4, 7])
def test_damping_below_the_rounding_noise_does_not_amplify_it(lost, damping):
    """No E is farther from G than no step at all: ‖E - G‖ ≤ ‖G‖, even in float32."""
    a, b, full = oracle.factors(13, 60, 50, 8, cond=1e4, dtype=np.float32)
    if lost:
        keep = np.diag(np.arange(8) < 8 - lost)
        a, b = (np.linalg.qr(a.T)[0] @ keep).T, np.linalg.qr(b)[0] @ keep
        a, b = (np.float64(np.float32(x)) for x in (a, b))
    grads = oracle.lora_gradients(a, b, full, 1.0)

    step = update(tree_of(a, b), tree_of(*grads), damping=damping)

    received = [np.float64(step[key]).T for key in ("lora_a", "lora_b")]
    distance = np.linalg.norm(oracle.equivalent(a, b, *received, 1.0) - full)
    assert distance < 1.02 * np.linalg.norm(full)


@pytest.mark.parametrize("rank", [4, 16, 64])
def test_null_space_is_recognised_at_every_rank(rank):
    """Half of the directions lost, undamped: E is still the projection of G."""
    rng = np.random.default_rng(rank)
    spread = lambda n: np.linalg.qr(rng.standard_normal((n, rank)))[0]
    mix = np.linalg.qr(rng.standard_normal((rank, rank)))[0][:, : rank // 2]
    a, b = (mix @ (spread(4 * rank) @ mix).T), spread(5 * rank) @ mix @ mix.T
    a, b = (np.float64(np.float32(x)) for x in (a, b))
    full = rng.standard_normal((5 * rank, 4 * rank))

    grads = oracle.lora_gradients(a, b, full, 1.0)
    step = update(tree_of(a, b), tree_of(*grads), damping=0.0)

    received = [np.float64(step[key]).T for key in ("lora_a", "lora_b")]
    onto_b, onto_a = (x @ np.linalg.pinv(x, rcond=1e-4) for x in (b, a.T))
    expected = onto_b @ full + (full - onto_b @ full) @ onto_a
    error = oracle.equivalent(a, b, *received, 1.0) - expected
    assert np.linalg.norm(error) < 1e-4 * np.linalg.norm(expected)


def test_update_can_be_differentiated_also_with_mixed_ranks(x64):
    """The derivative of the step's size in a factor agrees with differences."""
    params, grads = {}, {}
    for name, shape in {"x": (12, 9, 4), "y": (10, 8, 2)}.items():
        factors, gradients = problem(14, *shape)
        params[name] = tree_of(*factors, jnp.float64)
        grads[name] = tree_of(*gradients, jnp.float64)

    def size(shift):
        moved = {
            **params,
            "x": {**params["x"], "lora_a": params["x"]["lora_a"] + shift},
        }
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(update(moved, grads)))

    slope = jax.grad(size)(0.0)

    expected = (size(1e-5) - size(-1e-5)) / 2e-5
    np.testing.assert_allclose(slope, expected, rtol=1e-5)


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("sizes", EXTREMES, ids=str)
def test_extreme_scales_stay_finite(sizes, damping):
    """A, B and s of 1e-20 to 1e20, with the gradients that G ~ 1 gives them."""
    a_size, b_size, scale = sizes
    a, b, full = oracle.factors(3, 12, 9, 3)
    a, b = a_size * a, b_size * b
    grads = oracle.lora_gradients(a, b, full, scale)

    step = update(tree_of(a, b), tree_of(*grads), scale, damping=damping)

    chex.assert_tree_all_finite(step)
    larger = "lora_b" if a_size >= b_size else "lora_a"  # it has the larger gradient
    assert jnp.abs(step[larger]).max() > 0


@pytest.mark.parametrize("size", [2.0**-60, 1.0, 2.0**60])
def test_common_scale_of_the_factors_only_rescales_the_step(size, full_compiles):
    """(cA, cB) with the same G: the step is 1/c of the step, to the last bit."""
    factors, grads = problem(4, 12, 9, 3, dtype=np.float32)
    small = update(tree_of(*factors), tree_of(*grads), damping=1e-3)

    scaled = [size * x for x in (*factors, *grads)]
    step = update(tree_of(*scaled[:2]), tree_of(*scaled[2:]), damping=1e-3)

    chex.assert_trees_all_equal(jax.tree.map(lambda x: x * size, step), small)


@pytest.mark.parametrize("size", [1e-20, 1e15])
def test_step_is_linear_in_the_gradient_whatever_its_size(size):
    """Tiny and huge gradients keep their direction."""
    factors, grads = problem(5, 12, 9, 3)
    step = update(tree_of(*factors), tree_of(*grads))

    other = update(tree_of(*factors), tree_of(*(size * g for g in grads)))

    chex.assert_trees_all_close(
        jax.tree.map(lambda x: x / size, other), step, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("shape", [(6, 5, 1), (4, 9, 4), (3, 7, 5), (3, 4, 6)])
@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_every_rank_works_even_above_the_size_of_the_layer(shape, damping):
    """r = 1, r = m, and r > m as an explicit pair."""
    factors, grads = problem(6, *shape, cond=3.0)
    pairs = (LoRAPair("lora_a", "lora_b", 1, 0),)

    step = update(tree_of(*factors), tree_of(*grads), damping=damping, pairs=pairs)

    best = oracle.adjust(*factors, *grads, 1.0, damping)
    received = [np.float64(step[key]).T for key in ("lora_a", "lora_b")]
    np.testing.assert_allclose(
        oracle.equivalent(*factors, *received, 1.0),
        oracle.equivalent(*factors, *best, 1.0),
        atol=1e-4,
    )


@pytest.mark.parametrize("where", ["lora_a", "lora_b"])
@pytest.mark.parametrize("kind", ["params", "grads"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_pair_leaves_the_others_bit_identical(bad, kind, where):
    """NaN stays visible in its own pair, for `apply_if_finite`, and only there."""
    trees = {"params": {}, "grads": {}}
    for name, shape in {"x": (12, 9, 3), "y": (8, 8, 3), "z": (10, 7, 5)}.items():
        factors, grads = problem(7, *shape)
        trees["params"][name] = tree_of(*factors)
        trees["grads"][name] = tree_of(*grads)
    clean = update(trees["params"], trees["grads"])
    spoiled = trees[kind]["y"]
    spoiled[where] = spoiled[where].at[1, 1].set(bad)

    step = update(trees["params"], trees["grads"])

    for name in ("x", "z"):
        chex.assert_trees_all_equal(step[name], clean[name])
    assert not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(step["y"]))


def test_non_finite_layer_leaves_the_other_layers_of_its_stack_bit_identical():
    """In stacked factors each slice is a pair of its own."""
    factors, grads = problem(8, 12, 9, 3)
    stack = lambda tree: jax.tree.map(lambda x: jnp.stack([x] * 4), tree)
    params, grads = stack(tree_of(*factors)), stack(tree_of(*grads))
    clean = update(params, grads)
    grads["lora_a"] = grads["lora_a"].at[2, 0, 0].set(jnp.nan)

    step = update(params, grads)

    keep = jnp.array([0, 1, 3])
    chex.assert_trees_all_equal(
        jax.tree.map(lambda x: x[keep], step), jax.tree.map(lambda x: x[keep], clean)
    )
    assert jnp.isnan(step["lora_a"][2]).any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_factors_keep_their_dtype_and_compute_in_float32(dtype):
    """The result is that of the same numbers in float32, rounded once."""
    factors, grads = problem(9, 12, 9, 3)
    params, grads = tree_of(*factors, dtype), tree_of(*grads, dtype)
    widen = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    step = update(params, grads)

    expected = update(widen(params), widen(grads))
    chex.assert_trees_all_equal(
        step, jax.tree.map(lambda x: x.astype(dtype), expected), strict=True
    )


def test_float16_saturates_instead_of_overflowing():
    """A tiny B asks for a step of A beyond 65504; it is cut there, with its sign."""
    a, b, full = oracle.factors(10, 12, 9, 3, b_scale=1e-3)
    grads = oracle.lora_gradients(a, b, 1e3 * full, 1.0)
    params, grads = tree_of(a, b, jnp.float16), tree_of(*grads, jnp.float16)

    step = update(params, grads, damping=0.0)

    chex.assert_tree_all_finite(step)
    assert jnp.abs(step["lora_a"]).max() == jnp.finfo(jnp.float16).max
    infinite = jax.tree.map(lambda x: x * jnp.inf, grads)
    spoiled = update(params, infinite, damping=0.0)
    assert not all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(spoiled))


def test_mixed_dtypes_in_one_tree_and_in_one_pair(x64):
    """Each leaf keeps its own; float64 is used where a pair has a float64 leaf."""
    factors, grads = problem(11, 12, 9, 3)
    dtypes = {"lora_a": jnp.float64, "lora_b": jnp.bfloat16}
    mixed = lambda tree: {key: x.astype(dtypes[key]) for key, x in tree.items()}
    params = {"x": tree_of(*factors), "y": mixed(tree_of(*factors, jnp.float64))}
    grads = {"x": tree_of(*grads), "y": mixed(tree_of(*grads, jnp.float64))}

    step = update(params, grads)

    chex.assert_trees_all_equal_dtypes(step, grads)
    wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float64), tree)
    alone = update(wide(params["y"]), wide(grads["y"]))
    np.testing.assert_allclose(step["y"]["lora_a"], alone["lora_a"], rtol=1e-12)
    np.testing.assert_array_equal(
        step["y"]["lora_b"], alone["lora_b"].astype(jnp.bfloat16)
    )
