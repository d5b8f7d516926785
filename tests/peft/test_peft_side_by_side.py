"""Pairs that are several modules in PyTorch, and experts that share a parameter."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorapro_jax.peft import load_peft_adapter, save_peft_adapter
from tests.support.peft_files import SIZES, pair_tree, read, tree_of, written_by_another

pytestmark = pytest.mark.usefixtures("quick_compiles")

KEY = "base_model.model.{}.lora_{}.weight".format

# Path, axes of A and B (see `SIZES`), names and where they lie, stacked axes; and the
# letter of that axis.
LAYOUTS: dict[str, Any] = {
    "kv_einsum": ("kv_w_lora_{}", "dr", "rxnh", (["k", "v"], 1), (), "x"),
    "the last axis": ("kv_w_lora_{}", "dr", "rnx", (["k", "v"], -1), (), "x"),
    "stacked": ("kv_lora_{}", "Ldr", "Lrxnh", (["{}.k", "{}.v"], 2), None, "x"),
    "experts of one B": (
        "kv_w_lora_{}", "Edr", "rf", ([f"e{i}" for i in range(3)], 0, "a"), (), "E",
    ),
    "halves of an axis": ("kv_w_lora_{}", "dr", "rc", (["k", "v"], 1), (), "c"),
}  # fmt: skip


def products(folder, names):
    """s B A of each module of a file."""
    tensors, config = read(folder)
    scale = config["lora_alpha"] / config["r"]
    return [scale * tensors[KEY(x, "B")] @ tensors[KEY(x, "A")] for x in names]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_module_gets_its_part_of_the_product(layout, tmp_path):
    path, a_axes, b_axes, names, stack_axis, letter = LAYOUTS[layout]
    tree = tree_of(path, a_axes, b_axes)
    options = {"stack_axis": stack_axis, "module_names": {".*": names}, "alpha": 3.0}

    save_peft_adapter(tmp_path, tree, **options)

    a, b = jax.tree.leaves(tree)
    stack = "L" if "L" in a_axes else ""
    rest = lambda axes: "".join(x for x in axes if x not in "rL" + letter)
    out = f"{stack}{letter}{rest(b_axes)}{rest(a_axes)}"
    dense = 1.5 * np.einsum(f"{a_axes},{b_axes}->{out}", a, b)
    dense = dense[None] if not stack else dense
    for layer, want in enumerate(dense):
        found = products(tmp_path, [x.format(layer) for x in names[0]])
        assert len(found) == len(names[0])
        rows = np.split(want, len(found))  # the parts, in equal shares of the axis
        matrices = [x.reshape(found[0].shape) for x in rows]
        np.testing.assert_allclose(found, matrices, rtol=1e-5, atol=1e-6)
        assert np.abs(found[0] - matrices[1]).max() > 1e-2  # control: their order

    back = load_peft_adapter(tmp_path, jax.tree.map(jnp.zeros_like, tree), **options)
    chex.assert_trees_all_equal(back, tree)


def test_modules_with_an_a_each_need_the_sum_of_their_ranks(tmp_path):
    """[A1; A2] and [B1, 0], [0, B2], exact; with a rank and a scale each."""
    names, shape = ["m.k", "m.v"], (SIZES["n"], SIZES["h"])
    tree = {
        "m": {
            "k": {"lora_a": jnp.ones((6, 2)), "lora_b": 2 * jnp.ones((2, 6))},
            "v": tree_of("lora_{}", "dr", "rd", seed=1),
        }
    }
    tree["m"]["v"] = {
        "lora_a": jnp.arange(18.0).reshape(6, 3),
        "lora_b": jnp.arange(18.0).reshape(3, 6),
    }
    save_peft_adapter(tmp_path, tree, scale={"m/k": 2.0, "m/v": 0.5})
    tensors, _ = read(tmp_path)
    scales = {"m.k": 2.0, "m.v": 0.5}
    due = [scales[x] * tensors[KEY(x, "B")] @ tensors[KEY(x, "A")] for x in names]

    wide = {"kv_w": {"lora_a": jnp.ones((6, 5)), "lora_b": jnp.ones((5, 2, *shape))}}
    options = {"module_names": {".*": (names, 1)}, "scale": 4.0, "stack_axis": ()}
    back = load_peft_adapter(tmp_path, wide, **options)["kv_w"]

    dense = 4.0 * np.einsum("dr,rxnh->xnhd", back["lora_a"], back["lora_b"])
    np.testing.assert_allclose(dense.reshape(2, 6, 6), due, rtol=1e-6)
    narrow = {"kv_w": {"lora_a": jnp.ones((6, 3)), "lora_b": jnp.ones((3, 2, *shape))}}
    match = r"\['m\.k', 'm\.v'\] have an A each .* rank 2 \+ 3 = 5, here 3"
    with pytest.raises(ValueError, match=match):
        load_peft_adapter(tmp_path, narrow, **options)


@pytest.mark.parametrize(
    ("names", "match"),
    [
        ((["k", "v"], 0), r"along axis 0 of `kv_w_lora_b` \(2, 2, 2, 3\).*\(1, 2, 3\)"),
        ((["k", "v"], 3), "of a size that 2 divides"),
        ((["k", "v"], "x"), "along axis 'x'"),
        ((["k", "v"], 7), "along axis 7"),
        ((["k"], 1), "Several modules are"),
        ((["k", "v"],), "Several modules are"),
        ((), "Several modules are"),
        ((["k", "v"], 1, "c"), "Several modules are"),
        ((["k", "k"], 1), "the same PyTorch name, 'k'"),
        ((["k", 3], 1), "cannot be filled in"),
    ],
)
def test_modules_that_cannot_lie_there_are_errors(names, match, tmp_path):
    tree = tree_of("kv_w_lora_{}", "dr", "rxnh")
    with pytest.raises(ValueError, match=match) as error:
        save_peft_adapter(tmp_path / "x", tree, module_names={".*": names})
    assert "kv_w_lora" in str(error.value)
    assert "module_names=" in str(error.value)
    assert not (tmp_path / "x").exists()


# --- Experts in one parameter, as PEFT's `ParamWrapper` reads them ---


def of_parameter(tensors, module, experts):
    """`ParamWrapper.get_delta_weight` of PEFT 0.19 and later, for `(E, out, in)`."""
    a, b = (tensors[KEY(module, side)] for side in "AB")
    a = a.reshape(experts, -1, a.shape[-1])
    b = b.reshape(len(b), -1, experts)
    return np.einsum("ore,eri->eoi", b, a)


EXPERTS = {
    "in front": ("LEdr", "LErf", "l.{}.x.", None),
    "before the layers": ("ELdr", "ELrf", "l.{1}.x.", None),
    "without layers": ("Edr", "Erf", "l.0.x.", 0),
}


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("layout", EXPERTS)
def test_experts_share_the_tensors_of_their_parameter(layout, swapped, tmp_path):
    a_axes, b_axes, template, stack_axis = EXPERTS[layout]
    tree = {
        name: tree_of("lora_{}", a_axes, b_axes, seed=seed)
        for seed, name in enumerate(("up", "down"))
    }
    end = ".T" if swapped else ""
    options = {
        "module_names": {"(.*)": template + r"\1"}, "alpha": 3.0,
        "target_parameters": (f"up{end}", f"x.down{end}"), "stack_axis": stack_axis,
    }  # fmt: skip

    save_peft_adapter(tmp_path, tree, **options)

    tensors, config = read(tmp_path)
    layers = range(SIZES["L"] if "L" in a_axes else 1)
    due = sorted(f"l.{i}.x.{name}" for i in layers for name in tree)
    assert config["target_parameters"] == due
    assert (config["target_modules"], config["r"]) == ([], 2)
    transposed = "fd" if not swapped else "df"
    for name, module in (("up", "l.{}.x.base_layer"), ("down", "l.{}.x")):
        a, b = tree[name].values()
        out = ("L" if len(layers) > 1 else "") + "E" + transposed
        dense = np.einsum(f"{a_axes},{b_axes}->{out}", a, b)
        for i in layers:
            got = of_parameter(tensors, module.format(i), SIZES["E"])
            want = dense[i] if len(layers) > 1 else dense
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
            assert np.abs(got - want[::-1]).max() > 1e-2  # control: their order

    back = load_peft_adapter(tmp_path, jax.tree.map(jnp.zeros_like, tree), **options)
    chex.assert_trees_all_equal(back, tree)


def test_experts_of_other_scales_share_one(tmp_path):
    """PEFT has one alpha a parameter: B takes up the ratios, both ways."""
    tree = tree_of("up/lora_{}", "Edr", "Erf")
    options = {
        "module_names": {"up": "x.up"}, "target_parameters": ["up"], "stack_axis": 0,
    }  # fmt: skip
    scales = np.array([2.0, 3.0, 2.0])
    save_peft_adapter(tmp_path, tree, scale=scales, **options)
    assert read(tmp_path)[1]["lora_alpha"] == 4  # s = 2, most common
    new = np.array([1.0, 0.5, 4.0])
    back = load_peft_adapter(tmp_path, tree, scale=new, **options)
    dense = lambda x, s: s[:, None, None] * (x["lora_a"] @ x["lora_b"])
    want = dense(tree["up"], scales)
    np.testing.assert_allclose(dense(back["up"], new), want, rtol=1e-5, atol=1e-6)
    assert np.abs(dense(back["up"], scales) - want).max() > 1e-2  # control


def test_one_parameter_alone_has_no_wrapper_around_it(tmp_path):
    """And of a file with both, one can be read if the order of both is known."""
    tree = {x: tree_of("lora_{}", "Edr", "Erf") for x in ("up", "down")}
    options = {"module_names": {"(.*)": r"x.\1"}, "stack_axis": 0}
    both = {**options, "target_parameters": ("up", "down")}
    save_peft_adapter(tmp_path / "one", {"up": tree["up"]}, **both)
    assert KEY("x", "A") in read(tmp_path / "one")[0]

    save_peft_adapter(tmp_path / "two", tree, **both)
    some = {"up": tree["up"]}
    back = load_peft_adapter(tmp_path / "two", some, ignore=r"x\.lora", **both)
    chex.assert_trees_all_equal(back, some)
    with pytest.raises(ValueError, match=r"adapts the parameters .* `target_parameter"):
        load_peft_adapter(tmp_path / "two", pair_tree())


@pytest.mark.parametrize(
    ("tree", "options", "match"),
    [
        (
            tree_of("up/lora_{}", "LEdr", "LErf"), {"module_names": {"up": "x.up"}},
            "2 stacked axes, and the name of its parameter mentions 0",
        ),
        (pair_tree(), {"target_parameters": "up"}, "has to be a tuple of names"),
        (pair_tree(), {"target_parameters": [3]}, "has to be a tuple of names"),
        (pair_tree(), {"target_parameters": []}, "has to be a tuple of names"),
        (
            tree_of("kv_w_lora_{}", "dr", "rxnh"),
            {"module_names": {".*": (["x.up", "x.v"], 1)}}, "modules and parameters",
        ),
    ],
)  # fmt: skip
def test_parameters_that_cannot_be_are_errors(tree, options, match, tmp_path):
    options = {"target_parameters": ["up"], **options}
    with pytest.raises(ValueError, match=match):
        save_peft_adapter(tmp_path / "x", tree, **options)
    assert not (tmp_path / "x").exists()


def test_a_file_without_the_parameter_is_an_error(tmp_path):
    save_peft_adapter(tmp_path, pair_tree())
    written_by_another(tmp_path)
    with pytest.raises(ValueError, match=r"`target_parameters` \[\] have no `mlp\.up`"):
        load_peft_adapter(tmp_path, pair_tree(), target_parameters=["up"])


def test_a_weight_beside_wrapped_parameters_is_inside_of_the_wrappers(tmp_path):
    tree = {x: tree_of("lora_{}", "Edr", "Erf") for x in ("up", "down")}
    tree["up"]["up_bias"] = jnp.ones((3, 5))
    options = {
        "module_names": {"(.*)": r"x.\1"}, "stack_axis": 0,
        "target_parameters": ("up", "down"), "extra": {"up/up_bias": "x.up_bias"},
    }  # fmt: skip
    save_peft_adapter(tmp_path, tree, **options)
    tensors, config = read(tmp_path)
    inside = tensors["base_model.model.x.base_layer.base_layer.up_bias"]
    assert inside.shape == (3, 5)
    assert (config["bias"], config["modules_to_save"]) == ("none", None)
    back = load_peft_adapter(tmp_path, jax.tree.map(jnp.zeros_like, tree), **options)
    np.testing.assert_array_equal(back["up"]["up_bias"], np.ones((3, 5)))
