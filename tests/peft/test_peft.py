"""PEFT files: what they hold, what they bring back, and what is refused."""

import json
import math
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lorapro_jax import LoRAPair
from lorapro_jax.peft import load_peft_adapter, save_peft_adapter
from tests.support.peft_files import CONFIG, SIZES, WEIGHTS, pair_tree, read, tree_of

pytestmark = pytest.mark.usefixtures("quick_compiles")

# Path, axes of A and B (r the rank, L and E stacked), name of the layer in PyTorch.
LAYOUTS = {
    "plain": ("mlp/up/lora/lora_{}", "dr", "rf", "mlp.up"),
    "qwix heads": ("attn/q/kernel_lora_{}", "dr", "rnh", "attn.q"),
    "out of heads": ("attn/o/w_lora_{}", "nhr", "rd", "attn.o"),
    "two in a module": ("attn/kv_einsum_lora_{}", "dr", "rxnh", "attn.kv_einsum"),
    "stack in front": ("layers/up/lora_{}", "Ldr", "Lrf", "layers.{}.up"),
    "stack at axis 1": ("layers/q/kernel_lora_{}", "dLr", "rLnh", "layers.{}.q"),
    "layers of experts": ("m/w_lora_{}", "LEdr", "LErf", "m.{}.experts.{}.w"),
    "bare names": ("q/lora/{}", "dr", "rnh", "q"),
}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_file_holds_the_product_of_every_layer(layout, tmp_path):
    """B·A of each entry is the dense weight `out × in` of its layer."""
    path, a_axes, b_axes, name = LAYOUTS[layout]
    tree = tree_of(path, a_axes, b_axes)
    options = {"module_names": {".*": name}} if "{}" in name else {}
    if "stack at" in layout:
        options["stack_axis"] = 1

    save_peft_adapter(tmp_path, tree, alpha=3.0, **options)

    a, b = jax.tree.leaves(tree)
    stack = "".join(x for x in a_axes if x.isupper())
    inputs, outputs = (
        "".join(x for x in axes if x.islower() and x != "r")
        for axes in (a_axes, b_axes)
    )
    dense = np.einsum(f"{a_axes},{b_axes}->{stack}{outputs}{inputs}", a, b)
    count = math.prod(SIZES[x] for x in outputs)
    tensors, config = read(tmp_path)
    indices = list(np.ndindex(*(SIZES[x] for x in stack)))
    assert len(tensors) == 2 * len(indices)
    assert (config["r"], config["lora_alpha"]) == (2, 3)
    for index in indices:
        module = name.format(*index)
        assert module in config["target_modules"]
        key = f"base_model.model.{module}.lora_{{}}.weight".format
        product = tensors[key("B")] @ tensors[key("A")]
        want = dense[index].reshape(count, -1)
        np.testing.assert_allclose(product, want, rtol=1e-5, atol=1e-6)
        # Negative control: heads in another order are another matrix.
        if len(outputs) > 1:
            other = np.moveaxis(dense[index], 0, len(outputs) - 1).reshape(count, -1)
            assert np.abs(product - other).max() > 1e-2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_was_saved_comes_back_bit_for_bit(layout, dtype, tmp_path):
    path, a_axes, b_axes, name = LAYOUTS[layout]
    tree = tree_of(path, a_axes, b_axes, dtype=dtype)
    options = {"alpha": 3.0, "module_names": {".*": name}}
    if "stack at" in layout:
        options["stack_axis"] = 1
    save_peft_adapter(tmp_path, tree, **options)

    template = jax.tree.map(jnp.zeros_like, tree)
    back = load_peft_adapter(tmp_path, template, **options)

    chex.assert_trees_all_equal_shapes_and_dtypes(back, tree)
    chex.assert_trees_all_equal(back, tree)
    with pytest.raises(AssertionError):  # negative control
        chex.assert_trees_all_equal(back, template)
    assert not any(np.any(x) for x in jax.tree.leaves(template))  # left alone


