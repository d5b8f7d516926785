"""The demo's base: a small Llama that has read the standard library.

It takes the place of a pretrained model, in a folder as Hugging Face lays it out.
"""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from rich.progress import Progress

from examples.finetune_llm import corpus, export, models
from examples.finetune_llm.chat import Example
from examples.finetune_llm.optimizers import schedule
from examples.finetune_llm.options import Options
from examples.finetune_llm.training import fit


class Size(NamedTuple):
    """Of the base model, and of what it reads."""

    vocabulary: int
    width: int
    layers: int
    steps: int
    batch: int
    length: int
    modules: int | None = None  # of the standard library; None for all
    rate: float = 3e-3


FULL = Size(2048, 128, 4, 300, 16, 128)
QUICK = Size(1024, 64, 2, 80, 8, 128, modules=40)


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
    if options.model is None and not base.exists():
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
    data, alone = options.output / "data", jax.process_count() == 1
    return replace(
        options,
        model=options.model or options.output / "base",
        data=options.data or data / "train.jsonl",
        validation=options.validation or data / "validation.jsonl",
        evaluate=options.evaluate or ("exact" if alone else None),
        questions=options.questions or data / "questions.jsonl",
    )


def new_base(folder: Path, size: Size, seed: int) -> None:
    """Pretrains and saves everything that belongs to a Hugging Face folder."""
    texts = corpus.sources(size.modules)
    corpus.write_tokenizer(folder, texts, size.vocabulary)
    (folder / "config.json").write_text(json.dumps(config(size), indent=2) + "\n")
    spec = models.read_spec(folder)
    rows = corpus.windows(folder, texts, size.length)
    model, loss = pretrain(spec, rows, size, seed)
    export.save_base(spec, model, folder)
    print(
        f"base: {size.steps} steps of {size.batch * size.length} tokens of the "
        f"standard library, loss {loss:.2f} nats"
    )


def pretrain(
    spec: models.Spec, rows: np.ndarray, size: Size, seed: int
) -> tuple[nnx.Module, float]:
    """A model of which all weights are trained, and its mean loss at the end."""
    # Of one device, so that a base is the same wherever it is made.
    mesh = Mesh(np.array(jax.local_devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    model = models.random(spec, seed, jnp.float32, mesh)
    learnt = np.arange(size.length) > 0
    examples = [Example(row, learnt) for row in rows]
    rate = schedule(size.rate, size.steps, 0.1)
    losses: list[float] = []
    with Progress(transient=True, disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task("pretraining", total=size.steps)

        def report(step: int, metrics: dict[str, float]) -> None:
            progress.update(task, completed=step)
            losses.append(metrics["loss"])

        fit(
            spec, model, optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate)),
            examples, mesh=mesh, steps=size.steps, batch=size.batch,
            length=size.length, seed=seed, trains=nnx.Param, report=report,
        )  # fmt: skip
    return model, float(np.mean(losses[-max(1, size.steps // 10) :]))
