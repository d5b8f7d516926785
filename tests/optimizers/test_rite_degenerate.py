"""LoRA-RITE in float32 and at the edge: finite stays finite and contained."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorapro_jax import lora_rite, scale_by_lora_rite
from lorapro_jax.algebra._spectra import eigh_each
from tests.support import oracle

pytestmark = pytest.mark.usefixtures("quick_compiles")

M, N, R, STEPS, RATE = 9, 6, 3, 20, 0.02


def tree_of(a, b):
    """One pair in Flax's layout, from the paper's."""
    return {"lora_a": jnp.float32(a.T), "lora_b": jnp.float32(b.T)}


def weight(params):
    return (params["lora_a"] @ params["lora_b"]).mT


@jax.jit
def run(params, target):
    """The losses of some steps, and the factors at the end."""
    tx = lora_rite(RATE)
    loss = lambda params: 0.5 * jnp.sum((weight(params) - target) ** 2)

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    carry = params, tx.init(params)
    (params, state), losses = jax.lax.scan(step, carry, length=STEPS)
    return losses, params, state


@functools.cache
def updates_of(bound=None, **options):
    return jax.jit(scale_by_lora_rite(max_grad_norm=bound, **options).update)


def directions(params, sequence, bound=None, **options):
    """Of each gradient of a sequence, at factors that stay; and the last state."""
    state = scale_by_lora_rite(max_grad_norm=bound, **options).init(params)
    result = []
    for grads in sequence:
        step, state = updates_of(bound, **options)(grads, state, params)
        result.append(step)
    return result, state


def test_from_zero_b_the_first_step_is_bs_and_later_ones_are_both():
    a, _, target = oracle.factors(5, M, N, R)
    params = tree_of(a, np.zeros((M, R)))
    grads = tree_of(*oracle.lora_gradients(a, 0 * target[:, :R], target, 1.0))

    (first,), _ = directions(params, [grads])
    losses, moved, state = run(params, target)

    assert not first["lora_a"].any()
    assert jnp.abs(first["lora_b"]).max() > 0.1
    chex.assert_tree_all_finite((losses, moved, state))
    assert losses[-1] < 0.98 * losses[0]
    for name in params:
        assert jnp.abs(moved[name] - params[name]).max() > RATE


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", ["lora_a", "lora_b"])
def test_rank_deficient_factors_give_finite_steps(name, count):
    """What a factor lacks is left out until its partner's step brings it back."""
    a, b, target = oracle.factors(6, M, N, R)
    params = tree_of(a, b)
    u, sigma, vt = np.linalg.svd(params[name], full_matrices=False)
    sigma[R - count :] = 0
    params[name] = jnp.float32((u * sigma) @ vt)
    grads = tree_of(
        *oracle.lora_gradients(*(np.asarray(x).T for x in params.values()), target, 1.0)
    )

    (first,), _ = directions(params, [grads])
    losses, moved, state = run(params, target)

    chex.assert_tree_all_finite((losses, moved, state))
    assert losses[-1] < losses[0]
    # The partner's first step has nothing in these directions.
    other = "lora_b" if name == "lora_a" else "lora_a"
    lost = vt[R - count :] if name == "lora_a" else u[:, R - count :].T
    part = lost @ (first[other] if name == "lora_a" else first[other].T)
    assert np.abs(part).max() < 1e-4 * jnp.abs(first[other]).max()


def spread(cond, size=1.0):
    """Orthonormal factors, and G with singular values from `size` down by `cond`."""
    rng = np.random.default_rng(7)
    q = lambda k: np.linalg.qr(rng.standard_normal((k, R)))[0]
    a, b = q(N).T, q(M)
    full = size * (b * np.geomspace(1, 1 / cond, R)) @ a
    return tree_of(a, b), tree_of(*oracle.lora_gradients(a, b, full, 1.0))


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6])
@pytest.mark.parametrize("cond", [1.0, 1e2, 1e4, 1e6, 1e12])
def test_what_of_a_gradient_is_below_rounding_is_not_magnified(cond, size):
    """A whitened gradient has singular values √n; here up to that, never more.

    In float32, V = u uᵀ / n has lost the square of what is below 1e-3 of the largest.
    """
    params, grads = spread(cond, size)

    (step,), _ = directions(params, [grads], eps=1e-8)

    for name, count in (("lora_a", N), ("lora_b", M)):
        found = np.linalg.svd(np.float64(step[name]), compute_uv=False) / np.sqrt(count)
        assert found.max() < 1.01
        assert found[0] > 0.99
        if cond <= 1e2:  # what is above rounding is brought to full size
            assert found.min() > 0.99
    if cond == 1e4:  # negative control: V has lost a direction, and ε is far too small
        u = grads["lora_a"].T  # of orthonormal factors
        (found,) = eigh_each([u @ u.T / N])
        assert found.values[0] == 0
        assert jnp.linalg.norm(found.vectors[:, 0] @ u) / 1e-8 > 3 * np.sqrt(N)


