"""Leaves of a tree that are no factors, and what PyTorch calls them.

PEFT loads every weight that it finds in a file. It saves biases by `bias`, and the
layers of `modules_to_save` (`_beside`).
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from .._checks import close_to, compiled
from ..algebra._axes import Shape
from ..pairs._leaves import Leaf, index_leaves
from ._templates import Index, check_plain, fill_in, is_name, places_of

ExtraSpec: TypeAlias = Mapping[str, str | tuple[str, ...]]
"""From a regex on the path of a leaf to its name in PyTorch, or several names."""

_TURNED = ".T"  # behind a name: PyTorch has the weight the other way round


class Place(NamedTuple):
    """A parameter in PyTorch.

    Attributes:
      name: What it is called.
      turned: Whether it is the transpose of what a layer of its kind usually has.
    """

    name: str
    turned: bool = False


class Extra(NamedTuple):
    """A leaf that is no factor, and its weights in PyTorch.

    Attributes:
      path: The path of the leaf.
      shape: Its shape.
      places: The parameters in PyTorch for each position on its leading axes, those of
        one layer by `()`: one, or several that have the same value.
    """

    path: str
    shape: Shape
    places: Mapping[Index, tuple[Place, ...]]

    @property
    def names(self) -> list[str]:
        """All parameters."""
        return [place.name for places in self.places.values() for place in places]

    @property
    def inner(self) -> Shape:
        """The shape for one name."""
        return self.shape[len(next(iter(self.places))) :]

    @property
    def is_kernel(self) -> bool:
        """Whether it is Flax's or Keras's, with its outputs last."""
        return self.path.rpartition("/")[2] == "kernel"

    @property
    def is_bias(self) -> bool:
        """Whether it is a layer's, perhaps with an axis of heads."""
        return self.path.rpartition("/")[2] == "bias"


def find_extra(
    tree: Any, spec: ExtraSpec | None, factors: Iterable[str]
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
                extra = Extra(path, shape, _places(path, shape, spec[given], match))
                _check_names(extra, owners)
                found.append(extra)
                break
    return found


def to_torch(x: np.ndarray, extra: Extra, place: Place, *, conv: bool) -> np.ndarray:
    """One weight as PyTorch has it: kernels with their outputs first, biases flat."""
    if not extra.is_kernel:
        x = x.ravel() if extra.is_bias else x
    elif x.ndim != 2 and not conv:
        raise ValueError(
            f"`{extra.path}` is a kernel of shape {x.shape}. `extra=` takes (in, out), "
            "and (*window, in, out) where `conv=` says that it is a convolution: "
            "reshape it first."
        )
    else:
        x = np.moveaxis(x, (-1, -2), (0, 1))
    return x.T if place.turned else x


def from_torch(x: np.ndarray, extra: Extra, place: Place) -> np.ndarray:
    """The inverse of `to_torch`."""
    x = x.T if place.turned else x
    return np.moveaxis(x, (0, 1), (-1, -2)) if extra.is_kernel else x


def torch_shape(extra: Extra, place: Place) -> Shape:
    """The shape of one weight in PyTorch."""
    shape = extra.inner
    if extra.is_kernel:
        shape = (*reversed(shape[-2:]), *shape[:-2])
    elif extra.is_bias:
        shape = (math.prod(shape),)
    return shape[::-1] if place.turned else shape


def _floating(path: str, leaf: Leaf) -> Shape:
    """The shape of a leaf that PyTorch can train."""
    dtype = getattr(leaf.value, "dtype", np.dtype(object))
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"`{path}` of `extra=` has dtype {dtype}, which is no real floating point. "
            "Leave it out of the pattern."
        )
    return leaf.shape


def _places(
    path: str, shape: Shape, given: Any, match: Any
) -> dict[Index, tuple[Place, ...]]:
    """The parameters of each position on the leading axes."""
    templates = given if isinstance(given, tuple | list) and given else (given,)
    depths = [len(places_of(x)) if isinstance(x, str) else 0 for x in templates]
    try:
        depth = max(depths)
        if depth > len(shape):
            raise ValueError(f"has {depth} places for the {len(shape)} axes of it.")
        return {
            index: tuple(_place(fill_in(x, match, index)) for x in templates)
            for index in np.ndindex(*shape[:depth])
        }
    except ValueError as error:
        raise ValueError(
            f"The name {given!r} that `extra=` has for `{path}` {error}"
        ) from None


def _place(name: str) -> Place:
    return Place(name.removesuffix(_TURNED), name.endswith(_TURNED))


def _check_names(extra: Extra, owners: dict[str, str]) -> None:
    path = extra.path
    for name, turned in (x for places in extra.places.values() for x in places):
        if not is_name(name) or "." not in name:
            raise ValueError(
                f"`{path}` would have the PyTorch name {name!r}. Give it that of a "
                "parameter with `extra=`, such as 'classifier.weight'."
            )
        check_plain(path, name, "extra")
        if turned and len(extra.inner) != 2:
            raise ValueError(
                f"`{path}` has shape {extra.inner} for {name!r}, and the `.T` behind "
                "that name is for weights of two axes. Leave `.T` out."
            )
        if name in owners:
            raise ValueError(
                f"`{path}` and `{owners[name]}` would have the same PyTorch name, "
                f"{name!r}. Give each its own with `extra=`."
            )
        owners[name] = path
