"""The two files of a PEFT adapter, each written whole or not at all.

The weights' metadata has the rank and the scale of every module as well, because the
files take their places one after the other.
"""

import contextlib
import json
import math
import os
import re
import stat
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ._config import Numbers, numbers_by
from ._tensors import read_tensors, safetensors_package

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_NUMBERS = "lora_modules"  # our entry of the metadata
_DAMAGE = ArithmeticError, AttributeError, RecursionError, TypeError, ValueError
_LEFTOVER = re.compile(
    rf"\.(?:{re.escape(WEIGHTS)}|{re.escape(CONFIG)})-[0-9a-f]{{32}}"
)


class Adapter(NamedTuple):
    """What a folder holds.

    Attributes:
      tensors: The arrays of `adapter_model.safetensors`.
      config: The content of `adapter_config.json`.
      numbers: The rank and scale of each module, as the weights were written with
        them; empty where another program wrote them.
    """

    tensors: Mapping[str, np.ndarray]
    config: Mapping[str, Any]
    numbers: Mapping[str, Numbers]


def write_adapter(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    names: list[str],
) -> None:
    """Writes both files into a folder, which may hold an older adapter.

    Both are complete on disk before the first takes its place, and a folder becomes
    an adapter by its configuration, which comes last. Each has the permissions of the
    file that it replaces, or those of any new file.

    Args:
      path: The folder.
      tensors: The weights by their keys.
      config: The configuration.
      names: The modules and parameters with factors.
    """
    save_file = safetensors_package().numpy.save_file
    weights = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    numbers = dict(zip(names, map(numbers_by(config), names), strict=True))
    # Readers in PyTorch refuse a file that does not say for whom it is.
    metadata = {"format": "pt", _NUMBERS: json.dumps(numbers)}
    save_weights = lambda name: save_file(weights, name, metadata=metadata)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    path.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    written: list[Path] = []
    try:
        written.append(_write_beside(path / WEIGHTS, save_weights))
        written.append(_write_beside(path / CONFIG, lambda x: x.write_text(text)))
        for new, name in zip(written, (WEIGHTS, CONFIG), strict=True):
            new.replace(path / name)
    finally:
        for new in written:
            new.unlink(missing_ok=True)


def read_adapter(path: Path) -> Adapter:
    """Reads both files of an adapter.

    Raises:
      FileNotFoundError: One of them is missing.
      ValueError: One of them is damaged.
    """
    safetensors_package()
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            inner = sorted(x.parent.name for x in path.glob(f"*/{CONFIG}"))
            hint = f" There are adapters in its folders {inner}." if inner else ""
            raise FileNotFoundError(
                f"`{path}` has no {name}. A PEFT adapter is a folder with {CONFIG} and "
                f"{WEIGHTS}; where there is an adapter_model.bin instead, load it with "
                f"PEFT and save it once more.{hint}"
            )
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also where it is no UTF-8
        raise ValueError(f"`{path / CONFIG}` is damaged: {error}.") from None
    if not isinstance(config, dict):
        raise ValueError(f"`{path / CONFIG}` holds no configuration: {config!r}.")
    tensors, metadata = read_tensors(path / WEIGHTS)
    return Adapter(tensors, config, _read_numbers(path / WEIGHTS, metadata))


def check_numbers(adapter: Adapter) -> None:
    """Raises ValueError where the configuration is not that of the weights."""
    find = numbers_by(adapter.config)
    for name, written in adapter.numbers.items():
        found = find(name)
        if found.rank != written.rank or not math.isclose(
            found.scale, written.scale, rel_tol=1e-9
        ):
            raise ValueError(
                f"{CONFIG} gives `{name}` rank {found.rank} and scale "
                f"{found.scale:.6g}, but {WEIGHTS} was written with rank "
                f"{written.rank} and scale {written.scale:.6g}. A save was cut short "
                "between the two files, or the configuration was changed: save the "
                "adapter again"
            )


def _read_numbers(path: Path, metadata: Mapping[str, str]) -> dict[str, Numbers]:
    try:
        found = json.loads(metadata.get(_NUMBERS, "{}"))
        return {
            str(name): Numbers(int(rank), float(scale))
            for name, (rank, scale) in found.items()
        }
    except _DAMAGE as error:
        raise ValueError(
            f"The entry {_NUMBERS!r} of the metadata of `{path}` is damaged: {error}."
        ) from None


def _write_beside(path: Path, write: Callable[[Path], Any]) -> Path:
    """Writes a file of another name in the same folder, complete and on disk."""
    new = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        new.touch(exist_ok=False)  # safetensors alone would make it private
        mode = stat.S_IMODE((path if path.exists() else new).stat().st_mode)
        write(new)
        new.chmod(mode)
        with new.open("rb") as file:
            os.fsync(file.fileno())
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    return new


def _remove_leftovers(path: Path) -> None:
    """Removes what saves that were killed have left, where that is allowed."""
    for file in path.iterdir():
        if _LEFTOVER.fullmatch(file.name):
            with contextlib.suppress(OSError):
                file.unlink()
