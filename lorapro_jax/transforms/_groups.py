"""Like pairs as one pair with one more layer axis, where few large kernels are faster.

A GPU starts a kernel for every product of every pair, which takes longer than the
product of a skinny matrix itself. Stacking the pairs of all layers copies them, but an
H200 is busy for 1.4 ms with a step of Llama-2-7B's adapters instead of 7.8, in 194
kernels instead of 4,113. On a CPU, and on a TPU by its compiler's estimate, the copies
cost more than they save (`benchmarks/NOTES.md`).
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from ..algebra._factors import Factor, PairArrays
from ..algebra._linalg import on_gpu
from ..pairs._axes import LoRAPair

T = TypeVar("T")


class Groups(NamedTuple):
    """Which of a sequence of pairs belong together.

    Attributes:
      members: The positions in each group; every position is in one.
    """

    members: Sequence[Sequence[int]]

    def join(self, trees: Sequence[T]) -> list[T]:
        """Of a tree for each pair, one for each group, its members along a new axis 0.

        Factors get the new axis as their first batch axis. A scale that is one number
        is the same in all of a group, and stays one number.
        """
        return [
            _joined([trees[i] for i in group]) if len(group) > 1 else trees[group[0]]
            for group in self.members
        ]

    def split(self, trees: Sequence[T]) -> list[T]:
        """The reverse of `join`, but for scales."""
        parts: dict[int, T] = {}
        for group, tree in zip(self.members, trees, strict=True):
            if len(group) == 1:
                parts[group[0]] = tree
                continue
            kept = _truths(len(group))
            for k, i in enumerate(group):
                parts[i] = _part(tree, k, kept[k])
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
        kind = [re.sub(r"\d+", "", path) for path in name.paths]
        factors = [
            (x.shape, x.dtype, x.axes, x.trains, jax.typeof(x.array).sharding)
            for x in (*pair.factors, *pair.gradients)
        ]
        scale = name.scale if isinstance(name.scale, int | float) else id(name.scale)
        groups.setdefault((*kind, *factors, scale), []).append(i)
    return Groups(list(groups.values()))


def _stacking_pays() -> bool:
    return on_gpu()


def _joined(trees: Sequence[Any]) -> Any:
    """Trees of arrays and factors as one, stacked along a new axis 0."""
    first = trees[0]
    if isinstance(first, PairArrays):
        factors = _joined([x.factors for x in trees])
        gradients = _joined([x.gradients for x in trees])
        scale = first.scale
        if jnp.ndim(scale):  # one for each layer
            scale = jnp.stack([jnp.asarray(x.scale) for x in trees])
        return PairArrays(factors.a, factors.b, gradients, scale)

    def stack(*xs: Any) -> Any:
        if isinstance(xs[0], Factor):
            array = jnp.stack([x.array for x in xs])
            return Factor(array, xs[0].axes.stacked(), xs[0].trains)
        return jnp.stack(xs)

    return jax.tree.map(stack, *trees, is_leaf=_is_factor)


def _part(tree: Any, k: int, kept: jax.Array) -> Any:
    """The member k of a joined tree; `kept` is one of `_truths`."""

    def of(stack: jax.Array) -> jax.Array:
        return jax.lax.select(kept, stack[k], jnp.zeros_like(stack[k]))

    def take(x: Any) -> Any:
        if _is_factor(x):
            return Factor(of(x.array), x.axes.unstacked(), x.trains)
        return of(x)

    return jax.tree.map(take, tree, is_leaf=_is_factor)


def _truths(count: int) -> jax.Array:
    """Only True, `(count,)`, which XLA does not know.

    Of parts that depend on it XLA makes a few kernels, each with as many results;
    what is a slice and nothing else it copies by itself, one part after the other.
    """
    truths: jax.Array = jax.lax.optimization_barrier(jnp.ones(count, bool))
    return truths


def _is_factor(x: Any) -> bool:
    return isinstance(x, Factor)
