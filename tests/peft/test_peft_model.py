"""The base model: what its names, shapes, kinds and ties show, and what is refused.

Modules are stand-ins with what PyTorch's have: names and classes called as there. The
real ones are in `test_peft_torch_model.py`.
"""

import ast
import json
import re
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lorapro_jax.peft import load_peft_adapter, save_peft_adapter
from tests.support.peft_files import WEIGHTS, pair_tree, read, tree_of
from tests.support.torch_like import TorchLike

pytestmark = pytest.mark.usefixtures("quick_compiles")

WEIGHT_NAMES = ["model.mlp.up.weight", "model.x.experts.up", "lm_head.weight"]


@pytest.mark.parametrize("way", ["names", "index", "weights"])
def test_names_that_the_base_model_lacks_are_errors(way, tmp_path):
    model = WEIGHT_NAMES
    if way != "names":
        model = tmp_path / "base"
        model.mkdir()
    if way == "index":
        text = json.dumps({"weight_map": dict.fromkeys(WEIGHT_NAMES, "x.safetensors")})
        (model / "model.safetensors.index.json").write_text(text)
    elif way == "weights":
        weights = {name: np.ones(1, np.float32) for name in WEIGHT_NAMES}
        safetensors.numpy.save_file(weights, model / "model.safetensors")
    save = lambda name, tree=None, **options: save_peft_adapter(
        tmp_path / "x", tree or pair_tree(), module_names={".*": name}, model=model,
        **options,
    )  # fmt: skip
    for name in ("model.mlp.upp", "mlp.up", "model.mlp.up.weight.x", "model.mlp"):
        with pytest.raises(ValueError, match=rf"`mlp/up/lora_a` the .* '{name}'") as e:
            save(name)
        assert "Close to it: ['model.mlp.up" in str(e.value)
        assert not (tmp_path / "x").exists()
    save("model.mlp.up")
    experts = {"up": tree_of("lora_{}", "Edr", "Erf")}
    options = {"target_parameters": ["up"], "stack_axis": 0}
    save("model.x.experts.up", experts, **options)
    with pytest.raises(ValueError, match="which `model=` does not have"):
        save("model.y.experts.up", experts, **options)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        ([], "has to be a module of PyTorch, its state dict, the names"),
        ([3], "has to be a module of PyTorch"),
        (3, "has to be a module of PyTorch"),
        ([[]], "has to be a module of PyTorch"),
        (["base_model.model.mlp.up.weight"], "wrapped already. Pass the base model"),
        ("meta-llama/Llama-3", "does not exist.* nothing is downloaded"),
    ],
)
def test_base_models_that_cannot_be_are_errors(model, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        save_peft_adapter(tmp_path / "x", pair_tree(), model=model)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no weights and no config"):
        save_peft_adapter(tmp_path / "x", pair_tree(), model=tmp_path / "empty")
    (tmp_path / "bad.index.json").write_text("[")
    with pytest.raises(ValueError, match=r"bad\.index\.json` of `model=` cannot be"):
        save_peft_adapter(tmp_path / "x", pair_tree(), model=tmp_path)
    assert not (tmp_path / "x").exists()


# --- What a model itself shows ---

PREFIX = "base_model.model."
BODY = {"body.q.weight": (5, 6), "body.q.bias": (5,), "body.attn.k.weight": (5, 6)}
NAMES = {"q": "body.q"}


def draw(*shape, seed=3):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def with_leaves(**leaves):
    """A pair `q`, and other leaves by the path with `__`."""
    tree = {"q": pair_tree()["mlp"]["up"]}
    for path, x in leaves.items():
        owner, name = path.split("__")
        tree.setdefault(owner, {})[name] = x
    return tree


def refused(folder, match, tree, **options):
    """The message of the one error, after which there is no folder."""
    with pytest.raises(ValueError, match=match) as error:
        save_peft_adapter(folder, tree, **options)
    assert not folder.exists()
    return str(error.value)


def option_in(message, option):
    """The value that a message says to pass, read as Python."""
    value = part_of(message, rf"`{option}=([{{'].+?)`")
    return ast.literal_eval(value.replace(", ...", ""))


def part_of(message, pattern):
    (found,) = re.findall(pattern, message)
    return found


def beside(folder):
    tensors, _ = read(folder)
    return {x.removeprefix(PREFIX): y for x, y in tensors.items() if "lora_" not in x}


def as_given(model):
    """All that may be passed for one model and shows its shapes."""
    return [model, model.state_dict(), types.MappingProxyType(model.state_dict())]


def test_extra_weights_that_the_base_model_lacks_are_errors(tmp_path):
    model = TorchLike({**BODY, "score.weight": (3, 6)})
    tree = with_leaves(head__kernel=draw(6, 3))
    for given in (*as_given(model), list(model.state_dict())):
        options = {"module_names": NAMES, "model": given}
        message = refused(
            tmp_path / "x", "'scor.weight', which `model=` does not have", tree,
            extra={"head/kernel": "scor.weight"}, **options,
        )  # fmt: skip
        assert "Close to it: ['score.weight'" in message
        save_peft_adapter(
            tmp_path / "good", tree, extra={"head/kernel": "score.weight"}, **options
        )
        chex.assert_trees_all_equal(
            beside(tmp_path / "good"), {"score.weight": tree["head"]["kernel"].T}
        )


def test_extra_weights_of_another_shape_are_errors(tmp_path):
    model = TorchLike({**BODY, "score.weight": (3, 7), "norm.bias": (6,)})
    for given in as_given(model):
        options = {"module_names": NAMES, "model": given}
        for leaves, extra, shapes in (
            ({"head__kernel": draw(6, 3)}, {"head/kernel": "score.weight"}, "(3, 6)"),
            ({"n__bias": draw(2, 4)}, {"n/bias": "norm.bias"}, "(8,)"),
        ):
            message = refused(
                tmp_path / "x", "in `model=`. Correct the name in `extra=`",
                with_leaves(**leaves), extra=extra, **options,
            )  # fmt: skip
            assert f"of shape {shapes}, which is" in message
    good = with_leaves(head__kernel=draw(7, 3), n__bias=draw(2, 3))
    extra = {"head/kernel": "score.weight", "n/bias": "norm.bias"}
    save_peft_adapter(
        tmp_path, good, module_names=NAMES, extra=extra, model=model
    )  # control


@pytest.mark.parametrize("shape", [(4, 4), (4, 3)])
def test_a_kernel_for_conv1d_needs_the_mark_of_a_transpose(shape, tmp_path):
    """GPT-2 has `(in, out)`: a square kernel would be wrong without a word."""
    weights = {**BODY, "c_proj.weight": shape}
    model = TorchLike(weights, {"c_proj": "Conv1D"})
    tree = with_leaves(proj__kernel=draw(*shape))
    options = {"module_names": NAMES}
    plain = {"proj/(kernel)": "c_proj.weight"}
    turned = {"proj/(kernel)": "c_proj.weight.T"}

    refused(
        tmp_path / "x", "a Conv1D in PyTorch, .* put `.T` behind its name", tree,
        extra=plain, model=model, **options,
    )  # fmt: skip
    save_peft_adapter(tmp_path / "good", tree, extra=turned, model=model, **options)
    kernel = tree["proj"]["kernel"]
    chex.assert_trees_all_equal(beside(tmp_path / "good"), {"c_proj.weight": kernel})
    zeros = jax.tree.map(jnp.zeros_like, tree)
    back = load_peft_adapter(tmp_path / "good", zeros, extra=turned, **options)
    chex.assert_trees_all_equal(back, tree)

    linear = TorchLike(weights | {"c_proj.weight": shape[::-1]})
    refused(
        tmp_path / "x", "a linear layer in PyTorch, .* leave `.T` out of its name",
        tree, extra=turned, model=linear, **options,
    )  # fmt: skip
    save_peft_adapter(tmp_path / "plain", tree, extra=plain, model=linear, **options)
    chex.assert_trees_all_equal(beside(tmp_path / "plain"), {"c_proj.weight": kernel.T})


def test_a_transpose_is_for_weights_of_two_axes(tmp_path):
    tree = with_leaves(norm__scale=draw(6))
    options = {"module_names": NAMES}
    refused(
        tmp_path / "x", r"has shape \(6,\) for 'norm.weight', .* Leave `.T` out", tree,
        extra={"norm/scale": "norm.weight.T"}, **options,
    )  # fmt: skip
    extra = {"norm/scale": "norm.weight"}
    save_peft_adapter(tmp_path / "good", tree, extra=extra, **options)


TIED = ("embed.weight", "head.weight")


def test_a_tied_leaf_goes_out_under_all_of_its_names(tmp_path):
    """The remedy of the message, read from it."""
    model = TorchLike({**BODY, "embed.weight": (7, 6)}, {"embed": "Embedding"}, TIED)
    tree = with_leaves(e__embedding=draw(7, 6))
    options = {"module_names": NAMES}
    message = refused(
        tmp_path / "x", r"which PyTorch ties to \['head.weight'\]", tree,
        extra={"e/.*": "embed.weight"}, model=model, **options,
    )  # fmt: skip
    extra = option_in(message, "extra")
    save_peft_adapter(tmp_path / "good", tree, extra=extra, model=model, **options)
    x = tree["e"]["embedding"]
    chex.assert_trees_all_equal(beside(tmp_path / "good"), dict.fromkeys(TIED, x))
    kept = read(tmp_path / "good")[1]["modules_to_save"]
    assert kept == ["embed", "head"]

    zeros = jax.tree.map(jnp.zeros_like, tree)
    back = load_peft_adapter(tmp_path / "good", zeros, extra=extra, **options)
    chex.assert_trees_all_equal(back, tree)


@pytest.mark.parametrize("turned", [False, True])
def test_a_leaf_of_two_weights_needs_both_in_the_file_and_equal(turned, tmp_path):
    mark = ".T" if turned else ""
    tree = with_leaves(e__kernel=draw(3, 7, 6))
    both = {"e/kernel": (f"layers.{{}}.a.weight{mark}", "layers.{}.b.weight")}
    options = {"module_names": NAMES}
    save_peft_adapter(tmp_path, tree, extra=both, **options)
    kernel, found = tree["e"]["kernel"], beside(tmp_path)
    for i in range(3):
        a = kernel[i] if turned else kernel[i].T
        np.testing.assert_array_equal(found[f"layers.{i}.a.weight"], a)
        np.testing.assert_array_equal(found[f"layers.{i}.b.weight"], kernel[i].T)
    chex.assert_trees_all_equal(
        load_peft_adapter(tmp_path, tree, extra=both, **options), tree
    )

    tensors, _ = read(tmp_path)
    key = f"{PREFIX}layers.1.b.weight"
    other = tensors | {key: tensors[key] + 1}
    safetensors.numpy.save_file(other, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=f"`{key}` and .* have other values, and are"):
        load_peft_adapter(tmp_path, tree, extra=both, **options)
    del other[key]
    safetensors.numpy.save_file(other, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=f"missing in the file: `{key}`"):
        load_peft_adapter(tmp_path, tree, extra=both, **options)


@pytest.mark.parametrize(
    ("kind", "option", "shapes"),
    [
        ("Embedding", "embedding", ((7, 2), (2, 6))),
        ("_ConvNd", "conv", ((3, 3, 4, 2), (2, 5))),
    ],
)
def test_a_layer_that_is_not_linear_has_to_be_said_to_be_so(
    kind, option, shapes, tmp_path
):
    """PEFT would drop an embedding's factors; the message has what to pass."""
    a, b = (draw(*shape) for shape in shapes)
    tree = {"x+": {"lora_a": a, "lora_b": b}, **with_leaves()}
    names = {**NAMES, r"x\+": "x"}
    model = TorchLike({**BODY, "x.weight": (1,)}, {"x": kind})
    options = {"module_names": names, "model": model}
    message = refused(
        tmp_path / "x", "in PyTorch, and `.*=` does not say", tree, **options
    )
    save_peft_adapter(
        tmp_path / "good", tree, **{option: option_in(message, option)}, **options
    )
    tensors, _ = read(tmp_path / "good")
    found = {x.removeprefix(PREFIX): y.shape for x, y in tensors.items() if ".x." in x}
    due = {
        "embedding": {"x.lora_embedding_A": (2, 7), "x.lora_embedding_B": (6, 2)},
        "conv": {"x.lora_A.weight": (2, 4, 3, 3), "x.lora_B.weight": (5, 2, 1, 1)},
    }
    assert found == due[option]
    # The names alone do not tell.
    save_peft_adapter(
        tmp_path / "blind", tree, module_names=names, model=list(model.state_dict())
    )


def test_a_linear_layer_is_no_embedding(tmp_path):
    options = {"module_names": NAMES, "model": TorchLike(BODY)}
    for tree, embedding in (
        (with_leaves(), "q"),
        ({"q": tree_of("lora_embedding_{}", "dr", "rf")}, None),
    ):
        refused(
            tmp_path / "x", "a linear layer in PyTorch, and its factors are said to be",
            tree, embedding=embedding, **options,
        )  # fmt: skip
    save_peft_adapter(tmp_path, with_leaves(), **options)


def test_dense_layers_that_peft_takes_for_experts_go_out_as_parameters(tmp_path):
    """Qwen3-MoE on transformers 5; the names of the message."""
    model = TorchLike({**BODY, "mlp.down_proj.weight": (5, 6)}, family="qwen3_moe")
    other = TorchLike({**BODY, "mlp.down_proj.weight": (5, 6)}, family="qwen2_moe")
    tree = {"d": with_leaves()["q"]}
    save = lambda folder, name, **options: save_peft_adapter(
        tmp_path / folder, tree, module_names={"d": name}, **options
    )
    save("plain", "mlp.down_proj", model=other)  # control
    with pytest.raises(ValueError, match="'qwen3_moe', PEFT on transformers 5") as e:
        save("x", "mlp.down_proj", model=model)
    name = part_of(str(e.value), r"`([\w.]+)` in `module_names=`")
    parameter = part_of(str(e.value), r"'([\w.]+)' in `target_parameters=`")
    save("good", name, model=model, target_parameters=(parameter,))
    tensors, config = read(tmp_path / "good")
    assert config["target_parameters"] == ["mlp.down_proj.weight"]
    assert config["target_modules"] == []
    chex.assert_trees_all_equal(tensors, read(tmp_path / "plain")[0])


# --- Modules that PEFT saves whole ---

HEAD = {"c__kernel": draw(6, 3), "c__bias": draw(3)}
PRE = {"p__kernel": draw(6, 6), "p__bias": draw(6)}
DISTILBERT = {
    **BODY, "pre_classifier.weight": (6, 6), "pre_classifier.bias": (6,),
    "classifier.weight": (3, 6), "classifier.bias": (3,),
}  # fmt: skip
ROBERTA = {
    **BODY, "classifier.dense.weight": (6, 6), "classifier.dense.bias": (6,),
    "classifier.out_proj.weight": (3, 6), "classifier.out_proj.bias": (3,),
}  # fmt: skip


def named(head, pre=None):
    """The options for a head, and another layer."""
    extra = {"c/kernel": f"{head}.weight", "c/bias": f"{head}.bias"}
    if pre:
        extra |= {"p/kernel": f"{pre}.weight", "p/bias": f"{pre}.bias"}
    return {"module_names": NAMES, "extra": extra}


def test_modules_whose_names_end_like_a_head_have_to_go_along(tmp_path):
    """DistilBERT's `pre_classifier`, which PEFT wants as it does `classifier`."""
    options = {"model": TorchLike(DISTILBERT)}
    message = refused(
        tmp_path / "x", r"\['classifier'\], and so `pre_classifier`",
        with_leaves(**HEAD), **named("classifier"), **options,
    )  # fmt: skip
    for name in DISTILBERT:
        assert (repr(name) in message) == name.startswith("pre_")
    tree = with_leaves(**HEAD, **PRE)
    save_peft_adapter(
        tmp_path / "good", tree, **named("classifier", "pre_classifier"), **options
    )
    kept = read(tmp_path / "good")[1]["modules_to_save"]
    assert kept == ["classifier", "pre_classifier"]
    # A bias alone is loaded as it is.
    bias = {"module_names": NAMES, "extra": {"c/bias": "classifier.bias"}}
    save_peft_adapter(tmp_path / "bias", tree, **bias, **options)
    assert read(tmp_path / "bias")[1]["modules_to_save"] is None


@pytest.mark.parametrize("known", [False, True])
def test_a_head_of_several_layers_is_saved_as_the_task_has_it(known, tmp_path):
    """With SEQ_CLS, PEFT wraps RoBERTa's `classifier`, and would wrap its parts."""
    options = named("classifier.out_proj", "classifier.dense")
    if known:
        options["model"] = TorchLike(ROBERTA)
    tree = with_leaves(**HEAD, **PRE)
    for task, kept in (
        (None, ["classifier.dense", "classifier.out_proj"]),
        ("CAUSAL_LM", ["classifier.dense", "classifier.out_proj"]),
        ("SEQ_CLS", ["classifier"]),
        ("TOKEN_CLS", ["classifier"]),
    ):
        folder = tmp_path / str(task)
        save_peft_adapter(folder, tree, config={"task_type": task}, **options)
        _, config = read(folder)
        assert (config["modules_to_save"], config["bias"]) == (kept, "none")
        back = load_peft_adapter(
            folder, tree, module_names=NAMES, extra=options["extra"]
        )
        chex.assert_trees_all_equal(back, tree)


SEQ_CLS = {"config": {"task_type": "SEQ_CLS"}}


def test_a_task_with_a_head_needs_one_in_the_file(tmp_path):
    """Three ways out, all of the message."""
    plain = {"module_names": NAMES}
    refused(
        tmp_path / "x", "modules called 'classifier' or 'score', .* would have none",
        with_leaves(), **plain, **SEQ_CLS,
    )  # fmt: skip
    save_peft_adapter(tmp_path / "1", with_leaves(), **plain)
    save_peft_adapter(tmp_path / "2", with_leaves(**HEAD), **named("score"), **SEQ_CLS)
    save_peft_adapter(
        tmp_path / "3", with_leaves(), model=TorchLike(BODY), **plain, **SEQ_CLS
    )
    model = TorchLike({**BODY, "model.score.weight": (3, 6)})
    message = refused(
        tmp_path / "x", r"so `model.score`, and wants .*\['model.score.weight'\]",
        with_leaves(), model=model, **plain, **SEQ_CLS,
    )  # fmt: skip
    assert "Or leave `task_type` out of `config`" in message
    save_peft_adapter(tmp_path / "4", with_leaves(), model=model, **plain)
    for task in ("QUESTION_ANS", "TOKEN_CLS"):
        refused(
            tmp_path / "x", "would have none", with_leaves(),
            config={"task_type": task}, **plain,
        )  # fmt: skip


def test_a_head_is_more_than_its_bias(tmp_path):
    tree, both = with_leaves(**HEAD), named("score")
    bias = both | {"extra": {"c/bias": "score.bias"}}
    match = r"has \['score.bias'\] and no weight beside it"
    refused(tmp_path / "x", match, tree, **bias, **SEQ_CLS)
    save_peft_adapter(tmp_path / "all", tree, **both, **SEQ_CLS)
    save_peft_adapter(tmp_path / "none", tree, **bias)
    assert read(tmp_path / "none")[1]["bias"] == "all"


def test_factors_of_a_head_go_without_the_task(tmp_path):
    for name in ("classifier", "model.score", "classifier.dense"):
        options = {"module_names": {"q": name}}
        match = f"as `{name}` of `q/lora_a` is: with the `task_type` of `config`"
        refused(tmp_path / "x", match, with_leaves(), **options, **SEQ_CLS)
        save_peft_adapter(tmp_path / name, with_leaves(), **options)


@pytest.mark.parametrize(
    ("layer", "head"),
    [("body.fc", "fc"), ("body.my_fc", "fc"), ("a.norm.fc", "norm"), ("axb.q", "a.b")],
)
def test_factors_that_peft_drops_for_a_saved_module_are_refused(layer, head, tmp_path):
    """By the end of the name, or as a regex: both ways of PEFT."""
    tree, options = with_leaves(**HEAD), {**named(head), "module_names": {"q": layer}}
    match = rf"end in '{head}', as `{layer}` of `q/lora_a` is.*\['c/bias', 'c/kernel'\]"
    refused(tmp_path / "x", match, tree, **options)
    # Out of `extra=`, or the pair left out.
    save_peft_adapter(tmp_path / "1", tree, module_names={"q": layer})
    tree["k"] = tree["q"]
    options["module_names"] = {"q": layer, "k": "other"}
    rest = {"pairs": [("k/lora_a", "k/lora_b")]}
    save_peft_adapter(tmp_path / "2", tree, **options, **rest)


def test_modules_inside_of_a_saved_one_are_not_saved_twice(tmp_path):
    """A parameter of its own, and a layer: PEFT would wrap one in the other."""
    tree = with_leaves(**HEAD, x__scale=draw(4))
    options = named("head.out")
    options["extra"]["x/scale"] = "head.scale"
    save_peft_adapter(tmp_path, tree, **options)
    assert read(tmp_path)[1]["modules_to_save"] == ["head"]
    weights = {"head.scale": (4,), "head.out.weight": (3, 6), "head.out.bias": (3,)}
    weights |= BODY
    save_peft_adapter(tmp_path, tree, model=TorchLike(weights), **options)
    match = r"wants all weights of it: \['head.b.weight'\] are not in"
    more = TorchLike({**weights, "head.b.weight": (1,)})
    refused(tmp_path / "x", match, tree, model=more, **options)
    inner = {**BODY, "fc.a_fc.weight": (3, 6), "fc.a_fc.bias": (3,)}
    match = r"`fc` and \['fc.a_fc'\] in it once more, which it cannot load"
    deep = {**named("fc.a_fc"), "config": None}
    deep["extra"]["x/scale"] = "fc.scale"
    model = TorchLike({**inner, "fc.scale": (4,)})
    refused(tmp_path / "x", match, tree, model=model, **deep)


# --- Names and patterns without a model ---


@pytest.mark.parametrize(
    ("name", "due"),
    [
        ("base_model.model.model.q", "model.q"),
        ("model.q.lora_A", "model.q"),
        ("model.q.base_layer", "model.q"),
        ("model.q.weight", "model.q"),
        ("model.q.lora_A.weight", "model.q"),
    ],
)
def test_names_that_were_copied_from_a_file_are_errors(name, due, tmp_path):
    """PEFT would look for `base_model.model.base_model.model...`."""
    match = "PEFT's own `.*` in it|which is no module's. Leave `.weight` out"
    refused(tmp_path / "x", match, with_leaves(), module_names={"q": name})
    with pytest.raises(ValueError, match=match):
        load_peft_adapter(tmp_path / "x", with_leaves(), module_names={"q": name})
    save_peft_adapter(tmp_path / "good", with_leaves(), module_names={"q": due})
    if "base_" in name:
        refused(
            tmp_path / "x", "with `extra=`", with_leaves(**HEAD), module_names=NAMES,
            extra={"c/kernel": f"{name}.weight"},
        )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"conv": "conw"}, "`conv='conw'` is found in the path of no layer"),
        ({"embedding": "x"}, "`embedding='x'` is found in the path of no layer"),
        ({"target_parameters": ("p",)}, r"has \['p'\], and no name of `module_names="),
    ],
)
def test_patterns_that_match_nothing_are_errors(options, match, tmp_path):
    message = refused(tmp_path / "x", match, pair_tree(), **options)
    assert "mlp" in message  # what is close
    save_peft_adapter(tmp_path / "good", pair_tree())  # left out
    if "target_parameters" in options:
        with pytest.raises(ValueError, match=match):
            load_peft_adapter(tmp_path / "good", pair_tree(), **options)


