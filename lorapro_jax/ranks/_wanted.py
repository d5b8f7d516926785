"""The rank that a user wants for each pair: a number, patterns, or a table."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from .._checks import close_to, some
from ..pairs._axes import LoRAPair
from ..pairs._leaves import is_under
from ..pairs._names import parse_factor_name
from ..pairs._scale import check_patterns, first_match
from ._table import RankTable

RanksSpec: TypeAlias = int | Mapping[str, int] | RankTable
"""One rank for all pairs, `{regex: rank}`, or what `allocate_ranks` returns."""


def wanted_ranks(ranks: RanksSpec, pairs: Sequence[LoRAPair]) -> list[int]:
    """The new rank of each pair.

    Args:
      ranks: See `resize_adapters`.
      pairs: As `find_pairs` returns them.

    Raises:
      ValueError: A rank that is no integer of at least 1; a pair without one; a pattern
        or a module of a table that belongs to no pair.
    """
    if isinstance(ranks, RankTable):
        return _of_table(ranks, pairs)
    if not isinstance(ranks, Mapping):
        return [_checked(ranks, "ranks")] * len(pairs)
    check_patterns("ranks", ranks, [path for pair in pairs for path in pair.paths])
    for pattern, rank in ranks.items():
        _checked(rank, f"ranks[{pattern!r}]")
    return [int(first_match(ranks, pair, "ranks")) for pair in pairs]


def _of_table(table: RankTable, pairs: Sequence[LoRAPair]) -> list[int]:
    """Of the module that each pair is in; of several, of the innermost."""
    found = []
    for pair in pairs:
        inside = [path for path in table if any(is_under(x, [path]) for x in _at(pair))]
        if not inside:
            raise ValueError(
                f"No module of the table of ranks has the factor `{pair.a}`; it has "
                f"{some(table)}. Pass the ranks of all pairs, as `{{regex: rank}}`."
            )
        found.append(max(inside, key=len))
    for path in table:
        if path not in found:
            raise ValueError(
                f"The table of ranks has `{path}`, where this tree has no LoRA pair. "
                f"{close_to(path, [pair.a for pair in pairs])} Pass the tree with all "
                "adapters, or the ranks of these pairs, as `{regex: rank}`."
            )
    return [table[path] for path in found]


def _at(pair: LoRAPair) -> list[str]:
    """Where a pair is: its A, and the kernel beside it that its name tells of.

    Where a module has several kernels, the table has the path of each:
    `attention/q` has the factor `attention/q_lora_a`.
    """
    name = parse_factor_name(pair.a)
    if name is None or not name.stem:
        return [pair.a]
    owner = [name.owner] if name.owner else []
    return [pair.a, "/".join([*owner, name.stem.rstrip("_")])]


def _checked(rank: Any, name: str) -> int:
    whole = isinstance(rank, int | np.integer) and not isinstance(rank, bool)
    if not (whole and rank >= 1):
        raise ValueError(f"`{name}={rank!r}` has to be an integer of at least 1.")
    return int(rank)