def test_convolutions_have_their_channels_first_and_come_back(tmp_path):
    tree = tree_of("conv/kernel_lora_{}", "xwcr", "rf")
    save_peft_adapter(tmp_path, tree, conv="conv")
    tensors, _ = read(tmp_path)
    a, b = jax.tree.leaves(tree)
    key = "base_model.model.conv.lora_{}.weight".format
    np.testing.assert_array_equal(tensors[key("A")], np.einsum("xwcr->rcxw", a))
    np.testing.assert_array_equal(tensors[key("B")][:, :, 0, 0], b.T)
    assert tensors[key("B")].shape == (5, 2, 1, 1)
    solid = tree_of("conv/lora_{}", "wdxcr", "rf")
    for kernel in (tree, solid):
        save_peft_adapter(tmp_path, kernel, conv="conv")
        chex.assert_trees_all_equal(load_peft_adapter(tmp_path, kernel), kernel)


def test_factors_in_pytorch_order_are_saved_as_they_are(tmp_path):
    tree = {"q": {"lora_A": {"weight": jnp.ones((2, 6))},
                  "lora_B": {"weight": 2 * jnp.ones((5, 2))}}}  # fmt: skip
    save_peft_adapter(tmp_path, tree)
    tensors, _ = read(tmp_path)
    assert tensors["base_model.model.q.lora_A.weight"].shape == (2, 6)
    chex.assert_trees_all_equal(load_peft_adapter(tmp_path, tree), tree)


def test_embeddings_have_their_own_keys(tmp_path):
    tree = tree_of("words/lora_embeddings_{}", "dr", "rf")
    save_peft_adapter(tmp_path, tree)
    prefix = "base_model.model.words.lora_embedding_"
    assert read(tmp_path)[0].keys() == {f"{prefix}A", f"{prefix}B"}
    chex.assert_trees_all_equal(load_peft_adapter(tmp_path, tree), tree)

    plain = tree_of("words/lora_{}", "dr", "rf")
    save_peft_adapter(tmp_path / "plain", plain, embedding="words")
    assert read(tmp_path / "plain")[0].keys() == {f"{prefix}A", f"{prefix}B"}
    chex.assert_trees_all_equal(load_peft_adapter(tmp_path / "plain", plain), plain)


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_alphas_that_differ_become_patterns(rslora, tmp_path):
    tree = {f"q{i}": tree_of("lora_{}", "dr", "rf") for i in range(3)}
    tree["block"] = {"q0": {"lora_a": jnp.ones((6, 4)), "lora_b": jnp.ones((4, 5))}}
    alpha = {"^q0": 1.5, ".*": 16}
    save_peft_adapter(tmp_path, tree, alpha=alpha, rslora=rslora)
    _, config = read(tmp_path)
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (2, 16, rslora)
    assert config["rank_pattern"] == {r"^block\.q0": 4}
    assert config["alpha_pattern"] == {"^q0": 1.5}  # and not that of block.q0
    back = load_peft_adapter(tmp_path, tree, alpha=alpha, rslora=rslora)
    chex.assert_trees_all_equal(back, tree)


def test_product_is_kept_where_the_scales_differ(tmp_path):
    tree = pair_tree()
    save_peft_adapter(tmp_path, tree, scale=3.0)
    back = load_peft_adapter(tmp_path, tree, scale=0.5)["mlp"]["up"]
    chex.assert_trees_all_equal(back["lora_a"], tree["mlp"]["up"]["lora_a"])
    chex.assert_trees_all_close(
        0.5 * back["lora_b"], 3.0 * tree["mlp"]["up"]["lora_b"], rtol=1e-6
    )


def test_explicit_pairs_and_a_function_for_the_names(tmp_path):
    leaves = [jnp.ones((6, 2)), jnp.ones((5,)), jnp.ones((2, 5))]
    options = {"pairs": [LoRAPair("0", "2")], "module_names": lambda pair: "dense"}
    save_peft_adapter(tmp_path, leaves, **options)
    assert read(tmp_path)[1]["target_modules"] == ["dense"]
    back = load_peft_adapter(tmp_path, [2 * x for x in leaves], **options)
    chex.assert_trees_all_equal(back, [leaves[0], 2 * leaves[1], leaves[2]])


