"""A pair's result is a function of that pair alone, whatever else is in the tree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorapro_jax import lorapro, scale_by_lora_rite, scale_by_lorapro_adam
from lorapro_jax.algebra._linalg import Norm
from lorapro_jax.transforms import _groups
from lorapro_jax.transforms._clip import Clip

pytestmark = pytest.mark.usefixtures("quick_compiles")

TRANSFORMS = {
    "lorapro": lambda **options: lorapro(damping=1e-2, **options),
    "factored": scale_by_lorapro_adam,
    "dense": functools.partial(scale_by_lorapro_adam, moments="dense"),
    "lora_rite": functools.partial(scale_by_lora_rite, max_grad_norm=None),
}
# name: shapes of A and B, their dtype, and the stacked axis if there is one.
KINDS = {
    "plain": ((9, 3), (3, 7), jnp.float32),
    "stack": ((3, 6, 2), (3, 2, 5), jnp.float32),
    "alike": ((9, 3), (3, 7), jnp.float32),
    "narrow": ((8, 2), (2, 6), jnp.bfloat16),
    "high": ((12, 8), (8, 10), jnp.float32),
    "heads": ((6, 2), (2, 3, 4), jnp.float32),
    "half": ((5, 1), (1, 4), jnp.float16),
}
# Two orders of the same sums, amplified by 1/damping; then rounded to the dtype.
ROUNDINGS = 1e-4


def problem(seed, names):
    rng = np.random.default_rng(seed)
    draw = lambda shape, dtype: jnp.asarray(rng.standard_normal(shape), dtype)
    return {
        name: {
            key: draw(shape, KINDS[name][2])
            for key, shape in zip(("lora_a", "lora_b"), KINDS[name][:2], strict=True)
        }
        for name in KINDS
        if name in names
    }


def run(tx, params, sequence):
    """The updates of each step, at factors that stay."""
    state, update, result = tx.init(params), jax.jit(tx.update), []
    for grads in sequence:
        updates, state = update(grads, state, params)
        result.append(updates)
    return result


def pick(tree, names):
    return {name: tree[name] for name in names}


def assert_same(tree, expected):
    for got, want in zip(*map(jax.tree.leaves, (tree, expected)), strict=True):
        assert got.dtype == want.dtype
        got, want, eps = *map(np.float64, (got, want)), float(jnp.finfo(got.dtype).eps)
        tolerance = (ROUNDINGS + 2 * eps) * np.abs(want).max()
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("stacked", [False, True], ids=["one by one", "grouped"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_each_pair_steps_as_it_does_alone(name, stacked, monkeypatch):
    """Among neighbours of other ranks and dtypes, one of them not finite."""
    params, *grads = (problem(seed, KINDS) for seed in range(4))
    bad = grads[1]["alike"]
    grads[1]["alike"] = bad | {"lora_a": bad["lora_a"].at[0, 0].set(jnp.nan)}
    bad = grads[2]["high"]
    grads[2]["high"] = bad | {"lora_b": bad["lora_b"].at[1, 1].set(jnp.inf)}
    tx = TRANSFORMS[name](scale=0.7)
    monkeypatch.setattr(_groups, "_stacking_pays", lambda: stacked)

    together = run(tx, params, grads)

    monkeypatch.setattr(_groups, "_stacking_pays", lambda: False)
    for kind in KINDS:
        alone = run(tx, pick(params, [kind]), [pick(x, [kind]) for x in grads])
        whole = 1 if kind == "alike" else 2 if kind == "high" else 3
        for got, want in zip(together[:whole], alone[:whole], strict=True):
            assert_same(got[kind], want[kind])
        # Negative control: the comparison sees another pair's step.
        if kind == "plain":
            with pytest.raises(AssertionError):
                assert_same(together[0]["alike"], alone[0]["plain"])


@pytest.mark.parametrize("name", TRANSFORMS)
def test_each_layer_of_a_stack_steps_as_it_does_alone(name):
    """Also beside a layer whose gradient is not finite."""
    params, *grads = (problem(seed, ["stack"]) for seed in range(3))
    bad = grads[0]["stack"]
    grads[0]["stack"] = bad | {"lora_a": bad["lora_a"].at[2, 0, 0].set(jnp.nan)}
    tx = TRANSFORMS[name](scale=0.7)
    layer = lambda tree, k: jax.tree.map(lambda x: x[k], tree)

    together = run(tx, params, grads)

    for k in (0, 1):
        alone = run(tx, layer(params, k), [layer(x, k) for x in grads])
        for got, want in zip(together, alone, strict=True):
            assert_same(layer(got, k), want)
    assert not np.isfinite(np.asarray(together[0]["stack"]["lora_a"][2])).any()


@pytest.mark.parametrize("stacked", [False, True], ids=["one by one", "grouped"])
@pytest.mark.parametrize("moments", ["factored", "dense"])
def test_a_layer_that_is_not_finite_does_not_switch_clipping_off(
    moments, stacked, monkeypatch
):
    """The others are clipped as if that layer's gradient were 0."""
    monkeypatch.setattr(_groups, "_stacking_pays", lambda: stacked)
    names = ["plain", "stack", "alike"]
    params, grads = (problem(seed, names) for seed in (0, 1))
    grads = jax.tree.map(lambda x: 100 * x, grads)

    def with_value(value):
        a, b = grads["stack"]["lora_a"], grads["stack"]["lora_b"]
        stack = {"lora_a": a.at[2].set(value), "lora_b": b.at[2].set(value)}
        lost = jax.tree.map(lambda x: jnp.full_like(x, value), grads["alike"])
        return {**grads, "stack": stack, "alike": lost}

    def state(value):
        tx = scale_by_lorapro_adam(moments=moments, max_grad_norm=1.0)
        return jax.jit(tx.update)(with_value(value), tx.init(params), params)[1]

    spoilt, expected = state(jnp.nan).pairs.nu, state(0.0).pairs.nu
    finite = lambda tree: [
        *jax.tree.leaves(tree["plain"]),
        *(x[:2] for x in jax.tree.leaves(tree["stack"])),
    ]
    assert_same(finite(spoilt), finite(expected))
    total = sum(float(x.sum()) for x in finite(expected)[:1])
    assert 0 < total < 1e-3  # (1 - b2) · 1², and not (1 - b2) · 1e4


