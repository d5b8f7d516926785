"""Like pairs as one pair with one more layer axis, where few large kernels are faster.

A GPU starts a kernel for every product of every pair, which takes longer than the
product of a skinny matrix itself. Stacking the pairs of all layers copies them, but
a step of Llama-2-7B's adapters becomes 165 kernels for an H100 instead of 3,652, where
AdamW alone has 450. On a CPU, and on a TPU by its compiler's estimate, the copies cost
more than they save (`benchmarks/NOTES.md`).
"""

import re
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from ._factors import PairArrays
from ._layout import FactorAxes, LoRAPair

T = TypeVar("T")


class Groups(NamedTuple):
    """Which of a sequence of pairs belong together.

    Attributes:
      members: The positions in each group; every position is in one.
    """

    members: Sequence[Sequence[int]]

    def join_pairs(self, pairs: Sequence[PairArrays]) -> list[PairArrays]:
        """A pair for each group, its members along a new axis 0."""
        arrays = self.join([pair[:4] for pair in pairs])
        joined = []
        for group, (a, b, grad_a, grad_b) in zip(self.members, arrays, strict=True):
            pair = pairs[group[0]]
            if len(group) > 1:
                axes = _behind(pair.a_axes), _behind(pair.b_axes)
                pair = PairArrays(a, b, grad_a, grad_b, pair.scale, *axes)
            joined.append(pair)
        return joined

    def join(self, trees: Sequence[T]) -> list[T]:
        """Of a tree of arrays for each pair, one for each group."""
        return [
            jax.tree.map(lambda *x: jnp.stack(x), *(trees[i] for i in group))
            if len(group) > 1
            else trees[group[0]]
            for group in self.members
        ]

    def split(self, trees: Sequence[T]) -> list[T]:
        """The reverse of `join`."""
        parts: dict[int, T] = {}
        for group, tree in zip(self.members, trees, strict=True):
            if len(group) == 1:
                parts[group[0]] = tree
                continue
            for k, i in enumerate(group):
                parts[i] = jax.tree.map(lambda x, k=k: x[k], tree)
        return [parts[i] for i in sorted(parts)]


def group_pairs(found: Sequence[LoRAPair], pairs: Sequence[PairArrays]) -> Groups:
    """The pairs to stack on this platform: on GPUs all that are alike.

    Alike are pairs of the same layer of a block, with the same shapes, dtypes and
    scale: their factors are sharded alike, also on automatic axes, which do not show
    while tracing.
    """
    if not _stacking_pays():
        return Groups([[i] for i in range(len(pairs))])
    groups: dict[object, list[int]] = {}
    for i, (name, pair) in enumerate(zip(found, pairs, strict=True)):
        kind = [re.sub(r"\d+", "", path) for path in (name.a, name.b)]
        arrays = [(x.shape, x.dtype, jax.typeof(x).sharding) for x in pair[:4]]
        scale = name.scale if isinstance(name.scale, int | float) else id(name.scale)
        groups.setdefault((*kind, *arrays, scale, *pair[5:]), []).append(i)
    return Groups(list(groups.values()))


def _stacking_pays() -> bool:
    return jax.default_backend() == "gpu"


def _behind(axes: FactorAxes) -> FactorAxes:
    """The same axes behind a new axis 0 of layers."""
    return FactorAxes(axes.rank + 1, (0, *(axis + 1 for axis in axes.batch)))
