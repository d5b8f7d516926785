"""The two files of a PEFT adapter, each written whole or not at all."""

import json
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


class Adapter(NamedTuple):
    """What a folder holds.

    Attributes:
      tensors: The arrays of `adapter_model.safetensors`.
      config: The content of `adapter_config.json`.
    """

    tensors: Mapping[str, np.ndarray]
    config: Mapping[str, Any]


def write_adapter(
    path: Path, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> None:
    """Writes both files into a folder, which may hold an older adapter.

    Both are complete on disk before the first takes its place, and a folder becomes
    an adapter by its configuration, which comes last.
    """
    save_file = _safetensors().numpy.save_file
    weights = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    # Readers in PyTorch refuse a file that does not say for whom it is.
    save_weights = lambda name: save_file(weights, name, metadata={"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    path.mkdir(parents=True, exist_ok=True)
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
    safetensors = _safetensors()
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
    except ValueError as error:  # also where it is no UTF-8
        raise ValueError(f"`{path / CONFIG}` is damaged: {error}.") from None
    if not isinstance(config, dict):
        raise ValueError(f"`{path / CONFIG}` holds no configuration: {config!r}.")
    try:
        with safetensors.safe_open(path / WEIGHTS, framework="np") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Adapter(tensors, config)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"`{path / WEIGHTS}` is damaged or was not written to its end: {error}."
        ) from None


def _write_beside(path: Path, write: Callable[[Path], Any]) -> Path:
    """Writes a file of another name in the same folder, complete and on disk."""
    new = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        write(new)
        with new.open("rb") as file:
            os.fsync(file.fileno())
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    return new


def _safetensors() -> Any:
    """The optional package, imported where it is first needed."""
    try:
        import safetensors.numpy
    except ImportError:
        raise ImportError(
            "PEFT files need safetensors: `pip install 'lorapro_jax[peft]'`."
        ) from None
    return safetensors
