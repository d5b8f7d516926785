"""All that is not the same in a PEFT file and in a tree, in one message."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from .._checks import some

_SHOWN = 4  # problems of a kind in one message


@dataclass
class Problems:
    """What was found, by kind.

    Attributes:
      missing: Keys that the file lacks.
      factors: Keys of factors that have no place in the tree.
      weights: Keys of other weights that have none.
      beside: Keys of what belongs to an adapter of the tree, and is no factor.
      wrong: Sentences about keys that are in both.
      ranks: Sentences about layers of another rank.
    """

    missing: list[str] = field(default_factory=list)
    factors: list[str] = field(default_factory=list)
    weights: list[str] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    ranks: list[str] = field(default_factory=list)

    def check(self, parameters: Sequence[str] = ()) -> None:
        """Raises ValueError with all of them, if there are any.

        Args:
          parameters: The parameters that the file adapts, if the user named none.
        """
        found = [
            [f"missing in the file: `{key}`" for key in self.missing],
            [
                f"in the file, not in the tree: `{key}`"
                for key in (*self.factors, *self.weights)
            ],
            [f"more than a factor: `{key}`" for key in self.beside],
            [*self.wrong, *self.ranks],
        ]
        if any(found):
            problems = "; ".join(_first(kind) for kind in found if kind)
            hints = " ".join(self._hints(parameters))
            raise ValueError(f"adapter and tree differ: {problems}. {hints}".rstrip())

    def _hints(self, parameters: Sequence[str]) -> list[str]:
        hints = []
        if self.missing or self.factors:
            hints.append("`module_names=` says what PyTorch calls a layer.")
            if parameters:
                hints.append(
                    f"The file adapts the parameters {some(parameters)}: name them "
                    "with `target_parameters=`, in the order of their module."
                )
        if self.weights:
            hints.append(
                "`extra=` takes weights that are no factors into the tree; `ignore=` "
                "leaves out entries, and with them what was trained there."
            )
        if self.beside:
            hints.append(
                "Plain factors would lose what is more: merge the adapter into its "
                "model with PEFT, and take the weights."
            )
        if self.ranks:
            hints.append(
                "Make the tree with the ranks of the file, or pass `resize=True` for "
                "the closest adapter of the tree's."
            )
        return hints


def _first(problems: Sequence[str]) -> str:
    """The first problems of a kind, and how many more there are."""
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return "; ".join(problems[:_SHOWN]) + more
