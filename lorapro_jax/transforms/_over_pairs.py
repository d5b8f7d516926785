"""An optimizer of LoRA pairs, over a whole tree.

A `Rule` sees the arrays of pairs and knows nothing of trees; `over_pairs` sees trees
and knows nothing of the rule. A new optimizer is a new rule, and a factory that hands
it to `over_pairs`; see `optimizers/_dense.py` for one on a page.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from ..algebra._factors import (
    Factor,
    PairArrays,
    Step,
    in_compute_dtype,
)
from ..pairs._names import normalize_path
from ._clip import Clip, scaled
from ._groups import group_pairs
from ._options import FindPairs
from ._rounding import warn_of_narrow_factors
from ._view import View, as_wide_as, wide, with_values

_FOREIGN = (
    "The optimizer state is not that of these gradients. Call `tx.init` with the "
    "parameters that they were taken of, and with the same options (as `moments=` or "
    "`escape_mass=`)."
)


class Rule(Protocol):
    """One optimizer of LoRA pairs, as functions of arrays.

    Its state of one pair is a NamedTuple, and each field a `Both`: what belongs to A
    and what belongs to B, a `Factor` with the axes of that factor, an array whose first
    axes are the pair's batch, or None for nothing.

    A result must be a function of its pair alone, the clipping's number apart.
    """

    @property
    def state(self) -> type[Any]:
        """The class of that NamedTuple."""

    def init(self, pair: PairArrays) -> Any:
        """The state before the first step, of a pair in the dtypes of its leaves.

        What is like a factor should be made from it, and so have its sharding.
        """

    def update(
        self,
        pairs: Sequence[PairArrays],
        states: Sequence[Any],
        count: jax.Array,
        clip: Clip,
    ) -> tuple[list[Step], list[Any], jax.Array | None]:
        """The directions of all pairs, in the sense of a gradient; and new states.

        Args:
          pairs: In their compute dtype, with LoRA's gradients.
          states: Of each pair.
          count: The number of this step, from 1.
          clip: Asked by `clip.factor` for the number that all gradients are to be
            multiplied with.

        Returns:
          Directions, states, and that number (None without clipping), which the other
          leaves are multiplied with too.
        """


class OverPairsState(NamedTuple):
    """State of an optimizer of LoRA pairs: arrays only, in trees like the parameters.

    Attributes:
      count: Steps done, int32.
      pairs: The rule's NamedTuple. Each of its fields is a tree like the parameters
        with that field's arrays at A and at B, with the shardings of these leaves.
      others: The state of the transform of all other leaves, whose tree it sees
        without the factors.

    Where there is nothing there is an `optax.MaskedNode()`, which `tree.map_params`
    with a second tree has to be told: `is_leaf=lambda x: isinstance(x, MaskedNode)`.
    """

    count: jax.Array  # type: ignore[assignment]
    pairs: Any
    others: Any


def over_pairs(
    rule: Rule,
    find: FindPairs,
    others: optax.GradientTransformation,
    max_norm: ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`rule` on the LoRA pairs of a tree, `others` on its other leaves.

    Other leaves are shown to `others` in float32 at least. `update` returns each leaf
    in the wider dtype of its gradient and its parameter.

    Args:
      rule: The optimizer.
      find: From a tree to its pairs.
      others: The transform of the leaves that are no factor.
      max_norm: The bound of `Clip`; None for no clipping.
    """

    def init_fn(params: optax.Params) -> OverPairsState:
        params = with_values(params)
        view = View.of(find(params), params)
        warn_of_narrow_factors(view.pairs, params)
        states = [rule.init(x) for x in view.take(params, params)]
        return OverPairsState(
            jnp.zeros((), jnp.int32),
            _spread(view, states, rule.state),
            others.init(wide(view.rest(params))),
        )

    def update_fn(
        updates: optax.Updates,
        state: OverPairsState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, OverPairsState]:
        del extra_args
        view = View.of(find(updates), updates)
        pairs = [in_compute_dtype(x) for x in view.take(updates, params)]
        rest = wide(view.rest(updates))
        like = _shapes(rule, pairs)
        expected = _spread(view, like, rule.state), jax.eval_shape(others.init, rest)
        _check((state.pairs, state.others), expected)
        groups = group_pairs(view.pairs, pairs)
        old = groups.join(_gather(view, state.pairs, like))

        count, clip = optax.safe_increment(state.count), Clip(max_norm, rest)
        if pairs:
            steps, new, factor = rule.update(groups.join(pairs), old, count, clip)
        else:
            steps, new, factor = [], [], clip.factor([])
        new = jax.tree.map(lambda x, y: x.astype(y.dtype), new, old)

        # Optax relies on the promotion of dtypes, also where a user forbids it.
        with jax.numpy_dtype_promotion("standard"):
            rest, others_state = others.update(scaled(factor, rest), state.others)
        steps = view.spread(groups.split(steps), rest)
        pairs_state = _spread(view, groups.split(new), rule.state)
        new_state = OverPairsState(count, pairs_state, others_state)
        return as_wide_as(steps, updates, params), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _spread(view: View, states: Sequence[Any], kind: type[Any]) -> Any:
    """The states of all pairs as one, whose fields are trees."""
    fields = range(len(kind._fields))
    return kind(*(view.spread([state[i] for state in states]) for i in fields))


def _gather(view: View, trees: Any, like: Sequence[Any]) -> list[Any]:
    """The reverse of `_spread`: factors are where `like` has them."""

    def as_in(x: Any, array: Any) -> Any:
        return x.like(array) if isinstance(x, Factor) else array

    fields = [view.gather(tree) for tree in trees]
    return [
        type(state)(*(x.map(as_in, both) for x, both in zip(state, found, strict=True)))
        for state, *found in zip(like, *fields, strict=True)
    ]


def _shapes(rule: Rule, pairs: Sequence[PairArrays]) -> list[Any]:
    """The states of pairs without values: one trace for each kind of pair."""
    kinds: dict[Any, Any] = {}

    def of(pair: PairArrays) -> Any:
        leaves, treedef = jax.tree.flatten(pair)
        kind = treedef, *((x.shape, x.dtype) for x in leaves)
        if kind not in kinds:
            kinds[kind] = jax.eval_shape(rule.init, pair)
        return kinds[kind]

    return [of(pair) for pair in pairs]


def _check(state: Any, expected: Any) -> None:
    """Raises ValueError where a state has not the leaves and shapes that are due."""

    def shapes(tree: Any) -> dict[str, Any]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {normalize_path(path): jnp.shape(x) for path, x in leaves}

    found, due = shapes(state), shapes(expected)
    for path in [*due, *found]:
        if found.get(path) != due.get(path):
            raise ValueError(
                f"{_FOREIGN} At `{path}` it has {found.get(path, 'nothing')} where "
                f"{due.get(path, 'nothing')} is due (shapes)."
            )
