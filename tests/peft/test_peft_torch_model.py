"""Base models of transformers: what PEFT does with a file, against one changed densely.

Each check of `model=` has its remedy followed here, and the model computes what it
should. The negative controls show what PEFT does without.
"""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from lorapro_jax.peft import load_peft_adapter, save_peft_adapter
from tests.support.torch_models import outputs_of, seeded

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
safetensors_torch = pytest.importorskip("safetensors.torch")

TOLERANCE = 5e-6  # of the largest logit: the same program in float32, factors apart
TEXT = torch.from_numpy(np.random.default_rng(0).integers(0, 40, (2, 9)))
BERT = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "vocab_size": 40, "max_position_embeddings": 32,
    "num_labels": 3, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40, "n_positions": 32}
DISTIL = {
    "dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2, "vocab_size": 40,
    "max_position_embeddings": 32, "num_labels": 3,
}  # fmt: skip
LLAMA = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 40,
    "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
MOE = {
    **LLAMA, "moe_intermediate_size": 12, "head_dim": 8, "num_experts": 4,
    "num_experts_per_tok": 2, "mlp_only_layers": [0], "tie_word_embeddings": False,
}  # fmt: skip
ATTENTION = "model.layers.0.self_attn.q_proj"


def model_of(kind, config, **options):
    config = getattr(transformers, f"{config}Config")(**options)
    return seeded(lambda: getattr(transformers, kind)(config))


def logits(model):
    return outputs_of(model, TEXT)


def draw(*shape, seed):
    x = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(0.3 * x, jnp.float32)


def pair(inputs, outputs, seed=0):
    return {
        "lora_a": draw(inputs, 2, seed=seed), "lora_b": draw(2, outputs, seed=seed + 9)
    }  # fmt: skip


def changed(model, factors=(), weights=()):
    """The model with A B on some modules `(in, out)`, and with other weights."""
    with torch.no_grad():
        for name, x in dict(factors).items():
            module = model.get_submodule(name)
            w = np.array(x["lora_a"] @ x["lora_b"])
            as_is = type(module).__name__ in ("Conv1D", "Embedding")
            module.weight += torch.from_numpy(w if as_is else w.T.copy())
        for name, x in dict(weights).items():
            model.get_parameter(name).copy_(torch.from_numpy(np.array(x)))
    return model


def adapted(model, folder):
    with warnings.catch_warnings():  # PEFT's on tied weights, and on what is missing
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, folder).eval()


def distance(got, want):
    got, want = logits(got), logits(want)
    return np.abs(got - want).max() / np.abs(want).max()


def all_of(model, folder):
    """What may be passed for a model, and shows kinds or shapes."""
    model.save_pretrained(folder)
    config = folder / "config.json"
    return [model, model.state_dict(), folder, config, list(model.state_dict())]


# --- Extra weights ---


@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
def test_a_head_of_distilbert_goes_with_the_layer_whose_name_ends_like_it(
    task, tmp_path
):
    make = lambda: model_of(
        "DistilBertForSequenceClassification", "DistilBert", **DISTIL
    )
    q = "distilbert.transformer.layer.0.attention.q_lin"
    tree = {
        "q": pair(16, 16),
        "cls": {"kernel": draw(16, 3, seed=7), "bias": draw(3, seed=8)},
        "pre": {"kernel": draw(16, 16, seed=9), "bias": draw(16, seed=10)},
    }
    head = {"cls/kernel": "classifier.weight", "cls/bias": "classifier.bias"}
    options = {"module_names": {"q": q}, "config": {"task_type": task}}
    for i, model in enumerate(all_of(make(), tmp_path / "base")):
        with pytest.raises(ValueError, match=r"so `pre_classifier`, and wants all"):
            save_peft_adapter(tmp_path / "x", tree, extra=head, model=model, **options)
        pre = {"pre/kernel": "pre_classifier.weight", "pre/bias": "pre_classifier.bias"}
        save_peft_adapter(
            tmp_path / str(i), tree, extra={**head, **pre}, model=model, **options
        )
    # Without the model, the first is written, and PEFT cannot load it.
    save_peft_adapter(tmp_path / "blind", tree, extra=head, **options)
    with pytest.raises(KeyError, match="pre_classifier"):
        adapted(make(), tmp_path / "blind")

    weights = {
        "classifier.weight": tree["cls"]["kernel"].T,
        "classifier.bias": tree["cls"]["bias"],
        "pre_classifier.weight": tree["pre"]["kernel"].T,
        "pre_classifier.bias": tree["pre"]["bias"],
    }
    want = changed(make(), {q: tree["q"]}, weights)
    assert distance(adapted(make(), tmp_path / "0"), want) < TOLERANCE
    assert distance(make(), want) > 1e-2


