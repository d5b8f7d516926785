"""Experts that transformers has in one parameter, with adapters through PEFT's files.

What the adapted model in PyTorch computes is compared with the same model without an
adapter, whose parameters were changed by the dense s A B of the JAX tree.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorapro_jax.peft import load_peft_adapter, save_peft_adapter
from tests.support.torch_models import draw_factors, outputs_of, seeded

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

# PEFT 0.21 looks for patterns among modules only, and applies them to parameters too.
pytestmark = pytest.mark.filterwarnings("ignore:The following rank_pattern keys did")

WIDTH, HIDDEN, EXPERTS, LAYERS, WORDS = 16, 12, 4, 2, 40
COMMON = {
    "hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "vocab_size": WORDS, "max_position_embeddings": 32, "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
}  # fmt: skip
TEXT = np.random.default_rng(0).integers(0, WORDS, (2, 9))
TOLERANCE = 1e-5  # of the largest logit: float32 through two layers


def mixtral():
    """Parameters of `(experts, out, in)`."""
    config = transformers.MixtralConfig(**COMMON)
    return transformers.MixtralForCausalLM(config)


def gpt_oss():
    """Parameters of `(experts, in, out)`, and the module says so."""
    kinds = ["full_attention"] * LAYERS
    config = transformers.GptOssConfig(**COMMON, layer_types=kinds)
    return transformers.GptOssForCausalLM(config)


def llama4():
    """Parameters of `(experts, in, out)`, and the module does not say so."""
    config = transformers.Llama4TextConfig(
        **COMMON | {"num_experts_per_tok": 1}, intermediate_size_mlp=HIDDEN,
        moe_layers=[*range(LAYERS)], use_qk_norm=False, pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    return transformers.Llama4ForCausalLM(config)


# The model, its MoE block, whether its parameters have their inputs first, and what
# `target_parameters=` has to say.
MODELS = {
    "mixtral": (mixtral, "mlp", False, ("gate_up_proj", "down_proj")),
    "gpt-oss": (gpt_oss, "mlp", True, ("gate_up_proj", "down_proj")),
    "llama 4": (llama4, "feed_forward", True, ("gate_up_proj.T", "down_proj.T")),
}
SIZES = {"gate_up": (WIDTH, 2 * HIDDEN), "down": (HIDDEN, WIDTH)}


def logits(model):
    return outputs_of(model, TEXT)


def distance(got, want):
    return np.abs(got - want).max() / np.abs(want).max()


def adapters(names, rank=3, seed=1):
    """Stacked layers of experts: `(layers, experts, in, r)`, `(…, r, out)`."""
    rng = np.random.default_rng(seed)
    draw = lambda *x: jnp.asarray(0.3 * rng.standard_normal(x), jnp.float32)
    return {
        "moe": {
            name: {
                "lora_a": draw(LAYERS, EXPERTS, SIZES[name][0], rank),
                "lora_b": draw(LAYERS, EXPERTS, rank, SIZES[name][1]),
            }
            for name in names
        }
    }


def with_dense(model, tree, block, inputs_first, scale):
    """The model with s A B on its parameters."""
    weights = dict(model.named_parameters())
    for name, pair in tree["moe"].items():
        dense = np.einsum("lxir,lxro->lxio", pair["lora_a"], pair["lora_b"])
        for layer in range(LAYERS):
            change = scale * (dense if inputs_first else dense.swapaxes(2, 3))[layer]
            key = f"model.layers.{layer}.{block}.experts.{name}_proj"
            with torch.no_grad():
                weights[key] += torch.from_numpy(change.copy())
    return model


@pytest.mark.parametrize("names", [("gate_up", "down"), ("down",), ("gate_up",)])
@pytest.mark.parametrize("model", MODELS)
def test_experts_give_the_same_outputs_in_pytorch(model, names, tmp_path):
    make, block, inputs_first, parameters = MODELS[model]
    tree, options = adapters(names), {"alpha": 6.0, "target_parameters": parameters}
    template = f"model.layers.{{}}.{block}.experts.\\1_proj"
    options["module_names"] = {"moe/(.*)": template}

    save_peft_adapter(tmp_path, tree, **options)
    adapted = logits(peft.PeftModel.from_pretrained(seeded(make), tmp_path))

    dense = with_dense(seeded(make), tree, block, inputs_first, 2.0)
    assert distance(adapted, logits(dense)) < TOLERANCE
    assert distance(logits(seeded(make)), adapted) > 1e-2  # control

    back = load_peft_adapter(tmp_path, jax.eval_shape(lambda: tree), **options)
    for new, old in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
        np.testing.assert_array_equal(new, old)


@pytest.mark.parametrize("model", MODELS)
def test_an_adapter_that_peft_saved_comes_in(model, tmp_path):
    """With another rank for one of the parameters."""
    make, block, inputs_first, parameters = MODELS[model]
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=[], rank_pattern={"experts.down_proj": 5},
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )  # fmt: skip
    adapted = peft.get_peft_model(seeded(make), config)
    draw_factors(adapted)
    adapted.save_pretrained(tmp_path)
    tree = {"moe": {**adapters(["gate_up"])["moe"], **adapters(["down"], 5)["moe"]}}
    template = f"model.layers.{{}}.{block}.experts.\\1_proj"

    back = load_peft_adapter(
        tmp_path, tree, scale=0.5, target_parameters=parameters,
        module_names={"moe/(.*)": template},
    )  # fmt: skip

    dense = with_dense(seeded(make), back, block, inputs_first, 0.5)
    want = logits(adapted.eval())
    assert distance(logits(dense), want) < TOLERANCE
    # Negative control: the experts in another order.
    pair = back["moe"]["gate_up"]
    pair["lora_b"] = pair["lora_b"][:, ::-1]
    dense = with_dense(seeded(make), back, block, inputs_first, 0.5)
    assert distance(logits(dense), want) > 1e-3
