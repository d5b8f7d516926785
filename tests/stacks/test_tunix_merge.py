"""Merged weights of tunix's Qwen3 as a Hugging Face folder, against transformers."""

import warnings

import jax
import numpy as np
import pytest
from flax import nnx

from lorapro_jax import merge_model
from tests.support.deprecations import GLOBAL_NORM, STATE, TUNIX
from tests.support.layouts import distance

pytest.importorskip("tunix")
pytest.importorskip("torch")
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM
from tunix.sft.peft_trainer import TrainingInput

from examples.recipes import tunix_peft

with warnings.catch_warnings():  # Qwen3 imports what is deprecated in JAX
    warnings.simplefilter("ignore", DeprecationWarning)
    from tunix.models.qwen3.params import save_lora_merged_model_as_safetensors

    from examples.recipes import tunix_merge

pytestmark = [
    *TUNIX,
    GLOBAL_NORM,
    STATE,
    pytest.mark.usefixtures("quick_compiles"),
]

TOLERANCE = 1e-5  # two layers in float32, by two frameworks
RANK, ALPHA = tunix_peft.RANK, tunix_peft.ALPHA


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder, and its model with adapters none of which is 0."""
    folder = tmp_path_factory.mktemp("base")
    tunix_merge.new_folder(folder)
    model = tunix_peft.add_lora(tunix_merge.load(folder))
    factors = nnx.state(model, nnx.LoRAParam)
    rng = np.random.default_rng(0)
    draw = lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32)
    nnx.update(model, jax.tree.map(draw, factors))
    return folder, model


TOKENS = np.random.default_rng(1).integers(100, size=(2, 20), dtype=np.int32)


def in_tunix(model):
    inputs = tunix_peft.model_inputs(TrainingInput(TOKENS, np.ones_like(TOKENS, bool)))
    return model(TOKENS, inputs["positions"], None, inputs["attention_mask"])[0]


def in_transformers(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def test_transformers_computes_the_logits_of_the_model_with_adapters(made, tmp_path):
    folder, model = made
    before = in_tunix(model)
    merged = nnx.clone(model)
    merge_model(merged, alpha=ALPHA)
    tunix_merge.write(merged, folder, tmp_path)

    assert distance(in_tunix(merged), before) < TOLERANCE
    assert distance(in_transformers(tmp_path), before) < TOLERANCE
    # Negative control: the adapters change the logits, and so does their scale.
    assert distance(in_transformers(folder), before) > 1e3 * TOLERANCE
    merge_model(other := nnx.clone(model), alpha=1.1 * ALPHA)
    assert distance(in_tunix(other), before) > 1e2 * TOLERANCE


def test_it_writes_what_tunix_saves(made, tmp_path):
    """Entry by entry: tunix merges on its own, from the factors and the base folder."""
    folder, model = made
    merged = nnx.clone(model)
    merge_model(merged, alpha=ALPHA)
    tunix_merge.write(merged, folder, tmp_path / "ours")
    theirs = tmp_path / "theirs"
    save_lora_merged_model_as_safetensors(
        str(folder), str(theirs), model, rank=RANK, alpha=ALPHA
    )

    ours, due = (
        load_file(x / "model.safetensors") for x in (tmp_path / "ours", theirs)
    )
    base = load_file(folder / "model.safetensors")
    assert ours.keys() == due.keys()
    moved = 0
    for name, x in due.items():
        assert distance(ours[name], x) < TOLERANCE, name
        moved += distance(base[name], x) > 1e3 * TOLERANCE
    assert moved == 2 * 7
    assert (tmp_path / "ours" / "config.json").exists()


def test_the_recipe_trains_and_writes(tmp_path):
    assert tunix_merge.main(steps=2, folder=str(tmp_path)) < TOLERANCE
