"""What the user says about base weights: `kernels=` of the initialisers."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from .._checks import compiled
from ..pairs._axes import LoRAPair
from ..pairs._names import normalize_path

KernelSpec: TypeAlias = str | tuple[str, int | Sequence[int], int | Sequence[int]]
"""Path of a kernel; or `(path, its input axes, its output axes)`."""
KernelsSpec: TypeAlias = Mapping[str, KernelSpec]
"""From a regex that matches all of a factor's path to its kernel."""


class Given(NamedTuple):
    """What `kernels=` says for one pair.

    Attributes:
      path: The path of the kernel.
      axes: Its input and its output axes, as the user wrote them; or nothing.
    """

    path: str
    axes: tuple[Any, ...]


def look_up(pair: LoRAPair, kernels: KernelsSpec) -> Given | None:
    """The first entry of `kernels=` for a pair, with the groups of its regex."""
    for pattern, spec in kernels.items():
        entry: tuple[Any, ...] = (spec,) if isinstance(spec, str) else tuple(spec)
        if len(entry) not in (1, 3) or not isinstance(entry[0], str):
            raise ValueError(
                f"`kernels` has {spec!r} for {pattern!r}. It maps to a path, or to "
                "`(path, input axes, output axes)`."
            )
        template, *axes = entry
        matched = compiled(pattern, "kernels").fullmatch
        match = matched(pair.a) or matched(pair.b)
        if match is None:
            continue
        try:
            path = match.expand(template)
        except (re.error, IndexError) as error:
            raise ValueError(
                f"`kernels={{{pattern!r}: {spec!r}}}` is no regular expression with "
                f"its template: {error}."
            ) from None
        return Given(normalize_path(path), tuple(axes))
    return None


def check_matches(pattern: str, pairs: Sequence[LoRAPair]) -> None:
    """Raises ValueError for a key of `kernels=` that matches no factor."""
    match = compiled(pattern, "kernels").fullmatch
    if not any(match(path) for pair in pairs for path in pair.paths):
        raise ValueError(
            f"{pattern!r} in `kernels` matches no factor. It has to match all of a "
            f"path, such as `{pairs[0].a}`."
            if pairs
            else "There is no pair for `kernels`."
        )


def key_for(path: str) -> str:
    """A key of `kernels=` that matches this path of a factor, and no other."""
    try:
        plain = re.fullmatch(path, path) is not None
    except re.error:
        plain = False
    return path if plain else re.escape(path)
