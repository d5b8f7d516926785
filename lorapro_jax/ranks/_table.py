"""Ranks by module: looked up, printed, saved, and given to qwix."""

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .._checks import close_to, table

_FORMAT = "lorapro_jax ranks 1"


@dataclasses.dataclass(frozen=True)
class RankRow:
    """One module of a `RankTable`.

    Attributes:
      path: The module's path.
      kernel: Its kernel's path.
      shape: The kernel's shape.
      importance: Its importance; of stacked layers, their mean.
      rank: The rank of its adapter; of stacked layers, of each.
      parameters: The parameters of the adapter, rank · (m + n) · layers.
    """

    path: str
    kernel: str
    shape: tuple[int, ...]
    importance: float
    rank: int
    parameters: int


@dataclasses.dataclass(frozen=True, eq=False)
class RankTable(Mapping[str, int]):
    """What `allocate_ranks` returns: the rank of each module by its path.

    A module's path is that of its kernel without the last part; where a module holds
    several kernels, each goes by its own path. `print` shows the table; it is equal
    to any mapping with the same ranks.

    Attributes:
      rows: All that is known of each module.
      reference: The reference rank.
      budget: The parameters of adapters that all have the reference rank.
    """

    rows: tuple[RankRow, ...]
    reference: int
    budget: int

    @property
    def parameters(self) -> int:
        """The parameters of all adapters, at most the budget."""
        return sum(row.parameters for row in self.rows)

    def __getitem__(self, path: str) -> int:
        for row in self.rows:
            if row.path == path:
                return row.rank
        raise KeyError(
            f"{path!r} has no rank in this table. {close_to(str(path), self)}"
        )

    def __iter__(self) -> Iterator[str]:
        return (row.path for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        head = ("module", "kernel", "importance", "rank", "parameters")
        lines = table([head, *map(_cells, self.rows)], right=(2, 3, 4))
        share = 100 * self.parameters / self.budget
        lines.append(
            f"{self.parameters:,} parameters, {share:.1f} % of the {self.budget:,} of "
            f"rank {self.reference}"
        )
        return "\n".join(lines)

    def qwix_rules(self, *, scale: float, **options: Any) -> list[Any]:
        """One `qwix.LoraRule` a module, for `qwix.LoraProvider(rules)`.

        qwix multiplies by alpha / rank, so each rule gets alpha = scale · rank. The
        scale is then the same everywhere, as in GoRA; tell `lorapro(scale=...)`.
        The paths have to be those that qwix sees, as in Linen's `params` without the
        collection's name; `get_unused_rules()` of the provider lists what met nothing.

        Args:
          scale: The scale s of W = W0 + s B A.
          **options: Other fields of the rules, such as `dropout` or `weight_qtype`.

        Raises:
          ValueError: A module with several kernels: qwix has one rule for all.
        """
        import qwix

        shared = [row.path for row in self.rows if row.path == row.kernel]
        if shared:
            raise ValueError(
                f"{shared} share modules, and a rule of qwix is for all kernels of a "
                "module. Write their rules by hand."
            )
        rule = lambda path, rank: qwix.LoraRule(
            module_path=re.escape(path), rank=rank, alpha=scale * rank, **options
        )
        return [rule(path, rank) for path, rank in self.items()]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the table as JSON."""
        content = {"format": _FORMAT, **dataclasses.asdict(self)}
        Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "RankTable":
        """Reads what `save` wrote.

        Raises:
          ValueError: The file is not such a table.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content.pop("format") != _FORMAT:
                raise ValueError
            rows = (
                RankRow(**row | {"shape": tuple(row["shape"])})
                for row in content.pop("rows")
            )
            return cls(tuple(rows), **content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"`{path}` is no table of ranks: {error!r}.") from None


def _cells(row: RankRow) -> tuple[str, ...]:
    """One line of the printed table."""
    return (
        row.path,
        str(row.shape),
        f"{row.importance:.3g}",
        str(row.rank),
        f"{row.parameters:,}",
    )
