"""Kinds of adapters beyond plain linear layers, through PEFT's files and its models."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lorapro_jax.peft import load_peft_adapter, save_peft_adapter
from tests.support import tiny_llama
from tests.support.peft_files import CONFIG, WEIGHTS, read
from tests.support.tiny_llama import HIDDEN, KV_HEADS, LAYERS, SIZE, WIDTH, WORDS
from tests.support.torch_models import outputs_of, seeded

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
save_file = pytest.importorskip("safetensors.torch").save_file

TEXT = np.random.default_rng(0).integers(0, WORDS, (2, 9))
TOLERANCE = 2e-5  # as in `test_peft_torch.py`
AGAIN = 1e-6  # the same computation in JAX, on what came back
SIDE_BY_SIDE = {
    "layers/attn/kv_einsum": (
        ["model.layers.{}.self_attn.k_proj", "model.layers.{}.self_attn.v_proj"],
        2,
    ),
    "layers/mlp/gating_einsum": (
        ["model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"],
        2,
    ),
}


def torch_model(kind="LlamaForCausalLM", **options):
    config = transformers.LlamaConfig(**tiny_llama.CONFIG, pad_token_id=0, **options)
    return seeded(lambda: getattr(transformers, kind)(config))


def torch_logits(model):
    return outputs_of(model, TEXT)


def adapted(folder, **options):
    return peft.PeftModel.from_pretrained(torch_model(**options), folder)


def trained(model, seed=1):
    """A model of PEFT with all that trains drawn at random."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.copy_(0.3 * torch.randn_like(weight))
    return model


def distance(got, want):
    return np.abs(got - want).max() / np.abs(want).max()


def draw(*shape, seed):
    x = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(0.3 * x, jnp.float32)


def einsums(rank=4):
    """Gemma's pairs of two kernels, with stacked layers."""
    kv = {
        "w_lora_a": draw(LAYERS, WIDTH, rank, seed=1),
        "w_lora_b": draw(LAYERS, rank, 2, KV_HEADS, SIZE, seed=2),
    }
    gating = {
        "w_lora_a": draw(LAYERS, WIDTH, rank, seed=3),
        "w_lora_b": draw(LAYERS, rank, 2, HIDDEN, seed=4),
    }
    return {"layers": {"attn": {"kv_einsum": kv}, "mlp": {"gating_einsum": gating}}}


def einsum_logits(tree, scale):
    """Those of the JAX model, with the two kernels of each einsum apart."""
    kv = tree["layers"]["attn"]["kv_einsum"]
    gating = tree["layers"]["mlp"]["gating_einsum"]
    of = lambda pair, i: {
        "lora_a": pair["w_lora_a"], "lora_b": pair["w_lora_b"][:, :, i]
    }  # fmt: skip
    factors = {
        "attn": {"k": of(kv, 0), "v": of(kv, 1)},
        "mlp": {"gate": of(gating, 0), "up": of(gating, 1)},
    }
    scales = dict.fromkeys(("k", "v", "gate", "up"), scale)
    weights = tiny_llama.weights_of(torch_model())
    logits = jax.jit(tiny_llama.logits)(weights, {"layers": factors}, scales, TEXT)
    return np.asarray(logits)


def test_one_pair_of_two_kernels_is_two_modules_in_pytorch(tmp_path):
    """Gemma's `kv_einsum` and `gating_einsum`."""
    tree, options = einsums(), {"alpha": 6.0, "module_names": SIDE_BY_SIDE}
    save_peft_adapter(tmp_path, tree, **options)

    want = einsum_logits(tree, 1.5)
    assert distance(torch_logits(adapted(tmp_path)), want) < TOLERANCE
    # Negative controls: the adapters matter, and so does which kernel is which.
    assert distance(torch_logits(torch_model()), want) > 1e-2
    swapped = {key: (names[::-1], x) for key, (names, x) in SIDE_BY_SIDE.items()}
    save_peft_adapter(tmp_path, tree, alpha=6.0, module_names=swapped)
    assert distance(torch_logits(adapted(tmp_path)), want) > 1e-2

    save_peft_adapter(tmp_path, tree, **options)
    back = load_peft_adapter(tmp_path, jax.tree.map(jnp.zeros_like, tree), **options)
    assert distance(einsum_logits(back, 1.5), want) < AGAIN


