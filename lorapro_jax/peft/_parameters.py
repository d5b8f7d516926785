"""Parameters that PEFT adapts without a module of their own: `target_parameters`.

Where several parameters of one module have adapters, PEFT wraps the module once for
each, in the order in which it has them. So the first of two is inside the second, and
its entries are called `experts.base_layer.lora_A.weight`, with no name of a parameter.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .._checks import close_to


class Parameters(NamedTuple):
    """The user's `target_parameters=`.

    Attributes:
      order: The ends of their names, in the order of the module.
      swapped: Those that PEFT takes the other way round.
    """

    order: tuple[str, ...] = ()
    swapped: frozenset[str] = frozenset()

    def entry_of(self, name: str) -> str | None:
        """What stands for a name; None where it is no parameter's."""
        return next((x for x in self.order if is_end_of(x, name)), None)


def read_parameters(given: Sequence[str] | None) -> Parameters:
    """The option, checked.

    Raises:
      ValueError: It is no list of names.
    """
    if given is None:
        return Parameters()
    names = () if isinstance(given, str) else tuple(given)
    if not names or not all(isinstance(x, str) and x.strip(".") for x in names):
        raise ValueError(
            f"`target_parameters={given!r}` has to be a tuple of names, such as "
            "`('gate_up_proj', 'down_proj')`."
        )
    order = tuple(x.removesuffix(".T") for x in names)
    swapped = frozenset(x.removesuffix(".T") for x in names if x.endswith(".T"))
    return Parameters(order, swapped)


def check_used(parameters: Parameters, names: Sequence[str]) -> None:
    """Raises ValueError where no name ends with any entry.

    One of several may be unused: they say in which order a module has them.
    """
    if parameters.order and not any(map(parameters.entry_of, names)):
        raise ValueError(
            f"`target_parameters=` has {list(parameters.order)}, and no name of "
            f"`module_names=` ends so. {close_to(parameters.order[0], names)} Correct "
            "it, or leave it out."
        )


def is_end_of(end: str, name: str) -> bool:
    """Whether PEFT takes a module or a parameter with this name for a target."""
    return name == end or name.endswith(f".{end}")


def wrapping_modules(
    names: Iterable[str], parameters: Parameters, targets: Sequence[str]
) -> dict[str, str]:
    """What a file calls the wrapper of each parameter.

    Args:
      names: The parameters.
      parameters: The user's option, which has their order.
      targets: `target_parameters` of the configuration: other parameters of the same
        module that have adapters too.

    Raises:
      ValueError: A parameter is not among the targets.
    """
    found = {}
    for name in names:
        module = name.rpartition(".")[0]
        ends = [entry.rpartition(".")[2] for entry in parameters.order]
        beside = dict.fromkeys(
            full
            for full in (f"{module}.{end}" for end in ends)
            if parameters.entry_of(full) and any(is_end_of(x, full) for x in targets)
        )
        if name not in beside:
            raise ValueError(
                f"its `target_parameters` {list(targets)} have no `{name}`, which "
                "`target_parameters=` says is a parameter"
            )
        behind = list(beside)[list(beside).index(name) + 1 :]
        found[name] = module + ".base_layer" * len(behind)
    return found
