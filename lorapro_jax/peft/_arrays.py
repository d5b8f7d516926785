"""Factors of a JAX tree as layers of matrices on the host, and back.

In between, both factors are `(*stack, r, features)`, the rank first. A convolution's A
keeps its axes, in PyTorch's order: `(*stack, r, channels, *window)`.
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from .._placement import to_host
from ..algebra._axes import FactorAxes, Shape
from ..pairs._axes import LoRAPair

_DTYPES = ("float16", "bfloat16", "float32", "float64")


def sides(pair: LoRAPair) -> Iterator[tuple[str, FactorAxes]]:
    """Path and axes of A, then of B."""
    return zip(pair.paths, pair.factor_axes, strict=True)


def to_layers(x: np.ndarray, axes: FactorAxes, *, window: int = 0) -> np.ndarray:
    """One factor with its stacked axes and its rank in front.

    Args:
      x: A or B, with its axes in any order.
      axes: What its axes are. Feature axes are flattened in their order: the heads of
        an einsum, then what is in each.
      window: The window axes of a convolution's A, which come before its channels in
        JAX and behind them in PyTorch; else 0.
    """
    stack = len(axes.batch)
    rank_first = axes.rank < min(axes.features(x.ndim))  # PyTorch's layout already
    layers = np.moveaxis(x, (*axes.batch, axes.rank), range(stack + 1))
    if window:
        return layers if rank_first else np.moveaxis(layers, -1, stack + 1)
    return layers.reshape(*layers.shape[: stack + 1], -1)


def from_layers(layers: np.ndarray, shape: Shape, axes: FactorAxes) -> np.ndarray:
    """The inverse of `to_layers`, for a factor of this shape."""
    stack = len(axes.batch)
    at = axes.features(len(shape))
    if layers.ndim > stack + 2 and axes.rank > min(at):
        layers = np.moveaxis(layers, stack + 1, -1)  # the channels behind the window
    features = [shape[axis] for axis in at]
    layers = layers.reshape(*layers.shape[: stack + 1], *features)
    return np.moveaxis(layers, range(stack + 1), (*axes.batch, axes.rank))


def feature_shapes(shape: Shape, axes: FactorAxes) -> list[Shape]:
    """The features that one layer of an A may have in a file, the usual ones first."""
    at = axes.features(len(shape))
    sizes = [shape[axis] for axis in at]
    if axes.rank > min(at):
        sizes = [sizes[-1], *sizes[:-1]]
    return list(dict.fromkeys([(axes.feature_count(shape),), tuple(sizes)]))


def on_host(path: str, x: Any) -> np.ndarray:
    """All of a leaf, also of one that other processes hold a part of."""
    if not isinstance(x, jax.Array | np.ndarray) or x.dtype.name not in _DTYPES:
        kind = type(x).__name__
        raise ValueError(
            f"`{path}` is a {kind} of dtype {x.dtype}; a PEFT file holds arrays of one "
            f"of {_DTYPES}."
        )
    return to_host(x)
