"""One model in JAX and in PyTorch, with adapters that went through PEFT's files."""

import dataclasses
import json
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorapro_jax import estimate_gradients, initialize_adapters, lorapro
from lorapro_jax.initializers import lora_ga, pissa
from lorapro_jax.peft import load_peft_adapter, save_peft_adapter
from tests.support import tiny_llama
from tests.support.torch_models import draw_factors, outputs_of, seeded

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TEXT = np.random.default_rng(0).integers(0, tiny_llama.WORDS, (2, 9))
# Of the largest logit: some 300 roundings of float32 through layers, norms and softmax,
# in another order on each side; transformers 5.24 came to 1.2e-5.
TOLERANCE = 2e-5
RANKS = {"q": 5, "k": 5, "v": 3, "o": 5, "gate": 5, "down": 3}  # none on `up`
ALPHA = 6.0


def torch_model():
    """A `LlamaForCausalLM` with random weights, norms included."""
    config = transformers.LlamaConfig(**tiny_llama.CONFIG)
    return seeded(lambda: transformers.LlamaForCausalLM(config))


def torch_logits(model):
    return outputs_of(model, TEXT)


def jax_logits(factors, scales):
    weights = tiny_llama.weights_of(torch_model())
    return np.asarray(jax.jit(tiny_llama.logits)(weights, factors, scales, TEXT))


def distance(got, want):
    return np.abs(got - want).max() / np.abs(want).max()


def test_base_model_is_the_same_in_both():
    """The premise of all others."""
    nothing = {"layers": {"attn": {}, "mlp": {}}}
    assert distance(jax_logits(nothing, {}), torch_logits(torch_model())) < TOLERANCE


@pytest.mark.parametrize("rslora", [False, True])
def test_exported_adapter_gives_the_same_outputs_in_pytorch(rslora, tmp_path):
    factors = tiny_llama.adapters(RANKS, seed=1)
    divisor = math.sqrt if rslora else float
    scales = {name: ALPHA / divisor(rank) for name, rank in RANKS.items()}

    save_peft_adapter(
        tmp_path, factors, alpha=ALPHA, rslora=rslora, module_names=tiny_llama.MODULES
    )
    adapted = peft.PeftModel.from_pretrained(torch_model(), tmp_path)

    want = torch_logits(adapted)
    assert distance(jax_logits(factors, scales), want) < TOLERANCE
    # Negative controls: the adapters matter, and so does the scale of one kernel.
    assert distance(torch_logits(torch_model()), want) > 1e-2
    wrong = {**scales, "v": scales["v"] * 1.01}
    assert distance(jax_logits(factors, wrong), want) > 3e-5


def test_peft_finds_every_entry_of_an_exported_file(tmp_path):
    """No weight of the file is left over, and none of the model's is missing."""
    factors = tiny_llama.adapters(RANKS, seed=1)
    save_peft_adapter(tmp_path, factors, alpha=ALPHA, module_names=tiny_llama.MODULES)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    model = peft.get_peft_model(torch_model(), config)
    result = peft.set_peft_model_state_dict(
        model, peft.utils.load_peft_weights(tmp_path, device="cpu")
    )
    assert not result.unexpected_keys
    assert not [name for name in result.missing_keys if "lora_" in name]


@pytest.mark.parametrize("rslora", [False, True])
def test_adapter_saved_by_peft_gives_the_same_outputs_in_jax(rslora, tmp_path):
    """Ranks and alphas by pattern, and an alpha that differs within a stack."""
    config = peft.LoraConfig(
        r=5, lora_alpha=8, use_rslora=rslora,
        target_modules=[f"{name}_proj" for name in RANKS],
        rank_pattern={"v_proj": 3, r".*\.down_proj": 3},
        alpha_pattern={"layers.1.self_attn.q_proj": 2, "down_proj": 5},
    )  # fmt: skip
    model = peft.get_peft_model(torch_model(), config)
    draw_factors(model)
    model.save_pretrained(tmp_path)
    template = jax.eval_shape(lambda: tiny_llama.adapters(RANKS, seed=0))

    # The JAX model multiplies by 2 everywhere, whatever the file says.
    factors = load_peft_adapter(
        tmp_path, template, scale=2.0, module_names=tiny_llama.MODULES
    )

    want = torch_logits(model.eval())
    scales = dict.fromkeys(RANKS, 2.0)
    assert distance(jax_logits(factors, scales), want) < TOLERANCE
    assert distance(torch_logits(torch_model()), want) > 1e-2
    # Negative control: one layer of one stack in another order.
    q = factors["layers"]["attn"]["q"]
    q["lora_b"] = q["lora_b"][::-1]
    assert distance(jax_logits(factors, scales), want) > 1e-3


def logits_of(tree, weights):
    """With the kernels that lie beside the factors, at the s of rsLoRA."""
    pairs = tree["layers"]["attn"] | tree["layers"]["mlp"]
    kernels = {name: pair["kernel"] for name, pair in pairs.items()}
    weights = weights | {"layers": weights["layers"] | kernels}
    scales = {name: ALPHA / math.sqrt(rank) for name, rank in RANKS.items()}
    return tiny_llama.logits(weights, tree, scales, TEXT)


