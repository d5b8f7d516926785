"""What a PEFT file gets: tensors by their keys, ranks and scales by their modules."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from .._checks import close_to, compiled
from ._arrays import sides
from ._beside import Saved, beside_config, extra_key
from ._config import Numbers, most_common
from ._extra import Extra, to_torch
from ._keys import file_keys
from ._matrices import Layer, pad_rank, times, to_tensors
from ._names import is_embedding, layer_path
from ._original import append_initial
from ._parameters import Parameters, wrapping_modules
from ._targets import Target, wrapped_modules

Arrays = Mapping[str, np.ndarray]


class Kinds(NamedTuple):
    """The regexes for layers that are not linear.

    Attributes:
      conv: For convolutions; None for none.
      embedding: For embeddings; None for none but those whose factors say so.
    """

    conv: re.Pattern[str] | None
    embedding: re.Pattern[str] | None

    @classmethod
    def read(cls, conv: str | None, embedding: str | None) -> "Kinds":
        """The options, compiled."""
        return cls(
            None if conv is None else compiled(conv, "conv"),
            None if embedding is None else compiled(embedding, "embedding"),
        )

    def is_conv(self, layer: str) -> bool:
        """Whether the layer of this path is a convolution."""
        return bool(self.conv and self.conv.search(layer))

    def is_embedding(self, target: Target) -> bool:
        """Whether the layer of a pair is an embedding."""
        named = self.embedding and self.embedding.search(layer_path(target.pair))
        return bool(named) or is_embedding(target.pair)

    def check(self, targets: Sequence[Target], extras: Sequence[Extra]) -> None:
        """Raises ValueError for a regex that no layer matches."""
        layers = [layer_path(target.pair) for target in targets]
        others = [extra.path.rpartition("/")[0] for extra in extras]
        for option, regex, paths in (
            ("conv", self.conv, [*layers, *others]),
            ("embedding", self.embedding, layers),
        ):
            if regex and not any(map(regex.search, paths)):
                raise ValueError(
                    f"`{option}={regex.pattern!r}` is found in the path of no layer. "
                    f"{close_to(regex.pattern, paths)} Correct it, or leave it out."
                )


class Contents(NamedTuple):
    """What is to be written.

    Attributes:
      tensors: The arrays by their keys.
      modules: The rank and the scale of each module or parameter.
      parameters: Those among them that are parameters.
      beside: What the configuration says of weights beside the factors.
    """

    tensors: dict[str, np.ndarray]
    modules: dict[str, Numbers]
    parameters: list[str]
    beside: dict[str, Any]


class _Entry(NamedTuple):
    """One module: its name, its factors, and what the configuration says of it."""

    name: str
    layer: Layer
    numbers: Numbers


def collect(
    targets: Sequence[Target],
    extras: Sequence[Extra],
    arrays: Arrays,
    before: Arrays | None,
    kinds: Kinds,
    parameters: Parameters,
    saved: Saved,
    uniform: bool,
) -> Contents:
    """Everything of a tree as PyTorch has it.

    Args:
      targets: The pairs.
      extras: The leaves beside them.
      arrays: The values of all of them, by path.
      before: The factors that training started from, where it changed the base
        weights; else None.
      kinds: Which layers are convolutions or embeddings.
      parameters: The order of parameters.
      saved: The modules that PEFT saves whole.
      uniform: Whether all modules get one rank and one scale.
    """
    named = [x for t in targets if t.naming.is_parameter for x in t.names]
    wrapped = Counter(wrapped_modules(targets))
    found = Contents({}, {}, named, beside_config(extras, wrapped, saved))
    common = _common(targets, before is not None) if uniform else None
    wrappers = wrapping_modules(named, parameters, named)
    for target in targets:
        for entry in _entries(target, arrays, before, kinds, common):
            module = wrappers.get(entry.name, entry.name)
            keys = file_keys(module, embedding=kinds.is_embedding(target))
            experts = target.experts is not None
            tensors = to_tensors(entry.layer, experts=experts)
            found.tensors.update(zip(keys, tensors, strict=True))
            found.modules[entry.name] = entry.numbers
    for extra in extras:
        x = _finite(extra.path, arrays[extra.path])
        conv = kinds.is_conv(extra.path.rpartition("/")[0])
        for index, places in extra.places.items():
            for place in places:
                weight = to_torch(x[index], extra, place, conv=conv)
                found.tensors[extra_key(place.name, wrapped)] = weight
    return found


def _common(targets: Sequence[Target], doubled: bool) -> Numbers:
    """The largest rank, and the most common scale."""
    rank = max(cast(int, target.pair.rank) for target in targets)
    scales = [float(x) for t in targets for y in t.scales.values() for x in y.flat]
    return Numbers(rank * (2 if doubled else 1), most_common(scales))


def _entries(
    target: Target,
    arrays: Arrays,
    before: Arrays | None,
    kinds: Kinds,
    common: Numbers | None,
) -> Iterator[_Entry]:
    """The modules of one pair."""
    at_a, _ = target.pair.factor_axes
    is_parameter = target.naming.is_parameter
    is_conv = not is_parameter and kinds.is_conv(layer_path(target.pair))
    window = len(at_a.features(len(target.shapes[0]))) - 1 if is_conv else 0
    stack = len(target.stack)
    for path, _ in sides(target.pair):
        _finite(path, arrays[path])
    pieces = list(target.take(arrays, window))
    if before is not None:
        starts = target.take(before, window)
        pieces = [
            [
                append_initial(x, x0, is_a=not side, stack=stack)
                for side, (x, x0) in enumerate(zip(both, initial, strict=True))
            ]
            for both, initial in zip(pieces, starts, strict=True)
        ]
    if common:
        pieces = [[pad_rank(x, common.rank, stack) for x in both] for both in pieces]
    for part, (a, b) in enumerate(pieces):
        for index, scales in target.scales.items():
            layer, scale = _at_one_scale(
                target.pair.b, Layer(a[index], b[index]), scales, common
            )
            if target.naming.swapped:
                layer = Layer(layer.b, layer.a)
            name = target.naming.modules[index][part]
            yield _Entry(name, layer, Numbers(layer.rank, scale))


def _at_one_scale(
    path: str, layer: Layer, scales: np.ndarray, common: Numbers | None
) -> tuple[Layer, float]:
    """A layer whose experts have one scale, and that scale."""
    scale = common.scale if common else most_common(map(float, scales.flat))
    b = times(layer.b, scales / scale)
    if b is layer.b:
        return layer, scale
    with np.errstate(over="ignore"):
        narrow = b.astype(layer.b.dtype)
        if narrow.dtype.itemsize < 4 and not np.array_equal(narrow, b):
            narrow = b.astype(np.float32)
    if not np.isfinite(narrow).all():
        raise ValueError(
            f"`{path}` overflows at the scale {scale:.6g}, which `uniform=True` or the "
            "most of its experts have: their scales are too far apart for one."
        )
    return layer._replace(b=narrow), scale


def _finite(path: str, x: np.ndarray) -> np.ndarray:
    """`x`, if all of it is finite."""
    if not np.isfinite(x).all():
        raise ValueError(
            f"`{path}` has entries that are not finite. Such an adapter could not be "
            "loaded."
        )
    return x
