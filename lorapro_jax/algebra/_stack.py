"""The r×r matrices of all pairs as one array, and back.

Mixed ranks are padded with zeros to the largest, and the layers of a stacked pair are
matrices like any other, so that one program serves all of them.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ._axes import Shape
from ._factors import PairArrays
from ._linalg import matmul
from ._sharding import replicated

_CHUNK = 8
"""Of pairs; see `Stack.products`."""


class Stack(NamedTuple):
    """Where the matrices of each pair lie among those of all; static.

    Attributes:
      ranks: r of each pair.
      batches: Its `(*batch)`, `()` where it is one layer.
    """

    ranks: tuple[int, ...]
    batches: tuple[Shape, ...]

    @classmethod
    def of(cls, pairs: Sequence[PairArrays]) -> "Stack":
        """That of these pairs, in their order."""
        return cls(tuple(x.rank for x in pairs), tuple(x.batch for x in pairs))

    @property
    def sizes(self) -> np.ndarray:
        """The rank of each matrix, `(N,)`."""
        return self.repeat(self.ranks)

    def join(self, matrices: Sequence[jax.Array]) -> jax.Array:
        """`(*batch_i, ..., r_i, r_i)` of all pairs as `(N, ..., R, R)`.

        The result is on every device.
        """
        flat = [
            replicated(x).reshape(-1, *x.shape[len(batch) :])
            for x, batch in zip(matrices, self.batches, strict=True)
        ]
        return _joined_square(flat)

    def join_scalars(self, scalars: Sequence[jax.Array]) -> jax.Array:
        """`(*batch_i)` of all pairs as `(N, 1, 1)`, in the widest dtype."""
        widest = _widest(scalars)
        flat = [replicated(x).reshape(-1).astype(widest) for x in scalars]
        return jnp.concatenate(flat)[:, None, None]

    def repeat(self, numbers: Sequence[Any]) -> np.ndarray:
        """Static numbers of each pair for each of its matrices, `(N, ...)`."""
        return np.repeat(numbers, [math.prod(x) for x in self.batches], axis=0)

    def split(self, stack: jax.Array) -> list[jax.Array]:
        """The reverse of `join`, for `(N, R, R)`."""
        parts = split_batches(stack, self.batches)
        return [x[..., :r, :r] for x, r in zip(parts, self.ranks, strict=True)]

    def products(self, left: jax.Array, right: jax.Array) -> list[jax.Array]:
        """`left @ right` of all matrices, divided: `(2, *batch_i, ...)` for each pair.

        In chunks of pairs, because XLA compiles equal programs once, and programs that
        read different places of an array differ. Those at one place of several arrays
        of a shape are equal, so a few dozen slices serve hundreds of pairs.

        Args:
          left: `(2, N, R, R)`, of both sides.
          right: `(2, N, R, K)`.
        """
        counts = [math.prod(batch) for batch in self.batches]
        ends = [0, *itertools.accumulate(counts)]
        products = []
        for i in range(0, len(counts), _CHUNK):
            batches = self.batches[i : i + _CHUNK]
            chunk = slice(ends[i], ends[i + len(batches)])
            product = matmul(left[:, chunk], right[:, chunk])
            products += _split_sides(product, batches)
        return products

    def split_sides(self, stack: jax.Array) -> list[jax.Array]:
        """`(2, N, ...)` divided: `(2, *batch_i, ...)` for each pair."""
        return _split_sides(stack, self.batches)


def stack_square(matrices: Sequence[jax.Array]) -> jax.Array:
    """Stacks square matrices of mixed size and batch shape into one array.

    Args:
      matrices: `(*batch_i, r_i, r_i)` each; the widest dtype is that of all.

    Returns:
      `(N, R, R)` with `N` the number of matrices in all batches and `R` the
      largest `r_i`; smaller ones fill their top left corner, the rest is 0.
    """
    return _joined_square([x.reshape(-1, *x.shape[-2:]) for x in matrices])


def split_batches(stack: jax.Array, batches: Sequence[Shape]) -> list[jax.Array]:
    """Divides `(N, *rest)` into one `(*batch_i, *rest)` for each batch shape."""
    counts = [math.prod(batch) for batch in batches]
    parts = jnp.split(stack, np.cumsum(counts)[:-1])
    return [
        part.reshape(*batch, *stack.shape[1:])
        for part, batch in zip(parts, batches, strict=True)
    ]


def _split_sides(stack: jax.Array, batches: Sequence[Shape]) -> list[jax.Array]:
    counts = [math.prod(batch) for batch in batches]
    parts = jnp.split(stack, np.cumsum(counts)[:-1], axis=1)
    return [
        part.reshape(2, *batch, *stack.shape[2:])
        for part, batch in zip(parts, batches, strict=True)
    ]


def _joined_square(matrices: Sequence[jax.Array]) -> jax.Array:
    """`(n_i, ..., r_i, r_i)` as `(N, ..., R, R)`, padded with zeros."""
    size = max(x.shape[-1] for x in matrices)
    widest = _widest(matrices)

    def padded(x: jax.Array) -> jax.Array:
        missing = size - x.shape[-1]
        none = [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x.astype(widest), [*none, (0, missing), (0, missing)])

    return jnp.concatenate([padded(x) for x in matrices])


def _widest(arrays: Sequence[jax.Array]) -> jnp.dtype:
    return max((x.dtype for x in arrays), key=lambda dtype: dtype.itemsize)