@pytest.mark.parametrize("name", [None, 3, b"q", {"q"}])
def test_a_name_that_is_no_string_is_one_sentence(name, tmp_path):
    for names in ({"q": name}, lambda _: name, {"q": (["a", name], 1)}):
        message = refused(
            tmp_path / "x", "cannot be filled in: it is no string.", with_leaves(),
            module_names=names,
        )  # fmt: skip
        assert "descriptor" not in message
    refused(
        tmp_path / "x", "for `c/bias` cannot be filled in: it is no string",
        with_leaves(**HEAD), module_names=NAMES, extra={"c/bias": ("a.b", name)},
    )  # fmt: skip


def test_the_adapter_without_a_name_can_be_chosen(tmp_path):
    tree = pair_tree()
    save_peft_adapter(tmp_path, tree)
    tensors, _ = read(tmp_path)
    other = {
        key.replace(".weight", ".other.weight"): x + 1 for key, x in tensors.items()
    }
    safetensors.numpy.save_file(tensors | other, tmp_path / WEIGHTS)
    match = r"adapters \['other'\] and one without a name, `adapter=''`"
    with pytest.raises(ValueError, match=match):
        load_peft_adapter(tmp_path, tree)
    chex.assert_trees_all_equal(load_peft_adapter(tmp_path, tree, adapter=""), tree)
    named = load_peft_adapter(tmp_path, tree, adapter="other")
    chex.assert_trees_all_equal(named, jax.tree.map(lambda x: x + 1, tree))
    safetensors.numpy.save_file(other, tmp_path / WEIGHTS)
    for wrong in ("", 0):
        with pytest.raises(ValueError, match=f"of .'other'., not `adapter={wrong!r}`"):
            load_peft_adapter(tmp_path, tree, adapter=wrong)
