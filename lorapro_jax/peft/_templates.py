"""Names with places in them: for positions on stacked axes, and groups of a regex."""

import re
import string
from typing import Any, TypeAlias

from ..pairs._axes import LoRAPair

Template: TypeAlias = str | tuple[Any, ...]
"""A name; or `(names, axis)`, or `(names, axis, "a")`, for several modules."""

# What PEFT puts into the keys of its files, and no base model has.
_OF_FILES = re.compile(
    r"^base_model\.model(?=\.|$)"
    r"|(?<![^.])(?:lora_(?:embedding_)?[AB]|base_layer|modules_to_save)(?=\.|$)"
)

Index: TypeAlias = tuple[int, ...]
"""A layer's positions on the stacked axes, experts apart; `()` where there are none."""


def as_several(
    pair: LoRAPair, template: Template
) -> tuple[tuple[str, ...], tuple[Any, ...] | None]:
    """The names of a template, and where they lie if they are several.

    Raises:
      ValueError: A tuple of something else.
    """
    if not isinstance(template, tuple):
        return (template,), None
    names, *where = template if template else ((),)
    if (
        not isinstance(names, list | tuple)
        or len(names) < 2
        or len(where) not in (1, 2)
        or (len(where) == 2 and where[1] not in ("a", "b"))
    ):
        raise ValueError(
            f"`module_names=` has {template!r} for the layer of `{pair.a}`. Several "
            "modules are `([name, name], axis)`, where axis is that of B along which "
            'they lie, or `([name, name], axis, "a")` for an axis of A.'
        )
    return tuple(names), (where[0], "b" if len(where) == 1 else where[1])


def fill_in(template: str, match: re.Match[str] | None, index: Index) -> str:
    """A template with a layer's position and the groups of its regex.

    Raises:
      ValueError: It is no string, has more places than there are positions, or no
        such group.
    """
    if not isinstance(template, str):
        raise ValueError("cannot be filled in: it is no string.")
    try:
        name = str.format(template, *index)
        return match.expand(name) if match else name
    except (TypeError, LookupError, ValueError, re.error) as error:
        raise ValueError(
            f"cannot be filled in: {error}. `{{}}` is for the position on a stacked "
            f"axis, of which it has {len(index)}, `\\1` for a group of the regex."
        ) from None


def places_of(template: str) -> set[int]:
    """The positions that a template mentions: `{0, 1}` of `"{}.{}"` and `"{1}.{0}"`."""
    try:
        fields = [x for _, x, _, _ in string.Formatter().parse(template)]
    except (TypeError, ValueError):  # `fill_in` says what is wrong with it
        return set()
    given = [x for x in fields if x is not None]
    return {int(x) if x.isdigit() else i for i, x in enumerate(given)}


def is_name(name: Any) -> bool:
    """Whether PyTorch could have such a name."""
    if not isinstance(name, str):
        return False
    return name.isprintable() and bool(re.fullmatch(r"[^\s/]+", name))


def check_plain(path: str, name: str, option: str) -> None:
    """Raises ValueError for a name that was copied from a PEFT file."""
    if found := _OF_FILES.search(name):
        raise ValueError(
            f"`{path}` would have the PyTorch name {name!r}, with PEFT's own "
            f"`{found[0]}` in it, which its files get anyway. Give the name that the "
            f"base model has, with `{option}=`."
        )
