"""The names that a base model in PyTorch has, to check ours against."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from .._checks import close_to
from ._tensors import safetensors_package

ModelSpec: TypeAlias = str | os.PathLike[str] | Iterable[str]
"""A folder or `config.json` of transformers, or the names of all weights."""


def check_names(model: ModelSpec, names: Mapping[str, str]) -> None:
    """Raises ValueError where the base model has no module or parameter of a name.

    Args:
      model: The base model.
      names: The path of the pair of each PyTorch name.
    """
    known = _with_modules(_weights(model))
    lacking = [name for name in names if name not in known]
    if lacking and isinstance(model, str | os.PathLike):
        # A file may call weights as an older version of the model did, and leaves out
        # those that are tied to others.
        known |= _with_modules(_built(Path(model), needed=False))
        lacking = [name for name in names if name not in known]
    if lacking:
        name = lacking[0]
        more = f" (and {len(lacking) - 1} more like it)" if lacking[1:] else ""
        raise ValueError(
            f"`module_names=` gives `{names[name]}` the PyTorch name {name!r}{more}, "
            f"which `model=` does not have. {close_to(name, sorted(known))}"
        )


def _with_modules(weights: Iterable[str]) -> set[str]:
    """All weights, and the modules that they are in."""
    found: set[str] = set()
    for weight in weights:
        while weight and weight not in found:
            found.add(weight)
            weight = weight.rpartition(".")[0]
    return found


def _weights(model: ModelSpec) -> set[str]:
    """The names of the weights."""
    if not isinstance(model, str | os.PathLike):
        names = set(model)
        if not names or not all(isinstance(x, str) for x in names):
            raise ValueError(
                "`model=` has to be a folder or a config.json of transformers, or the "
                "names of all weights, as `list(model.state_dict())` has them."
            )
        return names
    path = Path(model)
    if not path.exists():
        raise ValueError(
            f"`model={os.fspath(model)!r}` does not exist. It is a folder or a "
            "config.json; nothing is downloaded."
        )
    return _saved(path) if path.is_dir() else _built(path)


def _saved(folder: Path) -> set[str]:
    """The names in a folder's weights, or those that its configuration leads to."""
    found: set[str] = set()
    for index in folder.glob("*.index.json"):
        found |= set(_read(index).get("weight_map", {}))
    safetensors = safetensors_package()
    for file in () if found else folder.glob("*.safetensors"):
        try:
            with safetensors.safe_open(file, framework="np") as opened:
                found |= set(opened.keys())
        except safetensors.SafetensorError as error:
            raise ValueError(f"`{file}` of `model=` is damaged: {error}.") from None
    return found or _built(folder)


def _built(path: Path, *, needed: bool = True) -> set[str]:
    """The names in the model of a configuration, built without memory for weights.

    Args:
      path: The configuration, or the folder with it.
      needed: Whether nothing else is known of the model; else it may be empty.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        if not needed:
            return set()
        raise ValueError(f"`model={os.fspath(path)!r}` has no weights and no config.")
    try:
        import torch
        import transformers
    except ImportError:
        if not needed:
            return set()
        raise ImportError(
            "To know a model by its config.json needs transformers and PyTorch: `pip "
            "install 'lorapro_jax[torch]'`. Or pass the names of its weights."
        ) from None
    kinds = _read(file).get("architectures") or []
    kind = getattr(transformers, kinds[0], None) if kinds else None
    if kind is None:
        if not needed:
            return set()
        raise ValueError(
            f"`{file}` has architectures {kinds}, none of transformers. Pass the names "
            "of the weights, `model=list(model.state_dict())`."
        )
    config = transformers.AutoConfig.from_pretrained(file)
    with torch.device("meta"):
        return set(kind(config).state_dict())


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        raise ValueError("it is no object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`{file}` of `model=` cannot be read: {error}.") from None
