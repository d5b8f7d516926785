"""What is known of a base model in PyTorch: its weights, and the kinds of its modules.

A model itself tells all. So does a folder of transformers where these can build it,
without memory for weights; else its files tell the names that they have.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from ..algebra._axes import Shape
from ._keys import PREFIX
from ._tensors import safetensors_package

ModelSpec: TypeAlias = str | os.PathLike[str] | Iterable[str] | Any
"""A module of PyTorch, its state dict, the names of all weights, or a path."""

# By the names of classes, as PyTorch need not be installed to look at a module.
_KINDS = {
    "Embedding": "embedding",
    "Conv1D": "Conv1D",
    "_ConvNd": "convolution",
    "Linear": "linear layer",
}


class Base(NamedTuple):
    """A base model.

    Attributes:
      shapes: Those of all weights by name; None where only the name is known.
      kinds: What each module is, one of the values of `_KINDS` or ""; empty where
        modules cannot be seen.
      tied: The names of weights that are one.
      family: transformers' `model_type`.
    """

    shapes: Mapping[str, Shape | None]
    kinds: Mapping[str, str]
    tied: tuple[tuple[str, ...], ...]
    family: str | None


def read_base(model: ModelSpec) -> Base:
    """What `model=` tells.

    Raises:
      ValueError: It is none of the things that a model may be, or a damaged file.
      ImportError: A configuration alone, without transformers and PyTorch.
    """
    if isinstance(model, str | os.PathLike):
        return _of_path(Path(model))
    if callable(getattr(model, "state_dict", None)):
        return _of_module(model)
    if isinstance(model, Mapping):
        return _of_weights({name: _shape(x) for name, x in model.items()})
    try:
        return _of_weights(dict.fromkeys(model))
    except TypeError:  # not iterable, or of things without a hash
        return _of_weights({})


def _of_weights(shapes: Mapping[str, Shape | None], family: str | None = None) -> Base:
    """All that weights tell."""
    return _checked(Base(shapes, {}, (), family))


def _checked(base: Base) -> Base:
    if not base.shapes or not all(isinstance(x, str) for x in base.shapes):
        raise ValueError(
            "`model=` has to be a module of PyTorch, its state dict, the names of all "
            "weights, as `list(model.state_dict())` has them, or a folder or a "
            "config.json of transformers."
        )
    if any(x.startswith(PREFIX) for x in base.shapes):
        raise ValueError(
            "`model=` is a model that PEFT has wrapped already. Pass the base model as "
            "it was before `get_peft_model`, or a folder or names of that."
        )
    return base


def _shape(x: Any) -> Shape | None:
    return tuple(map(int, x.shape)) if hasattr(x, "shape") else None


def _of_module(model: Any) -> Base:
    """Everything that a module shows; one on the meta device will do."""
    shapes = {name: _shape(x) for name, x in model.state_dict().items()}
    kinds: dict[str, str] = {}
    tied: dict[int, list[str]] = defaultdict(list)
    if hasattr(model, "named_modules"):
        for name, module in model.named_modules(remove_duplicate=False):
            names = [x.__name__ for x in type(module).__mro__]
            kinds[name] = next((_KINDS[x] for x in names if x in _KINDS), "")
    if hasattr(model, "named_parameters"):
        for name, x in model.named_parameters(remove_duplicate=False):
            tied[id(x)].append(name)
    groups = tuple(tuple(x) for x in tied.values() if len(x) > 1)
    family = getattr(getattr(model, "config", None), "model_type", None)
    return _checked(Base(shapes, kinds, groups, family))


def _of_path(path: Path) -> Base:
    """A folder or a configuration: the model that it makes, or the names of a file."""
    if not path.exists():
        raise ValueError(
            f"`model={os.fspath(path)!r}` does not exist. It is a folder or a "
            "config.json; nothing is downloaded."
        )
    file = path / "config.json" if path.is_dir() else path
    saved = _saved(path) if path.is_dir() else {}
    if not file.is_file():
        if not saved:
            raise ValueError(
                f"`model={os.fspath(path)!r}` has no weights and no config.json."
            )
        return _of_weights(saved)
    config = _read(file)
    try:
        # A file may call weights as an older version of the model did, and leaves out
        # those that are tied to others: the names of the model itself are PEFT's.
        return _of_module(_built(file, config))
    except (ImportError, ValueError):
        if not saved:
            raise
        return _of_weights(saved, config.get("model_type"))


def _saved(folder: Path) -> dict[str, Shape | None]:
    """The weights of a folder's files."""
    found: dict[str, Shape | None] = {}
    for index in folder.glob("*.index.json"):
        found |= dict.fromkeys(_read(index).get("weight_map", {}))
    safetensors = safetensors_package()
    for file in () if found else folder.glob("*.safetensors"):
        try:
            with safetensors.safe_open(file, framework="np") as opened:
                for name in opened.keys():  # noqa: SIM118
                    found[name] = tuple(opened.get_slice(name).get_shape())
        except safetensors.SafetensorError as error:
            raise ValueError(f"`{file}` of `model=` is damaged: {error}.") from None
    return found


def _built(file: Path, config: Mapping[str, Any]) -> Any:
    """The model of a configuration, without memory for weights.

    Raises:
      ImportError: transformers or PyTorch is not installed.
      ValueError: transformers does not know such a model, or cannot build it.
    """
    try:
        import torch
        import transformers
    except ImportError:
        raise ImportError(
            "To know a model by its config.json needs transformers and PyTorch: `pip "
            "install 'lorapro_jax[torch]'`. Or pass the names of its weights."
        ) from None
    kinds = config.get("architectures") or []
    kind = getattr(transformers, kinds[0], None) if kinds else None
    remedy = "Pass the model itself, `model=torch_model`, or its state dict."
    if kind is None:
        raise ValueError(
            f"`{file}` has architectures {kinds}, none of transformers. {remedy}"
        )
    try:
        with torch.device("meta"):
            return kind(transformers.AutoConfig.from_pretrained(file))
    except Exception as error:  # whatever a model's own code may raise
        raise ValueError(
            f"transformers cannot build the model of `{file}`: {error}. {remedy}"
        ) from error


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        raise ValueError("it is no object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`{file}` of `model=` cannot be read: {error}.") from None
