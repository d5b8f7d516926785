"""Stacks whose layers have scales of their own, as PEFT's patterns of alphas."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorapro_jax.peft import load_peft_adapter, save_peft_adapter
from lorapro_jax.peft._config import numbers_by
from tests.support.peft_files import SIZES, read, tree_of

ALPHAS = np.array([8.0, 8.0, 3.0, 16.0])  # of the layers L
NAMES = {"mlp/up": "layers.{}.up", "head": "head"}


def stacked(seed=0, dtype=jnp.float32):
    stack = tree_of("mlp/up/lora_{}", "Ldr", "Lrf", seed, dtype)
    return stack | tree_of("head/lora_{}", "dr", "rf", seed + 1, dtype)


def products(tree, scales):
    """s A B of every layer, and of the head."""
    layers = tree["mlp"]["up"]
    of = lambda pair: pair["lora_a"].astype(float) @ pair["lora_b"].astype(float)
    return scales[:, None, None] * of(layers), of(tree["head"])


@pytest.mark.parametrize(
    ("option", "rslora"), [("alpha", False), ("alpha", True), ("scale", False)]
)
def test_each_module_gets_its_own_alpha(tmp_path, option, rslora):
    values = {"up": ALPHAS, "head": 8.0}
    options = {"alpha": values, "rslora": rslora}
    if option == "scale":
        options = {"scale": {key: x / SIZES["r"] for key, x in values.items()}}

    save_peft_adapter(tmp_path, stacked(), module_names=NAMES, **options)

    _, config = read(tmp_path)
    assert config["use_rslora"] == rslora
    patterns = {r"^layers\.2\.up": 3, r"^layers\.3\.up": 16}
    assert (config["lora_alpha"], config["alpha_pattern"]) == (8, patterns)
    back = load_peft_adapter(tmp_path, stacked(5), module_names=NAMES, **options)
    for x, y in zip(*map(jax.tree.leaves, (back, stacked())), strict=True):
        np.testing.assert_array_equal(x, y)  # equal scales: the file's bits


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_each_layer_of_b_takes_up_its_own_ratio(tmp_path, dtype):
    tree, rank = stacked(dtype=dtype), SIZES["r"]
    options = {"module_names": NAMES}
    save_peft_adapter(tmp_path, tree, alpha={"up": ALPHAS, "head": 2.0}, **options)
    new = np.array([1.0, 4.0, 1.5, 0.5])

    back = load_peft_adapter(
        tmp_path, stacked(5, dtype), scale={"up": new, "head": 1.0}, **options
    )

    tolerance = float(jnp.finfo(dtype).eps) * 8
    got, due = products(back, new), products(tree, ALPHAS / rank)
    for x, y in zip(got, due, strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)
    layer = lambda tree, i: np.asarray(tree["mlp"]["up"]["lora_b"][i])
    np.testing.assert_array_equal(layer(back, 1), layer(tree, 1))  # 4 both times
    assert not np.allclose(layer(back, 0), layer(tree, 0))  # negative control


def test_two_stacked_axes_have_a_scale_each(tmp_path):
    tree = tree_of("up/lora_{}", "LEdr", "LErf")
    alphas = 2.0 * np.arange(1, 13).reshape(4, 3)
    names = {"up": "layers.{}.experts.{}"}

    save_peft_adapter(tmp_path, tree, alpha=alphas, module_names=names)

    _, config = read(tmp_path)
    due = {f"layers.{i}.experts.{j}": alphas[i, j] for i, j in np.ndindex(4, 3)}
    default, pattern = config["lora_alpha"], config["alpha_pattern"]
    found = {name: pattern.get("^" + name.replace(".", r"\."), default) for name in due}
    assert found == due
    assert len(set(due.values())) == 12


PATTERNS = [r"^l\.0\.q-x", "q-x", r"l\..*", r".*\.q-x", "^l", r"^l\.1", "1"]
MODULES = ["l.0.q-x", "m.l.0.q-x", "l.1", "l", "q-x", "m.1", "l.0.q-xx"]


def test_the_first_pattern_that_fits_counts_as_in_peft():
    """Also where our own, for one name, stand among others'."""

    def as_in_peft(pattern, name, default):
        """Restates `get_pattern_key`."""
        for key, value in pattern.items():
            if re.match(rf"(.*\.)?({key})$", name):
                return value
        return default

    found = set()
    for chosen in itertools.permutations(PATTERNS, 3):
        alphas = {key: 10.0 + i for i, key in enumerate(chosen)}
        ranks = dict(zip(chosen[1:], (3, 4), strict=True))
        config = {
            "r": 2, "lora_alpha": 1.0, "alpha_pattern": alphas, "rank_pattern": ranks
        }  # fmt: skip
        for name in MODULES:
            rank = as_in_peft(ranks, name, 2)
            due = (rank, as_in_peft(alphas, name, 1.0) / rank)
            assert numbers_by(config)(name) == due
            found.add(due)
    assert len(found) > 5  # control: defaults, and each of the patterns
