"""A small vision transformer in Flax NNX, and the digits it learns.

The task of the quickstart and of the benchmarks: pretrain on scikit-learn's
handwritten digits, then fine-tune on the same kind of images inverted, rotated and
with other labels.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from examples.training import Data, Task

SIDE, PATCH, CLASSES = 8, 2, 10


class Block(nnx.Module):
    """Pre-norm attention and MLP. `linear` makes all six of its layers."""

    def __init__(self, width: int, heads: int, linear, rngs: nnx.Rngs, causal=False):
        self.heads, self.causal = heads, causal
        self.norm_attention = nnx.LayerNorm(width, rngs=rngs)
        self.norm_mlp = nnx.LayerNorm(width, rngs=rngs)
        self.query = linear(width, width, rngs=rngs)
        self.key = linear(width, width, rngs=rngs)
        self.value = linear(width, width, rngs=rngs)
        self.out = linear(width, width, rngs=rngs)
        self.up = linear(width, 4 * width, rngs=rngs)
        self.down = linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:  # noqa: D102
        y = self.norm_attention(x)
        split = lambda z: z.reshape(*z.shape[:-1], self.heads, -1)
        projected = split(self.query(y)), split(self.key(y)), split(self.value(y))
        y = jax.nn.dot_product_attention(*projected, is_causal=self.causal)
        x = x + self.out(y.reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norm_mlp(x))))


class ViT(nnx.Module):
    """Images `(n, side, side)` to logits; with `rank`, LoRA on every layer."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        *,
        width: int = 48,
        depth: int = 3,
        heads: int = 4,
        rank: int | None = None,
        side: int = SIDE,
        patch: int = PATCH,
        classes: int = CLASSES,
    ):
        lora = functools.partial(nnx.LoRALinear, lora_rank=rank)
        linear = nnx.Linear if rank is None else lora
        self.grid, self.patch = side // patch, patch
        tokens = self.grid**2
        self.embed = linear(patch**2, width, rngs=rngs)
        self.position = nnx.Param(0.02 * rngs.params.normal((tokens, width)))
        blocks = [Block(width, heads, linear, rngs) for _ in range(depth)]
        self.blocks = nnx.Sequential(*blocks)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = linear(width, classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:  # noqa: D102
        grid, patch = self.grid, self.patch
        patches = images.reshape(-1, grid, patch, grid, patch).swapaxes(2, 3)
        x = self.embed(patches.reshape(-1, grid**2, patch**2)) + self.position[...]
        return self.head(self.norm(self.blocks(x)).mean(axis=1))


def new_vit(rank: int | None, seed: jax.typing.ArrayLike) -> ViT:
    """The model of both tasks."""
    return ViT(nnx.Rngs(jax.random.key(seed)), rank=rank)


def load_tasks(seed: int = 0) -> tuple[Task, Task]:
    """The digits upright, and shifted: inverted, rotated, relabelled.

    The inputs are images `(n, 8, 8)` in [0, 1]. Both tasks divide the 1797 images
    alike, so that the shifted test images are not seen in pretraining either.
    """
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)
    rest, test = train_test_split(
        np.arange(len(images)), test_size=450, stratify=digits.target, random_state=seed
    )
    train, validation = train_test_split(
        rest, test_size=270, stratify=digits.target[rest], random_state=seed
    )
    new_labels = np.random.default_rng(seed).permutation(CLASSES)
    turned = np.rot90(1 - images, axes=(1, 2))
    split = lambda x, y: (
        Data(jnp.asarray(x[i]), jnp.asarray(y[i])) for i in (train, validation, test)
    )
    return (
        Task("upright digits", new_vit, 64, *split(images, digits.target)),
        Task("shifted digits", new_vit, 64, *split(turned, new_labels[digits.target])),
    )
