"""Whether PyTorch computes from the exported folders what the model here computes."""

import importlib.util
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.finetune_llm import models


def can_compare() -> bool:
    """Whether torch, transformers and PEFT are installed."""
    names = "torch", "transformers", "peft"
    return all(importlib.util.find_spec(name) for name in names)


def torch_logits(base: Path, tokens: np.ndarray, adapter: Path | None = None) -> Any:
    """Logits `(b, t, words)` of a Hugging Face folder, with a PEFT folder or without.

    Args:
      base: The model's folder.
      tokens: `(b, t)`, without padding.
      adapter: The PEFT folder.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(base), dtype=torch.float32
    )
    if adapter is not None:
        import peft

        model = peft.PeftModel.from_pretrained(model, str(adapter))
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(tokens).long()).logits.numpy()


def logits_of(spec: models.Spec, model: nnx.Module, tokens: np.ndarray) -> np.ndarray:
    """The same from the model here."""
    rows, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
    mask = jnp.broadcast_to(
        jnp.tril(jnp.ones((length,) * 2, bool)), (rows,) + 2 * (length,)
    )
    run = nnx.jit(
        lambda model, tokens: models.apply(spec, model, tokens, positions, mask)
    )
    return np.asarray(run(model, jnp.asarray(tokens, jnp.int32)))


def differences(
    spec: models.Spec, model: nnx.Module, tokens: np.ndarray, folder: Path
) -> dict[str, float]:
    """The largest difference of logits for each exported folder.

    Args:
      spec: The model's description; its folder is the base of the adapter.
      model: The fine-tuned model.
      tokens: `(b, t)`, without padding.
      folder: With `adapter` and `merged`.
    """
    here = logits_of(spec, model, tokens)
    there = {
        "base and adapter, by PEFT": torch_logits(
            spec.folder, tokens, folder / "adapter"
        ),
        "merged, by transformers": torch_logits(folder / "merged", tokens),
    }
    return {name: float(np.abs(x - here).max()) for name, x in there.items()}
