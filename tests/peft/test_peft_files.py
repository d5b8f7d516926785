"""The files of an adapter: permissions, kills between them, leftovers."""

import os
import stat

import chex
import jax.numpy as jnp
import pytest
import safetensors.numpy

from lorapro_jax.peft import load_peft_adapter, save_peft_adapter
from tests.support.peft_files import CONFIG, WEIGHTS, pair_tree, read

pytestmark = pytest.mark.usefixtures("quick_compiles")


def modes(folder):
    return [stat.S_IMODE((folder / name).stat().st_mode) for name in (WEIGHTS, CONFIG)]


@pytest.fixture
def umask():
    """Sets it, and sets it back."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0, 0o666)])
def test_new_files_have_the_permissions_of_new_files(mask, mode, umask, tmp_path):
    umask(mask)
    save_peft_adapter(tmp_path, pair_tree())
    assert modes(tmp_path) == [mode, mode]


def test_files_that_are_replaced_keep_their_permissions(umask, tmp_path):
    save_peft_adapter(tmp_path, pair_tree())
    (tmp_path / WEIGHTS).chmod(0o664)
    (tmp_path / CONFIG).chmod(0o600)
    umask(0o077)
    save_peft_adapter(tmp_path, pair_tree(seed=1))
    assert modes(tmp_path) == [0o664, 0o600]
    chex.assert_trees_all_equal(
        load_peft_adapter(tmp_path, pair_tree()), pair_tree(seed=1)
    )


class Killed(BaseException):
    """As a process that ends: nothing is tidied up."""


@pytest.mark.parametrize(
    ("old", "new", "loads"),
    [
        ({"scale": 1.0}, {"scale": 2.0}, False),
        ({"alpha": 4.0}, {"alpha": 4.0, "rslora": True}, False),
        ({"scale": 2.0}, {"scale": 2.0}, True),
    ],
)
def test_a_kill_between_the_two_files_does_not_load(
    old, new, loads, tmp_path, monkeypatch
):
    """New weights with the old configuration; where both say the same, they load."""
    save_peft_adapter(tmp_path, pair_tree(), **old)
    replace, count = os.replace, []

    def killed(self, target):
        count.append(target)
        if len(count) == 2:
            raise Killed
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.replace", killed)
        patch.setattr("pathlib.Path.unlink", lambda self, missing_ok: None)
        with pytest.raises(Killed):
            save_peft_adapter(tmp_path, pair_tree(seed=1), **new)
    if loads:
        back = load_peft_adapter(tmp_path, pair_tree(), **old)
        chex.assert_trees_all_equal(back, pair_tree(seed=1))
    else:
        match = r"adapter_config\.json gives `mlp\.up` .* A save was cut short"
        with pytest.raises(ValueError, match=match):
            load_peft_adapter(tmp_path, pair_tree(), **new)

    # The next save is whole again, and removes what the kill has left.
    assert any(x.name.startswith(".") for x in tmp_path.iterdir())
    (tmp_path / ".adapter_model.safetensors-mine").write_text("mine")
    save_peft_adapter(tmp_path, pair_tree(seed=2))
    left = {x.name for x in tmp_path.iterdir()}
    assert left == {WEIGHTS, CONFIG, ".adapter_model.safetensors-mine"}
    back = load_peft_adapter(tmp_path, pair_tree())
    chex.assert_trees_all_equal(back, pair_tree(seed=2))


def test_the_weights_know_the_rank_and_scale_of_every_module(tmp_path):
    tree = {
        "q": pair_tree(),
        "k": {"lora_a": jnp.ones((6, 3)), "lora_b": jnp.ones((3, 5))},
    }
    save_peft_adapter(tmp_path, tree, scale={"k": 0.5, ".*": 2.0})
    with safetensors.safe_open(tmp_path / WEIGHTS, framework="np") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert metadata["lora_modules"] == '{"k": [3, 0.5], "q.mlp.up": [2, 2.0]}'


@pytest.mark.parametrize(
    "text", ["[", "[1]", '{"x": 3}', '{"x": ["a", 1]}', "[" * 10**5]
)
def test_damaged_metadata_is_one_error(text, tmp_path):
    save_peft_adapter(tmp_path, pair_tree())
    tensors, _ = read(tmp_path)
    safetensors.numpy.save_file(
        tensors, tmp_path / WEIGHTS, metadata={"lora_modules": text}
    )
    with pytest.raises(ValueError, match="'lora_modules' of the metadata"):
        load_peft_adapter(tmp_path, pair_tree())
