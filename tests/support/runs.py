"""One training run twice: by the package, and by the dense simulation in NumPy.

The loss pulls every weight s B A to a target of full rank, with noise: G depends on
the trajectory, so an error in one step is in all later ones.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lorapro_jax import lorapro_adamw
from tests.support import oracle, oracle_adamw
from tests.support.layouts import Pair, distance, leaves_by_path, pair_at

MOMENTS = ["dense", "factored"]
STEPS, LEARNING_RATE = 50, 0.05
# One rounding, 1e-16, costs up to cond² = 1e4 in a step and grows at most 100-fold in
# 50 steps: measured on the simulation, by starting it from A (1 + 1e-13).
TOLERANCE = 1e-9


class Start(NamedTuple):
    """B has singular values from `b_scale` down to a tenth of it."""

    damping: float
    b_scale: float


STARTS = {
    "B = 0, little damping": Start(0.1, 0.0),
    "B = 0, more damping": Start(3.0, 0.0),
    "B ≠ 0, undamped": Start(0.0, 0.5),
}
TREE = {  # ranks 1 to 4, six layouts, a scale each, and the sizes of the letters
    pair_at("plain", "ir", "ro", 0.5): {"i": 6, "r": 3, "o": 9},
    pair_at("narrow", "ir", "ro", 2.0): {"i": 5, "r": 1, "o": 7},
    pair_at("layers", "Lir", "Lro", 1.5): {"L": 2, "i": 5, "r": 2, "o": 6},
    pair_at("scanned", "iLr", "rLo", 0.8): {"L": 3, "i": 6, "r": 2, "o": 5},
    pair_at("query", "ir", "rnh", 0.7): {"i": 6, "r": 2, "n": 3, "h": 4},
    pair_at("output", "nhr", "ro", 1.2): {"n": 2, "h": 3, "r": 4, "o": 5},
    Pair("peft/lora_A/weight", "peft/lora_B/weight", "ri", "or", 1.3): {
        "i": 7, "r": 2, "o": 6,
    },
}  # fmt: skip

SMALL = {pair: TREE[pair] for pair in TREE if pair.a[:5] in ("plain", "scann")}


def counted(function):
    """The function under jit, and a list that grows by one with each trace."""
    traces: list[None] = []

    def traced(*args):
        traces.append(None)
        return function(*args)

    return jax.jit(traced), traces


def scales(tree):
    """The `scale=` of the package."""
    return {pair.a.split("/")[0]: pair.scale for pair in tree}


def initial(tree, b_scale):
    """Parameters with known spectra, nested by path."""
    params: dict[str, Any] = {}
    for seed, (pair, sizes) in enumerate(tree.items()):
        shape = _features(pair.b_axes, sizes), _features(pair.a_axes, sizes), sizes["r"]
        layers = [
            oracle.factors(100 * seed + k, *shape, b_scale=b_scale)[:2]
            for k in range(_size(pair.stack, sizes))
        ]
        for path, axes, side, xs in zip(
            pair[:2], pair[2:4], "ab", zip(*layers, strict=True), strict=True
        ):
            x = oracle_adamw.from_matrices(np.stack(xs), axes, side, sizes)
            set_leaf(params, path, jnp.asarray(x))
    return params


def set_leaf(tree, path, leaf):
    """Puts a leaf into nested dictionaries."""
    *parents, name = path.split("/")
    functools.reduce(lambda x, key: x.setdefault(key, {}), parents, tree)[name] = leaf


def products(params, tree):
    """s B A of every pair, `(layers, m, n)`, by `einsum` on the letters."""
    leaves, result = leaves_by_path(params), []
    for pair, sizes in tree.items():
        inner = [[c for c in axes if c.islower() and c != "r"] for axes in pair[2:4]]
        order = "".join([*pair.stack, *inner[1], *inner[0]])
        weight = jnp.einsum(
            f"{pair.a_axes},{pair.b_axes}->{order}", leaves[pair.a], leaves[pair.b]
        )
        shape = _size(pair.stack, sizes), -1, _features(pair.a_axes, sizes)
        result.append(pair.scale * weight.reshape(shape))
    return result


def gradients(tree, params, full):
    """LoRA's gradients for one G `(layers, m, n)` a pair, by differentiation."""
    _, pull = jax.vjp(lambda params: products(params, tree), params)
    return pull(full)[0]


