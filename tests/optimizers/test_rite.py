"""LoRA-RITE, the rule of `_rite`: its step does not depend on how B A is split."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.support import oracle, oracle_rite
from tests.support.transforms import rite

pytestmark = pytest.mark.usefixtures("quick_compiles")

M, N, R, STEPS, RATE = 9, 6, 3, 20, 0.02
# Each step costs a few roundings of 1e-16 times cond² = 1e2 to 1e3, and the loss, whose
# curvature times RATE is below 1, does not let them grow: 1e-12, and some for the
# directions that eps = 1e-8 hardly regularises.
TOLERANCE = 1e-9
HYPER = {"b1": 0.9, "b2": 0.99, "eps": 1e-8}


def start(seed=0, b_scale=1.0, scale=1.0):
    """A pair in Flax's layout, and the target of s B A."""
    a, b, target = oracle.factors(seed, M, N, R, b_scale=b_scale)
    return {"lora_a": jnp.asarray(a.T), "lora_b": jnp.asarray(b.T / scale)}, target


def weight(params, scale=1.0):
    """s B A of every layer, `(*batch, m, n)`."""
    return scale * (params["lora_a"] @ params["lora_b"]).mT


@functools.partial(jax.jit, static_argnames=("kind", "stack"))
def run(params, target, scale, kind="rite", stack=None):
    """s B A after each of some steps, and the factors at the end."""
    del stack  # so that shapes of another test do not share a trace
    adam = lambda: optax.scale_by_adam(**HYPER)
    tx = rite(**HYPER, scale=scale) if kind == "rite" else adam()
    loss = lambda params: 0.5 * jnp.sum((weight(params, scale) - target) ** 2)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = jax.tree.map(lambda p, d: p - RATE * d, params, updates)
        return (params, state), weight(params, scale)

    (params, _), weights = jax.lax.scan(step, (params, tx.init(params)), length=STEPS)
    return weights, params


def distance(got, want):
    return np.abs(got - want).max() / np.abs(want).max()


def moved(params, q):
    """(A, B) → (Q⁻¹ A, B Q) in Flax's layout."""
    a, b = params["lora_a"], params["lora_b"]
    return {"lora_a": a @ np.linalg.inv(q).T, "lora_b": q.T @ b}


@pytest.mark.parametrize("kind", ["rite", "adam"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_product_does_not_depend_on_how_it_is_split(seed, kind, x64):
    """After 20 steps; negative control: it does under `optax.adam`."""
    params, target = start(seed)
    q = np.eye(R) + 0.3 * np.random.default_rng(seed).standard_normal((R, R))

    one, _ = run(params, target, 1.0, kind)
    other, factors = run(moved(params, q), target, 1.0, kind)

    assert distance(factors["lora_a"], params["lora_a"]) > 0.1
    if kind == "rite":
        assert distance(other, one) < TOLERANCE
    else:
        assert distance(other, one) > 1e-2


@pytest.mark.parametrize("b_scale", [1.0, 1e-2])
def test_trajectory_is_that_of_the_algorithm_in_frames_from_qr(b_scale, x64):
    """The frames are another basis of the same space, and the step is the same."""
    scale = 2.0
    params, target = start(3, b_scale)

    received, factors = run(params, target, scale)

    expected, a = in_numpy(params, target, scale, HYPER)
    assert distance(received, expected) < TOLERANCE
    assert distance(factors["lora_a"].T, a) < TOLERANCE
    for name in HYPER:  # negative control: each number matters
        other = {**HYPER, name: 1.01 * HYPER[name] if name != "eps" else 1e-2}
        assert distance(in_numpy(params, target, scale, other)[0], expected) > 1e-6


def in_numpy(params, target, scale, hyper):
    """`run`, and A at the end, by `oracle_rite`."""
    a, b = np.asarray(params["lora_a"]).T, np.asarray(params["lora_b"]).T
    rule, weights = oracle_rite.Weight(scale, **hyper), []
    for _ in range(STEPS):
        full = scale * b @ a - target
        step = rule.direction(a, b, *oracle.lora_gradients(a, b, full, scale))
        a, b = a - RATE * step[0], b - RATE * step[1]
        weights.append(scale * b @ a)
    return np.stack(weights), a


def test_scale_of_the_forward_pass_does_not_change_the_trajectory(x64):
    """W = s B A with s four times as large and B a quarter: the same W at every step.

    Powers of two, so that not a bit differs before the first step.
    """
    params, target = start(4)
    one, _ = run(params, target, 1.0)
    other, _ = run({**params, "lora_b": params["lora_b"] / 4}, target, 4.0)
    assert distance(other, one) < TOLERANCE
    # Negative control: under Adam it does.
    one, _ = run(params, target, 1.0, "adam")
    other, _ = run({**params, "lora_b": params["lora_b"] / 4}, target, 4.0, "adam")
    assert distance(other, one) > 1e-2


def test_stacked_layers_equal_each_alone(x64):
    layers = [start(seed) for seed in range(4)]
    stack = lambda xs: jnp.stack(xs).reshape(2, 2, *xs[0].shape)
    params = jax.tree.map(lambda *xs: stack(xs), *(params for params, _ in layers))

    received, _ = run(params, stack([target for _, target in layers]), 1.0, stack=2)

    for k, (params, target) in enumerate(layers):
        expected, _ = run(params, target, 1.0)
        assert distance(received[:, k // 2, k % 2], expected) < TOLERANCE


def lost(params, name, count):
    """Parameters with the last singular values of a factor set to 0."""
    u, sigma, vt = np.linalg.svd(params[name], full_matrices=False)
    sigma[len(sigma) - count :] = 0
    return {**params, name: jnp.asarray((u * sigma) @ vt)}


def as_float32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def test_from_zero_b_it_is_finite_and_moves():
    """The first step is B's: A has no gradient there. Later ones are both's."""
    params, target = as_float32(start(5))
    params["lora_b"] = jnp.zeros_like(params["lora_b"])

    weights, factors = run(params, target, 1.0)

    chex.assert_tree_all_finite((weights, factors))
    losses = jnp.sum((weights - target) ** 2, (-2, -1))
    assert losses[-1] < 0.98 * losses[0] < 0.98 * jnp.sum(target**2)
    for name in factors:
        assert jnp.abs(factors[name] - params[name]).max() > RATE


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", ["lora_a", "lora_b"])
def test_rank_deficient_factors_give_finite_steps(name, count):
    """What a factor lacks is left out until its partner's step brings it back."""
    params, target = as_float32(start(6))
    params = as_float32(lost(params, name, count))

    weights, factors = run(params, target, 1.0)

    chex.assert_tree_all_finite((weights, factors))
    losses = jnp.sum((weights - target) ** 2, (-2, -1))
    assert losses[-1] < losses[0]


def test_a_gradient_that_is_not_finite_stays_in_its_pair():
    params = {name: as_float32(start(seed)[0]) for name, seed in (("x", 0), ("y", 1))}
    params["bias"] = jnp.ones(3)
    tx = rite(**HYPER, scale=1.0)
    update, state = jax.jit(tx.update), tx.init(params)
    bad = {**params, "x": {**params["x"], "lora_a": params["x"]["lora_a"] * jnp.nan}}

    received, _ = update(bad, state, params)

    expected, _ = update(params, state, params)
    for name in ("y", "bias"):
        chex.assert_trees_all_equal(received[name], expected[name])
    assert not all(bool(jnp.isfinite(x).all()) for x in received["x"].values())
