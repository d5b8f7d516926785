"""The leaves of a tree by their paths."""

from collections.abc import Iterable, Sequence
from numbers import Number
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ._names import normalize_path

FREEZE = (
    "`optax.partition({'train': tx, 'frozen': optax.set_to_zero()}, labels)` with "
    "'frozen' at both factors"
)
"""How a pair is frozen. Never `optax.masked`, which passes gradients through."""


class Leaf(NamedTuple):
    """A leaf of a tree.

    Attributes:
      position: Its position among all leaves.
      value: The leaf itself.
      unique: Whether no other leaf has the same normalised path.
    """

    position: int
    value: Any
    unique: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)


def index_leaves(tree: Any) -> dict[str, Leaf]:
    """The leaves of a tree by normalised path; the last one where two share it."""
    leaves: dict[str, Leaf] = {}
    for index, (path, value) in enumerate(jax.tree_util.tree_leaves_with_path(tree)):
        name = normalize_path(path)
        leaves[name] = Leaf(index, value, unique=name not in leaves)
    return leaves


def check_factor(path: str, leaf: Leaf) -> None:
    """Raises ValueError where a leaf cannot be a factor, whatever its partner is."""
    if not leaf.unique:
        raise ValueError(
            f"Two leaves have the path `{path}` once containers such as `.value` are "
            "left out, so it does not say which one is the factor. Rename one of them."
        )
    if not (hasattr(leaf.value, "shape") and hasattr(leaf.value, "dtype")):
        raise ValueError(
            f"`{path}` is named like a LoRA factor, but it is a "
            f"{type(leaf.value).__name__}, not an array. Pass the factors as arrays, "
            "or say with `pairs=` which leaves are the factors."
        )
    if not jnp.issubdtype(leaf.value.dtype, jnp.floating):
        raise ValueError(
            f"`{path}` has dtype {leaf.value.dtype}. LoRA-Pro adjusts real floating "
            "point factors. If this adapter does not train, leave it out of what you "
            f"differentiate, or freeze it: {FREEZE}. If it does, name all other pairs "
            "with `pairs=`, and it counts as any other leaf."
        )


def check_arrays(tree: Any) -> None:
    """Raises ValueError for a leaf that no optimizer can train: text, a function."""
    for path, leaf in index_leaves(tree).items():
        dtype = getattr(leaf.value, "dtype", None)
        if isinstance(dtype, np.dtype) and dtype.kind in "USO":
            kind = f"an array of dtype {dtype}"
        elif isinstance(leaf.value, Number) or hasattr(leaf.value, "shape"):
            continue
        else:
            kind = f"a {type(leaf.value).__name__}"
        raise ValueError(
            f"`{path}` is {kind}, no array of numbers. Put None in its place, in the "
            "parameters and in the gradients."
        )


def is_placeholder(tree: Any) -> bool:
    """Whether a tree is what `optax.tree.map_params` calls `init` with.

    It stands for any tree of parameters, and has no leaf.
    """
    nodes = jax.tree.leaves(tree, is_leaf=_is_of_optax)
    return bool(nodes) and all(map(_is_of_optax, nodes))


def masked_paths(tree: Any) -> set[str]:
    """The paths at which a tree has no leaf because it is masked or None."""
    empty = lambda x: x is None or isinstance(x, optax.MaskedNode)
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=empty)
    return {normalize_path(path) for path, leaf in found if empty(leaf)}


def is_under(path: str, parents: Iterable[str]) -> bool:
    """Whether a path is one of others, or below one."""
    parts: Sequence[str] = path.split("/")
    above = {"/".join(parts[:n]) for n in range(len(parts) + 1)}
    return not above.isdisjoint(parents)


def _is_of_optax(node: Any) -> bool:
    """Its placeholder is private, and has had no other name."""
    return type(node).__name__ == "_ParamsPlaceholder"
