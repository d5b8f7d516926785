"""Parts of an NNX model that it uses in several places.

A state has each Variable once, and does not show who else computes with it.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from ..pairs._names import normalize_path

Path = tuple[Any, ...]


def check_unshared(
    model: Any, places: Mapping[str, Path], merges: Sequence[Sequence[str]]
) -> None:
    """Raises ValueError where a weight or a factor is used without the others.

    What lies below the module that has all three may be used by that module alone:
    otherwise a layer without the adapter would get it, or one with it would lose it.

    Args:
      model: The model.
      places: The key path of each leaf of its state.
      merges: The paths of A, of B and of the base weight of each pair.
    """
    from flax import nnx

    uses = Counter(id(x) for x in _edges(model))
    nodes = {_key(path): x for path, x in nnx.iter_graph(model)}
    for paths in merges:
        keys = [_key(places[path]) for path in paths]
        owner = _common(keys)
        for key in keys:
            for length in range(owner + 1, len(key) + 1):
                if uses[id(nodes.get(key[:length]))] > 1:
                    raise ValueError(_message(paths, normalize_path(key[:length])))


def _key(path: Path) -> tuple[str, ...]:
    return tuple(map(str, path))


def _common(keys: Sequence[tuple[str, ...]]) -> int:
    """How many parts of all paths are the same, from the first on."""
    same = [len(set(parts)) == 1 for parts in zip(*keys, strict=False)]
    return same.index(False) if False in same else len(same)


def _edges(model: Any) -> Iterator[Any]:
    """Every part of a model, as often as another one has it."""
    seen, todo = {id(model)}, [model]
    while todo:
        for child in _children(todo.pop()):
            yield child
            if id(child) not in seen:
                seen.add(id(child))
                todo.append(child)


def _children(node: Any) -> list[Any]:
    from flax import nnx

    if isinstance(node, nnx.Variable | jax.Array):
        return []
    if isinstance(node, nnx.Module | getattr(nnx, "Pytree", nnx.Module)):
        return list(vars(node).values())
    return [
        x
        for x in jax.tree.leaves(node, is_leaf=lambda x: x is not node)
        if x is not node
    ]


def _message(paths: Sequence[str], shared: str) -> str:
    return (
        f"`{shared}` is in several places of the model, so that it is used without the "
        f"rest of `{paths[0]}`, `{paths[1]}` and `{paths[2]}`: a layer without the "
        "adapter would get it, or one with it would lose it. Give one of the places a "
        "copy first: `module.x = nnx.clone(module.x)`."
    )
