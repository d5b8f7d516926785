"""The state of `lorapro_adamw` at another rank: against dense moments in NumPy.

There M and V are m×n and know of no rank: when the factors change they stay as they
are, and the next step goes by the tangent space of the new ones.
"""

from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lorapro_jax import find_pairs, lorapro, lorapro_adamw, resize_adapters
from tests.support import oracle, oracle_adamw, trees
from tests.support.layouts import distance, leaves_by_path
from tests.support.runs import (
    SMALL,
    gradients,
    initial,
    matrices,
    products,
    scales,
    weights_of,
)

pytestmark = pytest.mark.usefixtures("quick_compiles")

OLD_FLAX = tuple(map(int, version("flax").split(".")[:2])) < (0, 12)
KEY = jax.random.key(3)
TOLERANCE = 1e-9  # see `support.runs`
RATE, DAMPING = 0.05, 1e-2


def at_rank(tree, rank, *, alpha):
    """The pairs of another rank, and with alpha of another scale."""
    return {
        pair._replace(scale=pair.scale * (sizes["r"] / rank if alpha else 1)): {
            **sizes, "r": rank,
        }
        for pair, sizes in tree.items()
    }  # fmt: skip


def options_of(alpha):
    """What gives the pairs of `SMALL` their scales."""
    if not alpha:
        return {"scale": scales(SMALL), "stack_axis": 1}
    numerators = {
        pair.a.split("/")[0]: pair.scale * sizes["r"] for pair, sizes in SMALL.items()
    }
    return {"alpha": numerators, "stack_axis": 1}


class Run:
    """Training by the package, towards one target for each weight."""

    def __init__(self, moments, options):
        self.tx = lorapro_adamw(RATE, damping=DAMPING, moments=moments, **options)
        self.update = jax.jit(self.tx.update)
        shapes = [x.shape for x in products(initial(SMALL, 0.5), SMALL)]
        rng = np.random.default_rng(7)
        self.targets = [rng.standard_normal(shape) for shape in shapes]

    def train(self, tree, params, state, steps):
        for _ in range(steps):
            weights = products(params, tree)
            full = [w - x for w, x in zip(weights, self.targets, strict=True)]
            grads = gradients(tree, params, full)
            updates, state = self.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    def simulate(self, weights, steps):
        targets = [x for stack in self.targets for x in stack]
        oracle_adamw.run(
            weights, lambda t, i, weight: weight - targets[i],
            steps=steps, learning_rate=RATE,
        )  # fmt: skip


def moved(tree, params, weights):
    """The weights of NumPy with the factors and scales of the package."""
    for w, new in zip(weights, weights_of(tree, params, moments=""), strict=True):
        w.a, w.b, w.scale, w.before = new.a, new.b, new.scale, (new.a, new.b)


def farthest(tree, params, weights):
    leaves = leaves_by_path(params)
    factors = [both for pair in tree for both in matrices(leaves, pair)]
    return max(
        distance(got, want)
        for both, w in zip(factors, weights, strict=True)
        for got, want in zip(both, (w.a, w.b), strict=True)
    )


@pytest.mark.parametrize(
    ("moments", "rank", "alpha"), [("factored", 1, True), ("dense", 4, False)]
)
def test_training_goes_on_as_the_dense_definition_does(moments, rank, alpha, x64):
    """Three steps, another rank, three steps, in both; ranks were 3 and 2."""
    options = options_of(alpha)
    run, params = Run(moments, options), initial(SMALL, 0.5)
    weights = weights_of(SMALL, params, moments=moments, damping=DAMPING)
    params, state = run.train(SMALL, params, run.tx.init(params), 3)
    run.simulate(weights, 3)
    assert farthest(SMALL, params, weights) < TOLERANCE

    result = resize_adapters(params, rank, key=KEY, state=state, **options)
    tree = at_rank(SMALL, rank, alpha=alpha)
    moved(tree, result.params, weights)
    after, _ = run.train(tree, result.params, result.state, 3)
    run.simulate(weights, 3)

    assert farthest(tree, after, weights) < TOLERANCE
    # Negative control: moments that begin anew are another training.
    fresh, _ = run.train(tree, result.params, run.tx.init(result.params), 3)
    assert farthest(tree, fresh, weights) > 1e6 * TOLERANCE


