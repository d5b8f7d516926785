"""Adapter trees of real models as data, filled with random factors and gradients.

A tree is `{"layers_0": {"q": {"lora_a": (in, r), "lora_b": (r, out)}}}`: every
linear layer of the model's blocks carries an adapter, W = W0 + s A B in this
layout. A name that ends in `-leaves` is the same tree as `nnx.vmap` or a scan over
layers has it, `{"layers": {"q": {"lora_a": (depth, in, r), ...}}}`. Only shapes and
names are real; there is no model behind them.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Shape: TypeAlias = tuple[int, int]
"""(in, out) of one linear layer."""

SCALE = 2.0
GRADIENT_RANK = 8


class Stack(NamedTuple):
    """`depth` equal blocks; `layers` are the linear layers of one of them."""

    depth: int
    layers: dict[str, Shape]


def _square(width: int, *names: str) -> dict[str, Shape]:
    return dict.fromkeys(names, (width, width))


_LLAMA = _square(4096, "q", "k", "v", "o") | {
    "gate": (4096, 11008),
    "up": (4096, 11008),
    "down": (11008, 4096),
}
_MLP = {"fc1": (768, 3072), "fc2": (3072, 768)}
_SELF = _square(768, "q", "k", "v", "o")
_CROSS = _square(768, "cross_q", "cross_k", "cross_v", "cross_o")

TREES: dict[str, dict[str, Stack]] = {
    "vit-b16": {"layers": Stack(12, _SELF | _MLP)},
    "t5-base": {
        "encoder": Stack(12, _SELF | _MLP),
        "decoder": Stack(12, _SELF | _CROSS | _MLP),
    },
    "llama2-7b": {"layers": Stack(32, _LLAMA)},
    "llama2-7b-leaves": {"layers": Stack(32, _LLAMA)},
}


class Pair(NamedTuple):
    """Factors and gradients of one weight, and the G behind them, in float32.

    The gradient of the weight, `(in, out)`, is `G = left @ right`, never formed.

    Attributes:
      lora_a: `(in, r)`.
      lora_b: `(r, out)`, not zero: the state some way into training.
      grad_a: s G lora_bᵀ.
      grad_b: s lora_aᵀ G.
      left: `(in, GRADIENT_RANK)`.
      right: `(GRADIENT_RANK, out)`.
    """

    lora_a: np.ndarray
    lora_b: np.ndarray
    grad_a: np.ndarray
    grad_b: np.ndarray
    left: np.ndarray
    right: np.ndarray


def weights(name: str) -> Iterator[tuple[str, str, Shape]]:
    """Block, layer and shape of all weights of a tree, in order."""
    for stack, (depth, layers) in TREES[name].items():
        for i in range(depth):
            for layer, shape in layers.items():
                yield f"{stack}_{i}", layer, shape


def random_pair(shape: Shape, rank: int, seed: int) -> Pair:
    """A pair that depends on its arguments only, so that a check can redo it."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    fan_in, fan_out = shape
    a = normal(fan_in, rank) / np.float32(fan_in**0.5)
    b = normal(rank, fan_out) / np.float32(10 * fan_out**0.5)
    left, right = normal(fan_in, GRADIENT_RANK), normal(GRADIENT_RANK, fan_out)
    grad_a = SCALE * (left @ (right @ b.T))
    grad_b = SCALE * ((a.T @ left) @ right)
    return Pair(a, b, grad_a, grad_b, left, right)


def build(name: str, rank: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters and gradients of a tree; the seed of a weight is its index."""
    params: dict[str, Any] = {}
    grads: dict[str, Any] = {}
    for seed, (block, layer, shape) in enumerate(weights(name)):
        a, b, grad_a, grad_b, *_ = random_pair(shape, rank, seed)
        # `jnp.array` copies: a buffer shared with NumPy could not be donated.
        params.setdefault(block, {})[layer] = _factors(a, b)
        grads.setdefault(block, {})[layer] = _factors(grad_a, grad_b)
    if is_stacked(name):
        return _leaves(name, params), _leaves(name, grads)
    return params, grads


def is_stacked(name: str) -> bool:
    """Whether the blocks of a tree are in common leaves."""
    return name.endswith("-leaves")


def _leaves(name: str, tree: dict[str, Any]) -> dict[str, Any]:
    blocks = lambda stack, depth: [tree[f"{stack}_{i}"] for i in range(depth)]
    return {
        stack: jax.tree.map(lambda *xs: jnp.stack(xs), *blocks(stack, depth))
        for stack, (depth, _) in TREES[name].items()
    }


def _factors(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    return {"lora_a": jnp.array(a), "lora_b": jnp.array(b)}
