"""GoRA's ranks, within a budget. Arrays with one entry a module; no trees."""

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
      importance: I, at least 0, not all of them 0.
      features: m + n.
      layers: The number of stacked layers, 1 where there is no stack.
      rank: The reference rank.

    References:
      He et al., `GoRA <https://arxiv.org/abs/2502.12171>`_, 2025.
    """
    importance = importance / importance.max()  # so that no sum overflows
    share = importance / np.sum(layers * importance)
    return rank * np.sum(layers * np.sqrt(features)) * share / np.sqrt(features)


def fit_ranks(desired: Floats, cost: Ints, low: Ints, high: Ints, budget: int) -> Ints:
    """Whole ranks in proportion to the desired ones, within limits and budget.

    Args:
      desired: At least 0.
      cost: Parameters a rank.
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
