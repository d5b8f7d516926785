"""What a file has beside the factors: trained biases, heads, whole layers.

PEFT loads every weight that it finds in a file. It saves biases by `bias`, and the
layers of `modules_to_save`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from .._checks import close_to, compiled
from ..algebra._axes import Shape
from ..pairs._leaves import Leaf, index_leaves
from ._keys import PREFIX
from ._templates import Index, fill_in, is_name, places_of


class Extra(NamedTuple):
    """A leaf that is no factor, and its weights in PyTorch.

    Attributes:
      path: The path of the leaf.
      shape: Its shape.
      names: The parameter in PyTorch for each position on its leading axes; those of
        one layer by `()`.
    """

    path: str
    shape: Shape
    names: Mapping[Index, str]

    @property
    def inner(self) -> Shape:
        """The shape for one name."""
        return self.shape[len(next(iter(self.names))) :]

    @property
    def is_kernel(self) -> bool:
        """Whether it is Flax's or Keras's, with its outputs last."""
        return self.path.rpartition("/")[2] == "kernel"

    @property
    def is_bias(self) -> bool:
        """Whether it is a layer's, perhaps with an axis of heads."""
        return self.path.rpartition("/")[2] == "bias"


def find_extra(
    tree: Any, spec: Mapping[str, str] | None, factors: Iterable[str]
) -> list[Extra]:
    """The leaves that `extra=` names.

    Args:
      tree: The tree.
      spec: `{regex: template}` on the whole path of a leaf; `{}` in the template
        stands for the position on a leading axis.
      factors: The paths of the factors, which are none of these.

    Raises:
      ValueError: A regex without a leaf, a name that cannot be, or that two have.
      TypeError: The option is no mapping.
    """
    if spec is None:
        return []
    if not isinstance(spec, Mapping):
        raise TypeError(f"`extra={spec!r}` has to be `{{regex: template}}`.")
    leaves, taken = index_leaves(tree), set(factors)
    others = [path for path in leaves if path not in taken]
    patterns = {x: compiled(x, "extra") for x in spec}
    for given, pattern in patterns.items():
        if not any(map(pattern.fullmatch, others)):
            raise ValueError(
                f"The pattern {given!r} of `extra=` matches the whole path of no leaf "
                f"beside the factors. {close_to(given, others)} Pass a tree with it, "
                "correct the pattern, or take it out."
            )
    found: list[Extra] = []
    owners: dict[str, str] = {}
    for path in others:
        for given, pattern in patterns.items():
            if match := pattern.fullmatch(path):
                shape = _floating(path, leaves[path])
                names = _names(path, shape, spec[given], match)
                _check_names(path, names, owners)
                found.append(Extra(path, shape, names))
                break
    return found


def to_torch(x: np.ndarray, extra: Extra, *, conv: bool) -> np.ndarray:
    """One weight as PyTorch has it: kernels with their outputs first, biases flat."""
    if not extra.is_kernel:
        return x.ravel() if extra.is_bias else x
    if x.ndim != 2 and not conv:
        raise ValueError(
            f"`{extra.path}` is a kernel of shape {x.shape}. `extra=` takes (in, out), "
            "and (*window, in, out) where `conv=` says that it is a convolution: "
            "reshape it first."
        )
    return np.moveaxis(x, (-1, -2), (0, 1))


def from_torch(x: np.ndarray, extra: Extra) -> np.ndarray:
    """The inverse of `to_torch`."""
    return np.moveaxis(x, (0, 1), (-1, -2)) if extra.is_kernel else x


def torch_shape(extra: Extra) -> Shape:
    """The shape of one weight in PyTorch."""
    inner = extra.inner
    if extra.is_kernel:
        return (*reversed(inner[-2:]), *inner[:-2])
    return (math.prod(inner),) if extra.is_bias else inner


def extra_key(name: str, wrapped: Mapping[str, int]) -> str:
    """What a file calls a weight: PEFT wraps the layers with factors.

    Args:
      name: The parameter in PyTorch.
      wrapped: How often PEFT wraps each of these modules.
    """
    module, _, last = name.rpartition(".")
    return f"{PREFIX}{module}{'.base_layer' * wrapped.get(module, 0)}.{last}"


def beside_config(
    extras: Sequence[Extra], wrapped: Mapping[str, int]
) -> dict[str, Any]:
    """The entries `bias` and `modules_to_save` of the configuration."""
    names = [x.rpartition(".")[::2] for e in extras for x in e.names.values()]
    kept = {module for module, last in names if last != "bias"} - wrapped.keys()
    biases = {module for module, last in names if last == "bias"} - kept
    kind = "none"
    if biases:
        kind = "lora_only" if biases <= wrapped.keys() else "all"
    return {"bias": kind, "modules_to_save": sorted(kept) or None}


def _floating(path: str, leaf: Leaf) -> Shape:
    """The shape of a leaf that PyTorch can train."""
    dtype = getattr(leaf.value, "dtype", np.dtype(object))
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"`{path}` of `extra=` has dtype {dtype}, which is no real floating point. "
            "Leave it out of the pattern."
        )
    return leaf.shape


def _names(path: str, shape: Shape, template: Any, match: Any) -> dict[Index, str]:
    depth = len(places_of(template)) if isinstance(template, str) else 0
    try:
        if depth > len(shape):
            raise ValueError(f"has {depth} places for the {len(shape)} axes of it.")
        return {
            index: fill_in(template, match, index)
            for index in np.ndindex(*shape[:depth])
        }
    except ValueError as error:
        raise ValueError(
            f"The name {template!r} that `extra=` has for `{path}` {error}"
        ) from None


def _check_names(path: str, names: Mapping[Index, str], owners: dict[str, str]) -> None:
    for name in names.values():
        if not is_name(name) or "." not in name:
            raise ValueError(
                f"`{path}` would have the PyTorch name {name!r}. Give it that of a "
                "parameter with `extra=`, such as 'classifier.weight'."
            )
        if name in owners:
            raise ValueError(
                f"`{path}` and `{owners[name]}` would have the same PyTorch name, "
                f"{name!r}. Give each its own with `extra=`."
            )
        owners[name] = path
