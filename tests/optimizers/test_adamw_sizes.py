"""`lorapro_adamw` with factored moments on factors and gradients of any size, float32.

Its products are scaled by powers of two, so what is known of another size is exact.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorapro_jax import lorapro_adamw, scale_by_lorapro_adam
from lorapro_jax.algebra._axes import FactorAxes
from lorapro_jax.algebra._factors import Both, Factor, PairArrays
from lorapro_jax.algebra._stack import Stack
from lorapro_jax.optimizers._grams import Grams, Units
from lorapro_jax.transforms import _groups

pytestmark = pytest.mark.usefixtures("quick_compiles")

M, N, RANK, STEPS = 12, 9, 3, 4


@functools.cache
def problem():
    """Factors, how they move at every step, and a G for each."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: np.asarray(rng.standard_normal(shape), np.float32)
    a, b = draw(STEPS, N, RANK), draw(STEPS, RANK, M)
    moved = a[0] + 1e-3 * np.cumsum(a, 0), b[0] + 1e-3 * np.cumsum(b, 0)
    return *moved, draw(STEPS, N, M)


@jax.jit
def update(grads, state, params):
    return scale_by_lorapro_adam(eps=0.0).update(grads, state, params)


def times(size, tree):
    return jax.tree.map(lambda x: jnp.float32(size * np.float64(x)), tree)


def directions(factor_size, full_size):
    """Of each step, times the size of the factors: that of W's direction, once."""
    state, result = None, []
    for a, b, full in zip(*problem(), strict=True):
        params = {"lora_a": a, "lora_b": 0.1 * b}
        a, b = params.values()
        grads = {"lora_a": full @ b.T, "lora_b": a.T @ full}
        params = times(factor_size, params)
        grads = times(factor_size * full_size, grads)
        if state is None:
            state = scale_by_lorapro_adam().init(params)
        step, state = update(grads, state, params)
        result.append({key: factor_size * np.float64(x) for key, x in step.items()})
    return result


@pytest.mark.parametrize(
    ("factors", "full"),
    [
        (-100, 0),
        (-80, 40),
        (-60, 60),
        (-30, 60),
        (0, -40),
        (30, -40),
        (80, 0),
        (100, 0),
    ],
)
def test_sizes_from_1e_minus_30_to_1e30_change_nothing_but_sizes(factors, full):
    """Powers of two of A and B, and of G, whose size Adam divides out: exactly so.

    Up to what is lost below the smallest number.
    """
    received = directions(2.0**factors, 2.0**full)

    for step, expected in zip(received, directions(1.0, 1.0), strict=True):
        for key, want in expected.items():
            atol = 1e-6 * np.abs(want).max()
            np.testing.assert_allclose(step[key], want, rtol=0, atol=atol)


def moved_pair(relative, kind):
    """Factors one step apart, in float64: in general, or with the same product."""
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((RANK, N)), rng.standard_normal((M, RANK))
    turn = relative * rng.standard_normal((RANK, RANK))
    if kind == "same product":
        eye = np.eye(RANK)
        old = np.linalg.solve(eye + turn, a), b @ (eye + turn)
    else:
        old = a - relative * rng.standard_normal(a.shape), b + b @ turn
    as_float32 = lambda x: np.float64(np.float32(x))
    return [as_float32(x) for x in (a, b, *old)]


@jax.jit
def square_of_motion(a, b, old_a, old_b):
    axes = Both(FactorAxes(0), FactorAxes(1))
    both = lambda x, y: Both(Factor(x, axes.a), Factor(y, axes.b))
    now, old = both(a, b), both(old_a, old_b)
    pair = PairArrays(now.a, now.b, now)
    sums = now.map(lambda x: x.map(lambda y: y.sum(x.axes.rank, keepdims=True)))
    units = [Units.of(pair, sums, 0.999, jnp.ones((), jnp.int32))]
    grams = Grams.of(Stack.of([pair]), [pair], units, [now], [old])
    return grams.square_of_motion()[0] / units[0].factors ** 4


@pytest.mark.parametrize("relative", [1e-1, 1e-3, 1e-5, 1e-6])
def test_motion_is_that_of_the_product_also_far_below_its_rounding_error(relative):
    a, b, *old = moved_pair(relative, "any")

    received = square_of_motion(*map(jnp.float32, (a, b, *old)))

    expected = np.sum((b @ a - old[1] @ old[0]) ** 2)
    np.testing.assert_allclose(received, expected, rtol=1e-5)
    # Negative control: of Gram matrices of the factors themselves it is noise.
    inner = lambda x, y, z, w: np.sum(np.float32(x.T @ z) * np.float32(y @ w.T))
    now, before = (b, a), old[::-1]
    noisy = inner(*now, *now) - 2 * inner(*now, *before) + inner(*before, *before)
    assert relative > 1e-4 or abs(noisy / expected - 1) > 1e-2


def test_motion_that_leaves_the_product_alone_is_small_but_not_rest():
    """Rounding noise neither below 0 nor exactly 0, which would mean no step so far."""
    a, b, *old = moved_pair(1e-3, "same product")
    change = np.sum((a - old[0]) ** 2) * np.sum(b**2)

    received = float(square_of_motion(*map(jnp.float32, (a, b, *old))))

    assert 0 < received < 1e-4 * change
    assert float(square_of_motion(*map(jnp.float32, (a, b, a, b)))) == 0


def test_temporaries_are_less_than_four_times_the_factors(monkeypatch):
    """3.5 times; with copies of factors beside the donated state it would be 4.4."""
    monkeypatch.setattr(_groups, "_stacking_pays", lambda: False)  # which copies too
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    params = {
        f"layers_{i}": {"lora_a": leaf(16384, 4), "lora_b": leaf(4, 8192)}
        for i in range(3)
    }
    tx = lorapro_adamw(1e-3)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    args = params, jax.eval_shape(tx.init, params), params
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile()

    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 3.8 * size