@pytest.mark.parametrize("bound", [None, 1.0])
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e-8, 1.0, 1e8, 1e19, 1e25, 1e30])
def test_gradients_of_every_size_give_finite_steps(size, bound):
    """And full steps, where ε does not stop them; then ordinary ones again."""
    a, b, full = oracle.factors(8, M, N, R)
    params = tree_of(a, b) | {"bias": jnp.ones(3)}
    grads = tree_of(*oracle.lora_gradients(a, b, full, 1.0)) | {"bias": jnp.ones(3)}
    scaled = jax.tree.map(lambda x: size * x, grads)

    received, state = directions(params, [scaled, scaled, grads], bound)

    chex.assert_tree_all_finite((received, state.pairs))
    (plain,), _ = directions(params, [grads], bound)
    for name in ("lora_a", "lora_b"):
        want = plain[name]
        if size >= 1e-3:
            np.testing.assert_allclose(received[0][name], want, rtol=1e-2, atol=1e-2)
        else:
            assert 0 < jnp.abs(received[0][name]).max() < jnp.abs(want).max()


@pytest.mark.parametrize("size", [1e-20, 1e-15, 1e-8, 1e8, 1e15, 1e20])
@pytest.mark.parametrize("which", ["A", "B", "s"])
def test_factors_and_scales_of_every_size_give_the_same_step_of_the_product(
    which, size
):
    """With one G, s B a and s b A are what they are at size 1.

    A factor is 0 to its partner where its square is, in float32: at 1e-20 of it.
    """
    a, b, full = oracle.factors(9, M, N, R)
    sizes = {"A": 1.0, "B": 1.0, "s": 1.0}

    def halves(a_size, b_size, scale):
        x, y = a_size * a, b_size * b
        grads = tree_of(*oracle.lora_gradients(x, y, full, scale))
        (step,), _ = directions(tree_of(x, y), [grads], scale=scale)
        of_a, of_b = (np.float64(step[k]).T for k in ("lora_a", "lora_b"))
        return scale * y @ of_a, scale * of_b @ x

    received = halves(*(sizes | {which: size}).values())

    expected = halves(1.0, 1.0, 1.0)
    if which != "s" and size in (1e-20, 1e20):
        lost = 0 if (which == "B") == (size < 1) else 1
        assert not received[lost].any()
        received, expected = received[1 - lost :][:1], expected[1 - lost :][:1]
    for got, want in zip(received, expected, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["lora_a", "lora_b"])
def test_a_gradient_that_is_not_finite_stays_in_its_layer(name, bad):
    """Also under clipping, for which it does not count; and it stays there for good."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.float32(rng.standard_normal(shape))
    params = {
        "stack": {"lora_a": draw(3, N, R), "lora_b": draw(3, R, M)},
        "pair": {"lora_a": draw(N, 2), "lora_b": draw(2, M)},
        "bias": draw(3),
    }
    grads = jax.tree.map(lambda x: draw(*x.shape), params)
    spoilt = grads["stack"][name]
    with_value = lambda value: {
        **grads, "stack": {**grads["stack"], name: spoilt.at[1].set(value)}
    }  # fmt: skip

    received, _ = directions(params, [with_value(bad), grads], 1.0)
    expected, _ = directions(params, [with_value(0.0), grads], 1.0)

    keep = jnp.array([0, 2])
    others = lambda tree: {
        **tree,
        "stack": jax.tree.map(lambda x: x[keep], tree["stack"]),
    }
    for got, want in zip(received, expected, strict=True):
        chex.assert_trees_all_close(others(got), others(want), rtol=1e-4)
    assert not np.isfinite(np.asarray(received[1]["stack"][name][1])).any()


def test_derivatives_raise_because_they_would_be_wrong():
    params, grads = spread(1.0)
    tx = scale_by_lora_rite()
    state = tx.init(params)

    def size(params, grads):
        step, _ = tx.update(grads, state, params)
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(step))

    for argument in (0, 1):
        with pytest.raises(NotImplementedError, match="stop_gradient"):
            jax.eval_shape(jax.grad(size, argument), params, grads)


BAD_OPTIONS = [
    ("b1", 1.0), ("b1", -0.1), ("b2", 1.0), ("b2", 1.5), ("eps", -1e-8),
    ("eps", float("inf")), ("escape_mass", None), ("escape_mass", 0.5),
    ("max_grad_norm", 0.0), ("max_grad_norm", float("nan")), ("mu_dtype", jnp.int32),
    ("on_no_pairs", "maybe"), ("wrt", "c"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD_OPTIONS)
def test_bad_option_is_named_at_construction(name, value):
    for make in (scale_by_lora_rite, functools.partial(lora_rite, 1e-3)):
        with pytest.raises(ValueError, match=name):
            make(**{name: value})
    with pytest.raises(ValueError, match="weight_decay"):
        lora_rite(1e-3, weight_decay=-1.0)
    with pytest.raises(ValueError, match="learning_rate"):
        lora_rite(-1.0)


def test_state_of_other_options_is_refused():
    params, _ = spread(1.0)
    state = scale_by_lora_rite().init(params)
    tx = scale_by_lora_rite(escape_mass=False)
    with pytest.raises(ValueError, match=r"or `escape_mass=`\)"):
        jax.eval_shape(tx.update, params, state, params)
    jax.eval_shape(tx.update, params, tx.init(params), params)
