"""Entries of a configuration as JSON has them."""

import json
from collections.abc import Mapping
from enum import Enum
from typing import Any

import jax
import numpy as np


def read_entries(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the user has in `config=`: sets and tuples as lists, scalars as numbers.

    Raises:
      TypeError: It is no mapping.
      ValueError: An entry that JSON cannot hold, or one without a name.
    """
    if config is None:
        return {}
    if not isinstance(config, Mapping):
        raise TypeError(
            f"`config={config!r}` has to be a mapping of entries, such as "
            "`{'task_type': 'CAUSAL_LM'}`; of PEFT's own, pass `config.to_dict()` with "
            "the entries that you need."
        )
    entries = {}
    for name, value in config.items():
        if not isinstance(name, str):
            raise ValueError(
                f"`config` has the key {name!r}. Names of entries are strings, such as "
                "`task_type`."
            )
        entries[name] = _plain(value)
        try:
            json.dumps(entries[name], allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"`config` has {name!r}: {value!r}, which JSON cannot hold: {error}. "
                "Give plain numbers, strings, lists and dicts, or leave it out."
            ) from None
    return entries


def _plain(value: Any) -> Any:
    """A value of the types that JSON has, as far as there is one."""
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return np.asarray(value).tolist()
    if isinstance(value, set | frozenset):
        return sorted(map(_plain, value), key=str)
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    if isinstance(value, Mapping):
        return {key: _plain(x) for key, x in value.items()}
    return value