def test_leaves_beside_the_factors_stay_what_they_are(tmp_path):
    tree = pair_tree() | {"head": jnp.ones(3)}
    save_peft_adapter(tmp_path, tree)
    assert load_peft_adapter(tmp_path, tree)["head"] is tree["head"]


def test_factors_keep_the_sharding_of_the_template(tmp_path):
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    tree = pair_tree()
    specs = {"lora_a": P("x"), "lora_b": P()}
    shardings = {"mlp": {"up": {k: NamedSharding(mesh, p) for k, p in specs.items()}}}
    sharded = jax.device_put(tree, shardings)
    save_peft_adapter(tmp_path, sharded)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), sharded
    )
    for template in (sharded, abstract):
        back = load_peft_adapter(tmp_path, template)
        chex.assert_trees_all_equal(back, tree)
        assert jax.tree.map(lambda x: x.sharding, back) == shardings
    plain = load_peft_adapter(tmp_path, tree)["mlp"]["up"]["lora_a"]
    assert not plain.committed  # may go to any mesh


# Each spoils a good adapter or asks for another; the message says what is wrong.


def test_truncated_file_is_one_error(tmp_path):
    save_peft_adapter(tmp_path, pair_tree())
    good = (tmp_path / WEIGHTS).read_bytes()
    for size in (0, 5, 40, len(good) - 1):
        (tmp_path / WEIGHTS).write_bytes(good[:size])
        with pytest.raises(ValueError, match=r"safetensors` is damaged or was not wr"):
            load_peft_adapter(tmp_path, pair_tree())
    (tmp_path / WEIGHTS).write_bytes(good)
    load_peft_adapter(tmp_path, pair_tree())  # control


def test_damaged_or_missing_configuration_is_one_error(tmp_path):
    save_peft_adapter(tmp_path, pair_tree())
    for text in ('{"r": 2', "[]", "\udcff"):
        (tmp_path / CONFIG).write_text(text, errors="surrogateescape")
        with pytest.raises(ValueError, match=CONFIG):
            load_peft_adapter(tmp_path, pair_tree())
    (tmp_path / CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json"):
        load_peft_adapter(tmp_path, pair_tree())
    save_peft_adapter(tmp_path / "inner", pair_tree())
    with pytest.raises(FileNotFoundError, match=r"adapters in its folders \['inner'\]"):
        load_peft_adapter(tmp_path, pair_tree())


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"peft_type": "VERA"}, "`peft_type` is 'VERA'"),
        ({"use_dora": True}, "`use_dora`"),
        ({"alora_invocation_tokens": [3]}, "`alora_invocation_tokens`"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
        ({"r": None}, "`r` is None, no whole number above 0"),
        ({"lora_alpha": "x"}, "`lora_alpha` is 'x'"),
        ({"lora_alpha": math.nan}, "`lora_alpha` is nan"),
        ({"alpha_pattern": {"up": None}}, r"`alpha_pattern\['up'\]` is None"),
        ({"alpha_pattern": [1]}, r"`alpha_pattern` is \[1\], no mapping"),
        ({"rank_pattern": {"(": 2}}, "is no regex"),
        (
            {"r": 4},
            r"gives `mlp\.up` rank 4 and scale 0\.5, but .* rank 2 and scale 1",
        ),
        ({"rank_pattern": {"up": 8}}, r"rank 8 and scale 0\.25, but"),
    ],
)
def test_configuration_of_another_adapter_is_one_error(entries, match, tmp_path):
    save_peft_adapter(tmp_path, pair_tree())
    config = read(tmp_path)[1] | entries
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=match) as error:
        load_peft_adapter(tmp_path, pair_tree())
    assert str(tmp_path) in str(error.value)