@pytest.mark.parametrize("moments", ["factored", "dense"])
@pytest.mark.parametrize("size", [1e19, 1e25, 1e30])
def test_where_the_square_of_the_norm_overflows_the_norm_is_still_the_bound(
    size, moments
):
    params, grads = (problem(seed, ["plain", "high"]) for seed in (0, 1))
    tx = scale_by_lorapro_adam(moments=moments, max_grad_norm=1.0)
    update = jax.jit(tx.update)
    huge = jax.tree.map(lambda x: size * x, grads)

    step, state = update(huge, tx.init(params), params)

    expected, want = update(grads, tx.init(params), params)
    assert_same(step, expected)
    assert_same(state.pairs.nu, want.pairs.nu)


def test_a_norm_above_the_largest_number_still_clips():
    """Of a unit above 2^126, XLA's reciprocal would be 0, and so the norm."""
    norms = lambda unit: [Norm(unit, jnp.float32(1.5)).times(2.0**20)]
    factor = jax.jit(lambda unit: Clip(1.0, {}).factor(norms(unit)))
    assert 0 <= factor(jnp.float32(2.0**110)) < 1e-37
    np.testing.assert_allclose(factor(jnp.float32(2.0**80)), 2.0**-100 / 1.5, rtol=1e-6)


def test_complex_leaves_are_clipped_by_their_absolute_values():
    params = problem(0, ["plain"]) | {"phase": jnp.zeros(3, jnp.complex64)}
    grads = jax.tree.map(jnp.zeros_like, params)
    grads["phase"] = jnp.asarray([3j, 4, 0], jnp.complex64)
    tx = scale_by_lorapro_adam(max_grad_norm=1.0, b1=0.0)

    _, state = jax.jit(tx.update)(grads, tx.init(params), params)

    np.testing.assert_allclose(state.others.mu["phase"], grads["phase"] / 5, rtol=1e-6)
