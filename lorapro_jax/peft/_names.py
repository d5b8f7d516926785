"""PyTorch's names for the modules of a JAX tree.

A PEFT file says `base_model.model.<module>.lora_A.weight`, where the module is the
path of a layer in the PyTorch model. Only the user knows what that model calls it.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from .._checks import compiled
from ..algebra._axes import Shape
from ..pairs._axes import LoRAPair
from ..pairs._names import parse_factor_name
from ._parameters import Parameters
from ._templates import (
    Index,
    Template,
    as_several,
    check_plain,
    fill_in,
    is_name,
    places_of,
)

NamesSpec: TypeAlias = Mapping[str, Template] | Callable[[LoRAPair], Template] | None
"""`{regex: template}` on the path of the layer, or a function of the pair."""

# The factor's own part of qwix's, tunix's and Keras's names says nothing of the layer.
_PLAIN_STEMS = frozenset({"", "kernel_", "w_"})


class Naming(NamedTuple):
    """What PyTorch has for one pair.

    Attributes:
      modules: The names for each layer: one, or several that lie side by side.
      given: The axis along which they lie and its factor, as the user gave them; None
        for one name.
      experts: Which of the stacked axes holds the experts of a parameter; None where
        it is no parameter, or one of two axes.
      is_parameter: Whether the names are those of parameters.
      swapped: Whether PEFT takes the parameter the other way round.
    """

    modules: Mapping[Index, tuple[str, ...]]
    given: tuple[Any, ...] | None = None
    experts: int | None = None
    is_parameter: bool = False
    swapped: bool = False


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


def is_embedding(pair: LoRAPair) -> bool:
    """Whether a pair is called like an embedding's, as in Keras and PEFT."""
    name = parse_factor_name(pair.a)
    return name is not None and name.kind.startswith("embedding")


def name_modules(
    pairs: Sequence[LoRAPair],
    stacks: Sequence[Shape],
    names: NamesSpec,
    parameters: Parameters,
) -> list[Naming]:
    """The PyTorch modules of every layer of every pair.

    Args:
      pairs: What `find_pairs` returns.
      stacks: The sizes of the stacked axes of each; `()` where it is one layer.
      names: See `NamesSpec`. A regex has to match the whole path of a layer, and
        its groups may be used in the template; `{}` there stands for a layer's
        position on a stacked axis. Without names, `/` becomes `.`.
      parameters: Which names are parameters; the stacked axis that such a name does
        not mention holds the experts.

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
        naming = _name_pair(pair, stack, names, parameters)
        for layer in naming.modules.values():
            for name in layer:
                if name in owners:
                    raise ValueError(_same_name(name, owners[name], pair, stack))
                owners[name] = pair.a
        found.append(naming)
    return found


def _name_pair(
    pair: LoRAPair, stack: Shape, names: NamesSpec, parameters: Parameters
) -> Naming:
    """The names of one pair, checked."""
    template, match = _template_of(pair, names)
    templates, given = as_several(pair, template)
    if names is None:  # a path may have braces too: they are not for the index
        fill = lambda x, _: x
        used: set[int] = set()
    else:
        fill = lambda x, index: _fill_named(pair, x, match, index)
        used = set().union(*map(places_of, templates))
    kinds = {parameters.entry_of(fill(x, (0,) * len(stack))) for x in templates}
    if len(kinds) > 1 and None in kinds:
        raise ValueError(
            f"`module_names=` gives the layer of `{pair.a}` modules and parameters, "
            f"{list(templates)}. All of them have to be of one kind."
        )
    is_parameter = None not in kinds
    experts = _expert_axis(pair, stack, used) if is_parameter else None
    modules = {}
    for full in np.ndindex(*(1 if i == experts else x for i, x in enumerate(stack))):
        index = tuple(x for i, x in enumerate(full) if i != experts)
        filled = [_checked(pair, fill(x, full)) for x in templates]
        for name in () if is_parameter else filled:
            _check_module(pair, name)
        modules[index] = tuple(filled)
    swapped = any(kind in parameters.swapped for kind in kinds)
    return Naming(modules, given, experts, is_parameter, swapped)


def _expert_axis(pair: LoRAPair, stack: Shape, used: set[int]) -> int | None:
    """The stacked axis that the name of a parameter leaves out."""
    unused = [i for i in range(len(stack)) if i not in used]
    if len(unused) > 1:
        raise ValueError(
            f"`{pair.a}` has {len(stack)} stacked axes, and the name of its parameter "
            f"mentions {len(used)} of them. It may leave out one, that of the experts: "
            "put `{}` where PyTorch has the position on another, or `{1}` for the "
            "second, with `module_names=`."
        )
    return unused[0] if unused else None


def _template_of(
    pair: LoRAPair, names: NamesSpec
) -> tuple[Template, re.Match[str] | None]:
    """The user's template for a pair, and the match of the first regex that fits."""
    path = layer_path(pair)
    if names is None:
        return path.replace("/", "."), None
    if callable(names):
        return names(pair), None
    for pattern, template in names.items():
        if match := compiled(pattern, "module_names").fullmatch(path):
            return template, match
    raise ValueError(
        f"No pattern of `module_names=` matches the whole of {path!r}, the layer of "
        f"`{pair.a}`. Patterns: {list(names)}."
    )


def _fill_named(
    pair: LoRAPair, template: str, match: re.Match[str] | None, index: Index
) -> str:
    try:
        return fill_in(template, match, index)
    except ValueError as error:
        raise ValueError(
            f"The name {template!r} that `module_names=` has for the layer of "
            f"`{pair.a}` {error}"
        ) from None


def _checked(pair: LoRAPair, name: str) -> str:
    if not is_name(name):
        raise ValueError(
            f"The layer of `{pair.a}` would have the PyTorch name {name!r}. Give it "
            "one with `module_names=`, such as `{'': 'classifier'}` for factors at the "
            "top of a dict, `{'(.*)': r'model.\\1'}` with a raw string where there are "
            "groups, or a function of the pair."
        )
    check_plain(pair.a, name, "module_names")
    return name


def _check_module(pair: LoRAPair, name: str) -> None:
    """Raises ValueError for a weight's name where a module's is due."""
    module, _, last = name.rpartition(".")
    if last in ("weight", "bias"):
        raise ValueError(
            f"The layer of `{pair.a}` would have the PyTorch name {name!r}, which is "
            f"no module's. Leave `.{last}` out of it, so that it is {module!r}; for a "
            "weight that PEFT is to adapt as a parameter there is "
            "`target_parameters=`."
        )


def _same_name(name: str, owner: str, pair: LoRAPair, stack: Shape) -> str:
    where = "" if owner == pair.a else f" and a layer of `{owner}`"
    hint = (
        "Put `{}` into the name where PyTorch has the position on a stacked axis, as "
        "in 'model.layers.{}.mlp.up_proj'"
        if stack
        else "Give each layer its own"
    )
    return (
        f"A layer of `{pair.a}`{where} would have the same PyTorch name, {name!r}. "
        f"{hint}, with `module_names=`. Experts that PyTorch has in one parameter need "
        "`target_parameters=`."
    )
