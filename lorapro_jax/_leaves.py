"""The leaves of a tree by their paths."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from ._paths import normalize_path


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
            "point factors; freeze this adapter with `optax.masked`, or split complex "
            "factors with `optax.contrib.split_real_and_imaginary`."
        )


def masked_paths(tree: Any) -> set[str]:
    """The paths at which a tree has no leaf because it is masked or None."""
    empty = lambda x: x is None or isinstance(x, optax.MaskedNode)
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=empty)
    return {normalize_path(path) for path, leaf in found if empty(leaf)}


def to_host(x: Any) -> np.ndarray:
    """An array in NumPy; from a mesh of several processes, all of it in each."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)