@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
def test_a_head_of_several_layers_is_loaded_with_its_task(task, tmp_path):
    make = lambda: model_of("RobertaForSequenceClassification", "Roberta", **BERT)
    q = "roberta.encoder.layer.0.attention.self.query"
    tree = {
        "q": pair(16, 16),
        "d": {"kernel": draw(16, 16, seed=7), "bias": draw(16, seed=8)},
        "o": {"kernel": draw(16, 3, seed=9), "bias": draw(3, seed=10)},
    }
    extra = {
        "d/kernel": "classifier.dense.weight", "d/bias": "classifier.dense.bias",
        "o/kernel": "classifier.out_proj.weight", "o/bias": "classifier.out_proj.bias",
    }  # fmt: skip
    options = {"module_names": {"q": q}, "config": {"task_type": task}}
    save_peft_adapter(tmp_path / "x", tree, extra=extra, model=make(), **options)
    weights = {
        name: tree[path[0]][path[2:]].T if "kernel" in path else tree[path[0]]["bias"]
        for path, name in extra.items()
    }
    want = changed(make(), {q: tree["q"]}, weights)
    assert distance(adapted(make(), tmp_path / "x"), want) < TOLERANCE
    assert distance(make(), want) > 1e-2
    if task:  # factors in the head: only without the task
        tree["d"] = pair(16, 16, seed=3)
        names = {"q": q, "d": "classifier.dense"}
        extra = {key: name for key, name in extra.items() if key[0] == "o"}
        with pytest.raises(ValueError, match=r"[Ll]eave `task_type` out"):
            save_peft_adapter(
                tmp_path / "y", tree, extra=extra, **options | {"module_names": names}
            )
        save_peft_adapter(
            tmp_path / "y", tree, extra=extra, module_names=names, model=make()
        )
        weights = {key: x for key, x in weights.items() if "dense" not in key}
        both = {q: tree["q"], "classifier.dense": tree["d"]}
        want = changed(make(), both, weights)
        assert distance(adapted(make(), tmp_path / "y"), want) < TOLERANCE


