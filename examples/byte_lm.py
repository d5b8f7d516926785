"""A byte-level transformer in Flax NNX, and the two kinds of text it learns.

A task of the benchmarks that needs no download: pretrain on the source of Python's
standard library, then fine-tune on English prose, the language reference that
Python ships as the topics of `help()`.
"""

import functools
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.training import Data, Task
from examples.vit_digits import Block

CONTEXT, VOCABULARY = 64, 128


class ByteLM(nnx.Module):
    """Bytes `(n, 64)` to logits of the next; with `rank`, LoRA on every linear layer.

    The bytes are those of ASCII. `adapted` is the class of layers with LoRA.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        *,
        width: int = 64,
        depth: int = 3,
        heads: int = 4,
        rank: int | None = None,
        adapted: Callable[..., nnx.Module] = nnx.LoRALinear,
    ):
        lora = functools.partial(adapted, lora_rank=rank)
        linear = nnx.Linear if rank is None else lora
        self.embed = nnx.Embed(VOCABULARY, width, rngs=rngs)
        self.position = nnx.Param(0.02 * rngs.params.normal((CONTEXT, width)))
        blocks = [Block(width, heads, linear, rngs, causal=True) for _ in range(depth)]
        self.blocks = nnx.Sequential(*blocks)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = linear(width, VOCABULARY, rngs=rngs)

    def __call__(self, text: jax.Array) -> jax.Array:  # noqa: D102
        x = self.embed(text.astype(jnp.int32)) + self.position[...]
        return self.head(self.norm(self.blocks(x)))


def new_lm(rank: int | None, seed: jax.typing.ArrayLike) -> ByteLM:
    """The model of both tasks."""
    return ByteLM(nnx.Rngs(jax.random.key(seed)), rank=rank)


def windows(texts: Sequence[str], stride: int, at_most: int | None = None) -> Data:
    """Inputs `(n, 64)` every `stride` bytes, and each byte's successor as labels."""
    joined = "\n".join(texts).encode("ascii", "replace")
    text = np.frombuffer(joined, np.uint8)
    cut = np.lib.stride_tricks.sliding_window_view(text, CONTEXT + 1)[::stride]
    cut = cut[:: -(-len(cut) // (at_most or len(cut)))]
    return Data(jnp.asarray(cut[:, :-1]), jnp.asarray(cut[:, 1:]))


def make_task(name: str, texts: Sequence[str], stride: int, seed: int) -> Task:
    """Four fifths of the texts to train on, a tenth each to choose by and to report.

    A text is in one part only, so that no part knows another's.
    """
    order = np.random.default_rng(seed).permutation(len(texts))
    sizes = np.cumsum([len(texts[i]) for i in order])
    part = np.searchsorted((0.1, 0.2), sizes / sizes[-1])
    validation, test, train = ([texts[i] for i in order[part == k]] for k in range(3))
    held_out = (windows(texts, CONTEXT, 512) for texts in (validation, test))
    return Task(name, new_lm, 16, windows(train, stride), *held_out)


def load_tasks(seed: int = 0) -> tuple[Task, Task]:
    """Python source, and English prose."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(folder.glob("*.py"))
    source = [file.read_text("utf-8", "replace") for file in files]
    prose = [topics[name] for name in sorted(topics)]
    return (
        make_task("source", source, 16, seed),
        make_task("prose", prose, 4, seed),
    )