def test_two_modules_that_peft_trained_are_one_pair_of_summed_rank(tmp_path):
    """k_proj and v_proj, gate_proj and up_proj, with an A, a rank and an alpha each."""
    config = peft.LoraConfig(
        r=3, lora_alpha=8, rank_pattern={"v_proj": 5, "up_proj": 5},
        alpha_pattern={"v_proj": 2},
        target_modules=["k_proj", "v_proj", "gate_proj", "up_proj"],
    )  # fmt: skip
    model = trained(peft.get_peft_model(torch_model(), config))
    model.save_pretrained(tmp_path)
    options = {"scale": 1.5, "module_names": SIDE_BY_SIDE}

    back = load_peft_adapter(tmp_path, einsums(8), **options)

    want = torch_logits(model.eval())
    assert distance(einsum_logits(back, 1.5), want) < TOLERANCE
    assert distance(torch_logits(torch_model()), want) > 1e-2  # control
    with pytest.raises(ValueError, match=r"an A each .* rank 3 \+ 5 = 8, here 4"):
        load_peft_adapter(tmp_path, einsums(4), **options)


def test_a_file_of_one_rank_and_scale_gives_the_same_outputs(tmp_path):
    """Mixed ranks and scales, by patterns and with `uniform=True`."""
    ranks = {"q": 5, "k": 5, "down": 16}
    tree = tiny_llama.adapters(ranks, seed=1)
    options = {"alpha": 6.0, "module_names": tiny_llama.MODULES}
    scales = {name: 6.0 / rank for name, rank in ranks.items()}
    weights = tiny_llama.weights_of(torch_model())
    want = np.asarray(jax.jit(tiny_llama.logits)(weights, tree, scales, TEXT))

    save_peft_adapter(tmp_path, tree, uniform=True, **options)

    assert distance(torch_logits(adapted(tmp_path)), want) < TOLERANCE
    # Without patterns in the file, as vLLM reads it: one rank, one alpha.
    _, config = read(tmp_path)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert (config["r"], config["lora_alpha"]) == (16, 19.2)
    wide = jax.eval_shape(lambda: tiny_llama.adapters(dict.fromkeys(ranks, 16), seed=0))
    names = {"module_names": tiny_llama.MODULES}
    of_layers = {f"/{name}/": scale for name, scale in scales.items()}
    back = load_peft_adapter(tmp_path, wide, scale=of_layers, **names)
    again = jax.jit(tiny_llama.logits)(weights, back, scales, TEXT)
    assert distance(np.asarray(again), want) < AGAIN


HEAD = {
    "score/kernel": "score.weight",
    "layers/([qv])/bias": r"model.layers.{}.self_attn.\1_proj.bias",
}
CLASSIFIER = {
    "kind": "LlamaForSequenceClassification", "num_labels": 3, "attention_bias": True
}  # fmt: skip
ATTENTION = {"layers/([qv])": r"model.layers.{}.self_attn.\1_proj"}


def with_head(seed=5):
    outputs = {"q": WIDTH, "v": KV_HEADS * SIZE}
    layers = {
        name: {
            "bias": draw(LAYERS, size, seed=seed),
            "lora_a": draw(LAYERS, WIDTH, 4, seed=seed + 1),
            "lora_b": draw(LAYERS, 4, size, seed=seed + 2),
        }
        for name, size in outputs.items()
    }
    return {"layers": layers, "score": {"kernel": draw(WIDTH, 3, seed=seed + 3)}}


def with_dense_head(tree, scale):
    """The classifier with the tree's head and biases, and s A B on its weights."""
    model = torch_model(**CLASSIFIER)
    weights = dict(model.named_parameters())
    put = lambda x: torch.from_numpy(np.array(x))
    with torch.no_grad():
        weights["score.weight"].copy_(put(tree["score"]["kernel"].T))
        for name, layer in tree["layers"].items():
            dense = np.einsum("lir,lro->loi", layer["lora_a"], layer["lora_b"])
            for i in range(LAYERS):
                module = f"model.layers.{i}.self_attn.{name}_proj"
                weights[f"{module}.bias"].copy_(put(layer["bias"][i]))
                weights[f"{module}.weight"].add_(put(scale * dense[i]))
    return model


