"""One layer of a pair as the two tensors of a PEFT file, and back.

A linear layer has A as `(r, in)` and B as `(out, r)`, a convolution
`(r, channels, *window)` and `(out, r, 1, ...)`. The experts of an MoE layer share two
tensors, `(experts · r, in)` and `(out, r · experts)`, as PEFT's `ParamWrapper` reads
them: expert by expert in A, and rank by rank in B.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..algebra._axes import Shape


class Layer(NamedTuple):
    """Both factors of one layer, the rank first.

    Attributes:
      a: `(r, in)`, for a convolution `(r, channels, *window)`; the experts of an MoE
        layer are in front.
      b: `(r, out)`; the experts are in front.
    """

    a: np.ndarray
    b: np.ndarray

    @property
    def rank(self) -> int:
        return int(self.b.shape[-2])


def to_tensors(layer: Layer, *, experts: bool) -> tuple[np.ndarray, np.ndarray]:
    """A and B of a layer as PyTorch has them."""
    a, b = layer
    if experts:
        return a.reshape(-1, a.shape[-1]), b.transpose(2, 1, 0).reshape(b.shape[-1], -1)
    window = a.ndim - 2
    return a, b.T.reshape(*b.T.shape, *(1,) * window)


def from_tensors(a: np.ndarray, b: np.ndarray, experts: int | None) -> Layer:
    """The inverse of `to_tensors`."""
    if experts is None:
        return Layer(a, b.reshape(b.shape[:2]).T)
    rank = len(a) // experts
    of_b = b.reshape(len(b), rank, experts).transpose(2, 1, 0)
    return Layer(a.reshape(experts, rank, -1), of_b)


def tensor_shapes(
    rank: int, of_a: Sequence[Shape], of_b: int, experts: int | None
) -> tuple[list[Shape], list[Shape]]:
    """The shapes that A and B may have in a file, the usual ones first.

    Args:
      rank: The rank of each layer or expert.
      of_a: What A's features may be.
      of_b: The number of B's features.
      experts: The number of experts that share the tensors; None without.
    """
    count = rank * (experts or 1)
    shapes_a = [(count, *features) for features in of_a]
    return shapes_a, [(of_b, count, *(1,) * window) for window in range(4)]


def join_shared(
    shared: Sequence[np.ndarray], pieces: Sequence[np.ndarray], axis: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Pairs of several modules as one, whose pieces lie side by side.

    Of k_proj and v_proj, the A's are to be one and the B's are its pieces. Where the
    A's are equal, nothing changes. Else the pair has their ranks' sum: it is exact,
    [A1; A2] and [B1, 0], [0, B2].

    Args:
      shared: What is to become one, of each module.
      pieces: The other factor of each module.
      axis: Their rank axis.
    """
    first = shared[0]
    if all(np.array_equal(first, other) for other in shared[1:]):
        return first, list(pieces)
    ranks = [piece.shape[axis] for piece in pieces]
    padded = []
    for index, piece in enumerate(pieces):
        around = [(0, 0)] * piece.ndim
        around[axis] = sum(ranks[:index]), sum(ranks[index + 1 :])
        padded.append(np.pad(piece, around))
    return np.concatenate(shared, axis=axis), padded


def pad_rank(x: np.ndarray, rank: int, axis: int) -> np.ndarray:
    """A factor with zeros up to this rank."""
    around = [(0, 0)] * x.ndim
    around[axis] = 0, rank - x.shape[axis]
    return np.pad(x, around)


def times(x: np.ndarray, ratio: np.ndarray) -> np.ndarray:
    """`x` times a number, or one for each expert in front; equal scales keep the bits.

    Otherwise it is float64, so that what stores it rounds once.
    """
    if np.allclose(ratio, 1.0, rtol=1e-12, atol=0.0):
        return x
    factor = ratio.reshape(*ratio.shape, *(1,) * (x.ndim - ratio.ndim))
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(x.astype(np.float64) * factor)