@pytest.mark.parametrize("method", [lora_ga(), pissa()], ids=lambda x: x.name)
def test_adapter_of_changed_weights_works_on_the_original_ones(method, tmp_path):
    """LoRA-GA or PiSSA, LoRA-Pro's steps, and PEFT on the model as it was."""
    weights = jax.tree.map(jnp.asarray, tiny_llama.weights_of(torch_model()))
    tree = tiny_llama.adapters(RANKS, seed=1)
    for name in RANKS:
        pair = tree["layers"][tiny_llama.block_of(name)][name]
        pair["lora_b"] = jnp.zeros_like(pair["lora_b"])
        pair["kernel"] = weights["layers"][name]
    options = {"alpha": ALPHA, "rslora": True}

    def loss(tree, text):
        logits, labels = logits_of(tree, weights)[:, :-1], text[:, 1:]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    gradients = estimate_gradients(loss, tree, [TEXT], progress=False)
    initial = initialize_adapters(
        method, tree, gradients, key=jax.random.key(0), **options
    )
    assert (
        distance(logits_of(initial, weights), torch_logits(torch_model())) < TOLERANCE
    )

    def label(path, _):
        return "frozen" if path[-1].key == "kernel" else "lora"

    labels = jax.tree_util.tree_map_with_path(label, tree)
    steps = optax.chain(lorapro(**options), optax.adamw(3e-3))
    groups = {"lora": steps, "frozen": optax.set_to_zero()}
    tx = optax.partition(groups, labels)

    @jax.jit
    def train_step(tree, state):
        value, grads = jax.value_and_grad(loss)(tree, TEXT)
        updates, state = tx.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state, value

    after, state, losses = initial, tx.init(initial), []
    for _ in range(10):
        after, state, value = train_step(after, state)
        losses.append(value)
    assert losses[-1] < 0.9 * losses[0]

    options["module_names"] = tiny_llama.MODULES
    save_peft_adapter(tmp_path / "with", after, initial=initial, **options)
    save_peft_adapter(tmp_path / "without", after, **options)

    want = np.asarray(logits_of(after, weights))
    adapted = lambda folder: torch_logits(
        peft.PeftModel.from_pretrained(torch_model(), tmp_path / folder)
    )
    assert distance(adapted("with"), want) < TOLERANCE
    # Negative controls: training moved the model, and the start counts.
    assert distance(torch_logits(torch_model()), want) > 1e-2
    assert distance(adapted("without"), want) > 1e-2


def test_bfloat16_survives_the_way_through_pytorch(tmp_path):
    factors = tiny_llama.adapters(RANKS, seed=1, dtype=jnp.bfloat16)
    options = {"alpha": ALPHA, "module_names": tiny_llama.MODULES}
    save_peft_adapter(tmp_path / "out", factors, **options)
    model = peft.PeftModel.from_pretrained(
        torch_model().bfloat16(), tmp_path / "out", autocast_adapter_dtype=False
    )
    kinds = {x.dtype for name, x in model.named_parameters() if "lora_" in name}
    assert kinds == {torch.bfloat16}
    model.save_pretrained(tmp_path / "back")

    back = load_peft_adapter(tmp_path / "back", factors, **options)

    for new, old in zip(jax.tree.leaves(back), jax.tree.leaves(factors), strict=True):
        assert new.dtype == old.dtype == jnp.bfloat16
        np.testing.assert_array_equal(new, old)


def test_configuration_has_no_entry_that_peft_does_not_know(tmp_path):
    factors = tiny_llama.adapters(RANKS, seed=1)
    extra = {"task_type": "CAUSAL_LM", "base_model_name_or_path": "tiny"}
    save_peft_adapter(
        tmp_path, factors, alpha=ALPHA, module_names=tiny_llama.MODULES, config=extra
    )
    config = peft.LoraConfig.from_pretrained(tmp_path)
    assert (config.task_type, config.base_model_name_or_path) == tuple(extra.values())
    saved = set(json.loads((tmp_path / "adapter_config.json").read_text()))
    assert saved <= {field.name for field in dataclasses.fields(peft.LoraConfig)}


Module: Any = torch.nn.Module  # for type checkers where PyTorch is not installed


class Pictures(Module):
    """A convolution of embedded words: the two layers whose factors are special."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = torch.nn.Embedding(11, 3)
        self.conv = torch.nn.Conv2d(3, 5, (2, 3), bias=False)

    def forward(self, text):
        return self.conv(self.words(text).permute(0, 3, 1, 2))


def test_convolutions_and_embeddings_give_the_same_outputs_in_pytorch(tmp_path):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    factors = {
        "words": {"lora_embeddings_a": draw(11, 2), "lora_embeddings_b": draw(2, 3)},
        "conv": {"kernel_lora_a": draw(2, 3, 3, 4), "kernel_lora_b": draw(4, 5)},
    }
    save_peft_adapter(tmp_path, factors, scale=2.0, conv="conv")
    base, text = Pictures(), rng.integers(0, 11, (2, 5, 6))
    adapted = peft.PeftModel.from_pretrained(Pictures(), tmp_path)
    with torch.no_grad():
        want, plain = (x(torch.from_numpy(text)).numpy() for x in (adapted, base))

    words, conv = factors["words"].values(), factors["conv"].values()
    table = base.words.weight.detach().numpy() + 2.0 * jnp.einsum("vr,rd->vd", *words)
    kernel = base.conv.weight.detach().numpy() + 2.0 * jnp.einsum(
        "hwcr,rf->fchw", *conv
    )
    got = jax.lax.conv_general_dilated(
        jnp.asarray(table)[text], kernel, (1, 1), "VALID",
        dimension_numbers=("NHWC", "OIHW", "NCHW"), precision="highest",
    )  # fmt: skip

    assert distance(np.asarray(got), want) < TOLERANCE
    assert distance(plain, want) > 1e-2  # negative control
    chex.assert_trees_all_equal(
        load_peft_adapter(tmp_path, factors, scale=2.0), factors
    )
