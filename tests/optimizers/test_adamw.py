"""`lorapro_adamw` against a dense simulation of its definition, in float64."""

from typing import Any

import numpy as np
import pytest

from tests.support import oracle, oracle_adamw
from tests.support.layouts import distance, leaves_by_path, pair_at
from tests.support.runs import (
    MOMENTS,
    SMALL,
    STARTS,
    STEPS,
    TOLERANCE,
    TREE,
    Start,
    initial,
    largest_distance,
    matrices,
    simulated,
    trained,
)

pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("start", STARTS)
def test_fifty_steps_equal_the_dense_simulation_in_every_layout(start, moments):
    params, _ = trained(TREE, STARTS[start], moments)

    _, trajectory = simulated(TREE, STARTS[start], moments)
    assert largest_distance(TREE, params, trajectory) < TOLERANCE


@pytest.mark.parametrize("gauge", ["symmetric", "zero"])  # above: "sylvester"
@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("start", STARTS)
def test_fifty_steps_equal_the_dense_simulation_in_every_gauge(start, moments, gauge):
    params, _ = trained(SMALL, STARTS[start], moments, gauge=gauge)

    _, trajectory = simulated(SMALL, STARTS[start], moments, gauge=gauge)
    assert largest_distance(SMALL, params, trajectory) < TOLERANCE


@pytest.mark.parametrize("moments", MOMENTS)
def test_fifty_steps_with_nesterov_equal_the_dense_simulation(moments):
    """And its momentum is another one than Adam's, by far."""
    start = STARTS["B = 0, more damping"]
    params, _ = trained(SMALL, start, moments, nesterov=True)

    _, trajectory = simulated(SMALL, start, moments, nesterov=True)
    assert largest_distance(SMALL, params, trajectory) < TOLERANCE
    _, without = simulated(SMALL, start, moments)
    assert largest_distance(SMALL, params, without) > 1e-2


MISTAKES: dict[str, dict[str, Any]] = {
    "b1": {"b1": 0.91},
    "b2": {"b2": 0.998},
    "eps": {"eps": 1e-2},
    "damping": {"damping": 0.11},
    "gauge": {"gauge": "symmetric"},
    "weight decay": {"weight_decay": 1e-3},
    "norm": {"max_grad_norm": 3.0},
    "bias correction": {"kind": oracle_adamw.CountedFromZero},
    "transport": {"kind": oracle_adamw.WithoutTransport},
    "transport undamped": {"kind": oracle_adamw.DampedTransport},
}


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_control_the_comparison_sees_every_ingredient(mistake, moments):
    """All but one: the dense momentum is not transported at all."""
    start = STARTS["B = 0, little damping"]
    params, _ = trained(SMALL, start, moments)

    _, trajectory = simulated(SMALL, start, moments, **MISTAKES[mistake])

    seen = largest_distance(SMALL, params, trajectory) > 1000 * TOLERANCE
    assert seen == (moments == "factored" or "transport" not in mistake)


@pytest.mark.parametrize(
    ("stack_axis", "axes", "moments"),
    [(0, ("Lir", "Lro"), "dense"), (1, ("iLr", "rLo"), "factored")],
)
def test_stack_axis_decides_what_is_one_layer(stack_axis, axes, moments):
    """A of (2, 2, 2) and B of (2, 2, 5), as `nnx.vmap` stacks them on either axis."""
    tree = {pair_at("x", *axes): {"L": 2, "i": 2, "r": 2, "o": 5}}
    start = Start(1e-2, 0.5)

    params, _ = trained(tree, start, moments, stack_axis=stack_axis)

    _, trajectory = simulated(tree, start, moments)
    assert largest_distance(tree, params, trajectory) < TOLERANCE
    with pytest.raises(ValueError, match="stack_axis"):  # not without being told
        trained(tree, start, moments)


@pytest.mark.parametrize("start", STARTS)
def test_factored_state_holds_exact_energies_and_the_transported_momentum(start):
    """Sums over rows and columns of the dense V, and J(μ) = M at its own factors."""
    before, state = trained(TREE, STARTS[start], "factored")

    weights, _ = simulated(TREE, STARTS[start], "factored")

    assert state.count == STEPS
    mu, nu, factors = map(leaves_by_path, state.pairs)
    before = leaves_by_path(before)
    rest = iter(weights)
    for pair in TREE:
        for path in pair[:2]:
            np.testing.assert_array_equal(factors[path], before[path][STEPS - 1])
        for (step_a, step_b), (columns, rows), (a, b), weight in zip(
            matrices(mu, pair), matrices(nu, pair), matrices(factors, pair), rest,
            strict=False,
        ):  # fmt: skip
            momentum = oracle.equivalent(a, b, step_a, step_b, pair.scale)
            assert distance(momentum, weight.momentum) < TOLERANCE
            assert distance(columns, weight.energy.sum(0, keepdims=True)) < TOLERANCE
            assert distance(rows, weight.energy.sum(1, keepdims=True)) < TOLERANCE


@pytest.mark.parametrize("start", STARTS)
def test_dense_state_holds_the_moments_of_the_weight(start):
    """M and V at A's place: `(*batch, *features of B, *features of A)`."""
    _, state = trained(TREE, STARTS[start], "dense")

    weights, _ = simulated(TREE, STARTS[start], "dense")

    rest = iter(weights)
    for pair, sizes in TREE.items():
        at = dict(zip(("mu", "nu"), map(leaves_by_path, state.pairs[:2]), strict=True))
        for moment in at.values():
            assert pair.b not in moment
        letters = [c for c in pair.b_axes + pair.a_axes if c.islower() and c != "r"]
        shape = tuple(sizes[c] for c in (*pair.stack, *letters))
        assert at["mu"][pair.a].shape == at["nu"][pair.a].shape == shape
        n = matrices(leaves_by_path(initial({pair: sizes}, 0.0)), pair)[0][0].shape[1]
        layers = int(np.prod(shape[: len(pair.stack)]))
        for momentum, energy in zip(
            *(x[pair.a].reshape(layers, -1, n) for x in at.values()), strict=True
        ):
            weight = next(rest)
            assert distance(momentum, weight.momentum) < TOLERANCE
            assert distance(energy, weight.energy) < TOLERANCE


@pytest.mark.parametrize("moments", MOMENTS)
def test_decay_and_clipping_equal_the_simulation(moments):
    """λ = 0.2 on the product, and a bound that some of the norms exceed."""
    options = {"weight_decay": 0.2, "max_grad_norm": 4.0}
    start = STARTS["B = 0, more damping"]

    params, _ = trained(SMALL, start, moments, **options)

    _, trajectory = simulated(SMALL, start, moments, **options)
    assert largest_distance(SMALL, params, trajectory) < TOLERANCE
    for option in options:  # negative control: each of them matters
        others = {key: x for key, x in options.items() if key != option}
        _, trajectory = simulated(SMALL, start, moments, **others)
        assert largest_distance(SMALL, params, trajectory) > 1e-3