def test_a_square_kernel_of_conv1d_has_its_orientation(tmp_path):
    make = lambda: model_of("GPT2LMHeadModel", "GPT2", **GPT2)
    q, proj = "transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"
    tree = {
        "q": pair(16, 48),
        "proj": {"kernel": draw(16, 16, seed=9), "bias": draw(16, seed=10)},
    }
    options = {"module_names": {"q": q}}
    plain = {"proj/kernel": f"{proj}.weight", "proj/bias": f"{proj}.bias"}
    turned = plain | {"proj/kernel": f"{proj}.weight.T"}
    kinds = all_of(make(), tmp_path / "base")
    for model in (kinds[0], *kinds[2:4]):
        with pytest.raises(ValueError, match="a Conv1D in PyTorch"):
            save_peft_adapter(tmp_path / "x", tree, extra=plain, model=model, **options)
    for model in kinds:
        save_peft_adapter(tmp_path / "good", tree, extra=turned, model=model, **options)
    weights = {
        f"{proj}.weight": tree["proj"]["kernel"], f"{proj}.bias": tree["proj"]["bias"]
    }  # fmt: skip
    want = changed(make(), {q: tree["q"]}, weights)
    assert distance(adapted(make(), tmp_path / "good"), want) < TOLERANCE
    save_peft_adapter(tmp_path / "bad", tree, extra=plain, **options)  # control
    assert distance(adapted(make(), tmp_path / "bad"), want) > 1e-2


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_a_tied_embedding_goes_out_under_both_names(kind, tmp_path):
    if kind == "GPT2":
        make = lambda: model_of("GPT2LMHeadModel", "GPT2", **GPT2)
        q, names, out = (
            "transformer.h.0.attn.c_attn",
            ("transformer.wte", "lm_head"),
            48,
        )
    else:
        sizes = {**LLAMA, "tie_word_embeddings": True}
        make = lambda: model_of("LlamaForCausalLM", "Llama", **sizes)
        q, names, out = ATTENTION, ("model.embed_tokens", "lm_head"), 16
    names = tuple(f"{name}.weight" for name in names)
    tree = {"q": pair(16, out), "e": {"embedding": draw(40, 16, seed=9)}}
    options = {"module_names": {"q": q}}
    one, both = {"e/embedding": names[0]}, {"e/embedding": names}
    kinds = all_of(make(), tmp_path / "base")
    for model in (kinds[0], *kinds[2:4]):  # the others do not know of ties
        with pytest.raises(ValueError, match=r"which PyTorch ties to \['lm_head"):
            save_peft_adapter(tmp_path / "x", tree, extra=one, model=model, **options)
    for model in kinds:
        save_peft_adapter(tmp_path / "good", tree, extra=both, model=model, **options)
    want = changed(make(), {q: tree["q"]}, {names[0]: tree["e"]["embedding"]})
    assert distance(adapted(make(), tmp_path / "good"), want) < TOLERANCE
    save_peft_adapter(tmp_path / "bad", tree, extra=one, **options)  # control
    assert distance(adapted(make(), tmp_path / "bad"), want) > 1e-2