def momenta(tree, state):
    """M = s (B μ_a + μ_b A) of every layer, from the state alone."""
    both = (
        (matrices(leaves_by_path(state[0].pairs.factors), pair) for pair in tree),
        (matrices(leaves_by_path(state[0].pairs.mu), pair) for pair in tree),
    )
    return [
        oracle.equivalent(a, b, mu_a, mu_b, pair.scale)
        for pair, factors, mean in zip(tree, *both, strict=True)
        for (a, b), (mu_a, mu_b) in zip(factors, mean, strict=True)
    ]


@pytest.mark.parametrize("rank", [1, 4])
def test_m_is_projected_and_the_sums_of_v_are_what_they_were(rank, x64):
    """At a higher rank the old tangent space is part of the new."""
    options = options_of(alpha=True)
    run, params = Run("factored", options), initial(SMALL, 0.5)
    params, state = run.train(SMALL, params, run.tx.init(params), 3)

    result = resize_adapters(params, rank, key=KEY, state=state, **options)

    tree, moments = at_rank(SMALL, rank, alpha=True), result.state[0].pairs
    weights = weights_of(tree, result.params, moments="")
    at_last = weights_of(SMALL, params, moments="")
    changes = zip(
        momenta(SMALL, state), momenta(tree, result.state), weights, at_last,
        strict=True,
    )  # fmt: skip
    for old, new, w, last in changes:
        want = oracle.projection(w.a, w.b, old)
        assert np.abs(new - want).max() < TOLERANCE * np.abs(old).max()
        gone = np.linalg.norm(new - old)
        if rank == 4:  # only what the factors of that moment could not express either
            beyond = old - oracle.projection(last.a, last.b, old)
            assert gone < np.linalg.norm(beyond) + TOLERANCE
        else:
            assert gone > 1e-2 * np.linalg.norm(old)  # negative control
    jax.tree.map(np.testing.assert_array_equal, moments.nu, state[0].pairs.nu)
    jax.tree.map(np.testing.assert_array_equal, moments.factors, result.params)
    assert result.state[0].count == state[0].count == 3


OURS = lorapro_adamw(0.01, max_grad_norm=1.0, weight_decay=0.1)
INSIDE = {
    "alone": OURS,
    "in a chain": optax.chain(optax.clip_by_global_norm(1.0), OURS),
    "with hyperparameters": optax.inject_hyperparams(lorapro_adamw)(0.01),
    "if finite": optax.apply_if_finite(OURS, 3),
    "in parts": optax.partition(
        {"a": lorapro_adamw(0.01), "b": lorapro_adamw(0.02)},
        {"layers": "a", "head": "b", "norm": "a"},
    ),
    "one factor": lorapro_adamw(0.01, wrt="b"),
    "dense": lorapro_adamw(0.01, moments="dense"),
    "moments in bfloat16": lorapro_adamw(0.01, mu_dtype=jnp.bfloat16),
    "SGD": optax.chain(lorapro(), optax.sgd(0.1)),
}


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("rank", [1, 5])
def test_the_state_is_found_wherever_it_is_and_fits_the_new_factors(name, rank):
    """It has the structure, shapes and dtypes that `init` would make."""
    tx, params = INSIDE[name], trees.make_params()

    def resize(params, state):
        return resize_adapters(params, rank, key=KEY, state=state)

    result = jax.eval_shape(resize, params, jax.eval_shape(tx.init, params))

    due = jax.eval_shape(tx.init, result.params)
    kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert kinds(result.state) == kinds(due)


