"""Factors of a JAX tree as PEFT's matrices on the host, and back.

PEFT stores one pair a layer, A as `(r, in)` and B as `(out, r)`; for a convolution
`(r, channels, *window)` and `(out, r, 1, ...)`.
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from .._placement import to_host
from ..algebra._axes import FactorAxes, Shape
from ..pairs._axes import LoRAPair

_DTYPES = ("float16", "bfloat16", "float32", "float64")


def sides(pair: LoRAPair) -> Iterator[tuple[str, FactorAxes, bool]]:
    """Path and axes of A, then of B, and whether it is A."""
    return zip(pair.paths, pair.factor_axes, (True, False), strict=True)


def to_peft(x: np.ndarray, axes: FactorAxes, *, is_a: bool, window: int) -> np.ndarray:
    """One factor as PyTorch has it, `(*stack, ...)`.

    Args:
      x: A or B, with its axes in any order.
      axes: What its axes are. Feature axes are flattened in their order: the heads of
        an einsum, then what is in each.
      is_a: Whether it is A.
      window: The window axes of a convolution, which come first among A's features
        in JAX; else 0.
    """
    stack = len(axes.batch)
    rank_first = axes.rank < min(axes.features(x.ndim))  # PyTorch's layout already
    layers = np.moveaxis(x, (*axes.batch, axes.rank), range(stack + 1))
    if is_a and window:
        return layers if rank_first else np.moveaxis(layers, -1, stack + 1)
    matrices = layers.reshape(*layers.shape[: stack + 1], -1)
    if is_a:
        return matrices
    matrices = np.swapaxes(matrices, -1, -2)
    return matrices.reshape(*matrices.shape, *(1,) * window)


def from_peft(
    layers: np.ndarray, shape: Shape, axes: FactorAxes, *, is_a: bool
) -> np.ndarray:
    """The inverse of `to_peft`, for a factor of this shape.

    Args:
      layers: One array of the file for each layer, `(*stack, ...)`.
      shape: The shape of the factor in the tree.
      axes: What the axes of the factor are.
      is_a: Whether it is A.
    """
    stack = len(axes.batch)
    at = axes.features(len(shape))
    if not is_a:
        layers = layers.reshape(*layers.shape[:stack], -1, shape[axes.rank])
        layers = np.swapaxes(layers, -1, -2)
    elif layers.ndim > stack + 2 and axes.rank > min(at):
        layers = np.moveaxis(layers, stack + 1, -1)  # the channels behind the window
    features = [shape[axis] for axis in at]
    layers = layers.reshape(*layers.shape[: stack + 1], *features)
    return np.moveaxis(layers, range(stack + 1), (*axes.batch, axes.rank))


def peft_shapes(shape: Shape, axes: FactorAxes, *, is_a: bool) -> list[Shape]:
    """The shapes that one layer of a factor may have in a file, the usual one first."""
    at = axes.features(len(shape))
    sizes = [shape[axis] for axis in at]
    rank, count = shape[axes.rank], axes.feature_count(shape)
    if not is_a:
        return [(count, rank, *(1,) * window) for window in range(4)]
    if axes.rank > min(at):
        sizes = [sizes[-1], *sizes[:-1]]
    return [(rank, count), (rank, *sizes)]


def on_host(path: str, x: Any) -> np.ndarray:
    """All of a factor, also of one that other processes hold a part of."""
    if not isinstance(x, jax.Array | np.ndarray) or x.dtype.name not in _DTYPES:
        kind = type(x).__name__
        raise ValueError(
            f"`{path}` is a {kind} of dtype {x.dtype}; a PEFT file holds arrays of one "
            f"of {_DTYPES}."
        )
    return to_host(x)
