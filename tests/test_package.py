"""The package as it is installed: its imports, its names, its documentation."""

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import lorapro_jax

ROOT = Path(__file__).parent.parent


def modules_after(statement):
    """The modules that a fresh interpreter has loaded after `statement`."""
    code = f"import sys; {statement}; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    return set(result.stdout.split())


def test_import_loads_neither_flax_nor_orbax():
    loaded = modules_after("import lorapro_jax")
    assert {"jax", "optax"} <= loaded
    assert not {"flax", "orbax", "orbax.checkpoint", "chex", "qwix"} & loaded


def test_control_the_check_above_sees_an_import():
    assert "flax" in modules_after("import lorapro_jax, flax")


def test_facade_is_complete_and_typed():
    names = {
        name
        for name, value in vars(lorapro_jax).items()
        if not (name.startswith("_") or isinstance(value, ModuleType))
    }
    assert names == {
        "LoRAPair", "RankTable", "ScaleByLoRAProAdamState", "allocate_ranks",
        "describe_pairs", "equivalent_gradient", "estimate_gradients", "find_pairs",
        "initialize_adapters", "initialize_model", "lorapro", "lorapro_adamw",
        "scale_by_lorapro_adam",
    }  # fmt: skip
    assert (Path(lorapro_jax.__file__).parent / "py.typed").exists()
    for name in names:
        assert getattr(lorapro_jax, name).__doc__


def test_version_is_that_of_the_metadata_and_of_the_changelog():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    version = pyproject["project"]["version"]
    assert lorapro_jax.__version__ == importlib.metadata.version("lorapro_jax")
    assert lorapro_jax.__version__ == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_oldest_versions_tested_are_those_declared():
    """`.ci/oldest.txt` pins what pyproject.toml promises."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    declared = {x.replace(">=", "==") for x in pyproject["project"]["dependencies"]}
    pinned = set((ROOT / ".ci" / "oldest.txt").read_text().split())
    assert declared <= pinned


@pytest.mark.parametrize("path", sorted((ROOT / "lorapro_jax").glob("*.py")))
def test_modules_stay_small(path):
    assert len(path.read_text().splitlines()) <= 250