def targets_and_noise(tree):
    """Of every pair; the noise for each step."""
    rng = np.random.default_rng(7)
    shapes = [x.shape for x in products(initial(tree, 1.0), tree)]
    targets = [rng.standard_normal(shape) for shape in shapes]
    return targets, [0.3 * rng.standard_normal((STEPS, *shape)) for shape in shapes]


def trained(
    tree, start, moments, *, gauge="sylvester", weight_decay=0.0,
    max_grad_norm=np.inf, stack_axis=None, nesterov=False,
):  # fmt: skip
    """The package: parameters after 0 to 50 steps, stacked, and the last state."""
    numbers = start.damping, weight_decay, max_grad_norm  # traced: compiled once
    data = initial(tree, start.b_scale), *targets_and_noise(tree)
    return _trained(
        *data, *numbers, _frozen(tree), moments, gauge, stack_axis, nesterov
    )


@functools.partial(jax.jit, static_argnums=(6, 7, 8, 9, 10))
def _trained(
    params, targets, noise, damping, weight_decay, max_grad_norm,
    tree, moments, gauge, stack_axis, nesterov,
):  # fmt: skip
    tree = _thawed(tree)
    tx = lorapro_adamw(
        LEARNING_RATE, weight_decay=weight_decay, moments=moments, gauge=gauge,
        damping=damping, max_grad_norm=max_grad_norm, scale=scales(tree),
        stack_axis=stack_axis, nesterov=nesterov,
    )  # fmt: skip

    def step(carry, noise):
        params, state = carry
        weights = products(params, tree)
        full = [w - x + y for w, x, y in zip(weights, targets, noise, strict=True)]
        updates, state = tx.update(gradients(tree, params, full), state, params)
        return (optax.apply_updates(params, updates), state), params

    carry = params, tx.init(params)
    (params, state), seen = jax.lax.scan(step, carry, noise)
    join = lambda xs, last: jnp.concatenate([xs, last[None]])
    return jax.tree.map(join, seen, params), state[0]


def weights_of(tree, params, kind=oracle_adamw.Weight, **options):
    """The simulated weights of a tree, layer by layer."""
    leaves = leaves_by_path(params)
    return [
        kind(a, b, pair.scale, **options)
        for pair in tree
        for a, b in matrices(leaves, pair)
    ]


def matrices(leaves, pair):
    """(A, B) of every layer, in float64."""
    a = oracle_adamw.matrices(leaves[pair.a], pair.a_axes, "a")
    b = oracle_adamw.matrices(leaves[pair.b], pair.b_axes, "b")
    return list(zip(a, b, strict=True))


def simulated(tree, start, moments, *, weight_decay=0.0, max_grad_norm=None, **options):
    """The same in NumPy: all weights, and their factors after each step."""
    numbers = weight_decay, max_grad_norm, tuple(sorted(options.items()))
    return _simulated(_frozen(tree), start, moments, *numbers)


@functools.cache
def _simulated(tree, start, moments, weight_decay, max_grad_norm, options):
    tree = _thawed(tree)
    options = {"moments": moments, "damping": start.damping, **dict(options)}
    weights = weights_of(tree, initial(tree, start.b_scale), **options)
    targets, noise = targets_and_noise(tree)
    targets = [x for stack in targets for x in stack]
    noise = [x for stack in noise for x in stack.swapaxes(0, 1)]
    trajectory = oracle_adamw.run(
        weights,
        lambda t, i, weight: weight - targets[i] + noise[i][t],
        steps=STEPS,
        learning_rate=LEARNING_RATE,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
    )
    return weights, trajectory


def largest_distance(tree, params, trajectory):
    """Over all factors and steps, in units of a factor's largest entry."""
    leaves, worst = jax.tree.map(np.asarray, leaves_by_path(params)), 0.0
    for t, expected in enumerate(trajectory):
        now = {path: x[t + 1] for path, x in leaves.items()}
        received = [factors for pair in tree for factors in matrices(now, pair)]
        for got, want in zip(received, expected, strict=True):
            worst = max(worst, *map(distance, got, want))
    return worst


def _frozen(tree):
    return tuple((pair, tuple(sizes.items())) for pair, sizes in tree.items())


def _thawed(tree):
    return {pair: dict(sizes) for pair, sizes in tree}


def _size(letters, sizes):
    return int(np.prod([sizes[c] for c in letters]))


def _features(axes, sizes):
    return _size([c for c in axes if c.islower() and c != "r"], sizes)
