"""Which library was this docstring written for? Real text, without a download.

The libraries are installed wherever the example runs. Their files are parsed and
never imported. A file belongs to training, validation or test as a whole; the names
of the libraries are masked; what remains are the prose before the first section and
how it is worded.
"""

import ast
import functools
import gc
import hashlib
import importlib.metadata
import importlib.util
import platform
import re
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# What would give the library away, by label: its own name and what it is called by.
LIBRARIES = {
    "jax": ("jnp", "lax", "xla", "hlo", "stablehlo", "pallas"),
    "flax": ("nnx", "linen"),
    "optax": (),
    "orbax": ("ocp",),
    "numpy": ("np", "ndarray", "ndarrays"),
    "scipy": (),
    "matplotlib": ("mpl", "pyplot", "plt"),
    "python": ("cpython", "pep"),  # the standard library
}
MASK = "[MASK]"
SPLITS = ("train", "validation", "test")
SHARES = (0.6, 0.2, 0.2)  # of the files
CAPS = (200, 40, 64)  # texts of one library in each split
SHORTEST = 60  # characters: less than that says too little
PREFIX = 100  # two texts that begin with the same letters count as one

_NAME = re.compile(
    rf"\w*(?:{'|'.join(LIBRARIES)})\w*"  # also matplotlibrc, jaxpr, PyNumpy
    rf"|\b(?:{'|'.join(word for words in LIBRARIES.values() for word in words)})\b",
    re.IGNORECASE,
)
_ROLE = re.compile(r":[\w:]+:(?=`)")  # :func:`name`
_SECTION = re.compile(
    r"^\s*(?:\.\. .*|>>> .*|```.*|[-=~^]{3,}|(?:args|arguments|parameters?|returns?|"
    r"yields|raises|examples?|notes?|see also|references|attributes|methods|usage|"
    r"warnings?|warns|keyword arguments|inputs?|outputs?)\s*:{0,2})\s*$",
    re.IGNORECASE | re.MULTILINE,
)


class Text(NamedTuple):
    """A docstring: what is left of it, whose it is, and the file it stood in."""

    text: str
    label: str
    file: str


def load_texts(
    caps: tuple[int, int, int] = CAPS, prefix: int = PREFIX
) -> dict[str, list[Text]]:
    """The three splits; the same on every machine with the same versions.

    Args:
      caps: The most texts of one library in each split.
      prefix: How many letters have to agree for two texts to count as one. Of such
        texts one is kept if all are of one library, and else none.

    Returns:
      `{"train": texts, "validation": texts, "test": texts}`, in pseudo-random order.
    """
    texts = sorted(
        (text for label in LIBRARIES for text in read_library(label)),
        key=lambda text: _hash(text.file + text.text),
    )
    same: dict[str, list[Text]] = {}
    for text in texts:
        same.setdefault(re.sub(r"\W", "", text.text.lower())[:prefix], []).append(text)

    splits: dict[str, list[Text]] = {name: [] for name in SPLITS}
    room = {(n, k): c for n, c in zip(SPLITS, caps, strict=True) for k in LIBRARIES}
    for first, *others in same.values():
        name = split_of(first.file)
        ours = all(other.label == first.label for other in others)
        if ours and room[name, first.label]:
            room[name, first.label] -= 1
            splits[name].append(first)
    return splits


def split_of(file: str) -> str:
    """The split that a file belongs to, by a hash of its name."""
    place, total = int(_hash(file)[:8], 16) / 2**32, 0.0
    for name, share in zip(SPLITS, SHARES, strict=True):
        total += share
        if place < total:
            return name
    return SPLITS[-1]


@functools.cache
def read_library(label: str) -> tuple[Text, ...]:
    """All docstrings of a library that say enough."""
    root, found = _root(label), []
    for path in sorted(root.rglob("*.py")):
        file = path.relative_to(root)
        # Other people's code within it, tests, and what not every machine has.
        if re.search(r"test|site-packages|_vendor|lib2to3|idlelib", file.as_posix()):
            continue
        try:
            tree = _parse(path.read_bytes())
        except SyntaxError:  # templates
            continue
        for node in _statements(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = clean(ast.get_docstring(node) or "")
                if len(text) >= SHORTEST:
                    found.append(Text(text, label, f"{label}/{file.as_posix()}"))
    return tuple(found)


def clean(docstring: str) -> str:
    """The prose before the first section, without markup, the names masked."""
    text = textwrap.dedent(_SECTION.split(docstring, maxsplit=1)[0])
    text = _ROLE.sub("", text).replace("`", "").replace("~", "")
    return " ".join(_NAME.sub(MASK, text).split())


def versions() -> dict[str, str]:
    """Of the libraries, because the texts change with them."""
    names = {"orbax": "orbax-checkpoint"}
    return {
        label: platform.python_version()
        if label == "python"
        else importlib.metadata.version(names.get(label, label))
        for label in LIBRARIES
    }


def _root(label: str) -> Path:
    """The folder of a library; finding it does not import it."""
    if label == "python":
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(label)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{label} is not installed: its docstrings are data")
    return Path(next(iter(spec.submodule_search_locations)))


def _parse(source: bytes) -> ast.Module:
    """Without the garbage collector, which each big tree would wake several times."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(source)
    finally:
        if was_enabled:
            gc.enable()


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """All of a file; without the expressions, which are most of `ast.walk`."""
    todo = [tree]
    while todo:
        node = todo.pop()
        yield node
        for field in ("body", "orelse", "finalbody", "handlers", "cases"):
            todo += getattr(node, field, [])


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