def test_a_head_and_biases_go_out_with_the_factors(tmp_path):
    tree = with_head()
    options = {"alpha": 6.0, "module_names": ATTENTION, "extra": HEAD}
    config = {"task_type": "SEQ_CLS"}
    save_peft_adapter(tmp_path, tree, config=config, **options)

    got = torch_logits(adapted(tmp_path, **CLASSIFIER))
    want = torch_logits(with_dense_head(tree, 1.5))
    assert distance(got, want) < TOLERANCE
    # Negative controls: without the biases, and without the head.
    for left_out in HEAD:
        some = {key: name for key, name in HEAD.items() if key != left_out}
        save_peft_adapter(tmp_path, tree, **options | {"extra": some})
        other = torch_logits(adapted(tmp_path, **CLASSIFIER))
        assert distance(other, want) > 1e-2

    save_peft_adapter(tmp_path, tree, config=config, **options)
    back = load_peft_adapter(tmp_path, jax.tree.map(jnp.zeros_like, tree), **options)
    for new, old in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
        np.testing.assert_array_equal(new, old)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_a_head_and_biases_that_peft_trained_come_in(bias, tmp_path):
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], bias=bias,
        task_type="SEQ_CLS", modules_to_save=["score"],
    )  # fmt: skip
    model = trained(peft.get_peft_model(torch_model(**CLASSIFIER), config))
    model.save_pretrained(tmp_path)
    options = {"alpha": 6.0, "module_names": ATTENTION}
    template = jax.tree.map(jnp.zeros_like, with_head())
    with pytest.raises(ValueError, match=r"`extra=` takes weights that are no factors"):
        load_peft_adapter(tmp_path, template, **options)
    beside = {"ignore": r"[ko]_proj.*bias"} if bias == "all" else {}

    back = load_peft_adapter(tmp_path, template, extra=HEAD, **options, **beside)

    dense = with_dense_head(back, 1.5)
    if beside:  # k and o have no place in the tree
        weights = dict(dense.named_parameters())
        for name, x in model.named_parameters():
            if name.endswith(("k_proj.bias", "o_proj.bias")):
                weights[name.removeprefix("base_model.model.")].data.copy_(x)
    assert distance(torch_logits(dense), torch_logits(model.eval())) < TOLERANCE


def plain_adapter(**options):
    config = peft.LoraConfig(
        r=5, lora_alpha=7.5, target_modules=["q_proj", "v_proj"], **options
    )
    return peft.get_peft_model(torch_model(), config)


def llama_factors():
    return jax.eval_shape(lambda: tiny_llama.adapters({"q": 5, "v": 5}, seed=0))


def written_otherwise(model, folder, rename=lambda key: key, dtype=None):
    """The factors of a state dict, which another program wrote."""
    model.peft_config["default"].save_pretrained(folder)
    tensors = {
        rename(key): (x if dtype is None else x.to(dtype)).contiguous()
        for key, x in model.state_dict().items()
        if "lora_" in key
    }
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key,  # with the adapter's name
        lambda key: key.removeprefix("base_model.model."),
        lambda key: key.removeprefix("base_model.model.").replace(".default", ""),
        lambda key: f"module.{key}",
        lambda key: key.removesuffix(".weight"),
    ],
)
def test_keys_of_other_writers_are_read(rename, tmp_path):
    model = trained(plain_adapter())
    written_otherwise(model, tmp_path, rename)
    back = load_peft_adapter(
        tmp_path, llama_factors(), scale=1.5, module_names=tiny_llama.MODULES
    )
    weights = tiny_llama.weights_of(torch_model())
    got = tiny_llama.logits(weights, back, {"q": 1.5, "v": 1.5}, TEXT)
    assert distance(np.asarray(got), torch_logits(model.eval())) < TOLERANCE