def test_all_differences_of_the_layers_are_in_one_message(tmp_path):
    saved = {"one": pair_tree(), "two": pair_tree(), "three": pair_tree()}
    save_peft_adapter(tmp_path, saved)
    other = tree_of("mlp/up/lora_{}", "cr", "rf")  # c features instead of d
    template = {"one": other, "two": pair_tree(), "four": pair_tree()}
    with pytest.raises(ValueError, match="adapter and tree differ") as error:
        load_peft_adapter(tmp_path, template)
    key = "base_model.model.{}.mlp.up.lora_A.weight".format
    for part in (
        f"missing in the file: `{key('four')}`",
        f"in the file, not in the tree: `{key('three')}`",
        f"`{key('one')}` has shape (2, 6), but (2, 4) is due for `one/mlp/up/lora_a`",
    ):
        assert part in str(error.value)
    assert "two" not in str(error.value)


def test_a_weight_that_is_no_factor_is_left_out_only_on_request(tmp_path):
    save_peft_adapter(tmp_path, pair_tree())
    tensors, _ = read(tmp_path)
    head = {"base_model.model.classifier.weight": np.ones((2, 2), np.float32)}
    safetensors.numpy.save_file(tensors | head, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"classifier\.weight`.* `ignore=` leaves out"):
        load_peft_adapter(tmp_path, pair_tree())
    back = load_peft_adapter(tmp_path, pair_tree(), ignore=r"classifier\.weight$")
    chex.assert_trees_all_equal(back, pair_tree())


def test_wrong_names_of_many_layers_show_both_sides(tmp_path):
    tree = {f"l{i}": pair_tree() for i in range(12)}
    save_peft_adapter(tmp_path, tree)
    names = {"l(.*)/mlp/up": r"layer.\1.up"}
    with pytest.raises(ValueError, match="missing in the file") as error:
        load_peft_adapter(tmp_path, tree, module_names=names)
    for part in (
        "layer.0.up",
        "not in the tree: `base_model.model.l0.mlp.up",
        "20 more",
    ):
        assert part in str(error.value)


def test_rescaled_factors_are_as_precise_as_the_tree(tmp_path):
    """And a factor that the tree cannot hold is an error, not inf."""
    tree = jax.tree.map(lambda x: x.astype(jnp.bfloat16), pair_tree())
    save_peft_adapter(tmp_path, tree, scale=1.5)
    back = load_peft_adapter(tmp_path, pair_tree(1), scale=1.7)["mlp"]["up"]["lora_b"]
    exact = np.asarray(tree["mlp"]["up"]["lora_b"], np.float64) * (1.5 / 1.7)
    np.testing.assert_allclose(back, exact, rtol=1e-6)
    assert np.abs(exact.astype(jnp.bfloat16) - exact).max() > 1e-3  # control

    half = jax.tree.map(lambda x: x.astype(jnp.float16), pair_tree())
    load_peft_adapter(tmp_path, half, scale=1.0)
    with pytest.raises(ValueError, match=r"lora_b` does not fit float16"):
        load_peft_adapter(tmp_path, half, scale=1e-6)


