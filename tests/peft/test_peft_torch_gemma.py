"""Gemma 3 in JAX, by tunix and qwix, and in PyTorch, with one adapter of PEFT's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorapro_jax.peft import load_peft_adapter, save_peft_adapter
from tests.support.torch_models import draw_factors, outputs_of, seeded

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
qwix = pytest.importorskip("qwix")
gemma3 = pytest.importorskip("tunix.models.gemma3.model")
params_safetensors = pytest.importorskip("tunix.models.gemma3.params_safetensors")

# What tunix and qwix still use is deprecated in JAX and Flax.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:tunix.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:qwix.*"),
    pytest.mark.filterwarnings("ignore:'sharding' is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.flax.nnx.State. will be:DeprecationWarning"),
]

WIDTH, HIDDEN, HEADS, KV_HEADS, SIZE, LAYERS, WORDS = 16, 24, 4, 2, 6, 2, 32
TEXT = np.random.default_rng(0).integers(1, WORDS, (2, 9))
TOLERANCE = 1e-5  # of the largest logit: float32 through two layers
AGAIN = 1e-6  # the same computation in JAX, on what came back
ALPHA = 6.0
LAYER = r"layers/(\d+)/"
IN_TORCH = r"model.layers.\1."
NAMES = {
    f"{LAYER}attn/q_einsum": f"{IN_TORCH}self_attn.q_proj",
    f"{LAYER}attn/kv_einsum": (
        [f"{IN_TORCH}self_attn.k_proj", f"{IN_TORCH}self_attn.v_proj"],
        1,
    ),
    f"{LAYER}attn/attn_vec_einsum": f"{IN_TORCH}self_attn.o_proj",
    f"{LAYER}mlp/(.*)": rf"{IN_TORCH}mlp.\2",
}


def torch_model():
    config = transformers.Gemma3TextConfig(
        vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, head_dim=SIZE,
        num_key_value_heads=KV_HEADS, query_pre_attn_scalar=SIZE, sliding_window=16,
        layer_types=["sliding_attention"] * LAYERS, pad_token_id=0,
    )  # fmt: skip
    # Its norms multiply by 1 more than their weights.
    return seeded(lambda: transformers.Gemma3ForCausalLM(config), norms=0.0)


def torch_logits(model):
    return outputs_of(model, TEXT)


def jax_model(folder, rank):
    """tunix's model with the weights of a folder, and adapters of qwix's."""
    config = gemma3.ModelConfig(
        num_layers=LAYERS, num_embed=WORDS, embed_dim=WIDTH, hidden_dim=HIDDEN,
        num_heads=HEADS, head_dim=SIZE, num_kv_heads=KV_HEADS, sliding_window_size=16,
        param_dtype=jnp.float32,
    )  # fmt: skip
    model = params_safetensors.create_model_from_safe_tensors(
        str(folder), config, mesh=None, dtype=jnp.float32
    )
    rule = qwix.LoraProvider(module_path=".*(einsum|_proj)", rank=rank, alpha=ALPHA)
    inputs = model.get_model_input()
    return qwix.apply_lora_to_model(model, rule, **inputs, rngs=nnx.Rngs(1))


def jax_logits(model):
    count, length = TEXT.shape
    positions = jnp.tile(jnp.arange(length), (count, 1))
    mask = jnp.tril(jnp.ones((count, length, length), bool))
    with jax.default_matmul_precision("highest"):
        logits, _ = model(jnp.asarray(TEXT), positions, None, mask)
    return np.asarray(logits)


def distance(got, want):
    return np.abs(got - want).max() / np.abs(want).max()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of the model in PyTorch."""
    folder = tmp_path_factory.mktemp("gemma")
    torch_model().save_pretrained(folder)
    return folder


def test_gemma_of_tunix_and_of_transformers_compute_the_same(base, tmp_path):
    """With adapters on every kernel, also that of keys and values; and back."""
    model, rng = jax_model(base, rank=5), np.random.default_rng(1)
    draw = lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype)
    factors = jax.tree.map(draw, nnx.state(model, nnx.LoRAParam))
    nnx.update(model, factors)
    options = {"alpha": ALPHA, "module_names": NAMES}

    save_peft_adapter(tmp_path, factors, model=base, **options)

    want = jax_logits(model)
    adapted = peft.PeftModel.from_pretrained(torch_model(), tmp_path)
    assert distance(torch_logits(adapted), want) < TOLERANCE
    assert distance(torch_logits(torch_model()), want) > 1e-2  # control
    nnx.update(model, jax.tree.map(jnp.zeros_like, factors))
    assert distance(jax_logits(model), want) > 1e-2  # control
    nnx.update(model, load_peft_adapter(tmp_path, factors, **options))
    assert distance(jax_logits(model), want) < AGAIN


def test_an_adapter_that_peft_trained_on_gemma_comes_in(base, tmp_path):
    """k_proj and v_proj have an A each: rank 3 + 3, and the others get zeros for it."""
    kernels = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
    config = peft.LoraConfig(
        r=3, lora_alpha=ALPHA, target_modules=[*kernels, "down_proj"]
    )
    adapted = peft.get_peft_model(torch_model(), config)
    draw_factors(adapted)
    adapted.save_pretrained(tmp_path)
    model = jax_model(base, rank=6)
    template = nnx.state(model, nnx.LoRAParam)
    options = {"alpha": ALPHA, "module_names": NAMES}

    with pytest.raises(ValueError, match="has rank 3 in the file, here 6"):
        load_peft_adapter(tmp_path, template, **options)
    nnx.update(model, load_peft_adapter(tmp_path, template, resize=True, **options))

    want = torch_logits(adapted.eval())
    assert distance(jax_logits(model), want) < TOLERANCE
    assert distance(torch_logits(torch_model()), want) > 1e-2  # control
