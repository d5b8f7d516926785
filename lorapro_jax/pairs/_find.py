"""The LoRA pairs of a tree: static Python over paths and shapes.

It runs while a step is traced, costs nothing in the compiled program, and nothing
of it is stored in an optimizer's state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np

from ._axes import LayoutError, LoRAPair, as_axes, check_axes
from ._infer import infer_axes
from ._leaves import Leaf, check_factor, index_leaves, masked_paths
from ._messages import (
    half_pair_message,
    no_pair_message,
    rivals_message,
    unknown_path_message,
)
from ._names import FactorName, Layout, normalize_path, parse_factor_name
from ._scale import ScaleSpec, check_patterns, check_scale_options, resolve_scale

PairPaths: TypeAlias = LoRAPair | tuple[str, str]
PairsSpec: TypeAlias = Iterable[PairPaths] | Callable[[Any], Iterable[PairPaths]]
"""Explicit pairs, or a function from the tree to them."""


def find_pairs(
    tree: Any,
    *,
    scale: ScaleSpec = 1.0,
    alpha: ScaleSpec | None = None,
    rslora: bool = False,
    pairs: PairsSpec | None = None,
    stack_axis: int | Sequence[int] | None = None,
) -> tuple[LoRAPair, ...]:
    """Finds the LoRA pairs of a tree by the names and shapes of its leaves.

    Args:
      tree: Parameters or gradients; only paths, shapes and dtypes are used.
      scale: The s of the forward pass; `lorapro` explains this and what follows.
      alpha: The numerator of s = alpha / r, instead of `scale`.
      rslora: Whether s is alpha / sqrt(r).
      pairs: Explicit pairs instead of those found by name.
      stack_axis: The axes along which layers are stacked.

    Returns:
      The pairs in the order of their A in the tree, completely filled in; empty
      if no leaf is named like a factor.

    Raises:
      ValueError: A factor without its partner, two leaves for one factor, shapes
        that are no pair or more than one, an unknown path, a dtype that is not
        real floating point, a bad scale, or a pattern that occurs in no path of a
        factor. The message names the path.
      TypeError: A scale that is not a number.

    Examples:
      >>> import jax.numpy as jnp
      >>> from lorapro_jax import find_pairs
      >>> tree = {"mlp": {"lora_a": jnp.ones((64, 4)), "lora_b": jnp.ones((4, 32))}}
      >>> find_pairs(tree, alpha=8.0)[0]  # doctest: +NORMALIZE_WHITESPACE
      LoRAPair(a='mlp/lora_a', b='mlp/lora_b', a_rank_axis=1, b_rank_axis=0,
               a_batch_axes=(), b_batch_axes=(), scale=2.0, rank=4, wrt='both')
    """
    check_scale_options(scale, alpha, rslora)
    found = read_pairs(tree, pairs, stack_axis)
    if found:
        paths = [path for pair in found for path in pair.paths]
        masked = masked_paths(tree)  # a module too, of which no more is known
        paths += [*masked, *(f"{path}/" for path in masked)]
        check_patterns("scale", scale, paths)
        check_patterns("alpha", alpha, paths)

    leaves = index_leaves(tree)

    def complete(pair: LoRAPair) -> LoRAPair:
        batch = tuple(leaves[pair.a].shape[axis] for axis in pair.a_batch_axes)
        return pair._replace(scale=resolve_scale(pair, batch, scale, alpha, rslora))

    return tuple(map(complete, found))


def read_pairs(
    tree: Any,
    pairs: PairsSpec | None = None,
    stack_axis: int | Sequence[int] | None = None,
) -> list[LoRAPair]:
    """The pairs with their axes and ranks; a scale only where its pair is given one.

    Args:
      tree: See `find_pairs`, as for what follows, and for the errors.
      pairs: Explicit pairs instead of those found by name.
      stack_axis: The axes along which layers are stacked.
    """
    check_stack_axis(stack_axis)
    leaves = index_leaves(tree)
    if pairs is None:
        return _read_named(tree, leaves, stack_axis)
    return _read_explicit(tree, leaves, as_spec(pairs), stack_axis)


def as_spec(pairs: Any) -> PairsSpec:
    """What the user passes as `pairs=`, once it is a function or a list.

    Raises:
      ValueError: It is neither.
    """
    if callable(pairs):
        return cast(PairsSpec, pairs)
    if not np.iterable(pairs) or isinstance(pairs, str | Mapping):
        raise ValueError(
            f"`pairs={pairs!r}` has to be a list of `LoRAPair`s or of tuples `(path of "
            "A, path of B)`, or a function from the tree to one."
        )
    return tuple(pairs)  # a generator could be read only once


def check_stack_axis(stack_axis: Any) -> None:
    """Raises ValueError where it is no axis, and no tuple of axes."""
    try:
        good = all(axis >= 0 for axis in as_axes(stack_axis))
    except LayoutError:
        good = False
    if not good:
        raise ValueError(
            f"`stack_axis={stack_axis!r}` has to be an axis, such as 0 or 1, a tuple "
            "of axes, or `()` where nothing is stacked."
        )


def _read_named(
    tree: Any, leaves: Mapping[str, Leaf], stack_axis: int | Sequence[int] | None
) -> list[LoRAPair]:
    """The pairs among leaves that are named like factors."""
    groups: dict[tuple[str, ...], dict[str, list[tuple[str, FactorName]]]] = {}
    for path in leaves:
        if name := parse_factor_name(path):
            roles = groups.setdefault(name.group, {"a": [], "b": []})
            roles[name.role].append((path, name))

    pairs = []
    for roles in groups.values():
        for role in roles.values():
            if len(role) > 1:
                raise ValueError(rivals_message([path for path, _ in role]))
        if not (roles["a"] and roles["b"]):
            ((path, name),) = roles["a"] or roles["b"]
            raise ValueError(half_pair_message(tree, leaves, path, name))
        ((a, name_a),), ((b, name_b),) = roles["a"], roles["b"]
        layouts = [x for x in name_a.layouts if x in name_b.layouts] or ["jax"]
        read = _Reading(layouts, stack_axis, name_b.rank_leads)
        pairs.append(_read_pair(LoRAPair(a, b), leaves, read))
    return sorted(pairs, key=lambda pair: leaves[pair.a].position)


def _read_explicit(
    tree: Any,
    leaves: Mapping[str, Leaf],
    spec: PairsSpec,
    stack_axis: int | Sequence[int] | None,
) -> list[LoRAPair]:
    """The pairs that the user names, with what they leave out filled in."""
    pairs: list[LoRAPair] = []
    owners: dict[str, LoRAPair] = {}
    given_pairs: Any = spec(tree) if callable(spec) else spec
    for given in given_pairs if np.iterable(given_pairs) else [given_pairs]:
        pair = _as_pair(given)
        for path, written in zip(pair.paths, given, strict=False):
            if path not in leaves:
                raise ValueError(unknown_path_message(tree, leaves, path, written))
            if path in owners:
                raise ValueError(
                    f"`{path}` belongs to two of the given `pairs`, "
                    f"{owners[path].paths} and {pair.paths}. Name each factor once."
                )
            owners[path] = pair
        name = parse_factor_name(pair.a)
        read = _Reading(("jax", "torch"), stack_axis, rank_leads=False)
        if name:
            read = _Reading(name.layouts, stack_axis, name.rank_leads)
        pairs.append(_read_pair(pair, leaves, read))
    return pairs


def _as_pair(given: Any) -> LoRAPair:
    """One entry of `pairs=`, with normalised paths."""
    lengths = range(2, len(LoRAPair._fields) + 1)
    if not isinstance(given, tuple | list) or len(given) not in lengths:
        raise ValueError(
            f"`pairs` contains {given!r}. It is a list of `LoRAPair`s or of tuples "
            "`(path of A, path of B)`, also when there is only one."
        )
    pair = LoRAPair(*given)
    if not (isinstance(pair.a, str) and isinstance(pair.b, str)):
        raise ValueError(
            f"`pairs` contains {given!r}; both paths have to be strings, such as '4' "
            "for the fifth leaf of a list."
        )
    return pair._replace(a=normalize_path(pair.a), b=normalize_path(pair.b))


class _Reading(NamedTuple):
    """What is known about the axes of a pair beside its shapes."""

    layouts: Sequence[Layout]
    stack_axis: int | Sequence[int] | None
    rank_leads: bool


def _read_pair(pair: LoRAPair, leaves: Mapping[str, Leaf], read: _Reading) -> LoRAPair:
    """Checks both leaves and fills in the axes and the rank."""
    for path in pair.paths:
        check_factor(path, leaves[path])
    a, b = leaves[pair.a].shape, leaves[pair.b].shape
    try:
        if pair.has_axes:
            axes = check_axes(a, b, pair)
        else:
            axes = infer_axes(
                a, b, read.layouts, read.stack_axis, rank_leads=read.rank_leads
            )
    except LayoutError as error:
        raise ValueError(no_pair_message(pair, a, b, error)) from None
    rank = a[axes.a_rank]
    if pair.rank not in (None, rank):
        raise ValueError(
            f"`{pair.a}` has rank {rank} on axis {axes.a_rank}, not the given "
            f"`rank={pair.rank}`. Leave `rank` out, or give the right axes."
        )
    return LoRAPair(pair.a, pair.b, *axes, pair.scale, rank)
