"""One factor trains and the other does not: LoRA-FA, exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorapro_jax import lorapro, lorapro_adamw, scale_by_lorapro_adam
from tests.support import oracle

pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")

M, N, RANK, SCALE, DAMPING = 7, 6, 3, 1.7, 0.05
GRADIENTS = ["zeros", "not finite", "missing", "None", "masked"]
STEPS, RATE, DECAY = 5, 0.02, 0.1
ADAM = {"b1": 0.8, "b2": 0.95, "eps": 1e-3}


def problem(seed=0):
    """One pair in JAX's layout, a bias, and G for each step."""
    a, b, _ = oracle.factors(seed, M, N, RANK)
    full = np.random.default_rng(seed + 1).standard_normal((STEPS, M, N))
    params = {"lora_a": jnp.asarray(a.T), "lora_b": jnp.asarray(b.T)}
    return params | {"bias": jnp.ones(3)}, full


def gradients(params, full, wrt, kind):
    """LoRA's gradients; that of the factor that does not train in one of its forms."""
    a, b = (np.asarray(params[x]).T for x in ("lora_a", "lora_b"))
    grad_a, grad_b = oracle.lora_gradients(a, b, full, SCALE)
    grads = {"lora_a": jnp.asarray(grad_a.T), "lora_b": jnp.asarray(grad_b.T)}
    frozen = "lora_a" if wrt == "b" else "lora_b"
    forms = {
        "zeros": 0 * grads[frozen], "not finite": jnp.nan * grads[frozen],
        "None": None, "masked": optax.MaskedNode(),
    }  # fmt: skip
    del grads[frozen]
    if kind != "missing":
        grads[frozen] = forms[kind]
    return grads | {"bias": jnp.full(3, 2.0)}


def closest(a, b, full, wrt, damping):
    """The step of one factor whose s (B a + b A) is closest to G, by dense algebra."""
    ridge = SCALE**2 * oracle.relative_damping(a, b, damping)
    if wrt == "b":
        jac = SCALE * np.kron(np.eye(M), a.T)
    else:
        jac = SCALE * np.kron(b, np.eye(N))
    square = jac.T @ jac + ridge * np.eye(jac.shape[1])
    step = np.linalg.solve(square, jac.T @ full.ravel())
    if wrt == "b":
        return 0 * a, step.reshape(b.shape)
    return step.reshape(a.shape), 0 * b


@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize("wrt", ["a", "b"])
def test_lorapro_takes_the_closest_step_of_the_factor_that_trains(wrt, kind):
    params, full = problem()
    grads = gradients(params, full[0], wrt, kind)
    tx = lorapro(scale=SCALE, damping=DAMPING, wrt=wrt)

    step, _ = jax.jit(tx.update)(grads, tx.init(params), params)

    assert jax.tree.structure(step) == jax.tree.structure(grads)
    a, b = (np.asarray(params[x]).T for x in ("lora_a", "lora_b"))
    expected = closest(a, b, full[0], wrt, DAMPING)
    trains, frozen = ("lora_b", "lora_a") if wrt == "b" else ("lora_a", "lora_b")
    want = expected[1 if wrt == "b" else 0].T
    np.testing.assert_allclose(step[trains], want, atol=1e-10)
    if kind in ("zeros", "not finite"):
        np.testing.assert_array_equal(step[frozen], 0)
    np.testing.assert_array_equal(step["bias"], grads["bias"])
    # Negative control: it is not the two-sided step with one half thrown away.
    both = oracle.adjust(a, b, *oracle.lora_gradients(a, b, full[0], SCALE), SCALE,
                         DAMPING)  # fmt: skip
    assert np.abs(both[1 if wrt == "b" else 0].T - want).max() > 1e-2


