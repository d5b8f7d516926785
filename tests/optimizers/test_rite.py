"""LoRA-RITE: its step does not depend on how B A is split, and is its authors'."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorapro_jax import lora_rite, scale_by_lora_rite
from tests.support import oracle, oracle_rite
from tests.support.trees import make_params

pytestmark = pytest.mark.usefixtures("quick_compiles")

M, N, R, STEPS, RATE, DECAY = 9, 6, 3, 50, 0.02, 0.1
# Each step costs a few roundings of 1e-16 times cond² = 1e2 to 1e3, and the loss, whose
# curvature times RATE is below 1, does not let them grow: 1e-12, and some for the
# directions that eps = 1e-8 hardly regularises.
TOLERANCE = 1e-9
HYPER = {"b1": 0.9, "b2": 0.99, "eps": 1e-8, "escape_mass": True, "max_grad_norm": 1.0}
KINDS = {
    "lora_rite": lambda scale: lora_rite(
        RATE, weight_decay=DECAY, scale=scale, **HYPER
    ),
    "plain": lambda scale: lora_rite(
        RATE, weight_decay=DECAY, scale=scale,
        **HYPER | {"escape_mass": False, "max_grad_norm": None},
    ),
    "adam": lambda scale: optax.adam(RATE, 0.9, 0.99),
}  # fmt: skip
CHANGED = {
    "b1": 0.91, "b2": 0.98, "eps": 1e-3, "escape_mass": False, "max_grad_norm": None
}  # fmt: skip


def start(seed=0, b_scale=1.0, scale=1.0):
    """A pair in Flax's layout, and the target of s B A."""
    a, b, target = oracle.factors(seed, M, N, R, b_scale=b_scale)
    return {"lora_a": jnp.asarray(a.T), "lora_b": jnp.asarray(b.T / scale)}, target


def weight(params, scale=1.0):
    """s B A of every layer, `(*batch, m, n)`."""
    return scale * (params["lora_a"] @ params["lora_b"]).mT


@functools.partial(jax.jit, static_argnames=("kind", "stack"))
def run(params, target, scale, kind="lora_rite", stack=None):
    """s B A after each of some steps, and the factors at the end."""
    del stack  # so that shapes of another test do not share a trace
    tx = KINDS[kind](scale)
    loss = lambda params: 0.5 * jnp.sum((weight(params, scale) - target) ** 2)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), weight(params, scale)

    (params, _), weights = jax.lax.scan(step, (params, tx.init(params)), length=STEPS)
    return weights, params


def in_numpy(params, target, scale, hyper):
    """`run`, and A at the end, by `oracle_rite`."""
    a, b = np.asarray(params["lora_a"]).T, np.asarray(params["lora_b"]).T
    rule, bound = dict(hyper), hyper["max_grad_norm"]
    del rule["max_grad_norm"]
    adapter, weights = oracle_rite.Weight(scale, **rule), []
    keep = np.sqrt(1 - RATE * DECAY)
    for _ in range(STEPS):
        grads = oracle.lora_gradients(a, b, scale * b @ a - target, scale)
        by = oracle_rite.clip_factor(adapter.unmagnified(a, b, *grads), (), bound)
        step = adapter.direction(a, b, by * grads[0], by * grads[1])
        a, b = keep * a - RATE * step[0], keep * b - RATE * step[1]
        weights.append(scale * b @ a)
    return np.stack(weights), a


def distance(got, want):
    return np.abs(got - want).max() / np.abs(want).max()


def moved(params, q):
    """(A, B) → (Q⁻¹ A, B Q) in Flax's layout."""
    a, b = params["lora_a"], params["lora_b"]
    return {"lora_a": a @ np.linalg.inv(q).T, "lora_b": q.T @ b}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_product_does_not_depend_on_how_it_is_split(seed, kind, x64):
    """After 50 steps with decay; negative control: it does under `optax.adam`."""
    params, target = start(seed)
    q = np.eye(R) + 0.3 * np.random.default_rng(seed).standard_normal((R, R))

    one, _ = run(params, target, 1.0, kind)
    other, factors = run(moved(params, q), target, 1.0, kind)

    assert distance(factors["lora_a"], params["lora_a"]) > 0.1
    if kind == "adam":
        assert distance(other, one) > 1e-2
    else:
        assert distance(other, one) < TOLERANCE


