"""A tree seen as its LoRA pairs and the rest, and put together again."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from .._placement import cast_to
from ..algebra._factors import (
    Both,
    Factor,
    PairArrays,
    Step,
)
from ..pairs._axes import LoRAPair
from ..pairs._leaves import Leaf, check_factor, index_leaves

NOTHING = optax.MaskedNode()
"""What stands where a tree has no value for a leaf, as `optax.masked` has it."""


class View(NamedTuple):
    """Where the factors of a tree are; static.

    Attributes:
      pairs: What `find_pairs` finds.
      places: The positions of A and B of each among all leaves.
      treedef: The structure of the tree.
    """

    pairs: Sequence[LoRAPair]
    places: Sequence[Both[int]]
    treedef: Any

    @classmethod
    def of(cls, pairs: Sequence[LoRAPair], tree: Any) -> "View":
        """That of a tree in which these pairs were found."""
        index = index_leaves(tree)
        at = [Both(index[pair.a].position, index[pair.b].position) for pair in pairs]
        return cls(pairs, at, jax.tree.structure(tree))

    def take(self, updates: Any, params: Any) -> list[PairArrays]:
        """The arrays of all pairs.

        Args:
          updates: The tree of the gradients.
          params: The tree of the parameters; it may have more leaves.

        Raises:
          ValueError: `params` is missing or does not match.
        """
        if not self.pairs:
            return []
        if params is None:
            raise ValueError(
                "An optimizer of LoRA pairs needs the current factors: call "
                "`tx.update(grads, state, params)`."
            )
        gradients, factors = index_leaves(updates), index_leaves(params)
        return [_take(pair, gradients, factors) for pair in self.pairs]

    def rest(self, tree: Any) -> Any:
        """The tree with `NOTHING` at its factors."""
        leaves = self.treedef.flatten_up_to(tree)
        for place in self._all_places():
            leaves[place] = NOTHING
        return self.treedef.unflatten(leaves)

    def spread(self, values: Sequence[Both[Any]], rest: Any = None) -> Any:
        """Values at A and B of each pair, in `rest` or in a tree with nothing else.

        Args:
          values: For each pair arrays, factors, or None for nothing.
          rest: A tree like the viewed one.
        """
        leaves = [NOTHING] * self.treedef.num_leaves
        if rest is not None:
            leaves = self.treedef.flatten_up_to(rest)
        for both, places in zip(values, self.places, strict=True):
            for x, place in zip(both, places, strict=True):
                array = x.array if isinstance(x, Factor) else x
                leaves[place] = NOTHING if array is None else array
        return self.treedef.unflatten(leaves)

    def put(self, tree: Any, steps: Sequence[Step]) -> Any:
        """The tree with steps in place of its factors, each in the leaf's own dtype.

        All other leaves are the same objects.
        """
        cast = lambda step, x: cast_to(step.array, jnp.asarray(x).dtype)
        old = self.gather(tree)
        new = [step.map(cast, x) for step, x in zip(steps, old, strict=True)]
        return self.spread(new, tree)

    def gather(self, tree: Any) -> list[Both[Any]]:
        """What `spread` has put at A and B of each pair; None for nothing."""
        leaves = self.treedef.flatten_up_to(tree)
        of = lambda place: None if _is_nothing(leaves[place]) else leaves[place]
        return [places.map(of) for places in self.places]

    def _all_places(self) -> list[int]:
        return [place for places in self.places for place in places]


def with_values(tree: Any) -> Any:
    """Zeros with their shardings in place of leaves that are `jax.ShapeDtypeStruct`s.

    They serve to make a state: no moment depends on the values of the parameters at
    the start, where the first moment is 0.
    """

    def value(x: Any) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct):
            return jnp.zeros(x.shape, x.dtype, device=x.sharding)
        return x

    return jax.tree.map(value, tree)


def wide(tree: Any) -> Any:
    """All leaves in float32 at least.

    At the usual b2, a second moment in bfloat16 would never decay.
    """

    def widened(x: ArrayLike) -> jax.Array:
        x = jnp.asarray(x)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))

    return jax.tree.map(widened, tree)


def as_wide_as(tree: Any, updates: Any, params: Any) -> Any:
    """Each leaf in the wider dtype of gradient and parameter, where that is given."""
    params = updates if params is None else params

    def cast(x: jax.Array, gradient: ArrayLike, param: ArrayLike) -> jax.Array:
        dtypes = (jnp.asarray(y).dtype for y in (gradient, param))
        return cast_to(x, jnp.promote_types(*dtypes))

    return jax.tree.map(cast, tree, updates, params)


def _is_nothing(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _take(
    pair: LoRAPair, gradients: Mapping[str, Leaf], factors: Mapping[str, Leaf]
) -> PairArrays:
    """The arrays of one pair of `find_pairs`."""
    for path in pair.paths:
        _check_match(path, gradients[path], factors.get(path))
        check_factor(path, factors[path])

    def both(leaves: Mapping[str, Leaf]) -> Both[Factor]:
        arrays = (jnp.asarray(leaves[path].value) for path in pair.paths)
        trains = pair.wrt != "b", pair.wrt != "a"
        return Both(*map(Factor, arrays, pair.factor_axes, trains))

    # Whatever the gradient of a factor is that does not train, it must not count.
    seen = lambda x: x if x.trains else x.map(jnp.zeros_like)
    scale = cast(ArrayLike, pair.scale)
    return PairArrays(*both(factors), both(gradients).map(seen), scale)


def _check_match(path: str, gradient: Leaf, factor: Leaf | None) -> None:
    if factor is None:
        raise ValueError(
            f"`params` has no leaf `{path}`, but the gradients do. Pass the parameters "
            "that the gradients were taken of: `tx.update(grads, state, params)`."
        )
    if factor.shape != gradient.shape:
        raise ValueError(
            f"`{path}` has shape {factor.shape} in `params` and {gradient.shape} in "
            "the gradients. Pass the parameters that the gradients were taken of."
        )
