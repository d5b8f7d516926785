"""PEFT files of another rank than the tree's."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorapro_jax.peft import load_peft_adapter, save_peft_adapter
from tests.support.peft_files import SIZES, pair_tree, read, tree_of, written_by_another

pytestmark = pytest.mark.usefixtures("quick_compiles")

TOLERANCE = 1e-5  # of the largest entry: QR and SVD in float32


def closest(matrix, rank):
    """The closest matrix of a rank, by NumPy in float64."""
    u, values, vt = np.linalg.svd(np.float64(matrix))
    return (u[:, :rank] * values[:rank]) @ vt[:rank]


def with_rank(tree, rank):
    """A template of another rank: the axis of 2 in these trees."""
    sized = lambda x: jnp.zeros([rank if n == SIZES["r"] else n for n in x.shape])
    return jax.tree.map(sized, tree)


def dense(pair, scale=1.0):
    """s A B, `(..., in, out)`."""
    a, b = (np.float64(x) for x in pair.values())
    return scale * a @ b


def test_a_lower_rank_is_the_closest_product(tmp_path):
    """In each layer of a stack."""
    tree = tree_of("mlp/up/lora_{}", "Ldr", "Lrf")
    names = {"module_names": {".*": "l.{}"}}
    save_peft_adapter(tmp_path, tree, scale=3.0, **names)
    template = with_rank(tree, 1)

    back = load_peft_adapter(tmp_path, template, scale=0.5, resize=True, **names)

    due = [closest(x, 1) for x in dense(tree["mlp"]["up"], 3.0)]
    got = dense(back["mlp"]["up"], 0.5)
    size = np.abs(due).max()
    np.testing.assert_allclose(got, due, atol=TOLERANCE * size)
    assert np.abs(got - dense(tree["mlp"]["up"], 3.0)).max() > 0.1 * size  # control
    chex.assert_trees_all_equal_shapes_and_dtypes(back, template)


def test_a_higher_rank_is_the_same_product_with_more_directions(tmp_path):
    tree = pair_tree()
    save_peft_adapter(tmp_path, tree)
    back = load_peft_adapter(tmp_path, with_rank(tree, 4), resize=True)["mlp"]["up"]
    old = tree["mlp"]["up"]
    np.testing.assert_array_equal(back["lora_a"][:, :2], old["lora_a"])
    np.testing.assert_array_equal(back["lora_b"][:2], old["lora_b"])
    assert not np.any(back["lora_b"][2:])
    assert np.linalg.matrix_rank(back["lora_a"]) == 4  # and no two files differ
    again = load_peft_adapter(tmp_path, with_rank(tree, 4), resize=True)
    chex.assert_trees_all_equal(again["mlp"]["up"], back)


def test_equal_ranks_keep_their_bits(tmp_path):
    tree = pair_tree(dtype=jnp.bfloat16)
    save_peft_adapter(tmp_path, tree)
    chex.assert_trees_all_equal(load_peft_adapter(tmp_path, tree, resize=True), tree)


def test_a_stack_takes_layers_of_several_ranks(tmp_path):
    """Ranks 2 and 3 by `rank_pattern`, to rank 2."""
    tree = {
        "0": pair_tree(),
        "1": {"lora_a": jnp.ones((6, 3)), "lora_b": jnp.eye(3, 5)},
    }
    names = {"0/mlp/up": "l.0", "1": "l.1"}
    save_peft_adapter(tmp_path, tree, module_names=names)
    stack = {"lora_a": jnp.zeros((2, 6, 2)), "lora_b": jnp.zeros((2, 2, 5))}
    options = {"module_names": {".*": "l.{}"}, "stack_axis": 0}
    with pytest.raises(ValueError, match=r"`l\.1` has rank 3 .*`resize=True`"):
        load_peft_adapter(tmp_path, {"up": stack}, **options)
    back = load_peft_adapter(tmp_path, {"up": stack}, resize=True, **options)["up"]
    due = dense(tree["0"]["mlp"]["up"]), closest(dense(tree["1"]), 2)
    np.testing.assert_allclose(dense(back), due, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 4, 6])
def test_modules_with_an_a_each_are_as_close_as_one_pair_can_be(rank, tmp_path):
    """k_proj and v_proj of rank 2: exact from rank 4 on."""
    tree = {x: tree_of("lora_{}", "dr", "rf", seed) for seed, x in enumerate("kv")}
    save_peft_adapter(tmp_path, tree)
    whole = np.concatenate([dense(tree[x]) for x in "kv"], axis=1)
    template = {
        "kv_w": {"lora_a": jnp.zeros((6, rank)), "lora_b": jnp.zeros((rank, 2, 5))}
    }
    back = load_peft_adapter(
        tmp_path, template, resize=True, module_names={".*": (["k", "v"], 1)},
        stack_axis=(),
    )["kv_w"]  # fmt: skip
    got = np.einsum("dr,rxf->dxf", *(np.float64(x) for x in back.values()))
    due = closest(whole, rank)
    size = np.abs(whole).max()
    np.testing.assert_allclose(got.reshape(6, 10), due, atol=TOLERANCE * size)
    assert (np.abs(due - whole).max() < 1e-9) == (rank >= 4)  # what is exact


def test_convolutions_and_experts_are_resized_layer_by_layer(tmp_path):
    conv = tree_of("conv/kernel_lora_{}", "xwcr", "rf")
    save_peft_adapter(tmp_path / "conv", conv, conv="conv")
    small = {"conv": {
        "kernel_lora_a": jnp.zeros((2, 3, 4, 1)), "kernel_lora_b": jnp.zeros((1, 5))
    }}  # fmt: skip
    back = load_peft_adapter(tmp_path / "conv", small, resize=True)["conv"]
    flat = lambda x: dense({k: v.reshape(-1, v.shape[-1]) for k, v in x.items()})
    due = closest(flat(conv["conv"]), 1)
    np.testing.assert_allclose(flat(back), due, atol=1e-5)

    experts = tree_of("up/lora_{}", "Edr", "Erf")
    options = {
        "module_names": {"up": "x.up"}, "target_parameters": ["up"], "stack_axis": 0,
    }  # fmt: skip
    save_peft_adapter(tmp_path / "moe", experts, **options)
    template = with_rank(experts, 1)
    back = load_peft_adapter(tmp_path / "moe", template, resize=True, **options)
    due = [closest(x, 1) for x in dense(experts["up"])]
    np.testing.assert_allclose(dense(back["up"]), due, atol=1e-5)


def test_ranks_of_the_configuration_are_still_checked(tmp_path):
    save_peft_adapter(tmp_path, pair_tree())
    written_by_another(tmp_path, {"r": 3})
    with pytest.raises(ValueError, match="rank 3 in the configuration, and 2 in its A"):
        load_peft_adapter(tmp_path, pair_tree(), resize=True)
    assert read(tmp_path)[1]["r"] == 3
