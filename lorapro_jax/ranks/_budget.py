"""GoRA's ranks, within a budget. Arrays with one entry a module; no trees."""

from typing import cast

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def desired_ranks(
    importance: Floats, features: Ints, layers: Ints, rank: int
) -> Floats:
    """The paper's ranks before rounding and limits: b (I / Σ I) / √(m + n).

    b = rank · Σ √(m + n). A stack counts as its layers, each with the stack's
    importance, so that it gets what they would get together.

    Args:
      importance: The importances I, at least 0, not all of them 0.
      features: The features m + n of each module.
      layers: The number of stacked layers, 1 where there is no stack.
      rank: The reference rank.

    References:
      He et al., `GoRA <https://arxiv.org/abs/2502.12171>`_, 2025.
    """
    importance = importance / importance.max()  # so that no sum overflows
    share = importance / np.sum(layers * importance)
    return rank * np.sum(layers * np.sqrt(features)) * share / np.sqrt(features)


def rank_limits(
    rank: int, min_rank: int | None, max_rank: int | None
) -> tuple[int, int]:
    """The lowest and the highest rank: as given, else half of `rank` and four times it.

    Raises:
      ValueError: One is no integer of at least 1, or the lowest is above the highest.
    """
    given = {"rank": rank, "min_rank": min_rank, "max_rank": max_rank}
    for name, number in given.items():
        if number is None and name != "rank":
            continue
        whole = isinstance(number, int | np.integer) and not isinstance(number, bool)
        if not (whole and cast(int, number) >= 1):
            raise ValueError(f"`{name}={number!r}` has to be an integer of at least 1.")
    low = max(1, rank // 2) if min_rank is None else min_rank
    high = 4 * rank if max_rank is None else max_rank
    if low <= high:
        return low, high
    lowest, highest = f"`min_rank={low}`", f"`max_rank={high}`"
    remedy = "Raise the one or lower the other."
    if max_rank is None:
        highest = f"the default maximum, {high}, four times `rank={rank}`"
        remedy = "Pass `max_rank=` too, or a lower `min_rank`."
    elif min_rank is None:
        lowest = f"The default minimum, {low}, half of `rank={rank}`,"
        remedy = "Pass `min_rank=` too, or a higher `max_rank`."
    raise ValueError(f"{lowest} is above {highest}. {remedy}")


def fit_ranks(desired: Floats, cost: Ints, low: Ints, high: Ints, budget: int) -> Ints:
    """Whole ranks in proportion to the desired ones, within limits and budget.

    Args:
      desired: The ranks to be in proportion to, at least 0.
      cost: The parameters that one rank takes.
      low: The lowest ranks; Σ low · cost is at most the budget.
      high: The highest ranks.
      budget: What Σ rank · cost must not exceed.

    Returns:
      Ranks for which no module below its limit can have one more.
    """
    target = _scale_to(desired, cost, low, high, budget)
    ranks = np.floor(target).astype(np.int64)
    left = budget - int(ranks @ cost)
    while len(open_ := np.flatnonzero((ranks < high) & (cost <= left))):
        # Furthest below its target; then the more desired; then the first.
        order = np.lexsort((open_, -desired[open_], (ranks - target)[open_]))
        chosen = open_[order[0]]
        ranks[chosen] += 1
        left -= int(cost[chosen])
    return ranks


def _scale_to(
    desired: Floats, cost: Ints, low: Ints, high: Ints, budget: int
) -> Floats:
    """clip(c · desired, low, high) for the c at which it costs the budget.

    The cost is piecewise linear in c and bends where a module meets a limit, so
    interpolation between the bends is exact. Where all limits cost less, it is `high`.
    """
    ranks = lambda c: np.clip(c * desired, low, high)
    some = desired > 0
    bends = np.unique([x[some] / desired[some] for x in (low, high)])
    costs = [float(cost @ ranks(c)) for c in bends]
    target: Floats = ranks(np.interp(budget, costs, bends))
    return target