@pytest.mark.parametrize("b_scale", [1.0, 1e-2])
@pytest.mark.parametrize("kind", ["lora_rite", "plain"])
def test_trajectory_is_that_of_the_algorithm_in_frames_from_qr(kind, b_scale, x64):
    """50 steps. The frames are another basis of the same space, the step is the same.

    With escaped mass, clipping and decay, and without the first two.
    """
    scale = 2.0
    params, target = start(3, b_scale)
    off = {"escape_mass": False, "max_grad_norm": None}
    hyper = HYPER if kind == "lora_rite" else HYPER | off

    received, factors = run(params, target, scale, kind)

    expected, a = in_numpy(params, target, scale, hyper)
    assert distance(received, expected) < TOLERANCE
    assert distance(factors["lora_a"].T, a) < TOLERANCE
    for name, value in CHANGED.items():  # negative control: each option matters
        if value != hyper[name]:
            other, _ = in_numpy(params, target, scale, hyper | {name: value})
            assert distance(other, expected) > 1e-6


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

    targets = stack([target for _, target in layers])
    received, _ = run(params, targets, 1.0, "plain", stack=2)

    for k, (params, target) in enumerate(layers):
        expected, _ = run(params, target, 1.0, "plain")
        assert distance(received[:, k // 2, k % 2], expected) < TOLERANCE


SHAPES = {"x": (9, 6, 3), "y": (7, 8, 2)}  # m, n, r


def tree(seed=0, size=1.0):
    """Two pairs and a bias, and LoRA's gradients of two G after another."""
    params, sequence = {"bias": jnp.ones(4)}, [{}, {}]
    rng = np.random.default_rng(seed)
    for name, shape in SHAPES.items():
        a, b, _ = oracle.factors(seed, *shape)
        params[name] = {"lora_a": jnp.asarray(a.T), "lora_b": jnp.asarray(b.T)}
        for grads in sequence:
            full = size * rng.standard_normal(shape[:2])
            of_a, of_b = oracle.lora_gradients(a, b, full, 1.0)
            grads[name] = {"lora_a": jnp.asarray(of_a.T), "lora_b": jnp.asarray(of_b.T)}
    for grads in sequence:
        grads["bias"] = jnp.asarray(size * rng.standard_normal(4))
    return params, sequence


@pytest.mark.parametrize("bound", [0.5, 5.0, 1e3, None])
def test_all_gradients_are_clipped_by_the_norm_of_the_unmagnified_ones(bound, x64):
    """Of both pairs and of the bias together; each step by its own norm."""
    params, sequence = tree()
    sequence[1] = jax.tree.map(lambda x: 3 * x, sequence[1])
    tx = scale_by_lora_rite(eps=0.3, max_grad_norm=bound)
    state, update, received = tx.init(params), jax.jit(tx.update), []
    for grads in sequence:
        updates, state = update(grads, state, params)
        received.append(updates)

    flat = lambda tree, name: [
        np.asarray(tree[name][x]).T for x in ("lora_a", "lora_b")
    ]
    adapters = {name: oracle_rite.Weight(1.0, eps=0.3) for name in SHAPES}
    adam = optax.scale_by_adam(eps=0.3)
    of_bias = adam.init(params["bias"])
    factors = []
    for grads, got in zip(sequence, received, strict=True):
        u = [
            x for name, adapter in adapters.items()
            for x in adapter.unmagnified(*flat(params, name), *flat(grads, name))
        ]  # fmt: skip
        by = oracle_rite.clip_factor(u, [grads["bias"]], bound)
        factors.append(by)
        for name, adapter in adapters.items():
            clipped = [by * x for x in flat(grads, name)]
            want = adapter.direction(*flat(params, name), *clipped)
            for x, y in zip(flat(got, name), want, strict=True):
                np.testing.assert_allclose(x, y, atol=TOLERANCE)
        want, of_bias = adam.update(by * grads["bias"], of_bias)
        np.testing.assert_allclose(got["bias"], want, atol=TOLERANCE)
    # Negative control: the small bounds are reached, at different factors.
    clips = bound in (0.5, 5.0)
    assert (factors[1] < 0.5 * factors[0] < 0.5) if clips else factors == [1.0, 1.0]


@pytest.mark.parametrize("kind", ["zeros", "not finite", "missing"])
@pytest.mark.parametrize("wrt", ["a", "b"])
def test_one_factor_alone_follows_its_own_half_of_the_algorithm(wrt, kind, x64):
    """The other stays, and so does its frame; it has no state. All decay is its own."""
    params, target = start(5)
    own, other = ("lora_a", "lora_b") if wrt == "a" else ("lora_b", "lora_a")
    as_side = np.transpose if wrt == "a" else np.asarray  # A and B, or Bᵀ and Aᵀ
    tx = lora_rite(RATE, eps=0.1, weight_decay=DECAY, wrt=wrt)
    state, update = tx.init(params), jax.jit(tx.update)
    side = oracle_rite.Side(0.9, 0.999, 0.1, escape_mass=True)
    x, partner = as_side(params[own]), as_side(params[other])
    for _ in range(10):
        full = np.asarray(weight(params)) - target
        a, b = (np.asarray(params[name]).T for name in ("lora_a", "lora_b"))
        of_a, of_b = oracle.lora_gradients(a, b, full, 1.0)
        grads = {"lora_a": jnp.asarray(of_a.T), "lora_b": jnp.asarray(of_b.T)}
        gradient = as_side(grads[own])
        grads[other] *= jnp.nan if kind == "not finite" else 0.0
        if kind == "missing":
            del grads[other]
        updates, state = update(grads, state, params)
        assert updates.keys() == grads.keys()
        assert other not in updates or not np.any(updates[other])
        params = params | {own: params[own] + updates[own]}

        u = oracle_rite.unmagnified(partner, gradient, 1.0)
        by = oracle_rite.clip_factor([u], [], 1.0)
        step = side.direction(partner, by * gradient, 1.0)
        x = (1 - RATE * DECAY) * x - RATE * step

    np.testing.assert_allclose(as_side(params[own]), x, atol=TOLERANCE)
    shapes = [x.shape for x in jax.tree.leaves(state[0].pairs)]
    assert shapes == [params[own].shape, (R, R)]


def test_state_lies_at_the_places_that_the_spec_names():
    """Of the size of Adam's on the factors, and some r×r."""
    params = make_params()
    names = "lora_a", "lora_b"
    at = lambda layers, head: {
        "layers": dict(zip(names, layers, strict=True)),
        "head": {**dict(zip(names, head, strict=True)), "bias": None},
        "norm": None,
    }
    masked = lambda x: isinstance(x, optax.MaskedNode)
    shapes = lambda tree: jax.tree.map(
        lambda x: None if masked(x) else x.shape, tree, is_leaf=masked
    )

    state = scale_by_lora_rite().init(params).pairs

    factors = at([(3, 10, 4), (3, 4, 6)], [(8, 2), (2, 5)])
    assert shapes(state.mu) == shapes(state.frames) == factors
    assert shapes(state.nu) == at([(3, 4, 4)] * 2, [(2, 2)] * 2)
    assert shapes(state.spectrum) == at([(3, 4)] * 2, [(2,)] * 2)
    assert shapes(state.rho) == at([(3,)] * 2, [()] * 2)
    without = scale_by_lora_rite(escape_mass=False).init(params).pairs
    assert not jax.tree.leaves((without.spectrum, without.rho))
    chex.assert_trees_all_equal_shapes(without[:3], state[:3])


def test_mu_dtype_is_that_of_the_first_moments_only():
    params = make_params(jnp.bfloat16)
    tx = scale_by_lora_rite(mu_dtype=jnp.bfloat16)
    state = tx.init(params)
    for _ in range(2):
        updates, state = jax.jit(tx.update)(params, state, params)
    dtypes = lambda tree: {x.dtype for x in jax.tree.leaves(tree)}
    assert dtypes((state.pairs.mu, state.others.mu, updates)) == {jnp.dtype("bfloat16")}
    assert dtypes((state.pairs[1:], state.others.nu)) == {jnp.dtype("float32")}


@pytest.mark.parametrize("escape_mass", [True, False])
def test_there_are_two_eigendecompositions_however_many_pairs(escape_mass):
    """One of all Gram matrices, and one of the second moments, which need these."""
    params, tx = make_params(), scale_by_lora_rite(escape_mass=escape_mass)
    compiled = jax.jit(tx.update).lower(params, tx.init(params), params).compile()
    called = re.findall(r'custom_call_target="\w*syevd', str(compiled.as_text()))
    assert len(called) == 2


def test_escaped_mass_is_what_the_second_moment_loses(x64):
    """B's columns turn to others at once: all of A's V is lost, and ρ has it."""
    a = np.linalg.qr(np.random.default_rng(0).standard_normal((N, R)))[0]
    first, second = np.eye(M)[:R], np.eye(M)[R : 2 * R]
    tx = scale_by_lora_rite(b2=0.9, max_grad_norm=None)
    g = np.random.default_rng(1).standard_normal((M, N))
    grads = lambda b: {
        "lora_a": jnp.asarray((b @ g).T),
        "lora_b": jnp.asarray((g @ a).T),
    }
    params = {"lora_a": jnp.asarray(a), "lora_b": jnp.asarray(first)}
    update = jax.jit(tx.update)

    _, before = update(grads(first), tx.init(params), params)
    params["lora_b"] = jnp.asarray(second)
    _, after = update(grads(second), before, params)

    assert before.pairs.rho["lora_a"] == 0
    largest = np.linalg.eigvalsh(before.pairs.nu["lora_a"])[-1]
    np.testing.assert_allclose(after.pairs.rho["lora_a"], 0.9 * largest, rtol=1e-12)
    # A's rows are where they were: B loses nothing, not even to rounding.
    assert after.pairs.rho["lora_b"] == 0
    u = second @ g  # and of V nothing is left but the new
    np.testing.assert_allclose(
        after.pairs.nu["lora_a"], 0.1 * u @ u.T / N, atol=TOLERANCE
    )
