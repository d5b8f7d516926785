"""`scale_by_lorapro_adam()`: Adam on the weights that LoRA factors stand for."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from ._adam_state import ScaleByLoRAProAdamState, divide, join, split
from ._adjust import Step, decompose
from ._coefficients import Gauge
from ._dense import DenseMoments
from ._factored import FactoredMoments
from ._factors import PairArrays, in_compute_dtype
from ._groups import group_pairs
from ._linalg import safe_norm
from ._moments import Adam, Projector
from ._pairs import PairsSpec
from ._scale import ScaleSpec
from ._thin import norm
from ._trees import (
    OnNoPairs,
    by_position,
    check_adjustment,
    check_choice,
    check_concrete,
    check_number,
    check_positive,
    pair_finder,
    put_leaves,
    take_pairs,
)

Moments: TypeAlias = Literal["factored", "dense"]

DEFAULT_ADAM_DAMPING = 0.01


def scale_by_lorapro_adam(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    moments: Moments = "factored",
    gauge: Gauge = "sylvester",
    damping: ArrayLike = DEFAULT_ADAM_DAMPING,
    max_grad_norm: ArrayLike | None = None,
    mu_dtype: DTypeLike | None = None,
    scale: ScaleSpec = 1.0,
    alpha: ScaleSpec | None = None,
    rslora: bool = False,
    pairs: PairsSpec | None = None,
    stack_axis: int | Sequence[int] | None = None,
    on_no_pairs: OnNoPairs = "error",
) -> optax.GradientTransformationExtraArgs:
    """Adam's direction in the space of the weights, brought back to the factors.

    See `lorapro_adamw`, which adds the learning rate and the weight decay. Like
    `optax.scale_by_adam`, it does not turn the sign: chain it with
    `optax.scale_by_learning_rate`. `optax.add_decayed_weights` behind it decays A and
    B each, and so the product twice.

    Args:
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment.
      moments: See `lorapro_adamw`, as for everything below.
      gauge: Of the direction.
      damping: Of the adjustments.
      max_grad_norm: Of the equivalent gradient, over the whole tree.
      mu_dtype: Of the first moments.
      scale: See `lorapro`, as for everything below.
      alpha: Instead of `scale`.
      rslora: With `alpha`.
      pairs: Explicit pairs.
      stack_axis: The stacked axes.
      on_no_pairs: `"error"` or `"ignore"`.

    Returns:
      A `GradientTransformationExtraArgs` with a `ScaleByLoRAProAdamState`; `update`
      needs `params` and returns each leaf in the wider dtype of gradient and parameter.

    Raises:
      ValueError: As `lorapro_adamw`.
    """
    check_adjustment(gauge, damping)
    check_choice("moments", moments, Moments)
    check_number("b1", b1, 0, 1)
    check_number("b2", b2, 0, 1)
    check_number("eps", eps, 0, math.inf)
    if max_grad_norm is not None:
        check_positive("max_grad_norm", max_grad_norm)
    find = pair_finder(
        scale=scale,
        alpha=alpha,
        rslora=rslora,
        pairs=pairs,
        stack_axis=stack_axis,
        on_no_pairs=on_no_pairs,
    )
    adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype)
    kind: Any = DenseMoments if moments == "dense" else FactoredMoments

    def init_fn(params: optax.Params) -> ScaleByLoRAProAdamState:
        found = find(params)
        check_concrete(params)
        at, others = divide(found, params)
        arrays = take_pairs(found, params, params)
        new = [kind.init(pair, mu_dtype) for pair in arrays]
        return join(params, at, new, adam.init(others))

    def update_fn(
        updates: optax.Updates,
        state: ScaleByLoRAProAdamState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByLoRAProAdamState]:
        del extra_args
        found = find(updates)
        at, others = divide(found, updates)
        pairs = [in_compute_dtype(x) for x in take_pairs(found, updates, params)]
        old, old_adam = split(updates, at, pairs, others, state, kind)
        groups = group_pairs(found, pairs)
        pairs, old = groups.join_pairs(pairs), groups.join(old)

        hyper = Adam(b1, b2, eps, optax.safe_increment(state.count))
        project = Projector(decompose(pairs) if pairs else None, damping)
        steps = project(pairs, [(pair.grad_a, pair.grad_b) for pair in pairs])
        if max_grad_norm is not None:
            steps, others = _clip(pairs, steps, others, max_grad_norm)
        steps, new = kind.directions(pairs, steps, old, hyper, project, gauge)
        new = jax.tree.map(lambda x, like: x.astype(like.dtype), new, old)

        leaves, new_adam = adam.update(others, old_adam)
        leaves |= by_position(at, groups.split(steps))
        new_state = join(updates, at, groups.split(new), new_adam)
        return put_leaves(updates, leaves, params), new_state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _clip(
    pairs: Sequence[PairArrays],
    steps: Sequence[Step],
    others: Mapping[int, jax.Array],
    max_norm: ArrayLike,
) -> tuple[list[Step], dict[int, jax.Array]]:
    """Everything times one number, so that the norm is at most `max_norm`.

    The norm is that of the equivalent gradients and of the other leaves. What is not
    finite does not count, or it would reach all leaves through the norm.
    """
    norms = [norm(pair, *step) for pair, step in zip(pairs, steps, strict=True)]
    norms += [safe_norm(x) for x in others.values()]
    total = safe_norm(jnp.stack([jnp.where(jnp.isfinite(x), x, 0) for x in norms]))
    factor = jnp.where(total > max_norm, max_norm / total, 1)
    steps = [(factor.astype(a.dtype) * a, factor.astype(b.dtype) * b) for a, b in steps]
    return steps, {i: factor.astype(x.dtype) * x for i, x in others.items()}
