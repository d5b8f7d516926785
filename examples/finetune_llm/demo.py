"""The demo's base: a small Llama that has read the standard library.

It takes the place of a pretrained model, in a folder as Hugging Face lays it out.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.progress import track

from examples.finetune_llm import corpus, models
from examples.finetune_llm.options import Options


class Size(NamedTuple):
    """Of the base model, and of what it reads."""

    vocabulary: int
    width: int
    layers: int
    steps: int
    batch: int
    length: int
    rate: float = 3e-3


FULL = Size(2048, 128, 4, 400, 16, 128)
QUICK = Size(512, 64, 2, 60, 8, 64)


def config(size: Size) -> dict[str, Any]:
    """What transformers writes for such a Llama, heads shared and embedding tied."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": size.vocabulary,
        "hidden_size": size.width,
        "intermediate_size": 3 * size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": size.width // 4,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "pad_token_id": corpus.PAD,
        "bos_token_id": corpus.BEGIN,
        "eos_token_id": corpus.END,
        "torch_dtype": "float32",
    }


def prepare(options: Options) -> Options:
    """Makes the base and the data, unless they are there, and puts them in the options.

    Only one process of a run may call it.
    """
    size = QUICK if options.quick else FULL
    base, data = options.output / "base", options.output / "data"
    if not base.exists():
        options.output.mkdir(parents=True, exist_ok=True)
        begun = base.with_name("base.unfinished")
        shutil.rmtree(begun, ignore_errors=True)
        begun.mkdir()
        new_base(begun, size, options.seed)
        os.replace(begun, base)
    data.mkdir(exist_ok=True)
    corpus.write_data(data)
    return with_files(options)


def with_files(options: Options) -> Options:
    """The options with the demo's files, where none were given."""
    data = options.output / "data"
    return replace(
        options,
        model=options.model or options.output / "base",
        data=options.data or data / "train.jsonl",
        validation=options.validation or data / "validation.jsonl",
        evaluate=options.evaluate or "exact",
        questions=options.questions or data / "questions.jsonl",
    )


def new_base(folder: Path, size: Size, seed: int) -> None:
    """Pretrains and saves everything that belongs to a Hugging Face folder."""
    texts = corpus.sources()
    corpus.write_tokenizer(folder, texts, size.vocabulary)
    (folder / "config.json").write_text(json.dumps(config(size), indent=2) + "\n")
    spec = models.read_spec(folder)
    model = models.random(spec, seed, jnp.float32)
    rows = corpus.windows(folder, texts, size.length)
    loss = pretrain(spec, model, rows, size, seed)
    models.save_base(spec, model, folder)
    print(f"base: {size.steps} steps on {rows.size:,} tokens, loss {loss:.2f} nats")


def _batches(rows: np.ndarray, size: Size, seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    for _ in range(size.steps):
        yield rows[rng.integers(len(rows), size=size.batch)]


def pretrain(
    spec: models.Spec, model: nnx.Module, rows: np.ndarray, size: Size, seed: int
) -> float:
    """Trains all weights in place; returns the mean loss of the last tenth."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, size.rate, size.steps // 10, size.steps
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
    graph, weights = nnx.split(model)
    length = rows.shape[1]
    positions = jnp.broadcast_to(jnp.arange(length), (size.batch, length))
    mask = jnp.broadcast_to(
        jnp.tril(jnp.ones((length, length), bool)), (size.batch, length, length)
    )

    def loss_fn(weights, tokens):
        logits = models.apply(spec, nnx.merge(graph, weights), tokens, positions, mask)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits[:, :-1].astype(jnp.float32), tokens[:, 1:]
        )
        return losses.mean()

    def step(weights, state, tokens):
        loss, grads = jax.value_and_grad(loss_fn)(weights, tokens)
        updates, state = tx.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state, loss

    compiled = jax.jit(step, donate_argnums=(0, 1))
    state, losses = tx.init(weights), []
    for tokens in track(_batches(rows, size, seed), "pretraining", total=size.steps):
        weights, state, loss = compiled(weights, state, tokens)
        losses.append(loss)
    nnx.update(model, weights)
    return float(np.mean(jax.device_get(losses[-max(1, size.steps // 10) :])))
