"""A tree without some of its leaves."""

from collections.abc import Collection, Mapping
from typing import Any

import jax

from ..pairs._names import normalize_path


def without(tree: Any, paths: Collection[str]) -> Any:
    """A tree without the leaves at some paths, and without what held nothing else.

    Args:
      tree: Of mappings, also within lists and tuples, with any leaves.
      paths: Those of leaves, normalised.

    Raises:
      ValueError: One is not in a mapping. A list would number the rest anew, and
        other nodes have all of their fields.
    """
    return _pruned((), tree, paths)


def _pruned(above: tuple[Any, ...], node: Any, paths: Collection[str]) -> Any:
    """A node, without what is at the paths."""
    inside = _inside(above, node, paths)
    if not any(inside.values()):
        return node
    if isinstance(node, Mapping):
        kept = {
            key: _pruned((*above, key), x, paths)
            for key, x in node.items()
            if not _is_all((*above, key), x, paths)
        }
        return type(node)(kept)  # type: ignore[call-arg]
    if type(node) in (list, tuple) and not any(
        _is_all((*above, i), x, paths) for i, x in enumerate(node)
    ):
        return type(node)(_pruned((*above, i), x, paths) for i, x in enumerate(node))
    path = next(path for path, gone in inside.items() if gone)
    raise ValueError(
        f"`{path}` cannot be removed: it is in a {type(node).__name__}, which is no "
        "mapping. Merge with `remove=False`, where B becomes 0, and take what is "
        "needed out of the result."
    )


def _is_all(above: tuple[Any, ...], node: Any, paths: Collection[str]) -> bool:
    """Whether a node has leaves, and all of them go."""
    inside = _inside(above, node, paths)
    return bool(inside) and all(inside.values())


def _inside(
    above: tuple[Any, ...], node: Any, paths: Collection[str]
) -> dict[str, bool]:
    """The paths of all leaves of a node, and which of them go."""
    leaves = jax.tree_util.tree_leaves_with_path(node)
    start = tuple(map(str, above))
    found = (
        normalize_path("/".join([*start, normalize_path(path)])) for path, _ in leaves
    )
    return {path: path in paths for path in found}
