"""Random trees: discovery finds exactly what was planted, or says why it cannot."""

import dataclasses
import random

import jax
import jax.numpy as jnp
import pytest
from jax.tree_util import register_dataclass

from lorapro_jax import find_pairs

STYLES = [
    ("lora_a", "lora_b", "jax"),
    ("kernel_lora_a", "kernel_lora_b", "jax"),
    ("lora_kernel_a", "lora_kernel_b", "jax"),
    ("lora/a", "lora/b", "jax"),
    ("lora_a.kernel", "lora_b.kernel", "jax"),
    ("lora_down/weight", "lora_up/weight", "jax"),
    ("lora_A/weight", "lora_B/weight", "torch"),
    ("lora_A.default.weight", "lora_B.default.weight", "torch"),
    ("lora_embedding_A", "lora_embedding_B", "torch"),
]
DECOYS = ["kernel", "bias", "lora_alpha", "q_lora_rank", "flora_a", "a", "b", "scale"]


@register_dataclass
@dataclasses.dataclass
class Node:
    """A container whose children have attribute keys."""

    left: object
    value: object


def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def shapes(rng, layout, sizes):
    """The shapes of one pair, its rank and its stacked axes; feature sizes >= rank."""
    rank = rng.randint(1, 4)
    size = lambda: sizes(rng)
    features = lambda most: tuple(
        max(rank, size()) for _ in range(rng.randint(1, most))
    )
    if layout == "torch":
        stack = tuple(size() for _ in range(rng.randint(0, 1)))
        (n,), (m,) = features(1), features(1)
        return (*stack, rank, n), (*stack, m, rank), rank, tuple(range(len(stack)))
    kind = rng.choice(["plain", "plain", "front", "axis 1"])
    if kind == "plain":
        a, b = features(3), features(1)  # one factor of two axes: never stacked
        if rng.random() < 0.5:
            a, b = b, a
        return (*a, rank), (rank, *b), rank, ()
    layers, a, b = size(), features(2), features(2)
    if kind == "front":
        return (layers, *a, rank), (layers, rank, *b), rank, (0,)
    return (a[0], layers, *a[1:], rank), (rank, layers, *b), rank, (1,)


def distinct_sizes():
    """Sizes that never coincide, so that shapes settle every reading."""
    numbers = iter(range(5, 1000))
    return lambda rng: next(numbers)


def colliding_sizes():
    """Sizes that coincide with each other and with ranks all the time."""
    return lambda rng: rng.randint(1, 5)


def plant(rng, index, sizes):
    """A module with one pair, in a random style, and the pair's reading."""
    name_a, name_b, layout = rng.choice(STYLES)
    a, b, rank, stack = shapes(rng, layout, sizes)
    items = [(name_a, leaf(*a)), (name_b, leaf(*b))]
    items += [(name, leaf(3)) for name in rng.sample(DECOYS, rng.randint(0, 3))]
    rng.shuffle(items)
    module = {}
    for name, value in items:
        *parents, last = name.split("/") if rng.random() < 0.7 else [name]
        inner = module
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    return f"m{index}", module, (rank, stack, a, b)


def nest(rng, modules):
    """Hangs modules into a random mixture of containers."""
    if len(modules) == 1:
        ((name, module),) = modules
        return {name: module}
    cut = rng.randint(1, len(modules) - 1)
    left, right = nest(rng, modules[:cut]), nest(rng, modules[cut:])
    containers = [
        [left, None, right],
        (left, right),
        {0: left, 7: right},
        {"x/y": left, "z.0": right},
        Node(left, right),
    ]
    return rng.choice(containers)


def random_tree(seed, sizes, most):
    rng = random.Random(seed)
    planted = [plant(rng, index, sizes) for index in range(rng.randint(1, most))]
    tree = nest(rng, [(name, module) for name, module, _ in planted])
    return rng, tree, {name: reading for name, _, reading in planted}


def check_reading(pair, planted):
    """Both paths lie in one module, and rank and stacked axes are as planted there."""
    owner = next(part for part in pair.a.split("/") if part in planted)
    assert owner in pair.b.split("/")
    rank, stack, a, b = planted.pop(owner)
    assert (pair.rank, pair.a_batch_axes, pair.b_batch_axes) == (rank, stack, stack)
    assert a[pair.a_rank_axis] == b[pair.b_rank_axis] == rank


@pytest.mark.parametrize("seed", range(300))
def test_random_tree_gives_exactly_the_planted_pairs(seed):
    _, tree, planted = random_tree(seed, distinct_sizes(), most=8)

    pairs = find_pairs(tree)

    assert len(pairs) == len(planted)
    for pair in pairs:
        check_reading(pair, planted)


@pytest.mark.parametrize("seed", range(600))
def test_coinciding_sizes_give_the_planted_reading_or_an_error(seed):
    """Layers, ranks and features of 1 to 5: never a wrong pair."""
    _, tree, planted = random_tree(seed, colliding_sizes(), most=1)
    try:
        (pair,) = find_pairs(tree)
    except ValueError as error:
        assert "they can be read as" in str(error)
        return
    check_reading(pair, planted)


def test_coinciding_sizes_are_mostly_settled():
    """The test above would pass if everything were an error."""
    settled = 0
    for seed in range(600):
        _, tree, _ = random_tree(seed, colliding_sizes(), most=1)
        try:
            settled += len(find_pairs(tree))
        except ValueError:
            continue
    assert 400 < settled < 600


@pytest.mark.parametrize("seed", range(300))
def test_damaged_tree_is_an_error_with_a_path_or_still_a_pair(seed):
    """A leaf is dropped, resized or replaced: only ValueErrors that name a factor."""
    rng, tree, _ = random_tree(1000 + seed, distinct_sizes(), most=5)
    leaves, treedef = jax.tree.flatten(tree)
    leaves[rng.randrange(len(leaves))] = rng.choice(
        [
            None,
            leaf(),
            leaf(rng.randint(1, 9)),
            leaf(*(rng.randint(0, 9) for _ in range(rng.randint(2, 5)))),
            jax.ShapeDtypeStruct((4, 4), jnp.int32),
            "text",
            1.5,
        ]
    )
    try:
        pairs = find_pairs(jax.tree.unflatten(treedef, leaves))
    except ValueError as error:
        assert "`" in str(error)
        assert "lora" in str(error)
        return
    assert all(len(pair.a_batch_axes) == len(pair.b_batch_axes) for pair in pairs)
