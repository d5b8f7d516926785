"""What PEFT does with weights beside the factors: `bias` and `modules_to_save`.

PEFT wraps every module whose name ends in one of `modules_to_save`, letter by letter,
so that `classifier` is `pre_classifier` too. It wants all weights of such a module in
the file, and takes no factors inside of it. For some task types it adds heads itself.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ._extra import Extra
from ._keys import PREFIX

# What PEFT adds to `modules_to_save`, whatever the file says.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


class Saved(NamedTuple):
    """The modules that PEFT saves whole, by the ends of their names.

    Attributes:
      kept: `modules_to_save` of the configuration.
      heads: What PEFT adds for the task.
    """

    kept: tuple[str, ...]
    heads: tuple[str, ...]

    @property
    def ends(self) -> tuple[str, ...]:
        return *self.kept, *(x for x in self.heads if x not in self.kept)

    def covers(self, name: str) -> bool:
        """Whether a parameter is in one of them."""
        return any(name.startswith(f"{module}.") for module in self.kept)


def find_saved(
    extras: Sequence[Extra], wrapped: Iterable[str], task: str | None
) -> Saved:
    """The modules to save for the leaves beside the factors.

    Args:
      extras: The leaves.
      wrapped: The modules with factors, which are saved as parts of these.
      task: `task_type` of the configuration.
    """
    heads, wrapped = _HEADS.get(str(task), ()), set(wrapped)
    found = set()
    for module, last in (x.rpartition(".")[::2] for e in extras for x in e.names):
        above = [x for x in prefixes(module) if x.endswith(heads)]
        if above or (last != "bias" and module not in wrapped):
            found.add(above[0] if above else module)
    outermost = [x for x in found if found.isdisjoint([*prefixes(x)][:-1])]
    return Saved(tuple(sorted(outermost)), heads)


def beside_config(
    extras: Sequence[Extra], wrapped: Iterable[str], saved: Saved
) -> dict[str, Any]:
    """The entries `bias` and `modules_to_save` of the configuration."""
    names = (x for e in extras for x in e.names if not saved.covers(x))
    split = [x.rpartition(".")[::2] for x in names]
    biases = {module for module, last in split if last == "bias"}
    kind = "none"
    if biases:
        kind = "lora_only" if biases <= set(wrapped) else "all"
    return {"bias": kind, "modules_to_save": list(saved.kept) or None}


def check_saved(
    extras: Sequence[Extra], saved: Saved, factors: Mapping[str, str], *, known: bool
) -> None:
    """Raises ValueError where PEFT would drop factors, or look for weights in vain.

    Args:
      extras: The leaves beside the factors.
      saved: What is saved for them.
      factors: The path of the pair of each PyTorch name with factors.
      known: Whether the names of the base model are; then it tells more.
    """
    for name, path in factors.items():
        if end := next((x for x in saved.ends if _is_inside(name, x)), None):
            raise ValueError(_dropped_message(name, path, end, extras, saved))
    names = [name for extra in extras for name in extra.names]
    for module in (x for x in saved.kept if x.endswith(saved.heads)):
        inside = [x for x in names if x.startswith(f"{module}.")]
        if all(x.endswith(".bias") for x in inside):
            raise ValueError(
                f"`extra=` has {inside} and no weight beside it. With the `task_type` "
                f"of `config`, PEFT wants the whole of `{module}`: name all its "
                "weights, or leave `task_type` out of `config`."
            )
    if saved.heads and not saved.kept and not known:
        raise ValueError(
            f"With the `task_type` of `config`, PEFT loads the head too, from modules "
            f"called {' or '.join(map(repr, saved.heads))}, and the file would have "
            "none. Name its weights with `extra=`, or leave `task_type` out of "
            "`config`; if the model has no such module, pass it as `model=`."
        )


def extra_key(name: str, wrapped: Mapping[str, int]) -> str:
    """What a file calls a weight: PEFT wraps the layers with factors.

    Args:
      name: The parameter in PyTorch.
      wrapped: How often PEFT wraps each of these modules.
    """
    module, _, last = name.rpartition(".")
    return f"{PREFIX}{module}{'.base_layer' * wrapped.get(module, 0)}.{last}"


def prefixes(name: str) -> Iterator[str]:
    """The modules that a name is in, from the outermost, and itself."""
    parts = name.split(".")
    return (".".join(parts[: i + 1]) for i in range(len(parts)))


def _is_inside(name: str, end: str) -> bool:
    """Whether PEFT takes a name for one in a module that is saved whole."""
    if any(x.endswith(end) for x in prefixes(name)):
        return True
    try:  # PEFT reads the end as a regex, where `.` is any letter
        return re.match(rf"(^|.*\.){end}($|\..*)", name) is not None
    except re.error:
        return False


def _dropped_message(
    name: str, path: str, end: str, extras: Sequence[Extra], saved: Saved
) -> str:
    head = f"PEFT takes no factors in modules whose names end in {end!r}, as `{name}` "
    owners = [e.path for e in extras if any(x.startswith(f"{end}.") for x in e.names)]
    if not owners:
        return (
            f"{head}of `{path}` is: with the `task_type` of `config` it saves them "
            "whole. Leave `task_type` out of `config`."
        )
    task = " Or leave `task_type` out of `config`." if end in saved.heads else ""
    return (
        f"{head}of `{path}` is: it saves them whole, here for {owners} of `extra=`. "
        f"Take these out of `extra=` and set them in PyTorch by themselves, or leave "
        f"this pair out with `pairs=`.{task}"
    )
