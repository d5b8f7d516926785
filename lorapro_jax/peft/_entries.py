"""The entries of a PEFT file that the leaves of a tree get: checked and read."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, cast

import jax.numpy as jnp
import numpy as np

from ..algebra._axes import Shape
from ._arrays import feature_shapes
from ._config import Numbers
from ._extra import Extra, Place, from_torch, torch_shape
from ._files import Adapter
from ._keys import PREFIX, Keys, find_keys
from ._matrices import Layer, from_tensors, join_shared, tensor_shapes, times
from ._problems import Problems
from ._resized import resize_layers
from ._targets import Target
from ._templates import Index


class Source(NamedTuple):
    """A file, and where the modules of a tree are in it.

    Attributes:
      adapter: What the folder holds.
      keys: What its keys mean.
      wrappers: What the file calls the module of a parameter.
      numbers: The rank and scale of a module or parameter by the configuration.
    """

    adapter: Adapter
    keys: Keys
    wrappers: Mapping[str, str]
    numbers: Callable[[str], Numbers]

    def pair(self, name: str) -> tuple[str, str]:
        """The keys of A and B of a module or parameter."""
        return find_keys(self.keys, self.wrappers.get(name, name))


def check_entries(
    source: Source,
    targets: Sequence[Target],
    extras: Sequence[Extra],
    ignored: re.Pattern[str] | None,
    *,
    resize: bool,
) -> None:
    """Raises ValueError that lists what is not the same in file and tree.

    Args:
      source: The file.
      targets: The pairs of the tree that the entries are for.
      extras: The other leaves that they are for.
      ignored: A regex for the entries that may lack a place in the tree.
      resize: Whether layers may have other ranks than in the tree.
    """
    tensors, problems = source.adapter.tensors, Problems()
    due: set[str] = set()
    for target in targets:
        for index, names in target.naming.modules.items():
            keys = [key for name in names for key in source.pair(name)]
            due.update(keys)
            lacking = [key for key in keys if key not in tensors]
            problems.missing += lacking
            if lacking:
                continue
            wrong = [x for name in names for x in _differences(source, target, name)]
            problems.wrong += wrong
            if not (wrong or resize):
                problems.ranks += _wrong_rank(source, target, index)
    for extra in extras:
        for places in extra.places.values():
            keys = [source.keys.others.get(x, PREFIX + x) for x, _ in places]
            due.update(keys)
            problems.missing += [key for key in keys if key not in tensors]
            problems.wrong += _wrong_extra(source, extra, places, keys)
    modules = {source.wrappers.get(x, x) for target in targets for x in target.names}
    factors = set(source.keys.factors.values())
    for key in sorted(source.keys.own - due):
        if source.keys.beside.get(key) in modules:
            problems.beside.append(key)
        elif not (ignored and ignored.search(key)):
            kind = problems.factors if key in factors else problems.weights
            kind.append(key)
    adapted = source.adapter.config.get("target_parameters")
    problems.check([] if source.wrappers else adapted or [])


def read_factors(source: Source, target: Target) -> list[np.ndarray]:
    """A and B in the axes of the tree.

    Each layer takes up the ratio of the file's scale to its own, so that the product
    s B A is the file's, or the closest one of the tree's rank.
    """
    layers = {
        index: _read_layer(source, target, index, scale)
        for index, scale in target.scales.items()
    }
    return target.put(layers)


def read_extra(source: Source, extra: Extra) -> np.ndarray:
    """A leaf that is no factor, in the axes of the tree."""
    firsts = [places[0] for places in extra.places.values()]
    found = [
        from_torch(source.adapter.tensors[source.keys.others[x.name]], extra, x)
        for x in firsts
    ]
    return np.stack(found).reshape(extra.shape)


def _read_layer(
    source: Source, target: Target, index: Index, scale: np.ndarray
) -> list[Layer]:
    """One layer of a pair, for each of the modules that lie side by side."""
    side = target.split.side if target.split else 1
    layers = []
    for name in target.naming.modules[index]:
        a, b = (source.adapter.tensors[key] for key in source.pair(name))
        layer = from_tensors(a, b, target.experts)
        if target.naming.swapped:
            layer = Layer(layer.b, layer.a)
        found = source.numbers(name).scale
        scaled = times(layer[side], found / scale)
        if not np.isfinite(scaled).all():
            raise ValueError(
                f"`{name}` overflows: the configuration gives it the scale {found:.6g}"
            )
        layers.append(layer._replace(**{"ab"[side]: scaled}))
    joined = _joined(target, layers, side)
    rank = cast(int, target.pair.rank)
    return resize_layers(joined, side, rank, target.naming.modules[index][0])


def _joined(target: Target, layers: Sequence[Layer], side: int) -> list[Layer]:
    """The same with one factor for all of them."""
    axis = 0 if target.experts is None else 1
    shared, pieces = join_shared(
        [layer[1 - side] for layer in layers], [layer[side] for layer in layers], axis
    )
    both = [(shared, piece) if side else (piece, shared) for piece in pieces]
    return [Layer(*x) for x in both]


def _wrong_rank(source: Source, target: Target, index: Index) -> list[str]:
    """That a layer, all right else, has another rank than the tree's."""
    names = target.naming.modules[index]
    ranks = [source.numbers(name).rank for name in names]
    rank, why = ranks[0], f"`{names[0]}` has rank {ranks[0]} in the file"
    if target.split:
        side = 1 - target.split.side
        at = 1 - side if target.naming.swapped else side
        tensors = [source.adapter.tensors[source.pair(x)[at]] for x in names]
        if not all(np.array_equal(tensors[0], x) for x in tensors[1:]):
            rank = sum(ranks)
            total = " + ".join(map(str, ranks))
            why = (
                f"{list(names)} have an {'AB'[side]} each in the file, so that as one "
                f"pair they have rank {total} = {rank}"
            )
    return [] if rank == target.pair.rank else [f"{why}, here {target.pair.rank}"]


