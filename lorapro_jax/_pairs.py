"""The LoRA pairs of a tree: static Python over paths and shapes.

It runs while a step is traced, costs nothing in the compiled program, and nothing
of it is stored in an optimizer's state.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from ._layout import LayoutError, LoRAPair, Shape, check_axes, infer_axes
from ._leaves import Leaf, check_factor, index_leaves, masked_paths
from ._paths import FactorName, Layout, normalize_path, parse_factor_name
from ._scale import ScaleSpec, check_scale_options, resolve_scale

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
      scale: See `lorapro`.
      alpha: See `lorapro`.
      rslora: See `lorapro`.
      pairs: See `lorapro`.
      stack_axis: See `lorapro`.

    Returns:
      The pairs in the order of their A in the tree, completely filled in; empty
      if no leaf is named like a factor.

    Raises:
      ValueError: A factor without its partner, two leaves for one factor, shapes
        that are no pair or more than one, an unknown path, a dtype that is not
        real floating point, or a bad scale. The message names the path.
      TypeError: A scale that is not a number.

    Examples:
      >>> import jax.numpy as jnp
      >>> from lorapro_jax import find_pairs
      >>> tree = {"mlp": {"lora_a": jnp.ones((64, 4)), "lora_b": jnp.ones((4, 32))}}
      >>> find_pairs(tree, alpha=8.0)[0]  # doctest: +NORMALIZE_WHITESPACE
      LoRAPair(a='mlp/lora_a', b='mlp/lora_b', a_rank_axis=1, b_rank_axis=0,
               a_batch_axes=(), b_batch_axes=(), scale=2.0, rank=4)
    """
    check_scale_options(scale, alpha, rslora)
    leaves = index_leaves(tree)
    if pairs is None:
        read = _read_named(tree, leaves, stack_axis)
    else:
        read = _read_explicit(tree, leaves, pairs, stack_axis)
    return tuple(
        pair._replace(scale=resolve_scale(pair, scale, alpha, rslora)) for pair in read
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
                raise ValueError(_rivals_message([path for path, _ in role]))
        if not (roles["a"] and roles["b"]):
            ((path, name),) = roles["a"] or roles["b"]
            raise ValueError(_half_pair_message(tree, leaves, path, name.owner))
        ((a, name_a),), ((b, name_b),) = roles["a"], roles["b"]
        layouts = [x for x in name_a.layouts if x in name_b.layouts]
        pairs.append(_read_pair(LoRAPair(a, b), leaves, layouts or ["jax"], stack_axis))
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
        for path in (pair.a, pair.b):
            if path not in leaves:
                raise ValueError(_unknown_path_message(tree, leaves, path))
            if path in owners:
                raise ValueError(
                    f"`{path}` belongs to two of the given `pairs`: {owners[path][:2]} "
                    f"and {pair[:2]}. Name each factor once."
                )
            owners[path] = pair
        name = parse_factor_name(pair.a)
        layouts = name.layouts if name else ("jax", "torch")
        pairs.append(_read_pair(pair, leaves, layouts, stack_axis))
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


def _read_pair(
    pair: LoRAPair,
    leaves: Mapping[str, Leaf],
    layouts: Sequence[Layout],
    stack_axis: int | Sequence[int] | None,
) -> LoRAPair:
    """Checks both leaves and fills in the axes and the rank."""
    for path in (pair.a, pair.b):
        check_factor(path, leaves[path])
    a, b = leaves[pair.a].shape, leaves[pair.b].shape
    try:
        if pair[2:6] == LoRAPair("", "")[2:6]:
            axes = infer_axes(a, b, layouts, stack_axis)
        else:
            axes = check_axes(a, b, pair[2:6])
    except LayoutError as error:
        raise ValueError(_no_pair_message(pair, a, b, error)) from None
    rank = a[axes.a_rank]
    if pair.rank not in (None, rank):
        raise ValueError(
            f"`{pair.a}` has rank {rank} on axis {axes.a_rank}, not the given "
            f"`rank={pair.rank}`. Leave `rank` out, or give the right axes."
        )
    return LoRAPair(pair.a, pair.b, *axes, pair.scale, rank)


def _half_pair_message(
    tree: Any, leaves: Mapping[str, Leaf], path: str, owner: str
) -> str:
    prefix = f"{owner}/" if owner else ""

    def beside(paths: Iterable[str]) -> list[str]:
        return sorted(x.removeprefix(prefix) for x in paths if x.startswith(prefix))

    masked = beside(masked_paths(tree))
    also = f"; masked or None: {masked}" if masked else ""
    return (
        f"`{path}` is a LoRA factor without its partner (leaves in `{owner}`: "
        f"{beside(leaves)}{also}). LoRA-Pro adjusts both factors together, so it has "
        "to see both. If `optax.partition` or `optax.masked` separates them, put "
        "`lorapro()` before it in the chain; if one factor is frozen, mask both; if "
        "the partner has another name, give the two paths in `pairs=`."
    )


def _rivals_message(paths: list[str]) -> str:
    return (
        f"{paths} all look like the same factor of one LoRA pair. Rename them, or give "
        "the pairs explicitly with `pairs=`."
    )


def _unknown_path_message(tree: Any, leaves: Mapping[str, Leaf], path: str) -> str:
    if path in masked_paths(tree):
        return (
            f"`{path}` of the given `pairs` is masked or None here. Put `lorapro()` "
            "before `optax.partition` or `optax.masked`, or leave the pair out."
        )
    close = difflib.get_close_matches(path, leaves, n=3, cutoff=0.0)
    return (
        f"`{path}` of the given `pairs` is no path of this tree of {len(leaves)} "
        f"leaves. Close to it: {close}. In a list, a path is an index, such as '4'."
    )


def _no_pair_message(pair: LoRAPair, a: Shape, b: Shape, reason: LayoutError) -> str:
    return (
        f"`{pair.a}` {a} and `{pair.b}` {b} cannot be read as one LoRA pair: {reason}. "
        "If they do belong to one layer, say which axis is stacked (three axes or "
        "more) with `stack_axis=`, or list all pairs of the tree, this one with its "
        f"axes: `pairs=[LoRAPair({pair.a!r}, {pair.b!r}, a_rank_axis=..., "
        "b_rank_axis=..., a_batch_axes=..., b_batch_axes=...), ...]`."
    )
