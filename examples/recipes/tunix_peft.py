"""LoRA-Pro in tunix: `PeftTrainer` with an adapted Llama 3, on bytes of text.

    pip install -e '.[examples,tunix]' && python -m examples.recipes.tunix_peft

The model is tunix's own, made small. It learns the source of Python's standard
library, then its adapters learn English prose; replace both by your weights and data.
"""

import jax
import numpy as np
import optax
import qwix
from flax import nnx
from tunix.models.llama3 import model as llama3
from tunix.sft import utils
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig, TrainingInput

from examples import byte_lm
from lorapro_jax import lorapro_adamw

BATCH, RANK, ALPHA = 16, 4, 8.0
CONFIG = llama3.ModelConfig(
    num_layers=2,
    vocab_size=byte_lm.VOCABULARY,
    embed_dim=64,
    hidden_dim=128,
    num_heads=4,
    head_dim=16,
    num_kv_heads=2,
    rope_theta=10_000,
    norm_eps=1e-5,
)


def new_model(config: llama3.ModelConfig) -> llama3.Llama3:
    """Random weights; tunix leaves those of the MLPs 0, where nothing can be learnt."""
    rngs = nnx.Rngs(0)
    model = llama3.Llama3(config, rngs=rngs)
    for layer in model.layers:
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            init = nnx.initializers.lecun_normal()
            linear.kernel[...] = init(rngs.params(), linear.kernel.shape)
    return model


def add_lora(model: llama3.Llama3) -> llama3.Llama3:
    """Adapters on every projection; the forward pass multiplies by ALPHA / RANK."""
    rule = qwix.LoraProvider(module_path=".*_proj", rank=RANK, alpha=ALPHA)
    inputs = model.get_model_input()
    return qwix.apply_lora_to_model(model, rule, **inputs, rngs=nnx.Rngs(1))


def model_inputs(batch: TrainingInput) -> dict[str, jax.Array]:
    """What tunix's loss passes to the model."""
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": utils.build_positions_from_mask(batch.input_mask),
        "attention_mask": utils.make_causal_attn_mask(batch.input_mask),
    }


def batches(data: byte_lm.Data) -> list[TrainingInput]:
    """All windows of a text once, shuffled."""
    text = np.random.default_rng(0).permutation(np.asarray(data.inputs))
    cut = range(0, len(text) - BATCH + 1, BATCH)
    tokens = [text[i : i + BATCH].astype(np.int32) for i in cut]
    return [TrainingInput(x, np.ones_like(x, bool)) for x in tokens]


def train(
    model: llama3.Llama3,
    optimizer: optax.GradientTransformation,
    task: byte_lm.Task,
    steps: int,
) -> tuple[float, float]:
    """Trains adapters, or a model without them; the test loss before and after."""
    trainer = PeftTrainer(model, optimizer, TrainingConfig(eval_every_n_steps=steps))
    trainer.with_gen_model_input_fn(model_inputs)
    trainer.train(batches(task.train)[:steps], batches(task.test))
    before, after = trainer.metrics_logger.get_metric_history("", "loss", "eval")
    return float(before), float(after)


def main(steps: int = 60) -> tuple[float, float]:
    """Fine-tunes, and returns the test loss before and after."""
    source, prose = byte_lm.load_tasks()
    model = new_model(CONFIG)
    train(model, optax.adamw(3e-3), source, steps=300)
    optimizer = lorapro_adamw(optax.cosine_decay_schedule(1e-2, steps), alpha=ALPHA)
    losses = train(add_lora(model), optimizer, prose, steps)
    print("test loss before {:.3f}, after {:.3f}".format(*losses))
    return losses


if __name__ == "__main__":
    main()
