"""`lorapro_adamw()`: AdamW as full fine-tuning would run it, on LoRA factors.

A rule, `FactoredAdam` or `DenseAdam`, says the direction; rate and decay follow it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import optax
from jax.typing import ArrayLike, DTypeLike

from .._checks import check_choice, check_float_dtype, check_number, check_positive
from ..algebra._coefficients import Gauge, check_adjustment
from ..pairs._find import PairsSpec
from ..pairs._scale import ScaleSpec
from ..transforms._descent import descending
from ..transforms._options import OnNoPairs, pair_finder
from ..transforms._over_pairs import OverPairsState, over_pairs
from ..transforms._wrt import WrtSpec, without_frozen
from ._dense import DenseAdam
from ._factored import FactoredAdam

Moments: TypeAlias = Literal["factored", "dense"]
DEFAULT_ADAM_DAMPING = 1.0

ScaleByLoRAProAdamState: TypeAlias = OverPairsState
"""State of `scale_by_lorapro_adam`. Its `pairs` are `FactoredMoments` or
`DenseMoments`, with trees `mu` and `nu`; its `others` are those of
`optax.scale_by_adam` for all other leaves. Moments are float32, or float64 for a pair
with a float64 factor and for other float64 leaves."""


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
    nesterov: bool = False,
    scale: ScaleSpec = 1.0,
    alpha: ScaleSpec | None = None,
    rslora: bool = False,
    pairs: PairsSpec | None = None,
    stack_axis: int | Sequence[int] | None = None,
    on_no_pairs: OnNoPairs = "error",
    wrt: WrtSpec = "both",
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
      moments: `"factored"` or `"dense"`; `lorapro_adamw` explains all options.
      gauge: How the direction is divided between A and B.
      damping: Of E and of the direction, by how far the last step went.
      max_grad_norm: The bound of the norm of all E together; None for no clipping.
      mu_dtype: The dtype of the first moments.
      nesterov: Whether the momentum is Nesterov's.
      scale: The s of the forward pass, as in `lorapro`, and so
      alpha: the numerator of s = alpha / r instead, and
      rslora: whether s is alpha / sqrt(r).
      pairs: Explicit pairs instead of those found by name.
      stack_axis: The axes along which layers are stacked.
      on_no_pairs: `"error"`, or `"ignore"` to let a tree without a pair pass.
      wrt: Which factors move.

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
    check_float_dtype("mu_dtype", mu_dtype)
    check_choice("nesterov", nesterov, Literal[False, True])
    if max_grad_norm is not None:
        check_positive("max_grad_norm", max_grad_norm, finite=False)
    find = pair_finder(
        scale=scale,
        alpha=alpha,
        rslora=rslora,
        pairs=pairs,
        stack_axis=stack_axis,
        on_no_pairs=on_no_pairs,
        wrt=wrt,
    )
    kind = DenseAdam if moments == "dense" else FactoredAdam
    rule = kind(b1, b2, eps, damping, gauge, mu_dtype, nesterov)
    adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype, nesterov=nesterov)
    return without_frozen(over_pairs(rule, find, adam, max_grad_norm), find, wrt)


def lorapro_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    mask: Any = None,
    *,
    moments: Moments = "factored",
    gauge: Gauge = "sylvester",
    damping: ArrayLike = DEFAULT_ADAM_DAMPING,
    max_grad_norm: ArrayLike | None = None,
    mu_dtype: DTypeLike | None = None,
    nesterov: bool = False,
    scale: ScaleSpec = 1.0,
    alpha: ScaleSpec | None = None,
    rslora: bool = False,
    pairs: PairsSpec | None = None,
    stack_axis: int | Sequence[int] | None = None,
    on_no_pairs: OnNoPairs = "error",
    wrt: WrtSpec = "both",
) -> optax.GradientTransformationExtraArgs:
    """AdamW as full fine-tuning would run it, for LoRA factors.

    AdamW on A and B follows the gradients of A and B. This follows the gradient of
    W = W0 + s B A: its moments are those of the equivalent gradient E, the part of
    W's gradient that the factors can follow, and Adam's direction D for W is then
    brought back to the factors, as the step whose effect on W is closest to D. Its
    learning rates are therefore near those of full fine-tuning, and do not depend on
    s or, up to the damping, on how B A is split. Leaves that are no factor get plain
    AdamW. Unlike `optax.adamw`, it does not decay by default.

    The moments are of one of two kinds:

    * `"factored"`: no m×n array exists, not even for a moment, and the state is about
      that of AdamW on A and B. The second moment is the outer product of its exact
      row and column sums, as in Adafactor; the first is a pair of steps, carried
      from one step's tangent space to the next. This is not in the literature.
    * `"dense"`: the paper's algorithm, with two moments of the size of W, for small
      layers and to compare with.

    Weight decay is decoupled and acts on the product B A, which is all of W that
    LoRA trains: A and B each become √(1 - lr·λ) times what they were. The paper
    also decays the frozen W0; a LoRA optimizer cannot.

    As for `lorapro`, both gradients of a pair have to come from one G.

    **Spikes.** With factored moments E counts as ten times the root mean square of its
    past, layer by layer, where it is more, so that no gradient of any size stops a
    pair. NaN and infinity persist in the moments of their layer, as in `optax.adamw`;
    `optax.apply_if_finite` drops such steps.

    Args:
      learning_rate: A number or an Optax schedule.
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the second moment, in [0, 1).
      eps: Added to the root of the second moment; with factored moments ε² is added
        under the root.
      weight_decay: λ, at least 0.
      mask: Which leaves decay: a tree of bools, a prefix of the parameters' tree, or
        a function from the parameters to one; None for all. A mask that names one
        factor of a pair decays the product half as much. Under
        `optax.inject_hyperparams`, name a function in `static_args`.
      moments: `"factored"` or `"dense"`.
      gauge: How the direction is divided between A and B; see `lorapro`.
      damping: Levenberg-Marquardt damping of E and of the direction (the first moment
        is carried without), e = damping · ‖W - W⁻‖² / (s² (‖A‖² + ‖B‖²)) with W⁻ one
        step ago: a step on A is short while B is no larger than one step makes it, at
        every s and learning rate, and nearly exact later. Where nothing has moved, a
        hundredth of it in the units of `lorapro`. 0 with dense moments is the paper.
      max_grad_norm: Clips the equivalent gradients and the gradients of other leaves
        by their common norm, which is what clipping by the global norm would see in
        full fine-tuning, as far as the factors can follow. A gradient that is not
        finite does not count. None for no clipping.
      mu_dtype: Of the first moments; by default float32, as all moments are (float64
        for float64 parameters), whatever the dtype of the factors.
      nesterov: Whether the momentum is Nesterov's, as in `optax.adamw`.
      scale: The s of the forward pass; see `lorapro`, as for everything below.
      alpha: The numerator of s = alpha / r, instead of `scale`.
      rslora: Whether s is alpha / sqrt(r).
      pairs: Explicit pairs instead of those found by name. What is not among them
        gets plain AdamW, whatever its name.
      stack_axis: The axes along which layers are stacked.
      on_no_pairs: `"error"`, or `"ignore"` for plain AdamW in a tree without a pair.
      wrt: Which factors move, `"both"`, `"a"`, `"b"` or `{regex: which}`, as in
        `lorapro`. Moments and decay are those of the factors that do: with `"b"` this
        is AdamW in the space of the weights that LoRA-FA can reach.

    Returns:
      A `GradientTransformationExtraArgs`; the first part of its state is a
      `ScaleByLoRAProAdamState`. `update` needs `params`, computes in float32 (float64
      where a leaf is float64) and returns each leaf in the wider dtype of gradient and
      parameter. A gradient that is not finite spoils its own pair only.

    Raises:
      ValueError: For options out of range, and everything that `lorapro` raises.

    References:
      Wang et al., `LoRA-Pro: Are Low-Rank Adapters Properly Optimized?
      <https://arxiv.org/abs/2407.18242>`_, ICLR 2025, the algorithm with AdamW.
      Shazeer and Stern, `Adafactor: Adaptive Learning Rates with Sublinear Memory Cost
      <https://arxiv.org/abs/1804.04235>`_, 2018.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from lorapro_jax import lorapro_adamw
      >>> params = {"lora_a": jnp.ones((64, 4)), "lora_b": jnp.zeros((4, 32))}
      >>> tx = lorapro_adamw(1e-3, weight_decay=0.01, alpha=8.0)
      >>> state = tx.init(params)
      >>> grads = jax.tree.map(jnp.ones_like, params)
      >>> updates, state = tx.update(grads, state, params)
      >>> params = optax.apply_updates(params, updates)
    """
    return descending(
        functools.partial(
            scale_by_lorapro_adam,
            b1,
            b2,
            eps,
            moments=moments,
            gauge=gauge,
            damping=damping,
            max_grad_norm=max_grad_norm,
            mu_dtype=mu_dtype,
            nesterov=nesterov,
        ),
        learning_rate,
        weight_decay,
        mask,
        scale=scale,
        alpha=alpha,
        rslora=rslora,
        pairs=pairs,
        stack_axis=stack_axis,
        on_no_pairs=on_no_pairs,
        wrt=wrt,
    )
