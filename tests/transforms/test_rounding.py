"""bfloat16 factors stall, say so, and do not with stochastic rounding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorapro_jax import lorapro, lorapro_adamw, stochastic_rounding

pytestmark = pytest.mark.usefixtures("quick_compiles")

RATE, STEPS = 1e-3, 1000


def problem(dtype):
    """A product of rank 4 to be found, from B = 0."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.float32(rng.standard_normal(shape))
    target = draw(24, 4) @ draw(4, 20) / 2
    params = {"lora_a": draw(24, 4), "lora_b": jnp.zeros((4, 20))}
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    wide = lambda params: [x.astype(jnp.float32) for x in params.values()]
    return params, lambda params: jnp.mean((jnp.matmul(*wide(params)) - target) ** 2)


@functools.cache
def last_loss(name, dtype):
    """After 1,000 steps, in units of the first."""
    tx = lorapro_adamw(RATE)
    if name == "stochastic":
        tx = optax.chain(tx, stochastic_rounding(3))
    params, loss_fn = problem(dtype)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
        return (optax.apply_updates(params, updates), state), loss_fn(params)

    run = lambda params: jax.lax.scan(step, (params, tx.init(params)), length=STEPS)
    losses = jax.jit(run)(params)[1]
    return float(losses[-1] / losses[0])


def test_stochastic_rounding_follows_float32_where_bfloat16_stalls():
    wide = last_loss("plain", jnp.float32)
    assert last_loss("plain", jnp.bfloat16) > 2 * wide  # the fault
    assert last_loss("stochastic", jnp.bfloat16) < 1.1 * wide


def rounded(params, step, seed=0):
    """What becomes of parameters with one step."""
    tx = stochastic_rounding(seed)
    updates, state = tx.update(step, tx.init(params), params)
    return optax.apply_updates(params, updates), state


@pytest.mark.parametrize("size", [1e-4, -1e-4, 3e-3, 0.7])
@pytest.mark.parametrize("start", [1.0, -1.0, 0.0, 1e-20, 3.0])
def test_the_mean_is_that_of_the_exact_sum(start, size):
    """Of 40,000 roundings by at most one unit in the last place: within 4 σ."""
    count = 40_000
    params = jnp.full(count, start, jnp.bfloat16)
    step = jnp.full(count, size, jnp.bfloat16)

    new, _ = rounded(params, step)

    exact = float(params[0]) + float(step[0])
    ulp = 2.0 ** (np.floor(np.log2(abs(exact))) - 7)
    assert abs(np.float64(new).mean() - exact) <= 4 * ulp / 2 / np.sqrt(count)
    assert np.abs(np.float64(new) - exact).max() <= ulp


def test_other_dtypes_pass_and_what_is_not_finite_stays():
    params = {"w": jnp.ones(3), "f": jnp.zeros(2, jnp.bfloat16), "n": None}
    step = {"w": jnp.full(3, 1e-9), "n": None,
            "f": jnp.asarray([jnp.nan, jnp.inf], jnp.bfloat16)}  # fmt: skip
    tx = stochastic_rounding()

    updates, _ = jax.jit(tx.update)(step, tx.init(params), params)

    np.testing.assert_array_equal(updates["w"], step["w"])
    assert not np.isfinite(np.float32(updates["f"])).any()
    assert updates["f"].dtype == jnp.bfloat16


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFFC00000])
def test_a_nan_of_any_bits_stays_one(bits):
    """A GPU's has all bits set, and noise would make a zero of it."""
    nan = np.full(8, bits, np.uint32).view(np.float32)
    new, _ = rounded(jnp.ones(8, jnp.bfloat16), jnp.asarray(nan))
    assert np.isnan(np.float32(new)).all()


def test_steps_differ_from_each_other_and_repeat_from_the_same_state():
    params = jnp.ones(1000, jnp.bfloat16)
    step = jnp.full(1000, 1e-3, jnp.bfloat16)
    tx = stochastic_rounding()
    state = tx.init(params)

    first, state = tx.update(step, state, params)
    second, _ = tx.update(step, state, params)
    again, _ = tx.update(step, jax.device_put(jax.device_get(state)), params)

    np.testing.assert_array_equal(np.float32(second), np.float32(again))
    assert (np.float32(first) != np.float32(second)).any()


@pytest.mark.parametrize("make", [lorapro, lambda: lorapro_adamw(1e-3)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_factors_are_warned_of_at_init(dtype, make):
    with pytest.warns(UserWarning, match=r"`lora_a`.*float32.*stochastic_rounding"):
        make().init(problem(dtype)[0])


def test_errors_say_what_to_do():
    tx = stochastic_rounding()
    with pytest.raises(ValueError, match=r"tx.update\(grads, state, params\)"):
        tx.update({}, tx.init({}))
    with pytest.raises(ValueError, match="seed='x'"):
        stochastic_rounding("x")
