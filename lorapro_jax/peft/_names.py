"""PyTorch's names for the modules of a JAX tree.

A PEFT file says `base_model.model.<module>.lora_A.weight`, where the module is the
path of a layer in the PyTorch model. Only the user knows what that model calls it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from .._checks import compiled
from ..algebra._axes import Shape
from ..pairs._axes import LoRAPair
from ..pairs._names import parse_factor_name

NamesSpec: TypeAlias = Mapping[str, str] | Callable[[LoRAPair], str] | None
"""`{regex: template}` on the path of the layer, or a function of the pair."""

Index: TypeAlias = tuple[int, ...]
"""A layer's positions on the stacked axes; `()` where there are none."""

# The factor's own part of qwix's, tunix's and Keras's names says nothing of the layer.
_PLAIN_STEMS = frozenset({"", "kernel_", "w_"})


def layer_path(pair: LoRAPair) -> str:
    """The path of the layer that a pair adapts: `q` of `q/lora/lora_a`."""
    name = parse_factor_name(pair.a)
    if name is None:  # explicit pairs may be called anything
        return pair.a.rpartition("/")[0]
    parts = [x for x in name.owner.split("/") if x]
    if parts and parts[-1] == "lora":
        parts.pop()
    if name.stem not in _PLAIN_STEMS:
        parts.append(name.stem.rstrip("_"))
    return "/".join(parts)


def name_modules(
    pairs: Sequence[LoRAPair], stacks: Sequence[Shape], names: NamesSpec
) -> list[dict[Index, str]]:
    """The PyTorch module of every layer of every pair.

    Args:
      pairs: What `find_pairs` returns.
      stacks: The sizes of the stacked axes of each; `()` where it is one layer.
      names: See `NamesSpec`. A regex has to match the whole path of a layer, and
        its groups may be used in the template; `{}` there stands for a layer's
        position on a stacked axis. Without names, `/` becomes `.`.

    Raises:
      ValueError: A layer without a name, or two with the same.
      TypeError: Names that are no mapping and no function.
    """
    if not (names is None or callable(names) or isinstance(names, Mapping)):
        raise TypeError(
            f"`module_names={names!r}` has to be `{{regex: template}}` or a function."
        )
    found = []
    owners: dict[str, str] = {}
    for pair, stack in zip(pairs, stacks, strict=True):
        layers = {index: _name(pair, index, names) for index in np.ndindex(*stack)}
        for name in layers.values():
            if name in owners:
                raise ValueError(_same_name_message(name, owners[name], pair, stack))
            owners[name] = pair.a
        found.append(layers)
    return found


def file_keys(name: str, *, embedding: bool) -> tuple[str, str]:
    """The keys of A and B of one module in a PEFT file."""
    module = f"base_model.model.{name}"
    if embedding:
        return f"{module}.lora_embedding_A", f"{module}.lora_embedding_B"
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def is_factor_key(key: str) -> bool:
    """Whether an entry of a file is called like a factor."""
    return bool(re.search(r"\.lora_(?:[AB]\.weight|embedding_[AB])$", key))


def is_embedding(pair: LoRAPair) -> bool:
    """Whether a pair is called like an embedding's, as in Keras and PEFT."""
    name = parse_factor_name(pair.a)
    return name is not None and name.kind.startswith("embedding")


def _name(pair: LoRAPair, index: Index, names: NamesSpec) -> str:
    """The name of one layer, checked."""
    if names is None:  # a path may have braces too: they are not for the index
        name = layer_path(pair).replace("/", ".")
    else:
        name = _filled_in(pair, index, names)
    if not (name.isprintable() and re.fullmatch(r"[^\s/]+", name)):
        raise ValueError(
            f"The layer of `{pair.a}` would have the PyTorch name {name!r}. Give it "
            "one with `module_names=`, such as `{'': 'classifier'}` for factors at the "
            "top of a dict, `{'(.*)': r'model.\\1'}` with a raw string where there are "
            "groups, or a function of the pair."
        )
    return name


def _filled_in(
    pair: LoRAPair,
    index: Index,
    names: Mapping[str, str] | Callable[[LoRAPair], str],
) -> str:
    """The user's name of one layer, with its position and the groups of its regex."""
    match = None
    if callable(names):
        template = names(pair)
    else:
        template, match = _first_match(pair, names)
    try:
        name = str.format(template, *index)
        return match.expand(name) if match else name
    except (TypeError, LookupError, ValueError, re.error) as error:
        raise ValueError(
            f"The name {template!r} that `module_names=` has for the layer of "
            f"`{pair.a}` cannot be filled in: {error}. `{{}}` is for the position on "
            f"a stacked axis, of which it has {len(index)}, `\\1` for a group of the "
            "regex."
        ) from None


def _first_match(pair: LoRAPair, names: Mapping[str, str]) -> tuple[str, re.Match[str]]:
    """The template of the first regex that matches the layer, and the match."""
    path = layer_path(pair)
    for pattern, template in names.items():
        if match := compiled(pattern, "module_names").fullmatch(path):
            return template, match
    raise ValueError(
        f"No pattern of `module_names=` matches the whole of {path!r}, the layer of "
        f"`{pair.a}`. Patterns: {list(names)}."
    )


def _same_name_message(name: str, owner: str, pair: LoRAPair, stack: Shape) -> str:
    where = "" if owner == pair.a else f" and a layer of `{owner}`"
    hint = (
        "Put `{}` into the name where PyTorch has the position on a stacked axis, as "
        "in 'model.layers.{}.mlp.up_proj'"
        if stack
        else "Give each layer its own"
    )
    return (
        f"A layer of `{pair.a}`{where} would have the same PyTorch name, {name!r}. "
        f"{hint}, with `module_names=`."
    )