def _differences(source: Source, target: Target, name: str) -> Iterator[str]:
    """What is wrong with one module that is in the file."""
    piece = target.piece_shapes()
    at_a, at_b = target.pair.factor_axes
    of_a, of_b = feature_shapes(piece[0], at_a), at_b.feature_count(piece[1])
    if target.naming.swapped:
        of_a, of_b = [(of_b,)], at_a.feature_count(piece[0])
    keys = source.pair(name)
    rows, *_ = *source.adapter.tensors[keys[0]].shape, 0  # also of a lone number
    rank = rows // (target.experts or 1)
    if rank != source.numbers(name).rank:
        yield (
            f"`{name}` has rank {source.numbers(name).rank} in the configuration, and "
            f"{rank} in its A"
        )
        return
    for key, allowed, path in zip(
        keys,
        tensor_shapes(rank, of_a, of_b, target.experts),
        target.pair.paths[:: -1 if target.naming.swapped else 1],
        strict=True,
    ):
        found = source.adapter.tensors[key]
        yield from _bad_array(key, found, allowed, path)


def _wrong_extra(
    source: Source, extra: Extra, places: Sequence[Place], keys: Sequence[str]
) -> Iterator[str]:
    """What is wrong with the entries that are to be one leaf."""
    found = source.adapter.tensors
    here = [
        (key, place) for key, place in zip(keys, places, strict=True) if key in found
    ]
    for key, place in here:
        yield from _bad_array(key, found[key], [torch_shape(extra, place)], extra.path)
    values = [(key, found[key].T if x.turned else found[key]) for key, x in here]
    for key, x in values[1:]:
        if not np.array_equal(x, values[0][1]):
            yield (
                f"`{key}` and `{values[0][0]}` have other values, and are one leaf in "
                f"the tree, `{extra.path}`"
            )


def _bad_array(
    key: str, found: np.ndarray, allowed: Sequence[Shape], path: str
) -> Iterator[str]:
    """What is wrong with one tensor for a leaf."""
    if found.shape not in allowed:
        yield (f"`{key}` has shape {found.shape}, but {allowed[0]} is due for `{path}`")
    elif not jnp.issubdtype(found.dtype, jnp.floating):
        yield f"`{key}` has dtype {found.dtype}, which is no real floating point"
    elif not np.isfinite(found).all():
        yield f"`{key}` has entries that are not finite"