def test_one_of_several_adapters_is_read(tmp_path):
    model = trained(plain_adapter())
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    trained(model, seed=2)
    written_otherwise(model, tmp_path)
    options = {"scale": 1.5, "module_names": tiny_llama.MODULES}
    with pytest.raises(ValueError, match=r"adapters \['default', 'other'\].*`adapter="):
        load_peft_adapter(tmp_path, llama_factors(), **options)
    weights, outputs = tiny_llama.weights_of(torch_model()), {}
    for name in ("default", "other"):
        back = load_peft_adapter(tmp_path, llama_factors(), adapter=name, **options)
        got = tiny_llama.logits(weights, back, {"q": 1.5, "v": 1.5}, TEXT)
        model.set_adapter(name)
        outputs[name] = torch_logits(model.eval())
        assert distance(np.asarray(got), outputs[name]) < TOLERANCE
    assert distance(outputs["default"], outputs["other"]) > 1e-2  # control
    with pytest.raises(ValueError, match=r"\['default', 'other'\], not `adapter='x'`"):
        load_peft_adapter(tmp_path, llama_factors(), adapter="x", **options)


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
def test_tensors_of_8_bits_are_read(kind, tmp_path):
    model, dtype = trained(plain_adapter()), getattr(torch, kind)
    written_otherwise(model, tmp_path, dtype=dtype)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "lora_" in name:
                x.copy_(x.to(dtype).float())
    back = load_peft_adapter(
        tmp_path, llama_factors(), scale=1.5, module_names=tiny_llama.MODULES
    )
    weights = tiny_llama.weights_of(torch_model())
    got = tiny_llama.logits(weights, back, {"q": 1.5, "v": 1.5}, TEXT)
    assert distance(np.asarray(got), torch_logits(model.eval())) < TOLERANCE


# What is more than factors: each makes PEFT's outputs others than those of the factors.
MORE = {
    "DoRA": ({"use_dora": True}, "`use_dora`", "magnitude_vector"),
    "bias of B": ({"lora_bias": True}, "`lora_bias`", r"lora_B\.bias"),
    "OLoRA": ({"init_lora_weights": "OLoRA"}, "changes the base weights", None),
    "PiSSA": ({"init_lora_weights": "pissa"}, "changes the base weights", None),
}
if hasattr(peft, "LoraConfig") and hasattr(peft.tuners.lora.config, "KasaConfig"):
    kasa = peft.tuners.lora.config.KasaConfig()
    MORE["KaSA"] = ({"kasa_config": kasa}, "`kasa_config`", "lora_diag")


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape")
@pytest.mark.parametrize("kind", MORE)
def test_what_is_more_than_factors_is_refused(kind, tmp_path):
    """With its option; and without, where it shows in the file."""
    options, by_option, by_key = MORE[kind]
    model = trained(plain_adapter(**options))
    model.save_pretrained(tmp_path)
    load = lambda **options: load_peft_adapter(
        tmp_path, llama_factors(), scale=1.5, module_names=tiny_llama.MODULES, **options
    )
    for ignore in (None, "lora_(?!A|B.weight)", "bias"):
        with pytest.raises(ValueError, match=by_option):
            load(ignore=ignore)

    tensors, config = read(tmp_path)
    plain = {"use_dora": False, "lora_bias": False, "kasa_config": None}
    plain |= {"init_lora_weights": True}
    (tmp_path / CONFIG).write_text(json.dumps(config | plain))
    if by_key:
        for ignore in (None, by_key):
            with pytest.raises(ValueError, match=f"more than a factor: `.*{by_key}"):
                load(ignore=ignore)
        kept = {key: x for key, x in tensors.items() if "lora_A.w" in key or (
            "lora_B.w" in key)}  # fmt: skip
        safetensors.numpy.save_file(kept, tmp_path / WEIGHTS)
    back = load()
    # What would have been lost.
    weights = tiny_llama.weights_of(torch_model())
    got = tiny_llama.logits(weights, back, {"q": 1.5, "v": 1.5}, TEXT)
    assert distance(np.asarray(got), torch_logits(model.eval())) > 1e-2


def test_names_are_checked_against_the_base_model(tmp_path):
    """By its configuration, its folder, and the names of its weights."""
    model = torch_model()
    model.save_pretrained(tmp_path / "base")
    tree = tiny_llama.adapters({"q": 5, "down": 5}, seed=1)
    wrong = {"layers/attn/q": "model.layers.{}.attn.q_proj", **tiny_llama.MODULES}
    for base in (
        tmp_path / "base",
        tmp_path / "base" / "config.json",
        str(tmp_path / "base"),
        list(model.state_dict()),
    ):
        options = {"alpha": 6.0, "model": base}
        names = tiny_llama.MODULES
        save_peft_adapter(tmp_path / "good", tree, module_names=names, **options)
        with pytest.raises(
            ValueError, match=r"layers\.0\.attn\.q_proj'.*does not have"
        ):
            save_peft_adapter(tmp_path / "bad", tree, module_names=wrong, **options)
    assert not (tmp_path / "bad").exists()
    plain = torch_logits(torch_model())
    assert distance(torch_logits(adapted(tmp_path / "good")), plain) > 1e-2
