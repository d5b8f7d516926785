"""A language model of a few thousand weights that is fine-tuned in a second.

As a program it is one process of such a run:

    python -m tests.support.tiny_lm '{"folder": ..., "fsdp": 2, ...}'
"""

import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType

with warnings.catch_warnings():  # tunix imports what is deprecated in JAX
    warnings.simplefilter("ignore", DeprecationWarning)
    from examples.finetune_llm import checkpoints, evaluation, models, training
    from examples.finetune_llm.chat import Example, Question
    from examples.finetune_llm.lora import add_lora
    from examples.finetune_llm.optimizers import new_optimizer, schedule

WORDS, LENGTH, STEPS, BATCH, ALPHA = 32, 24, 6, 8, 4.0
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": WORDS,
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    "max_position_embeddings": 64, "tie_word_embeddings": True,
    "initializer_range": 0.3, "eos_token_id": 3,
}  # fmt: skip
PROMPTS = [[5, 9, 2], [7], [1, 1, 4, 8, 30]]


class Numbers:
    """A tokenizer whose texts are the numbers of their tokens."""

    eos_token_id, bos_token_id = 3, None

    def decode(self, tokens, skip_special_tokens=False):
        return " ".join(str(x) for x in tokens if x != 3 or not skip_special_tokens)


class Tuned(NamedTuple):
    """What a run has come to: metrics by step, final factors, answers."""

    losses: dict[int, float]
    factors: list[np.ndarray]
    validation: float
    texts: list[str]


def read_spec(folder):
    """Of a folder that is made, by all processes of a run at once."""
    folder.mkdir(parents=True, exist_ok=True)
    # Renamed when it is complete: another process may be reading already.
    own = folder / f"config.{os.getpid()}.new"
    own.write_text(json.dumps(CONFIG))
    own.replace(folder / "config.json")
    return models.read_spec(folder)


def new_mesh(fsdp=1, tp=1):
    types = (AxisType.Auto,) * 2
    devices = jax.devices()[: fsdp * tp]
    return jax.make_mesh((fsdp, tp), ("fsdp", "tp"), types, devices=devices)


def new_model(spec, mesh, dtype=jnp.float32):
    """With adapters none of which is 0, each array where its annotation says."""
    model = models.random(spec, 0, dtype)
    where = nnx.state(models.abstract(spec, mesh, dtype))
    place = lambda x, like: jax.device_put(np.asarray(x), like.sharding)
    nnx.update(model, jax.tree.map(place, nnx.state(model), where))
    kernels = ("q_proj", "v_proj", "down_proj")
    options = {"rank": 2, "alpha": ALPHA, "rslora": False, "targets": kernels}
    model = add_lora(spec, model, mesh, **options)
    factors = nnx.state(model, nnx.LoRAParam)
    rng = np.random.default_rng(1)
    draw = lambda x: (0.3 * rng.standard_normal(x.shape)).astype(np.float32)
    new = jax.tree.map(lambda x: jax.device_put(draw(x), x.sharding), factors)
    nnx.update(model, new)
    return model


def new_examples(count=40, seed=0, longest=LENGTH):
    """The second half of each is its answer."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(4, longest + 1, count)
    draw = lambda n: rng.integers(4, WORDS, n, dtype=np.int32)
    return [Example(draw(n), np.arange(n) >= n // 2) for n in sizes]


def new_tx(optimizer="lora", steps=STEPS):
    options = {"max_grad_norm": 1.0, "pair_options": {"alpha": ALPHA}}
    return new_optimizer(optimizer, schedule(3e-2, steps, 0.2), **options)


def tune(folder, fsdp=1, tp=1, *, optimizer="lora", save_every=2, accumulate=2):
    """A run from its last checkpoint on, and what is asked of it then."""
    spec, mesh = read_spec(folder), new_mesh(fsdp, tp)
    model, losses = new_model(spec, mesh), {}
    training.fit(
        spec, model, new_tx(optimizer), new_examples(), mesh=mesh, steps=STEPS,
        batch=BATCH, length=LENGTH, seed=0, packing=True, accumulate=accumulate,
        folder=folder / "checkpoints", save_every=save_every, settings={"seed": 0},
        report=lambda step, metrics: losses.update({step: metrics["loss"]}),
    )  # fmt: skip
    assert checkpoints.check(folder / "checkpoints", {"seed": 0}) == STEPS
    others = new_examples(7, seed=1)
    measure = evaluation.perplexity(spec, others, mesh=mesh, batch=4, length=LENGTH)
    asked = [Question(prompt, "") for prompt in PROMPTS]
    options = {"kind": "exact", "mesh": mesh, "tokens": 5, "batch": 4}
    ask = evaluation.answers(spec, Numbers(), asked, **options)
    factors = jax.tree.leaves(nnx.state(model, nnx.LoRAParam))
    whole = lambda x: (
        multihost_utils.process_allgather(x, tiled=True)
        if jax.process_count() > 1
        else x
    )
    return Tuned(
        losses, [np.asarray(whole(x)) for x in factors], measure(model).loss,
        ask(model).texts,
    )  # fmt: skip


def write(tuned, path):
    arrays = {str(i): x for i, x in enumerate(tuned.factors)}
    steps, losses = list(tuned.losses), list(tuned.losses.values())
    np.savez(
        path, steps=steps, losses=losses, validation=tuned.validation,
        texts=tuned.texts, **arrays,
    )  # fmt: skip


def read(path):
    with np.load(path) as found:
        steps, losses = found["steps"].tolist(), found["losses"].tolist()
        factors = [found[str(i)] for i in range(len(found.files) - 4)]
        losses = dict(zip(steps, losses, strict=True))
        texts = found["texts"].tolist()
        return Tuned(losses, factors, float(found["validation"]), texts)


def kill_at(event, left):
    """SIGKILL for this process when a step begins, or a save renames, so many times."""

    def count(*_):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    if event == "step":
        plain = training.put
        training.put = lambda *args: (count(), plain(*args))[1]
        return

    def audit(name, args):
        if name == "os.rename" and "orbax-checkpoint-tmp" in str(args[0]):
            count()

    if event == "rename":
        sys.addaudithook(audit)


def main(asked: dict[str, Any]) -> None:
    if "port" in asked:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{asked['port']}", 2, asked["process"])
    if "kill" in asked:
        kill_at(*asked["kill"])
    folder = Path(asked["folder"])
    tuned = tune(folder, asked["fsdp"], asked["tp"])
    write(tuned, folder / f"tuned{asked.get('process', 0)}.npz")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
