"""Factors that do not train: which they are, and gradients without theirs."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax

from .._checks import check_choice, compiled
from ..pairs._axes import LoRAPair
from ..pairs._leaves import index_leaves
from ..pairs._scale import check_patterns, first_match
from ._view import NOTHING

FindPairs: TypeAlias = Callable[[Any], tuple[LoRAPair, ...]]

Wrt: TypeAlias = Literal["both", "a", "b"]
WrtSpec: TypeAlias = Wrt | Mapping[str, Wrt]
"""Which factors move: of all pairs, or `{regex: which}` as for `scale`."""


def check_wrt(wrt: WrtSpec) -> None:
    """Raises ValueError where `wrt` says nothing known."""
    if not isinstance(wrt, Mapping):
        check_choice("wrt", wrt, Wrt)
        return
    for pattern, which in wrt.items():
        compiled(pattern, "wrt")
        check_choice(f"wrt[{pattern!r}]", which, Wrt)


def with_wrt(
    pairs: tuple[LoRAPair, ...], wrt: WrtSpec, masked: Iterable[str]
) -> tuple[LoRAPair, ...]:
    """The pairs, each with the factors that move.

    Args:
      pairs: What `find_pairs` finds in a tree.
      wrt: The first pattern that occurs in a path of a pair counts.
      masked: The paths at which the tree has nothing; patterns may be for these.

    Raises:
      ValueError: A pattern occurs in no path, or a pair has none.
    """
    if not isinstance(wrt, Mapping):
        return tuple(pair._replace(wrt=wrt) for pair in pairs)
    if pairs:
        paths = [path for pair in pairs for path in pair.paths]
        check_patterns("wrt", wrt, [*paths, *masked])
    return tuple(x._replace(wrt=first_match(wrt, x, "wrt")) for x in pairs)


def frozen_paths(pairs: tuple[LoRAPair, ...]) -> set[str]:
    """The paths of the factors that do not move."""
    sides = {"a": lambda pair: pair.b, "b": lambda pair: pair.a}
    return {sides[pair.wrt](pair) for pair in pairs if pair.wrt in sides}


def without_frozen(
    tx: optax.GradientTransformationExtraArgs, find: FindPairs, wrt: WrtSpec
) -> optax.GradientTransformationExtraArgs:
    """A transform that need not see the gradients of factors that do not move.

    They may be missing, None or masked; `tx` sees zeros, and what it returns for them
    is left out again.

    Args:
      tx: The transform.
      find: From a tree to its pairs, with `wrt`.
      wrt: Which factors move.
    """
    if wrt == "both":
        return tx

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        absent = {}
        if params is not None:
            leaves, present = index_leaves(params), index_leaves(updates)
            if any(path not in present for path in leaves):
                frozen = frozen_paths(find(params))
                absent = {x: leaves[x] for x in frozen - present.keys()}
        if not absent:
            updates, state = tx.update(updates, state, params, **extra_args)
            return updates, state
        full = [
            present[path].value
            if path in present
            else jnp.zeros_like(leaf.value)
            if path in absent
            else NOTHING
            for path, leaf in leaves.items()
        ]
        structure: Any = jax.tree.structure(params)
        tree = structure.unflatten(full)
        tree, state = tx.update(tree, state, params, **extra_args)
        steps = index_leaves(tree)
        kept: list[Any] = [steps[path].value for path in present]
        return jax.tree.unflatten(jax.tree.structure(updates), kept), state

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)