FOREIGN = {
    "Adam": (
        optax.chain(lorapro(), optax.adamw(0.1)), r"`1/0/mu/head/lora_a` \(8, 2\), whi"
    ),
    "momentum": (optax.sgd(0.1, momentum=0.9), "Only the moments of `lorapro_adamw`"),
    "accumulated gradients": (
        optax.MultiSteps(OURS, 2).gradient_transformation(), "`acc_grads/head/lora_a`"
    ),
    "rows and columns": (
        optax.chain(lorapro(), optax.adafactor(0.1, min_dim_size_to_factor=2)),
        r"`1/0/v_row/head/lora_a` \(2,\), which belongs to the entries of `head/lor",
    ),
    "a list of axes": (
        optax.chain(lorapro(), optax.sm3(0.1)),
        r"`1/0/mu/head/lora_a/0` \(8,\), which",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_other_moments_of_factors_are_refused(name):
    tx, message = FOREIGN[name]
    params = trees.make_params()
    state = tx.init(params)
    with pytest.raises(ValueError, match=message):
        resize_adapters(params, 1, state=state)
    # Negative control: where no rank changes nothing is lost.
    same = resize_adapters(params, {"head": 2, "layers": 4}, state=state)
    assert jax.tree.all(jax.tree.map(lambda x, y: x is y, same.state, state))


class Whitened(NamedTuple):
    """What another rule may keep."""

    mu: Any


def test_the_moments_of_another_rule_for_pairs_are_refused():
    params = trees.make_params()
    state, *rest = OURS.init(params)
    foreign = state._replace(pairs=Whitened(state.pairs.mu)), *rest
    with pytest.raises(ValueError, match="`state` has Whitened, which have no meaning"):
        resize_adapters(params, 1, state=foreign)


def test_a_state_of_other_parameters_is_refused():
    params = trees.make_params()
    other = resize_adapters(params, 1).params
    with pytest.raises(ValueError, match=r"of shape \(8, 1\) for `head/lora_a`, which"):
        resize_adapters(params, 3, key=KEY, state=OURS.init(other))


def test_a_state_of_other_paths_is_refused_and_the_remedy_works():
    """It would come back as it was, and fail in the next step."""
    params = trees.make_params()
    state, outer = OURS.init(params), {"params": params}
    with pytest.raises(ValueError, match=r"moments of .*'head/lora_a'.*Pass the tree"):
        resize_adapters(outer, 1, state=state)
    result = resize_adapters(params, 1, state=state)
    due = jax.eval_shape(OURS.init, result.params)
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    assert shapes(result.state) == jax.tree.map(lambda x: x.shape, due)
    assert resize_adapters(outer, 1).state is None  # left out
    # What is frozen has no moments, and some of the rest has.
    frozen = {"head": params["head"]}
    some = resize_adapters(params, 1, state=OURS.init(frozen))
    assert shapes(some.state) == shapes(
        resize_adapters(frozen, 1, state=OURS.init(frozen)).state
    )


@pytest.mark.skipif(OLD_FLAX, reason="needs flax 0.12; see `test_adamw_nnx.py`")
def test_an_nnx_optimizer_goes_on():
    """`optimizer.opt_state` of the old model goes to the optimizer of the new one."""
    x, y = np.ones((3, 6), np.float32), np.eye(3, 7, dtype=np.float32)
    make = lambda rank: nnx.LoRALinear(6, 7, lora_rank=rank, rngs=nnx.Rngs(0))

    def start(rank):
        model = make(rank)
        return model, nnx.Optimizer(model, OURS, wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer):
        loss = lambda model: jnp.mean((model(x) - y) ** 2)
        factors = nnx.DiffState(0, nnx.LoRAParam)
        optimizer.update(model, nnx.grad(loss, argnums=factors)(model))

    model, optimizer = start(4)
    for _ in range(3):
        step(model, optimizer)
    before = model(x)
    result = resize_adapters(nnx.state(model), 6, key=KEY, state=optimizer.opt_state)
    new, new_optimizer = start(6)
    nnx.update(new, result.params)
    new_optimizer.opt_state = result.state
    np.testing.assert_allclose(new(x), before, atol=1e-6)
    (pair,) = find_pairs(nnx.state(new))
    assert pair.rank == 6
    step(new, new_optimizer)
    assert new_optimizer.opt_state[0].count[...] == 4
    # Negative control: with a fresh state it is another step.
    fresh, fresh_optimizer = start(6)
    nnx.update(fresh, result.params)
    step(fresh, fresh_optimizer)
    assert distance(new(x), fresh(x)) > 1e-3