@pytest.mark.parametrize(
    ("tree", "match"),
    [
        (jax.eval_shape(pair_tree), "ShapeDtypeStruct"),
        (pair_tree(dtype=jnp.float8_e4m3fn), "float8_e4m3fn"),
    ],
)
def test_factors_that_pytorch_cannot_hold_are_errors(tree, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        save_peft_adapter(tmp_path, tree)


@pytest.mark.parametrize(
    "name", ["l.{}.q", "{", "{x}", r"\2", "\1", None, 3, "", "a/b", "two words"]
)
def test_names_that_cannot_be_are_errors(name, tmp_path):
    for names in ({".*": name}, lambda pair: name):
        if callable(names) and name == r"\2":
            continue  # a function's name is not a template of groups
        with pytest.raises(ValueError, match=r"`mlp/up/lora_a`") as error:
            save_peft_adapter(tmp_path, pair_tree(), module_names=names)
        assert "module_names=" in str(error.value)


def test_braces_in_paths_and_groups_are_just_letters(tmp_path):
    tree = {"q{x}": pair_tree()["mlp"]["up"]}
    save_peft_adapter(tmp_path, tree)
    assert read(tmp_path)[1]["target_modules"] == ["q{x}"]
    save_peft_adapter(tmp_path, tree, module_names={"(.*)": r"m.\1"})
    assert read(tmp_path)[1]["target_modules"] == ["m.q{x}"]


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (
            {"config": {"use_rslora": True}},
            ValueError,
            r"\['use_rslora'\], which follow",
        ),
        ({"module_names": "x"}, TypeError, "module_names='x'"),
        ({"module_names": {"(": "x"}}, ValueError, "'\\(' of `module_names=`"),
        ({"conv": "("}, ValueError, r"'\(' of `conv=` is no regular expression"),
        ({"embedding": 3}, ValueError, "3 of `embedding=` is no regular expression"),
    ],
)
def test_options_that_cannot_be_are_errors(options, error, match, tmp_path):
    with pytest.raises(error, match=match):
        save_peft_adapter(tmp_path / "adapter", pair_tree(), **options)
    assert not (tmp_path / "adapter").exists()


def test_integer_weights_are_refused(tmp_path):
    save_peft_adapter(tmp_path, pair_tree())
    tensors, _ = read(tmp_path)
    whole = {name: x.astype(np.int8) for name, x in tensors.items()}
    safetensors.numpy.save_file(whole, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="dtype int8"):
        load_peft_adapter(tmp_path, pair_tree())


@pytest.mark.parametrize(
    ("tree", "options", "match"),
    [
        ({"head": jnp.ones(3)}, {}, "No LoRA pair among the 1 leaves"),
        (tree_of("lora_{}", "dr", "rf"), {}, "the PyTorch name ''"),
        (pair_tree(), {"module_names": {"mlp": "m"}}, "matches the whole of 'mlp/up'"),
        (tree_of("l/lora_{}", "Ldr", "Lrf"), {}, r"Put `\{\}` into the name"),
        ({"a": pair_tree(), "b": pair_tree()}, {"module_names": {".*": "m"}},
         "a layer of `a/mlp/up/lora_a` would have the same PyTorch name, 'm'"),
    ],
)  # fmt: skip
def test_layers_without_a_name_of_their_own_are_errors(tree, options, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        save_peft_adapter(tmp_path / "adapter", tree, **options)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("fails", ["save_file", "dumps", "fsync"])
def test_failed_save_leaves_the_old_adapter_alone(fails, tmp_path, monkeypatch):
    save_peft_adapter(tmp_path, pair_tree())
    (tmp_path / "README.md").write_text("mine")
    before = contents(tmp_path)

    def broken(*args, **kwargs):
        raise OSError("disk full")

    owner = {"save_file": "safetensors.numpy", "dumps": "json", "fsync": "os"}[fails]
    with monkeypatch.context() as patch:
        patch.setattr(f"{owner}.{fails}", broken)
        with pytest.raises(OSError, match="disk full"):
            save_peft_adapter(tmp_path, pair_tree(seed=1), scale=2.0)
    assert contents(tmp_path) == before

    save_peft_adapter(tmp_path, pair_tree(seed=1), scale=2.0)  # control
    after = contents(tmp_path)
    assert after.keys() == before.keys()
    assert after["README.md"] == b"mine"
    assert all(after[name] != before[name] for name in (WEIGHTS, CONFIG))


def test_without_safetensors_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['safetensors'] = None\n"
        "import jax.numpy as jnp\n"
        "from lorapro_jax.peft import save_peft_adapter\n"
        "up = {'lora_a': jnp.ones((6, 2)), 'lora_b': jnp.ones((2, 5))}\n"
        "save_peft_adapter('unused', {'up': up})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True
    )
    assert "pip install 'lorapro_jax[peft]'" in result.stderr
