"""Greedy generation by tunix's sampler, which keeps keys and values of past tokens."""

import dataclasses
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tunix.generate.sampler import CacheConfig, Sampler

# tunix takes every token of this number for padding, in prompts as well: it has to be
# none of the tokenizer's. Its embedding, the last row, is read and not attended to.
PAD = -1


class Tokens:
    """What tunix's sampler asks of a tokenizer, where prompts are tokens already."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def encode(self, tokens: Sequence[int]) -> list[int]:
        """The prompt as it is."""
        return list(tokens)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text, without special tokens."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def bos_id(self) -> None:
        """Nothing to put before a prompt: it is complete."""

    def eos_id(self) -> int | None:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    def pad_id(self) -> int:
        """No token at all."""
        return PAD


def stop_tokens(folder: Path, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's, and those of the model's folder.

    Chat models end a turn by another token than a text; `generation_config.json` and
    `config.json` name both.
    """
    found = {tokenizer.eos_token_id} - {None}
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        if path.is_file():
            named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            found |= set(named if isinstance(named, list) else [named]) - {None}
    return sorted(found)


class MeshSampler(Sampler):
    """tunix's sampler, with its answers on every device, so that each process has all.

    Where the model divides its activations, tokens would be divided as well.
    """

    def __init__(self, mesh: Mesh, *args: Any):
        self.everywhere = NamedSharding(mesh, P())
        super().__init__(*args)

    def _decode_fn(self, params: Any, sampling_state: Any) -> Any:
        state = super()._decode_fn(params, sampling_state)
        place = jax.lax.with_sharding_constraint
        tokens = place(state.token_buffer, self.everywhere)
        return dataclasses.replace(state, token_buffer=tokens)


class Generator:
    """Continues prompts greedily, again and again without compiling anew.

    Args:
      model: With the structure of all models that will be given.
      config: tunix's configuration of it.
      tokenizer: From `load_tokenizer`.
      stop: The tokens that end an answer, from `stop_tokens`.
      longest: Tokens of the longest prompt.
      tokens: Of an answer at most.
      batch: Prompts at once; rounded up to what the mesh divides.
      mesh: Where the model is, with an axis "fsdp".
    """

    def __init__(
        self, model: nnx.Module, config: Any, tokenizer: Any, stop: Sequence[int], *,
        longest: int, tokens: int, batch: int, mesh: Mesh,
    ):  # fmt: skip
        self.stop, self.tokens, self.mesh = stop, tokens, mesh
        parts = mesh.shape["fsdp"]  # over which tunix divides the prompts
        self.batch = -(-batch // parts) * parts
        heads = config.num_layers, config.num_kv_heads, config.head_dim
        cache = CacheConfig(_power_of_2(longest) + tokens, *heads)
        self.sampler = MeshSampler(mesh, model, Tokens(tokenizer), cache)

    def __call__(
        self, model: nnx.Module, prompts: Sequence[Sequence[int]]
    ) -> list[str]:
        """The continuation of each prompt, in order, up to a token that ends it."""
        self.sampler.transformer_state = nnx.variables(model)
        # Those of like length together: a batch is as long as its longest prompt.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        texts = [""] * len(prompts)
        for at in range(0, len(order), self.batch):
            part = order[at : at + self.batch]
            full = part + part[-1:] * (self.batch - len(part))
            found = self._generate([prompts[i] for i in full])
            for i, text in zip(part, found, strict=False):
                texts[i] = text
        return texts

    def _generate(self, prompts: list[Sequence[int]]) -> list[str]:
        with self.mesh, warnings.catch_warnings():
            # tunix's Llama has no cache of its own, and its sampler says so.
            warnings.simplefilter("ignore", DeprecationWarning)
            return self.sampler(
                prompts,
                self.tokens,
                max_prompt_length=_power_of_2(max(map(len, prompts))),
                eos_tokens=self.stop,
            ).text


def _power_of_2(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()
