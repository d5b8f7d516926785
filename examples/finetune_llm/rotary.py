"""tunix's Llama 3 and Qwen 3 with the rotary frequencies that config.json asks for.

tunix 0.1.7 turns both by the base 1,000,000, whatever `rope_theta` says, and knows no
`rope_scaling`. Here its attention is run with another `apply_rope`.
"""

import dataclasses
import functools
import math
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tunix.models.llama3 import model as llama3
from tunix.models.qwen3 import model as qwen3


class Scaling(NamedTuple):
    """The `llama3` scaling of Llama 3.1 and later, named as in config.json."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class LlamaConfig(llama3.ModelConfig):
    """tunix's configuration and the scaling of rotary frequencies."""

    rope_scaling: Scaling | None = None


def frequencies(theta: float, size: int, scaling: Scaling | None) -> np.ndarray:
    """Radians per position of each pair of features, float32 `(size / 2,)`.

    Long wavelengths are stretched by the factor, short ones are kept, and those between
    are interpolated; as transformers' `_compute_llama3_parameters` has it.
    """
    plain = 1.0 / theta ** (np.arange(0, size, 2) / size)
    if scaling is None:
        return plain.astype(np.float32)
    length, low, high = (
        scaling.original_max_position_embeddings,
        scaling.low_freq_factor,
        scaling.high_freq_factor,
    )
    turns = length * plain / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (plain * (kept + (1 - kept) / scaling.factor)).astype(np.float32)


@functools.cache
def _block(kind: Any, theta: float, size: int, scaling: Scaling | None) -> Any:
    """The `block` of a class, which looks up `apply_rope` among its globals."""
    table = frequencies(theta, size, scaling)

    def apply_rope(x: jax.Array, positions: jax.Array, head_dim: int) -> jax.Array:
        del head_dim  # the table is for this one
        angles = positions[..., None, None] * table
        sin, cos = jnp.sin(angles), jnp.cos(angles)
        first, second = jnp.split(x, 2, axis=-1)
        turned = (first * cos - second * sin, second * cos + first * sin)
        return jnp.concatenate(turned, axis=-1).astype(x.dtype)

    block = kind.block
    names = {**block.__globals__, "apply_rope": apply_rope}
    return types.FunctionType(
        block.__code__, names, block.__name__, block.__defaults__, block.__closure__
    )


class LlamaAttention(llama3.Attention):
    """tunix's attention of Llama 3 with these frequencies."""

    def block(self, *args, **options):  # noqa: D102
        c = self.config
        run = _block(llama3.Attention, c.rope_theta, c.head_dim, c.rope_scaling)
        return run(self, *args, **options)


class QwenAttention(qwen3.Attention):
    """tunix's attention of Qwen 3 with these frequencies."""

    def block(self, *args, **options):  # noqa: D102
        c = self.config
        run = _block(qwen3.Attention, c.rope_theta, c.head_dim, None)
        return run(self, *args, **options)


class Llama(llama3.Llama3):
    """tunix's Llama 3 with this attention."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        for layer in self.layers:
            layer.attn = LlamaAttention(config=config, rngs=rngs)


class Qwen3(qwen3.Qwen3):
    """tunix's Qwen 3 with this attention."""

    def __init__(self, config: qwen3.ModelConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        for layer in self.layers:
            layer.attn = QwenAttention(config=config, rngs=rngs)
