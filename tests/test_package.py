"""The package as it is installed: its imports, its names, its documentation."""

import importlib.metadata
import inspect
import pydoc
import re
import subprocess
import sys
import tomllib
import typing
from pathlib import Path

import pytest

import lorapro_jax

ROOT = Path(__file__).parents[1]
FUNCTIONS = {
    "allocate_ranks", "describe_pairs", "equivalent_gradient", "estimate_gradients",
    "find_pairs", "initialize_adapters", "initialize_model", "lora_rite", "lorapro",
    "lorapro_adamw", "merge_adapters", "merge_model", "resize_adapters",
    "scale_by_lora_rite", "scale_by_lorapro_adam", "stochastic_rounding",
}  # fmt: skip
CLASSES = {
    "LoRAPair", "RankTable", "Resized", "ScaleByLoRAProAdamState",
    "ScaleByLoRARiteState",
}  # fmt: skip
MODULES = {"diagnostics", "initializers", "keras", "peft"}


def printed_by(code):
    """The words that a fresh interpreter prints."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return set(result.stdout.split())


def modules_after(statement):
    """The modules that a fresh interpreter has loaded after `statement`."""
    return printed_by(f"import sys; {statement}; print(*sys.modules)")


def test_import_loads_neither_flax_nor_orbax():
    loaded = modules_after("import lorapro_jax")
    assert {"jax", "optax"} <= loaded
    assert not {"flax", "orbax", "orbax.checkpoint", "chex", "qwix"} & loaded


def test_control_the_check_above_sees_an_import():
    assert "flax" in modules_after("import lorapro_jax, flax")


def test_modules_load_when_they_are_used():
    """After `import lorapro_jax` alone; the facade itself needs but two of them."""
    code = """
import sys
import lorapro_jax
before = set(sys.modules)
assert not {"lorapro_jax.peft", "lorapro_jax.keras"} & before
lorapro_jax.initializers.pissa()
lorapro_jax.peft.save_peft_adapter
lorapro_jax.diagnostics.equivalent_gradient
lorapro_jax.keras.keras_pairs
print(*sys.modules)
"""
    loaded = printed_by(code)
    assert {f"lorapro_jax.{name}" for name in MODULES} <= loaded
    assert not {"flax", "orbax", "keras", "safetensors"} & loaded


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"'lorapro_jax' has no attribute 'adam'"):
        _ = lorapro_jax.adam


def test_facade_is_complete_and_typed():
    assert set(lorapro_jax.__all__) == FUNCTIONS | CLASSES
    assert set(dir(lorapro_jax)) == FUNCTIONS | CLASSES | MODULES | {"__version__"}
    assert (ROOT / "lorapro_jax" / "py.typed").exists()
    for name in lorapro_jax.__all__:
        assert getattr(lorapro_jax, name).__doc__


def test_help_shows_the_public_functions_before_anything_else():
    """The docstring is a list of them, and comes first."""
    text = re.sub(".\x08", "", pydoc.render_doc(lorapro_jax))  # bold as on a terminal
    overview = text[: text.index("PACKAGE CONTENTS")]
    for name in FUNCTIONS | {f"lorapro_jax.{name}" for name in MODULES}:
        assert name in overview, name


def public_functions():
    """Those of the facade and of the public modules, by their full names."""
    modules = [lorapro_jax, *(getattr(lorapro_jax, name) for name in sorted(MODULES))]
    return {
        f"{module.__name__}.{name}": function
        for module in modules
        for name in module.__all__
        if inspect.isfunction(function := getattr(module, name))
    }


def long_annotations(function):
    """Parameters whose annotation `help()` prints as no name and no short union."""
    parameters = inspect.signature(function).parameters.values()
    shown = {x.name: inspect.formatannotation(x.annotation) for x in parameters}
    return {name: text for name, text in shown.items() if len(text) > 50}


@pytest.mark.parametrize("name", public_functions())
def test_signatures_print_aliases_as_such_and_the_names_in_them_exist(name):
    function = public_functions()[name]
    assert long_annotations(function) == {}
    assert typing.get_type_hints(function).keys() >= {"return"}


def test_control_an_alias_that_expands_is_long():
    def function(scale=1.0): ...

    hints = typing.get_type_hints(lorapro_jax.lorapro)
    function.__annotations__ = {"scale": hints["scale"]}
    assert long_annotations(function).keys() == {"scale"}


def test_options_of_lorapro_have_to_be_named():
    """Else `lorapro(1e-3)` would take a learning rate for a scale."""
    with pytest.raises(TypeError, match="positional argument"):
        lorapro_jax.lorapro(1e-3)


def test_version_is_that_of_the_metadata_and_of_the_changelog():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    version = pyproject["project"]["version"]
    assert lorapro_jax.__version__ == importlib.metadata.version("lorapro_jax")
    assert lorapro_jax.__version__ == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def missing_in_sdist(included):
    """The files that README leads to or tests read, and that no sdist would have."""
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / "README.md").read_text())
    assert len(links) > 10
    names = [".ci/run", ".ci/oldest.txt", "CITATION.cff", "CHANGELOG.md", "mkdocs.yml"]
    has = lambda path: any(f"/{path}/".startswith(f"{x}/") for x in included)
    return [path for path in [*links, *names] if not has(path)]


def test_the_sdist_has_what_the_readme_links_to():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    included = pyproject["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert missing_in_sdist(included) == []
    assert all((ROOT / path[1:]).exists() for path in included)
    # Negative control: a folder that is left out is missed.
    assert missing_in_sdist(set(included) - {"/.ci"})


def test_oldest_versions_tested_are_those_declared():
    """`.ci/oldest.txt` pins what pyproject.toml promises."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    declared = {x.replace(">=", "==") for x in pyproject["project"]["dependencies"]}
    pinned = set((ROOT / ".ci" / "oldest.txt").read_text().split())
    assert declared <= pinned
