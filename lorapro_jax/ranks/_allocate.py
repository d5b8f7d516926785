"""Ranks for adapters: more where the weights and their gradients are large."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from .._checks import check_choice, close_to, compiled, some
from .._placement import to_host
from ..algebra._axes import Shape
from ..pairs._axes import LayoutError, as_axes
from ..pairs._leaves import Leaf, index_leaves
from ..pairs._names import normalize_path
from ._budget import desired_ranks, fit_ranks, rank_limits
from ._table import RankRow, RankTable

Importance: TypeAlias = Literal["mean", "frobenius", "nuclear"]
Measure: TypeAlias = Callable[[np.ndarray, np.ndarray], float]
Axes: TypeAlias = int | Sequence[int]

_MEASURES: dict[str, Measure] = {
    "mean": lambda w, g: float(np.abs(w * g).mean()),
    "frobenius": lambda w, g: float(np.linalg.norm(w * g)),
    "nuclear": lambda w, g: float(np.linalg.norm(w * g, "nuc")),
}


class _Module(NamedTuple):
    """One kernel: its path and shape, what a rank costs there, and what it is worth."""

    kernel: str
    shape: Shape
    m: int
    n: int
    layers: int
    importance: float

    @property
    def path(self) -> str:
        return self.kernel.rpartition("/")[0]


def allocate_ranks(
    params: Any,
    gradients: Mapping[str, Any],
    *,
    rank: int,
    min_rank: int | None = None,
    max_rank: int | None = None,
    importance: Importance | Measure = "mean",
    stack_axis: Axes | None = None,
    input_axes: Mapping[str, Axes] | None = None,
) -> RankTable:
    """GoRA's ranks: shares of a budget in proportion to |W ∘ G|, module by module.

    It comes before the adapters: estimate the gradients of a base model's kernels,
    allocate, build adapters of these ranks. The budget is what adapters of rank `rank`
    would cost on all these kernels, rank · Σ (m + n). The total never exceeds it, and
    stays below it by less than one more rank of the cheapest module that may have one.

    GoRA gives a module of importance I the rank round(b I / Σ I) / √(m + n) with
    b = rank · Σ √(m + n), rounded down and clipped to the limits; the total may then
    be far off the budget. Here these ranks, unrounded, are multiplied by the one number
    for which they cost the budget within the limits, and rounded down; what that leaves
    over goes rank by rank to the module furthest below its share that still fits.

    **The scale.** GoRA multiplies by alpha / rank with the reference rank, or its root,
    whatever the module's own. `alpha=` of `lorapro` divides by each pair's own rank;
    for GoRA's scale, pass `scale=alpha / rank`.

    Args:
      params: A tree with the kernels, or a mapping from their paths to them.
      gradients: The gradients of the kernels that are to have adapters, by path, as
        `estimate_gradients` returns them.
      rank: The reference rank.
      min_rank: The lowest rank; by default half the reference.
      max_rank: The highest; by default four times the reference. No rank is above a
        kernel's smaller side.
      importance: `"mean"` of |W ∘ G|, GoRA's choice; the `"frobenius"` or `"nuclear"`
        norm of W ∘ G, the latter from an SVD; or a function of W and G, both `(m, n)`
        in float64, to a number of at least 0.
      stack_axis: The axis or axes of stacked layers in kernels of more than two axes.
        A stack gets one rank for all, and counts as its layers at mean importance.
      input_axes: `{regex: axes}`, the axes of the inputs in kernels with more than two
        axes beside the stacked ones; all others are outputs. For heads `(d, n, h)`,
        `{"query|key|value": 0, "out": (0, 1)}`; for convolutions `(*window, in, out)`,
        `{"conv": (0, 1, 2)}`. The first pattern found in a path counts.

    Returns:
      The table of ranks, in the order of `gradients`.

    Raises:
      ValueError: A path without a weight, shapes that differ or cannot be read,
        values that are not finite, importances that are all zero, or limits that
        contradict each other or the budget.

    References:
      He et al., `GoRA: Gradient-driven Adaptive Low Rank Adaptation
      <https://arxiv.org/abs/2502.12171>`_, 2025, and its code.

    Examples:
      >>> import jax.numpy as jnp
      >>> from lorapro_jax import allocate_ranks
      >>> weights = {"up/kernel": jnp.ones((8, 24)), "down/kernel": jnp.ones((24, 8))}
      >>> gradients = {**weights, "down/kernel": jnp.zeros((24, 8))}
      >>> ranks = allocate_ranks(weights, gradients, rank=4)
      >>> ranks["up"], ranks["down"]
      (6, 2)
    """
    if not callable(importance):
        check_choice("importance", importance, Importance)
        importance = _MEASURES[importance]
    leaves = index_leaves(params)
    _check_patterns(input_axes or {}, list(map(normalize_path, gradients)))
    modules = [
        _measured(path, leaves, gradient, importance, stack_axis, input_axes or {})
        for path, gradient in gradients.items()
    ]
    ranks, budget = _choose(modules, rank, min_rank, max_rank)
    times = Counter(module.path for module in modules)
    rows = (
        RankRow(
            path=x.path if times[x.path] == 1 else x.kernel,
            kernel=x.kernel,
            shape=x.shape,
            importance=x.importance,
            rank=chosen,
            parameters=chosen * (x.m + x.n) * x.layers,
        )
        for x, chosen in zip(modules, ranks, strict=True)
    )
    return RankTable(tuple(rows), int(rank), budget)


def _choose(
    modules: Sequence[_Module], rank: int, min_rank: int | None, max_rank: int | None
) -> tuple[list[int], int]:
    """The ranks of the modules, and the budget that they stay within."""
    low, high = rank_limits(rank, min_rank, max_rank)
    if not modules:
        raise ValueError("`gradients` is empty; see `estimate_gradients`.")
    importance = np.array([x.importance for x in modules])
    if not importance.any():
        raise ValueError(
            "The importance of every module is 0, so none can have more rank than "
            "another. Are weights or gradients zero?"
        )
    features, layers, side = np.transpose(
        [(x.m + x.n, x.layers, min(x.m, x.n)) for x in modules]
    )
    cost, limits = features * layers, (np.minimum(low, side), np.minimum(high, side))
    budget = int(rank) * int(cost.sum())
    if (least := int(limits[0] @ cost)) > budget:
        raise ValueError(
            f"`min_rank={low}` alone takes {least:,} parameters, above the budget of "
            f"`rank={rank}`, {budget:,}. Lower the one or raise the other."
        )
    desired = desired_ranks(importance, features, layers, rank)
    return fit_ranks(desired, cost, *limits, budget).tolist(), budget


def _check_patterns(input_axes: Mapping[str, Axes], paths: Sequence[str]) -> None:
    """Raises ValueError for a pattern that is of no use."""
    for pattern in input_axes:
        if paths and not any(map(compiled(pattern, "input_axes").search, paths)):
            raise ValueError(
                f"The pattern {pattern!r} of `input_axes` occurs in no path of "
                f"`gradients`. {close_to(pattern, paths)} Correct it, or take it out."
            )


def _measured(
    path: str,
    leaves: Mapping[str, Leaf],
    gradient: Any,
    measure: Measure,
    stack_axis: Axes | None,
    input_axes: Mapping[str, Axes],
) -> _Module:
    """Reads one kernel and its gradient, layer by layer in float64."""
    path = normalize_path(path)
    found = leaves[path].shape if path in leaves else None
    shape = tuple(np.shape(gradient))
    if found != shape:
        raise ValueError(
            f"The gradient of `{path}` has shape {shape}; in `params` that is "
            f"{found or 'no path'}, among {some(leaves)}. Pass the tree that the "
            "gradients were taken of."
        )
    try:
        batch, inputs, outputs = _read_axes(path, shape, stack_axis, input_axes)
    except LayoutError as error:
        raise ValueError(f"`{path}` {shape}: {error}.") from None
    m, n = (math.prod(shape[axis] for axis in axes) for axes in (outputs, inputs))
    order = (*batch, *outputs, *inputs)
    w, g = (
        np.transpose(to_host(x), order).reshape(-1, m, n)
        for x in (leaves[path].value, gradient)
    )
    each = [
        float(measure(a.astype(np.float64), b.astype(np.float64)))
        for a, b in zip(w, g, strict=True)
    ]
    worth = float(np.mean(each))
    if not 0 <= worth < math.inf:
        raise ValueError(
            f"The importance of `{path}` is {worth}; it has to be finite and at least "
            "0. Look at its weight and its gradient."
        )
    return _Module(path, shape, m, n, len(each), worth)


def _read_axes(
    path: str,
    shape: Shape,
    stack_axis: Axes | None,
    input_axes: Mapping[str, Axes],
) -> tuple[Shape, Shape, Shape]:
    """The stacked axes, the inputs' and the outputs'."""
    count = len(shape)
    batch = _axes(stack_axis, count) if count > 2 else ()
    rest = tuple(axis for axis in range(count) if axis not in batch)
    if len(rest) == 2:
        return batch, rest[:1], rest[1:]
    for pattern, axes in input_axes.items():
        if compiled(pattern, "input_axes").search(path):
            inputs = _axes(axes, count)
            outputs = tuple(axis for axis in rest if axis not in inputs)
            if not (inputs and outputs and set(inputs) <= set(rest)):
                raise LayoutError(
                    f"`input_axes` {inputs} have to be some and not all of {rest}"
                )
            return batch, inputs, outputs
    raise LayoutError(
        f"which of the axes {rest} are inputs? Say it with `input_axes=`, or which are "
        "stacked layers with `stack_axis=`"
    )


def _axes(given: Axes | None, count: int) -> Shape:
    """Axes that the user gave for an array of `count` axes, non-negative, ascending."""
    axes = as_axes(given)
    if not all(-count <= axis < count for axis in axes):
        raise LayoutError(f"it has no axes {axes}")
    return tuple(sorted({axis % count for axis in axes}))
