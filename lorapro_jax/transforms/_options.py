"""The options that say where the pairs are: those of every transform, once."""

import functools
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import jax

from .._checks import check_choice
from ..pairs._axes import LoRAPair
from ..pairs._find import PairsSpec, as_spec, check_stack_axis, find_pairs
from ..pairs._leaves import check_arrays, is_placeholder, masked_paths
from ..pairs._messages import (
    no_leaves_message,
    no_pairs_message,
    shared_weight_message,
    shared_weights,
)
from ..pairs._scale import ScaleSpec, check_scale_options
from ._wrt import FindPairs as FindPairs
from ._wrt import WrtSpec, check_wrt, with_wrt

OnNoPairs: TypeAlias = Literal["error", "ignore"]


def pair_finder(
    *,
    scale: ScaleSpec,
    alpha: ScaleSpec | None,
    rslora: bool,
    pairs: PairsSpec | None,
    stack_axis: int | Sequence[int] | None,
    on_no_pairs: OnNoPairs,
    wrt: WrtSpec = "both",
) -> FindPairs:
    """`find_pairs` with a transform's options, checked; see `lorapro` for them.

    The function raises ValueError for a tree without a leaf or without a pair, unless
    `on_no_pairs` is `"ignore"`; for a leaf that is no array; and for two adapters on
    one weight, unless `pairs` names them. The placeholder with which
    `optax.tree.map_params` calls `init` passes, without a pair.
    """
    check_scale_options(scale, alpha, rslora)
    check_choice("on_no_pairs", on_no_pairs, OnNoPairs)
    if isinstance(stack_axis, jax.Array):
        raise TypeError(
            "`stack_axis` is static. In `optax.inject_hyperparams(..., "
            "static_args=('stack_axis',))` name it."
        )
    check_stack_axis(stack_axis)
    check_wrt(wrt)
    find = functools.partial(
        find_pairs,
        scale=scale,
        alpha=alpha,
        rslora=rslora,
        pairs=None if pairs is None else as_spec(pairs),
        stack_axis=stack_axis,
    )

    def find_any(tree: Any) -> tuple[LoRAPair, ...]:
        if is_placeholder(tree):
            return ()
        if not jax.tree.leaves(tree):
            if on_no_pairs == "ignore":
                return ()
            raise ValueError(no_leaves_message(tree))
        check_arrays(tree)
        found = find(tree)
        if not found and on_no_pairs == "error":
            remedy = "Or pass `on_no_pairs='ignore'` to let such a tree through."
            raise ValueError(no_pairs_message(tree, remedy))
        if pairs is None:
            for paths in shared_weights(found):
                raise ValueError(shared_weight_message(paths))
        return with_wrt(found, wrt, masked_paths(tree))

    return find_any