def test_a_tied_embedding_that_peft_trained_comes_in_as_one_leaf(tmp_path):
    sizes = {**LLAMA, "tie_word_embeddings": True}
    make = lambda: model_of("LlamaForCausalLM", "Llama", **sizes)
    config = peft.LoraConfig(
        r=2, lora_alpha=2, target_modules=[ATTENTION], modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
    )  # fmt: skip
    model = peft.get_peft_model(make(), config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.copy_(0.3 * torch.randn_like(weight))
    model.save_pretrained(tmp_path)
    tree = {"q": pair(16, 16), "e": {"embedding": jnp.zeros((40, 16))}}
    names = ("model.embed_tokens.weight", "lm_head.weight")
    back = load_peft_adapter(
        tmp_path, tree, module_names={"q": ATTENTION}, extra={"e/.*": names}
    )
    dense = changed(make(), {ATTENTION: back["q"]}, {names[0]: back["e"]["embedding"]})
    assert distance(dense, model.eval()) < TOLERANCE
    assert distance(make(), model) > 1e-2


# --- Names and kinds of modules ---


def test_an_embedding_has_to_be_said_to_be_one(tmp_path):
    sizes = {**LLAMA, "tie_word_embeddings": False}
    make = lambda: model_of("LlamaForCausalLM", "Llama", **sizes)
    tree = {"e": pair(40, 16, seed=3), "q": pair(16, 16)}
    options = {"module_names": {"e": "model.embed_tokens", "q": ATTENTION}}
    kinds = all_of(make(), tmp_path / "base")
    for model in (kinds[0], *kinds[2:4]):
        with pytest.raises(ValueError, match=r"an? embedding in PyTorch.*'\^e\$'"):
            save_peft_adapter(tmp_path / "x", tree, model=model, **options)
    for model in kinds:
        save_peft_adapter(
            tmp_path / "good", tree, embedding="^e$", model=model, **options
        )
    want = changed(make(), {"model.embed_tokens": tree["e"], ATTENTION: tree["q"]})
    assert distance(adapted(make(), tmp_path / "good"), want) < TOLERANCE
    save_peft_adapter(tmp_path / "bad", tree, **options)  # control
    assert distance(adapted(make(), tmp_path / "bad"), want) > 1e-2


def test_the_names_of_the_built_model_count_not_those_of_its_file(tmp_path):
    """As the hub's GPT-2, whose file has no `transformer.`"""
    model = model_of("GPT2LMHeadModel", "GPT2", **GPT2)
    base = tmp_path / "base"
    model.save_pretrained(base)
    old = {
        name.removeprefix("transformer."): x.clone()
        for name, x in model.state_dict().items()
        if name != "lm_head.weight"
    }
    safetensors_torch.save_file(old, base / "model.safetensors")
    tree = {"q": pair(16, 48)}
    with pytest.raises(ValueError, match=r"Close to it: \['transformer\.h\.0\.attn"):
        save_peft_adapter(
            tmp_path / "x", tree, module_names={"q": "h.0.attn.c_attn"}, model=base
        )
    q = "transformer.h.0.attn.c_attn"
    save_peft_adapter(tmp_path / "good", tree, module_names={"q": q}, model=base)
    make = lambda: transformers.GPT2LMHeadModel.from_pretrained(base).eval()
    want = changed(make(), {q: tree["q"]})
    assert distance(adapted(make(), tmp_path / "good"), want) < TOLERANCE
    assert distance(make(), want) > 1e-2


def test_dense_layers_of_a_moe_are_adapted_as_parameters(tmp_path):
    make = lambda: model_of("Qwen3MoeForCausalLM", "Qwen3Moe", **MOE)
    down, up, q = "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj", (
        "model.layers.1.self_attn.q_proj"
    )  # fmt: skip
    tree = {"q": pair(16, 16), "d": pair(24, 16, seed=4), "u": pair(16, 24, seed=6)}
    names = {"q": q, "d": down, "u": up}
    for model in all_of(make(), tmp_path / "base")[:4:2]:
        with pytest.raises(ValueError, match="'qwen3_moe', PEFT on transformers 5"):
            save_peft_adapter(tmp_path / "x", tree, module_names=names, model=model)
    options = {
        "module_names": names | {"d": f"{down}.weight", "u": f"{up}.weight"},
        "target_parameters": ("down_proj.weight", "up_proj.weight"),
    }
    save_peft_adapter(tmp_path / "good", tree, model=make(), **options)
    want = changed(make(), {q: tree["q"], down: tree["d"], up: tree["u"]})
    assert distance(adapted(make(), tmp_path / "good"), want) < TOLERANCE
    if int(transformers.__version__.split(".")[0]) >= 5:  # control
        del tree["u"]
        want = changed(make(), {q: tree["q"], down: tree["d"]})
        save_peft_adapter(tmp_path / "bad", tree, module_names=names)
        assert distance(adapted(make(), tmp_path / "bad"), want) > 1e-2


def test_a_configuration_of_peft_as_a_dict_is_taken(tmp_path):
    """Its `target_modules` is a set, its task an enum."""
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    given = config.to_dict()
    keys = ("target_modules", "task_type", "lora_dropout", "exclude_modules")
    options = {"module_names": {"q": ATTENTION}}
    tree = {"q": pair(16, 16)}
    save_peft_adapter(tmp_path, tree, config={x: given[x] for x in keys}, **options)
    make = lambda: model_of("LlamaForCausalLM", "Llama", **LLAMA)
    want = changed(make(), {ATTENTION: tree["q"]})
    assert distance(adapted(make(), tmp_path), want) < TOLERANCE
