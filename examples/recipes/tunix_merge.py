"""Merged weights as a Hugging Face folder: tunix's Qwen3, for transformers and vLLM.

    pip install -e '.[examples,torch,tunix]' && python -m examples.recipes.tunix_merge

The adapters learn English prose on a tiny model of random weights; put a folder of
yours, such as that of Qwen3-0.6B, in its place. What is written is this folder with
other kernels, and transformers computes with it what tunix did.
"""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import optax
import torch
from safetensors.flax import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM
from tunix.models.qwen3 import model as qwen3
from tunix.models.qwen3.params import create_model_from_safe_tensors

from examples import byte_lm
from examples.recipes.tunix_peft import ALPHA, add_lora, batches, model_inputs, train
from lorapro_jax import lorapro_adamw, merge_model

MLP = "gate_proj", "up_proj", "down_proj"
ATTENTION = "q_proj", "k_proj", "v_proj", "o_proj"


def new_folder(folder: Path) -> None:
    """In place of a pretrained model, which the hub has in such a folder."""
    config = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    others = {"vocab_size": byte_lm.VOCABULARY, "rope_parameters": {"rope_theta": 1e6}}
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**config, **heads, **others))
    model.save_pretrained(folder)


def load(folder: Path) -> qwen3.Qwen3:
    """The model of a folder in tunix."""
    config = json.loads((folder / "config.json").read_text())
    return create_model_from_safe_tensors(
        str(folder),
        qwen3.ModelConfig(
            num_layers=config["num_hidden_layers"],
            vocab_size=config["vocab_size"],
            embed_dim=config["hidden_size"],
            hidden_dim=config["intermediate_size"],
            num_heads=config["num_attention_heads"],
            head_dim=config["head_dim"],
            num_kv_heads=config["num_key_value_heads"],
            rope_theta=config["rope_parameters"]["rope_theta"],
            norm_eps=config["rms_norm_eps"],
            use_tied_embedding=config["tie_word_embeddings"],
        ),
    )


def write(model: qwen3.Qwen3, source: Path, target: Path) -> None:
    """The folder `source` with the kernels of a merged model; PyTorch's are turned."""
    new = {}
    for i, layer in enumerate(model.layers):
        for x in MLP:
            new[f"model.layers.{i}.mlp.{x}.weight"] = getattr(layer.mlp, x).kernel
        for x in ATTENTION:
            new[f"model.layers.{i}.self_attn.{x}.weight"] = getattr(layer.attn, x).w
    shutil.copytree(source, target, dirs_exist_ok=True)
    for path in source.glob("*.safetensors"):  # large models have several
        tensors = load_file(path)
        for name in new.keys() & tensors:
            old = tensors[name]
            tensors[name] = new[name][...].reshape(-1, len(old)).T.astype(old.dtype)
        save_file(tensors, target / path.name, metadata={"format": "pt"})


def main(steps: int = 60, folder: str = "out/tunix_merge") -> float:
    """Fine-tunes, merges, writes; returns how far transformers' logits are off."""
    with tempfile.TemporaryDirectory() as source:
        new_folder(Path(source))
        model = add_lora(load(Path(source)))
        optimizer = lorapro_adamw(optax.constant_schedule(1e-2), alpha=ALPHA)
        _, prose = byte_lm.load_tasks()
        print("test loss {:.3f}, {:.3f}".format(*train(model, optimizer, prose, steps)))
        batch = batches(prose.test)[0]
        x = model_inputs(batch)
        before, _ = model(batch.input_tokens, x["positions"], None, x["attention_mask"])
        merge_model(model, alpha=ALPHA)
        write(model, Path(source), Path(folder))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        after = loaded(torch.tensor(batch.input_tokens)).logits.numpy()
    error = float(np.abs(after - before).max() / np.abs(after).max())
    print(f"written to {folder}, logits in transformers off by {error:.1e}")
    return error


if __name__ == "__main__":
    main()