class OneSided:
    """LoRA-Pro's Adam of one factor in dense NumPy, the moments m×n."""

    def __init__(self, wrt, moments):
        self.wrt, self.moments = wrt, moments
        self.mean, self.square, self.count = np.zeros((M, N)), np.zeros((M, N)), 0
        self.before = None

    def step(self, a, b, full):
        self.count += 1
        before, self.before = self.before or (a, b), (a, b)
        damping = oracle.damping_by_motion(a, b, before, 100 * DAMPING)
        project = functools.partial(closest, a, b, wrt=self.wrt)
        lift = lambda step: oracle.equivalent(a, b, *step, SCALE)
        e = lift(project(full, damping=damping))
        if self.moments == "factored":
            self.mean = lift(project(self.mean, damping=1e-13))
        self.mean = ADAM["b1"] * self.mean + (1 - ADAM["b1"]) * e
        self.square = ADAM["b2"] * self.square + (1 - ADAM["b2"]) * e**2
        mean = self.mean / (1 - ADAM["b1"] ** self.count)
        square = self.square / (1 - ADAM["b2"] ** self.count)
        if self.moments == "dense":
            d = mean / (np.sqrt(square) + ADAM["eps"])
        else:
            square = square + ADAM["eps"] ** 2
            rows, columns = square.sum(1, keepdims=True), square.sum(0, keepdims=True)
            d = mean / np.sqrt(rows * columns / square.sum())
        return project(d, damping=damping)


@pytest.mark.parametrize("kind", ["zeros", "missing"])
@pytest.mark.parametrize("moments", ["dense", "factored"])
@pytest.mark.parametrize("wrt", ["a", "b"])
def test_lorapro_adamw_is_adamw_in_the_space_of_that_factor(wrt, moments, kind):
    """Five steps with decay, which is all on the factor that trains."""
    params, full = problem(3)
    tx = lorapro_adamw(
        RATE, **ADAM, weight_decay=DECAY, scale=SCALE, damping=100 * DAMPING,
        moments=moments, wrt={"lora": wrt},
    )  # fmt: skip
    state, update = tx.init(params), jax.jit(tx.update)
    rule = OneSided(wrt, moments)
    a, b = (np.asarray(params[x]).T for x in ("lora_a", "lora_b"))
    start = a, b
    for g in full:
        grads = gradients(params, g, wrt, kind)
        updates, state = update(grads, state, params)
        moved = {key: params[key] + updates[key] for key in updates}
        params = {**params, **moved}

        step = rule.step(a, b, g)
        keep = 1 - RATE * DECAY
        a = (keep if wrt == "a" else 1) * a - RATE * step[0]
        b = (keep if wrt == "b" else 1) * b - RATE * step[1]
    np.testing.assert_allclose(params["lora_a"].T, a, atol=1e-9)
    np.testing.assert_allclose(params["lora_b"].T, b, atol=1e-9)
    frozen = ("lora_a", start[0]) if wrt == "b" else ("lora_b", start[1])
    np.testing.assert_array_equal(params[frozen[0]].T, frozen[1])


def test_pairs_may_differ_and_wrong_patterns_are_named():
    params, _ = problem()
    pair = {key: params[key] for key in ("lora_a", "lora_b")}
    tree = {"q": pair, "v": pair}
    tx = lorapro(wrt={"q": "b", ".*": "both"})

    step, _ = tx.update(tree, tx.init(tree), tree)

    np.testing.assert_array_equal(step["q"]["lora_a"], 0)
    assert np.abs(step["v"]["lora_a"]).max() > 0
    with pytest.raises(ValueError, match=r"wrt='c'.*'both', 'a', 'b'"):
        lorapro(wrt="c")
    with pytest.raises(ValueError, match=r"pattern 'k' of `wrt="):
        lorapro(wrt={"k": "b", ".*": "both"}).init(tree)
    with pytest.raises(ValueError, match=r"No pattern of `wrt=.*`v/lora_a`"):
        scale_by_lorapro_adam(wrt={"q": "b"}).init(tree)
