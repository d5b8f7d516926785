"""Layers of a file at the rank that the tree has."""

import zlib
from collections.abc import Sequence

import jax
import numpy as np

from ..ranks._factors import resize_factors
from ._matrices import Layer


def resize_layers(
    layers: Sequence[Layer], side: int, rank: int, name: str
) -> list[Layer]:
    """The modules of one pair at another rank: the product, or the closest to it.

    Args:
      layers: One for each of the modules, which share a factor.
      side: The factor that each has its part of, 0 for A and 1 for B.
      rank: The new rank.
      name: That of the layer: new rows of A are drawn from it.
    """
    if layers[0].rank == rank:
        return list(layers)
    flat = [[_flat(x, layer) for x in layer] for layer in layers]
    pieces = np.concatenate([both[side] for both in flat], axis=-1)
    whole = Layer(*((flat[0][0], pieces) if side else (pieces, flat[0][1])))
    key = jax.random.fold_in(jax.random.key(0), zlib.crc32(name.encode()))
    found = resize_factors(whole.a, np.swapaxes(whole.b, -1, -2), rank, key)
    a, b = np.asarray(found.a), np.swapaxes(np.asarray(found.b), -1, -2)
    ends = np.cumsum([both[side].shape[-1] for both in flat])[:-1]
    parts = np.split(b if side else a, ends, axis=-1)
    new = [Layer(a, x) if side else Layer(x, b) for x in parts]
    return [
        layer._replace(a=layer.a.reshape(rank, *old.a.shape[1:]))
        if old.a.ndim > old.b.ndim  # a convolution's window
        else layer
        for layer, old in zip(new, layers, strict=True)
    ]


def _flat(x: np.ndarray, layer: Layer) -> np.ndarray:
    """A factor as matrices, wide enough for what comes of it to be rounded once."""
    wide = x.astype(np.promote_types(x.dtype, np.float32))
    return wide.reshape(*layer.b.shape[:-1], -1)
