"""The keys of a PEFT file: those that it gets, and what those of all writers mean.

PEFT writes `base_model.model.<module>.lora_A.weight`. A state dict that another program
wrote has the adapters' names too, `lora_A.default.weight`, and perhaps no prefix.
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

PREFIX = "base_model.model."
_PLAIN, _EMBEDDING = ("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")
_FACTOR = re.compile(r"(?:(.+)\.)?(lora_(?:embedding_)?[AB])(?:\.(.+))?")
_LORA = re.compile(r"(?:(.+?)\.)?(lora_\w+)(?:\.(.+))?")
# Around a model: distributed data parallelism, and `torch.compile`.
_AROUND = re.compile(rf"^(?:module\.|_orig_mod\.)+(?={re.escape(PREFIX)})")
_WRAPPED = re.compile(r"(?:\.base_layer)+\.")
_SAVED = re.compile(r"\.modules_to_save\.([^.]+)(?=\.)")


class Keys(NamedTuple):
    """What the keys of one adapter mean; names of modules are without prefix.

    Attributes:
      factors: The keys of A and B by module and PEFT's name of the factor, such as
        `("model.layers.0.mlp.up_proj", "lora_A")`.
      others: The keys of biases, heads and other weights by the parameter's name.
      beside: The module of each key that belongs to an adapter and is no factor: a
        magnitude of DoRA, a bias of B.
      own: All keys of this adapter and of weights beside the factors.
    """

    factors: dict[tuple[str, str], str]
    others: dict[str, str]
    beside: dict[str, str]
    own: set[str]


def file_keys(module: str, *, embedding: bool) -> tuple[str, str]:
    """The keys of A and B of one module, as PEFT writes them."""
    a, b = _EMBEDDING if embedding else _PLAIN
    end = "" if embedding else ".weight"
    return f"{PREFIX}{module}.{a}{end}", f"{PREFIX}{module}.{b}{end}"


def find_keys(keys: Keys, module: str) -> tuple[str, str]:
    """The keys of A and B of one module, as the file has them.

    A key that the file lacks is what PEFT would have written.
    """
    embedding = any((module, kind) in keys.factors for kind in _EMBEDDING)
    kinds = _EMBEDDING if embedding else _PLAIN
    due = file_keys(module, embedding=embedding)
    a, b = (
        keys.factors.get((module, kind), key)
        for kind, key in zip(kinds, due, strict=True)
    )
    return a, b


def read_keys(all_keys: Iterable[str], adapter: str | None) -> Keys:
    """Sorts the keys of a file.

    Args:
      all_keys: The keys.
      adapter: The user's choice among several adapters.

    Raises:
      ValueError: Several adapters and no choice, a choice that is not there, or two
        keys for one weight.
    """
    parsed = {key: _parse(key) for key in all_keys}
    chosen = _choose({x.adapter for x in parsed.values() if x.is_factor}, adapter)
    keys = Keys({}, {}, {}, set())
    for key, entry in parsed.items():
        nameless = entry.adapter is None or chosen is None
        if entry.adapter != chosen and (entry.is_factor or not nameless):
            continue  # of another adapter
        keys.own.add(key)
        if entry.is_factor:
            _put(keys.factors, (entry.name, entry.kind), key)
        elif entry.kind:
            keys.beside[key] = entry.name
        else:
            _put(keys.others, entry.name, key)
    return keys


class _Entry(NamedTuple):
    """What one key says: a module's name or a parameter's, and PEFT's kind of it."""

    name: str
    kind: str = ""
    adapter: str | None = None
    is_factor: bool = False


def _parse(key: str) -> _Entry:
    path = _AROUND.sub("", key).removeprefix(PREFIX)
    if match := _FACTOR.fullmatch(path) or _LORA.fullmatch(path):
        parts = match[3].split(".") if match[3] else []
        last = parts.pop() if parts and parts[-1] in ("weight", "bias") else ""
        is_factor = match[2] in (*_PLAIN, *_EMBEDDING) and last != "bias"
        return _Entry(match[1] or "", match[2], ".".join(parts) or None, is_factor)
    saved = _SAVED.search(path)
    name = _WRAPPED.sub(".", _SAVED.sub("", path))
    return _Entry(name, adapter=saved[1] if saved else None)


def _choose(found: set[str | None], adapter: str | None) -> str | None:
    """The adapter to read."""
    names = sorted(x for x in found if x is not None)
    if adapter is None and len(found) > 1:
        nameless = " and one without a name, `adapter=''`" if None in found else ""
        raise ValueError(
            f"it holds the adapters {names}{nameless}. Say which one with `adapter=`"
        )
    if adapter is None:
        return next(iter(found), None)
    chosen = None if adapter == "" else adapter
    if chosen not in found:
        there = f"those of {names}" if names else "no name of an adapter in its keys"
        raise ValueError(f"it has {there}, not `adapter={adapter!r}`")
    return chosen


def _put(found: dict[Any, str], name: Any, key: str) -> None:
    """Adds a key, the only one for its weight."""
    if name in found:
        raise ValueError(f"it has two entries for one weight, `{found[name]}`, `{key}`")
    found[name] = key
