"""Heads and biases beside the factors, files of other writers, and of one rank."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lorapro_jax.peft import load_peft_adapter, save_peft_adapter
from tests.support.peft_files import (
    WEIGHTS,
    pair_tree,
    read,
    tree_of,
    written_by_another,
)

pytestmark = pytest.mark.usefixtures("quick_compiles")

PREFIX = "base_model.model."


def draw(*shape, seed=3):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def with_others():
    """An adapter of stacked layers, with biases, a head, a norm and a convolution."""
    up = tree_of("lora_{}", "Ldr", "Lrf") | {"bias": draw(4, 5)}
    return {
        "layers": {"up": up, "norm": {"scale": draw(4, 6)}},
        "head": {"kernel": draw(6, 3), "bias": draw(3)},
        "heads": {"bias": draw(2, 3)},
        "conv": {"kernel": draw(2, 3, 4, 5)},
        "words": {"embedding": draw(7, 6)},
    }


EXTRA = {
    "layers/up/bias": "model.layers.{}.up.bias",
    "layers/norm/scale": "model.layers.{}.norm.weight",
    "head/kernel": "score.weight",
    "(heads?)/bias": r"score_\1.bias",
    "conv/kernel": "vision.conv.weight",
    "words/embedding": "model.words.weight",
}
NAMES = {"layers/up": "model.layers.{}.up"}


def test_weights_beside_the_factors_go_out_as_pytorch_has_them(tmp_path):
    tree = with_others()
    options = {"module_names": NAMES, "extra": EXTRA}
    save_peft_adapter(tmp_path, tree, conv="conv", **options)

    tensors, config = read(tmp_path)
    found = {x.removeprefix(PREFIX): y for x, y in tensors.items() if "lora_" not in x}
    due = {
        "score.weight": tree["head"]["kernel"].T,
        "score_head.bias": tree["head"]["bias"],
        "score_heads.bias": tree["heads"]["bias"].reshape(6),
        "vision.conv.weight": np.einsum("hwio->oihw", tree["conv"]["kernel"]),
        "model.words.weight": tree["words"]["embedding"],
    }
    for i in range(4):
        # Of a layer with factors, as PEFT has it inside of them.
        due[f"model.layers.{i}.up.base_layer.bias"] = tree["layers"]["up"]["bias"][i]
        due[f"model.layers.{i}.norm.weight"] = tree["layers"]["norm"]["scale"][i]
    chex.assert_trees_all_equal(found, due)
    assert config["bias"] == "all"  # some are of layers without factors
    kept = [f"model.layers.{i}.norm" for i in range(4)]
    assert config["modules_to_save"] == [*kept, "model.words", "score", "vision.conv"]

    back = load_peft_adapter(tmp_path, jax.tree.map(jnp.zeros_like, tree), **options)
    chex.assert_trees_all_equal(back, tree)
    with pytest.raises(ValueError, match="`extra=` takes weights that are no factors"):
        load_peft_adapter(tmp_path, tree, module_names=NAMES)
    some = load_peft_adapter(
        tmp_path, tree, module_names=NAMES, ignore=r"weight$|bias$"
    )
    chex.assert_trees_all_equal(some, tree)


@pytest.mark.parametrize(
    ("extra", "bias", "kept"),
    [
        ({}, "none", None),
        ({"layers/up/bias": "model.layers.{}.up.bias"}, "lora_only", None),
        ({"head/bias": "score.bias"}, "all", None),
        ({"head/(.*)": r"score.w_\1"}, "none", ["score"]),
        (
            {"head/kernel": "score.weight", "head/bias": "score.bias"},
            "none",
            ["score"],
        ),
    ],
)
def test_the_configuration_says_what_is_beside_the_factors(extra, bias, kept, tmp_path):
    save_peft_adapter(tmp_path, with_others(), module_names=NAMES, extra=extra)
    _, config = read(tmp_path)
    assert (config["bias"], config["modules_to_save"]) == (bias, kept)


@pytest.mark.parametrize(
    ("extra", "error", "match"),
    [
        ("x", TypeError, "extra='x'"),
        ({"(": "x"}, ValueError, "of `extra=` is no regular expression"),
        ({"hed/.*": "x.w"}, ValueError, r"'hed/\.\*'.* no leaf .*Close to it"),
        ({"layers/up/lora_a": "x.w"}, ValueError, "no leaf beside the factors"),
        ({"head/kernel": "score"}, ValueError, "the PyTorch name 'score'"),
        ({"head/kernel": "a b.w"}, ValueError, "the PyTorch name 'a b.w'"),
        ({"head/kernel": None}, ValueError, "for `head/kernel` cannot be filled in"),
        ({"head/kernel": "{}.{}.{}.w"}, ValueError, "3 places for the 2 axes"),
        ({"head/.*": "score.weight"}, ValueError, "the same PyTorch name"),
        ({"conv/kernel": "conv.weight"}, ValueError, r"kernel of shape \(2, 3, 4, 5\)"),
    ],
)
def test_extra_weights_that_cannot_be_are_errors(extra, error, match, tmp_path):
    with pytest.raises(error, match=match):
        save_peft_adapter(
            tmp_path / "x", with_others(), module_names=NAMES, extra=extra
        )
    assert not (tmp_path / "x").exists()


def test_extra_weights_that_do_not_fit_are_in_the_one_message(tmp_path):
    tree = with_others()
    options = {"module_names": NAMES, "extra": EXTRA}
    save_peft_adapter(tmp_path, tree, conv="conv", **options)
    tree["head"] = {"kernel": draw(5, 3), "bias": draw(3)}
    other = dict(options, extra=EXTRA | {"heads/bias": "pooler.bias"})
    other["extra"] = {"heads/bias": "pooler.bias", **EXTRA}
    with pytest.raises(ValueError, match="adapter and tree differ") as error:
        load_peft_adapter(tmp_path, tree, **other)
    for part in (
        f"`{PREFIX}score.weight` has shape (3, 6), but (3, 5) is due for `head/kernel`",
        f"missing in the file: `{PREFIX}pooler.bias`",
        f"in the file, not in the tree: `{PREFIX}score_heads.bias`",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.replace("lora_A", "lora_A.default"),
        lambda key: key.replace(".weight", ".default.weight"),
        lambda key: key.removeprefix(PREFIX),
        lambda key: f"module.{key}",
        lambda key: f"_orig_mod.{key}",
        lambda key: key.removesuffix(".weight"),
        lambda key: key.replace(".weight", ".default"),
    ],
)
@pytest.mark.parametrize("embedding", [False, True])
def test_keys_of_other_writers_mean_the_same(rename, embedding, tmp_path):
    tree = tree_of("words/lora_embeddings_{}", "dr", "rf") if embedding else pair_tree()
    save_peft_adapter(tmp_path, tree)
    one = rename if "lora_A.default" not in rename("lora_A") else None
    written_by_another(
        tmp_path,
        rename=one or (lambda key: rename(key).replace("lora_B", "lora_B.default")),
    )
    back = load_peft_adapter(tmp_path, tree)
    chex.assert_trees_all_equal(back, tree)


def test_a_saved_module_of_a_state_dict_is_found_by_its_name(tmp_path):
    tree = {**pair_tree(), "head": {"kernel": draw(6, 3)}}
    options = {"extra": {"head/kernel": "score.weight"}}
    save_peft_adapter(tmp_path, tree, **options)
    saved = "score.modules_to_save.default.weight"
    written_by_another(tmp_path, rename=lambda x: x.replace("score.weight", saved))
    chex.assert_trees_all_equal(load_peft_adapter(tmp_path, tree, **options), tree)


def test_two_keys_for_one_factor_are_an_error(tmp_path):
    save_peft_adapter(tmp_path, pair_tree())
    tensors, _ = read(tmp_path)
    twice = {key.removeprefix(PREFIX): x for key, x in tensors.items()} | tensors
    safetensors.numpy.save_file(twice, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"two entries .*`mlp\.up\.lora_A\.weight`"):
        load_peft_adapter(tmp_path, pair_tree())


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_tensors_of_8_bits_are_read_exactly(dtype, tmp_path):
    tree = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), pair_tree())
    save_peft_adapter(tmp_path, tree)
    tensors, _ = read(tmp_path)
    narrow = {key: x.astype(dtype) for key, x in tensors.items()}
    safetensors.numpy.save_file(narrow, tmp_path / WEIGHTS)
    chex.assert_trees_all_equal(load_peft_adapter(tmp_path, pair_tree(1)), tree)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    back = load_peft_adapter(tmp_path, half, scale=0.5)  # B doubled: still exact
    chex.assert_trees_all_equal(
        back["mlp"]["up"]["lora_b"], 2 * half["mlp"]["up"]["lora_b"]
    )


# --- One rank and one scale ---


def as_vllm_reads(folder, name):
    """s B A of a reader that knows `r`, `lora_alpha` and `use_rslora` and no patterns.

    As vLLM's `PEFTHelper` documents it: the scale of all modules is alpha / r, or
    alpha / sqrt(r); `modules_to_save` has to be None and `bias` "none".
    """
    tensors, config = read(folder)
    assert config["modules_to_save"] is None
    assert config["bias"] == "none"
    rank = config["r"]
    scale = config["lora_alpha"] / (rank**0.5 if config["use_rslora"] else rank)
    a, b = (tensors[f"{PREFIX}{name}.lora_{side}.weight"] for side in "AB")
    return scale * np.float64(b) @ np.float64(a)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_reader_without_patterns_computes_the_same(rslora, dtype, tmp_path):
    """Ranks 4, 4, 16 and one alpha, where the last would be 4 times wrong."""
    ranks, alphas = {"q": 4, "k": 4, "v": 16}, {"k": 3.0, ".*": 8.0}
    tree = {
        name: {"lora_a": draw(20, rank), "lora_b": draw(rank, 24, seed=rank)}
        for name, rank in ranks.items()
    }
    tree = jax.tree.map(lambda x: x.astype(dtype), tree)
    options = {"alpha": alphas, "rslora": rslora}

    save_peft_adapter(tmp_path / "one", tree, uniform=True, **options)
    save_peft_adapter(tmp_path / "mixed", tree, **options)

    tensors, config = read(tmp_path / "one")
    assert config["r"] == 16  # what vLLM's `max_lora_rank` has to be
    assert {min(x.shape) for x in tensors.values()} == {16}
    wide = lambda x: np.float64(x.astype(jnp.float32))
    wrong = {}
    for name, rank in ranks.items():
        a, b = (wide(x) for x in tree[name].values())
        alpha = alphas.get(name, 8.0)
        want = (alpha / (rank**0.5 if rslora else rank) * (a @ b)).T
        got = as_vllm_reads(tmp_path / "one", name)
        # The zeros change nothing, and B rounds in float32 at most.
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
        mixed = as_vllm_reads(tmp_path / "mixed", name)
        wrong[name] = np.abs(mixed - want).max() / np.abs(want).max()
    assert wrong["v"] > 0.5  # control
    assert wrong["k"] > 0.5

    template = jax.tree.map(
        lambda x: jnp.zeros([16 if n in (4, 16) else n for n in x.shape]), tree
    )
    back = load_peft_adapter(tmp_path / "one", template, scale=2.0)
    got = (2.0 * back["v"]["lora_a"] @ back["v"]["lora_b"]).T
    np.testing.assert_allclose(got, as_vllm_reads(tmp_path / "one", "v"), atol=1e-5)


def test_equal_ranks_and_scales_keep_their_bits(tmp_path):
    tree = {name: pair_tree(seed) for seed, name in enumerate("qk")}
    save_peft_adapter(tmp_path / "one", tree, alpha=8.0, uniform=True)
    save_peft_adapter(tmp_path / "plain", tree, alpha=8.0)
    chex.assert_trees_all_equal(read(tmp_path / "one"), read(tmp_path / "plain"))


def test_a_scale_that_the_file_cannot_hold_is_an_error(tmp_path):
    tree = {x: pair_tree(dtype=jnp.float16) for x in ("q", "k", "v")}
    scales = {"q": 1e30, ".*": 1e-30}
    with pytest.raises(
        ValueError, match=r"`q/mlp/up/lora_b` overflows at the scale 1e-30"
    ):
        save_peft_adapter(tmp_path / "x", tree, scale=scales, uniform=True)
    assert not (tmp_path / "x").exists()


def test_a_start_that_changed_the_weights_has_one_rank_too(tmp_path):
    tree = {"q": pair_tree(), "k": {"lora_a": draw(6, 3), "lora_b": draw(3, 5)}}
    start = jax.tree.map(lambda x: 0.5 * x, tree)
    save_peft_adapter(tmp_path, tree, initial=start, scale=2.0, uniform=True)
    assert read(tmp_path)[1]["r"] == 6
    got = as_vllm_reads(tmp_path, "q.mlp.up")
    a, b = tree["q"]["mlp"]["up"].values()
    np.testing.assert_allclose(got, 2.0 * 0.75 * (a @ b).T, rtol=1e-5, atol=1e-6)


def test_an_integer_leaf_is_no_weight(tmp_path):
    tree = {**pair_tree(), "step": {"count": jnp.zeros((), jnp.int32)}}
    with pytest.raises(ValueError, match=r"`step/count` of `extra=` has dtype int32"):
        save_peft_adapter(tmp_path / "x", tree, extra={"step/count": "x.y"})
