"""PyTorch's names for the modules of a JAX tree.

A PEFT file says `base_model.model.<module>.lora_A.weight`, where the module is the
path of a layer in the PyTorch model. Only the user knows what that model calls it.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from ._layout import LoRAPair, Shape
from ._paths import parse_factor_name

NamesSpec: TypeAlias = Mapping[str, str] | Callable[[LoRAPair], str] | None
"""`{regex: template}` on the path of the layer, or a function of the pair."""

Index: TypeAlias = tuple[int, ...]

# The factor's own part of qwix's, tunix's and Keras's names says nothing of the layer.
_PLAIN_STEMS = frozenset({"", "kernel_", "w_"})


def layer_path(pair: LoRAPair) -> str:
    """The path of the layer that a pair adapts: `q` of `q/lora/lora_a`."""
    name = parse_factor_name(pair.a)
    if name is None:  # explicit pairs may be called anything
        return pair.a.rpartition("/")[0]
    stem = name.group[-3]
    parts = [x for x in name.owner.split("/") if x]
    if parts and parts[-1] == "lora":
        parts.pop()
    return "/".join(parts if stem in _PLAIN_STEMS else [*parts, stem.rstrip("_")])


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
    """
    found = []
    owners: dict[str, str] = {}
    for pair, stack in zip(pairs, stacks, strict=True):
        template = _template(pair, names)
        layers = {index: template.format(*index) for index in np.ndindex(*stack)}
        for name in layers.values():
            if name in owners:
                raise ValueError(_same_name_message(name, owners[name], pair, stack))
            owners[name] = pair.a
        found.append(layers)
    return found


def file_keys(name: str, pair: LoRAPair) -> tuple[str, str]:
    """The keys of A and B of one module in a PEFT file."""
    module = f"base_model.model.{name}"
    factor = parse_factor_name(pair.a)
    if factor and factor.group[-2].startswith("embedding"):
        return f"{module}.lora_embedding_A", f"{module}.lora_embedding_B"
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def factor_keys(keys: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Each key of a file, and whether it is called like a factor."""
    factor = re.compile(
        r"(?:base_model\.model\.)?(.+)\.lora_(?:[AB]\.weight|embedding_[AB])"
    )
    for key in keys:
        yield key, bool(factor.fullmatch(key))


def _template(pair: LoRAPair, names: NamesSpec) -> str:
    path = layer_path(pair)
    if callable(names):
        return names(pair)
    if names is None:
        if not path:
            raise ValueError(
                f"`{pair.a}` is at the top of the tree, so its layer has no name. Give "
                "PyTorch's with `module_names=`, such as `{'': 'classifier'}`."
            )
        return path.replace("/", ".")
    for pattern, template in names.items():
        if match := re.fullmatch(pattern, path):
            return match.expand(template)
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
