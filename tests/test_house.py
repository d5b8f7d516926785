"""The order of the rooms: which imports which, read from the source; and sizes."""

import ast
import graphlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lorapro_jax"
SOURCES = {
    path.relative_to(PACKAGE).as_posix(): path.read_text()
    for path in PACKAGE.rglob("*.py")
}
GROUND = ["_checks", "_placement"]  # for every room, and importing none
ROOMS = [
    "algebra", "pairs", "transforms", "optimizers", "weights", "initializers", "ranks",
    "peft",
]  # fmt: skip
TOP = ["diagnostics", "keras"]
MAY_IMPORT = {
    **{name: set() for name in GROUND},
    **{room: {room, *GROUND, *ROOMS[:i]} for i, room in enumerate(ROOMS)},
    **{name: {name, *GROUND, *ROOMS} for name in TOP},
}
LINES, FUNCTION_LINES = 250, 60


def module_of(path):
    """`("algebra", "_linalg")` of `algebra/_linalg.py`."""
    parts = path.removesuffix(".py").split("/")
    return tuple(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path, source, modules):
    """The modules of the package that a module imports, anywhere in it."""
    folder = path.split("/")[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            targets = [tuple(x[1:]) for x in names if x[0] == "lorapro_jax"]
        elif isinstance(node, ast.ImportFrom):
            target = node.module.split(".") if node.module else []
            if node.level:
                target = folder[: len(folder) - node.level + 1] + target
            elif target[0] == "lorapro_jax":
                target = target[1:]
            else:
                continue
            # What is imported may be a module itself.
            inner = [(*target, alias.name) for alias in node.names]
            targets = [x if x in modules else tuple(target) for x in inner]
        else:
            continue
        found |= set(targets)
    return found


def graph_of(sources):
    """Of every module those that it imports, the facade apart."""
    modules = {module_of(path): path for path in sources}
    return {
        module: imports_of(path, sources[path], modules)
        for module, path in modules.items()
        if module
    }


def wrong_rooms(sources):
    """Imports of a room, or of the facade, that the order does not allow."""
    return [
        f"{'/'.join(module)} imports {'/'.join(target) or 'the facade'}"
        for module, targets in graph_of(sources).items()
        for target in targets
        if not target or target[0] not in MAY_IMPORT.get(module[0], ())
    ]


def cycle(sources):
    """Modules that import each other, in a circle."""
    try:
        graphlib.TopologicalSorter(graph_of(sources)).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def is_factory(node):
    """Whether a function makes a transform."""
    is_function = isinstance(node, ast.FunctionDef)
    return is_function and "GradientTransformation" in ast.unparse(node.returns or node)


def is_rule(node):
    """Whether a class is the rule of an optimizer."""
    if not isinstance(node, ast.ClassDef):
        return False
    names = {x.name for x in node.body if isinstance(x, ast.FunctionDef)}
    return {"init", "update"} <= names


def tied_optimizers(sources):
    """Files of optimizers that import a factory's file, or one rule another."""
    having = lambda kind: {
        module_of(path)
        for path, source in sources.items()
        if path.startswith("optimizers/") and any(map(kind, ast.parse(source).body))
    }
    factories, rules = having(is_factory), having(is_rule)
    return [
        f"{module[1]} imports {target[1]}"
        for module, targets in graph_of(sources).items()
        for target in targets
        if module[0] == "optimizers"
        and (target in factories or (module in rules and target in rules))
    ]


def long_ones(sources):
    """Modules and functions that are too long; docstrings of functions do not count."""
    result = [x for x, y in sources.items() if len(y.splitlines()) > LINES]
    for path, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            count = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                count -= node.body[0].end_lineno - node.body[0].lineno + 1
            if count > FUNCTION_LINES:
                result.append(f"{path}: {node.name}")
    return result


def test_every_module_is_in_a_room():
    names = {module[0] for module in graph_of(SOURCES)}
    assert names == MAY_IMPORT.keys()
    assert ("algebra", "_linalg") in graph_of(SOURCES)["algebra", "_spectra"]


@pytest.mark.parametrize("check", [wrong_rooms, cycle, tied_optimizers, long_ones])
def test_the_house_is_in_order(check):
    assert check(SOURCES) == []


BROKEN = {
    "ground imports a room": (
        wrong_rooms, {"_checks.py": "from .pairs._axes import LoRAPair"},
    ),
    "algebra imports pairs": (
        wrong_rooms, {"algebra/_x.py": "from ..pairs import _axes"},
    ),
    "pairs import transforms": (
        wrong_rooms, {"pairs/_x.py": "from ..transforms._view import View"},
    ),
    "transforms import an optimizer": (
        wrong_rooms, {"transforms/_x.py": "def f():\n  from ..optimizers import _rite"},
    ),
    "weights import a later room": (
        wrong_rooms, {"weights/_x.py": "from ..initializers import lora"},
    ),
    "ranks import diagnostics": (
        wrong_rooms, {"ranks/_x.py": "import lorapro_jax.diagnostics"},
    ),
    "a room imports the facade": (
        wrong_rooms, {"peft/_x.py": "from lorapro_jax import find_pairs"},
    ),
    "another room": (wrong_rooms, {"utils/_x.py": "from .._checks import some"}),
    "two modules import each other": (
        cycle,
        {"ranks/_x.py": "from ._y import f", "ranks/_y.py": "from . import _x"},
    ),
    "an optimizer imports another": (
        tied_optimizers, {"optimizers/_x.py": "from ._lorapro import lorapro"},
    ),
    "a rule imports another": (
        tied_optimizers,
        {
            "optimizers/_x.py": "from ._rite_rule import Rite\nclass X:\n"
            "  def init(self): pass\n  def update(self): pass",
        },
    ),
    "a long module": (long_ones, {"pairs/_x.py": "x = 1\n" * 251}),
    "a long function": (long_ones, {"keras.py": "def f():\n" + "  x = 1\n" * 60}),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_control_a_broken_rule_is_seen(case):
    check, made_up = BROKEN[case]
    assert check({**SOURCES, **made_up})


def test_control_what_is_allowed_passes():
    docstring = '  """' + "x\n" * 100 + '"""\n'
    made_up = {
        "optimizers/_x.py": "from ..algebra import _thin\nfrom . import _moments",
        "keras.py": "from .pairs._find import find_pairs\nimport jax.numpy as jnp",
        "ranks/_x.py": "def f():\n" + docstring + "  x = 1\n" * 59,
    }
    for check in (wrong_rooms, cycle, tied_optimizers, long_ones):
        assert check({**SOURCES, **made_up}) == []
