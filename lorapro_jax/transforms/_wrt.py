"""Factors that do not train: which they are, and gradients without theirs."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax

from .._checks import check_choice, compiled
from ..pairs._axes import LoRAPair
from ..pairs._leaves import index_leaves
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


def with_wrt(pairs: tuple[LoRAPair, ...], wrt: WrtSpec) -> tuple[LoRAPair, ...]:
    """The pairs, each with the factors that move.

    Raises:
      ValueError: A pattern occurs in no path, or a pair has none.
    """
    if wrt == "both":
        return pairs
    if not isinstance(wrt, Mapping):
        return tuple(pair._replace(wrt=wrt) for pair in pairs)
    used = set()

    def of(pair: LoRAPair) -> LoRAPair:
        for pattern, which in wrt.items():
            if any(map(compiled(pattern, "wrt").search, pair.paths)):
                used.add(pattern)
                return pair._replace(wrt=which)
        raise ValueError(
            f"No pattern of `wrt={dict(wrt)!r}` occurs in `{pair.a}` or `{pair.b}`. "
            "Add one that does, or '.*' at the end for all other pairs."
        )

    found = tuple(map(of, pairs))
    if pairs and (unused := [x for x in wrt if x not in used]):
        raise ValueError(
            f"{unused} of `wrt=` decide for no pair; the factors are such as "
            f"`{pairs[0].a}`. Correct the patterns, or leave them out."
        )
    return found


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
