"""Single steps of `lorapro_adamw` that are known in closed form, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorapro_jax import lorapro_adamw
from tests.support import oracle
from tests.support.layouts import distance, leaves_by_path, pair_at
from tests.support.runs import (
    MOMENTS,
    SMALL,
    TOLERANCE,
    gradients,
    initial,
    matrices,
    scales,
    targets_and_noise,
    weights_of,
)

pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")


OPTIONS = {
    "learning_rate": 0.1, "b1": 0.9, "b2": 0.999, "weight_decay": 0.0,
    "damping": 1e-2, "max_grad_norm": np.inf,
}  # fmt: skip


def updates_of(params, sequence, options, moments, tree):
    """Of a list of gradients, with factors that stay."""
    state = lorapro_adamw(0.1, moments=moments, scale=scales(tree)).init(params)
    options, result = {**OPTIONS, **options}, []
    static = moments, tuple(tree), options.pop("nesterov", False)
    for grads in sequence:
        updates, state = _update(grads, state, params, options, *static)
        result.append(updates)
    return result


@functools.partial(jax.jit, static_argnames=("moments", "tree", "nesterov"))
def _update(grads, state, params, options, moments, tree, nesterov):
    """The options are traced: one program for all their values."""
    tx = lorapro_adamw(
        **options, moments=moments, scale=scales(tree), nesterov=nesterov
    )
    return tx.update(grads, state, params)


def square_problem(steps, size=5):
    """Invertible factors, r = m = n, and a sequence of G: any step is possible."""
    tree = {pair_at("x", "ir", "ro", 2.0): {"i": size, "r": size, "o": size}}
    rng = np.random.default_rng(0)
    return tree, initial(tree, 1.0), rng.standard_normal((steps, 1, size, size))


def weight_steps(tree, params, fulls, options, moments):
    """s (B a' + b' A) of each update."""
    pair = next(iter(tree))
    ((a, b),) = matrices(leaves_by_path(params), pair)
    grads = [gradients(tree, params, [full]) for full in fulls]
    updates = updates_of(params, grads, options, moments, tree)
    steps = [matrices(leaves_by_path(x), pair)[0] for x in updates]
    return [oracle.equivalent(a, b, *step, pair.scale) for step in steps]


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("moments", MOMENTS)
def test_at_full_rank_it_is_adamw_of_the_weight(moments, nesterov):
    """s (B a' + b' A) is the step of `optax.adamw` on W, also after many steps.

    With factored moments where G∘G is an outer product, as V then is itself.
    """
    tree, params, fulls = square_problem(8)
    options = {"b1": 0.8, "b2": 0.9, "damping": 0.0, "nesterov": nesterov}
    if moments == "factored":
        options |= {"eps": 0.0}  # it has ε² under the root
        outer = np.outer(np.linspace(0.5, 2, 5), np.linspace(1, 3, 5))
        fulls = [(1 + t % 2) * np.sign(full) * outer for t, full in enumerate(fulls)]

    received = weight_steps(tree, params, fulls, options, moments)

    eps = options.get("eps", 1e-8)
    adamw = optax.adamw(0.1, 0.8, 0.9, eps, weight_decay=0.0, nesterov=nesterov)
    state = adamw.init(jnp.zeros((5, 5)))
    for full, step in zip(fulls, received, strict=True):
        expected, state = adamw.update(full[0], state, jnp.zeros((5, 5)))
        np.testing.assert_allclose(step, expected, atol=TOLERANCE)
    # Negative control: another b2 is another optimizer.
    other = weight_steps(tree, params, fulls, {**options, "b2": 0.91}, moments)
    assert np.abs(other[-1] - received[-1]).max() > 1e3 * TOLERANCE
    # And another momentum.
    options["nesterov"] = not nesterov
    other = weight_steps(tree, params, fulls, options, moments)
    assert np.abs(other[-1] - received[-1]).max() > 1e3 * TOLERANCE


@pytest.mark.parametrize("moments", MOMENTS)
def test_first_step_from_zero_b_has_adams_full_length(moments):
    """r = n and B = 0, so E = G: D = sign G, or G over the rank-one √V; a = 0.

    Without bias correction it would be 3.2 times as long.
    """
    tree, params, fulls = square_problem(1)
    params["x"]["lora_b"] = jnp.zeros((5, 5))
    options = {"learning_rate": -1.0, "damping": 0.0}

    (received,) = weight_steps(tree, params, fulls, options, moments)

    full = fulls[0, 0]
    rows, columns = (np.sum(full**2, axis, keepdims=True) for axis in (1, 0))
    expected = {
        "dense": np.sign(full),
        "factored": full / np.sqrt(rows * columns / np.sum(full**2)),
    }[moments]
    # eps = 1e-8 is to be compared with |G| > 1e-2.
    np.testing.assert_allclose(received, expected, atol=1e-6)
    grads = gradients(tree, params, [fulls[0]])
    (updates,) = updates_of(params, [grads], options, moments, tree)
    np.testing.assert_array_equal(updates["x"]["lora_a"], 0)


def clipping_problem():
    """Gradients of four steps, with a bias beside, and N of each step."""
    params = {**initial(SMALL, 0.5), "bias": jnp.arange(4.0)}
    rng = np.random.default_rng(3)
    factors = {key: x for key, x in params.items() if key != "bias"}
    weights = weights_of(SMALL, params, moments="dense", damping=1e-2)
    sequence, norms = [], []
    for size in (0.1, 3.0, 0.5, 2.0):
        fulls = [size * x for x in targets_and_noise(SMALL)[0]]
        bias = size * rng.standard_normal(4)
        sequence.append({**gradients(SMALL, factors, fulls), "bias": jnp.asarray(bias)})
        flat = [x for stack in fulls for x in stack]
        tangents = [w.tangent(x) for w, x in zip(weights, flat, strict=True)]
        norms.append(np.sqrt(sum(np.sum(e**2) for e in tangents) + np.sum(bias**2)))
    return params, sequence, norms


@pytest.mark.parametrize("moments", MOMENTS)
def test_max_grad_norm_bounds_all_equivalent_gradients_and_other_leaves_together(
    moments,
):
    """Clipping is to feed c times the gradients, c from dense ‖E‖² and ‖g‖²."""
    params, sequence, norms = clipping_problem()
    bound = 5.0
    assert min(norms) < bound < max(norms)

    def run(sequence, bound):
        options = {"max_grad_norm": bound}
        updates = updates_of(params, sequence, options, moments, SMALL)
        return jax.tree.leaves(updates)

    received = run(sequence, bound)

    scaled = [
        jax.tree.map((lambda x, c=c: c * x), grads)
        for grads, c in zip(
            sequence, np.minimum(1, bound / np.array(norms)), strict=True
        )
    ]
    assert max(map(distance, received, run(scaled, np.inf))) < TOLERANCE
    # A bound just above all norms changes nothing; one just below the largest does.
    free = run(sequence, np.inf)
    above, below = (run(sequence, factor * max(norms)) for factor in (1.0001, 0.9999))
    assert max(map(distance, above, free)) < TOLERANCE
    assert max(map(distance, below, free)) > 1e3 * TOLERANCE


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("decay", [0.0, 0.3, 10.0, 20.0])
def test_without_gradients_the_product_shrinks_by_one_minus_lr_lambda(decay, moments):
    """√(1 - lr λ) on each factor, and 0, not NaN, where lr λ > 1."""
    params = {**initial(SMALL, 0.5), "bias": jnp.arange(4.0)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    options = {"weight_decay": decay}

    (updates,) = updates_of(params, [zeros], options, moments, SMALL)

    after = optax.apply_updates(params, updates)
    share = max(0.0, 1 - 0.1 * decay)
    old, new = leaves_by_path(params), leaves_by_path(after)
    for pair in SMALL:
        for before, now in zip(matrices(old, pair), matrices(new, pair), strict=True):
            (a, b), (new_a, new_b) = before, now
            np.testing.assert_allclose(new_b @ new_a, share * b @ a, atol=1e-12)
            np.testing.assert_allclose(new_a, np.sqrt(share) * a, atol=1e-12)
    np.testing.assert_allclose(after["bias"], (1 - 0.1 * decay) * params["bias"])
