"""`lorapro()`: LoRA's gradients in, LoRA-Pro's out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optax
from jax.typing import ArrayLike

from ..algebra._adjust import adjust
from ..algebra._coefficients import Gauge, check_adjustment
from ..pairs._find import PairsSpec
from ..pairs._scale import ScaleSpec
from ..transforms._groups import group_pairs
from ..transforms._options import OnNoPairs, pair_finder
from ..transforms._rounding import warn_of_narrow_factors
from ..transforms._view import View
from ..transforms._wrt import WrtSpec, without_frozen

DEFAULT_DAMPING = 0.1


def lorapro(
    *,
    scale: ScaleSpec = 1.0,
    alpha: ScaleSpec | None = None,
    rslora: bool = False,
    gauge: Gauge = "sylvester",
    damping: ArrayLike = DEFAULT_DAMPING,
    pairs: PairsSpec | None = None,
    stack_axis: int | Sequence[int] | None = None,
    on_no_pairs: OnNoPairs = "error",
    wrt: WrtSpec = "both",
) -> optax.GradientTransformationExtraArgs:
    """Replaces LoRA's gradients by those closest to the full gradient.

    LoRA trains W = W0 + s B A. Of all steps (a, b) on (A, B) this takes the one
    whose effect on W, `s (B a + b A)`, is closest to the gradient G of W, damped so
    that a tiny B cannot make it huge. G is never formed. Everything else in the tree
    passes through unchanged, so no mask is needed, and there is no state.

    Put it first in a chain, before momentum, Adam or per-leaf clipping: the two
    gradients of a pair have to come from one G, which is not checked (clipping by the
    global norm may stand before it). Sweep the learning rate anew; before AdamW the
    best one was that of plain LoRA to 3 times that.

    Args:
      scale: The s of the forward pass: a number, `{regex: number}` searched in the
        paths of the factors (first match counts), or a function of a `LoRAPair`.
        In place of a number, an array of the stack's shape gives each layer its own.
        1.0 is right for `nnx.LoRA`, gemma and EasyDeL. A wrong s multiplies the
        result by (s_true/s)².
      alpha: Instead of `scale`: s = alpha / r, pair by pair, as in qwix, tunix,
        MaxText, Keras and PEFT. A number, mapping or function, like `scale`.
      rslora: Whether s is alpha / sqrt(r); it goes with `alpha`.
      gauge: Which of the steps with this effect on W: `"sylvester"`, the closest to
        LoRA's own gradients (the paper's choice); `"symmetric"`, the correction
        divided equally between A and B; `"zero"`, all of it on B.
      damping: Levenberg-Marquardt damping in units of `(tr BᵀB + tr AAᵀ) / r`, at
        least 0. 0 is the paper exactly; large values approach LoRA's gradients,
        each pair's times a number of its own. The default is the best of 0 to 10, or
        within noise of it, before AdamW and before SGD with momentum in
        `benchmarks/damping.py` (three seeds, learning rates swept); there 0 and 1e-4
        are clearly worse, because a tiny B makes the undamped step of A huge. In
        float32, values between 0 and about 1e-5 are below the rounding of
        ill-conditioned factors.
      pairs: Explicit pairs instead of those found by name: `LoRAPair`s or plain
        `(path of A, path of B)` tuples, or a function from the tree to them. What
        is not among them passes through, whatever its name. Two adapters that are
        active on one weight would each be adjusted to all of its gradient: where
        names do not show it, freeze one with `optax.partition` and `set_to_zero()`.
      stack_axis: The axis (or axes) along which layers are stacked in factors of
        three axes or more, where their shapes cannot settle it; `()` for none.
        Under `optax.inject_hyperparams`, name in `static_args` what is no number:
        `stack_axis`, and `scale`, `alpha` or `pairs` if they are functions.
      on_no_pairs: `"error"`, or `"ignore"` to let a tree without a pair pass, also
        one without any leaf.
      wrt: Which factors move: `"both"`, `"a"`, `"b"`, or `{regex: which}` like
        `scale`. With `"b"`, A is fixed and b is the closest step without it, that of
        LoRA-FA, g_B (AAᵀ + eI)⁻¹/s². The other factor's update is exactly 0, and its
        gradient may be missing, None or masked.

    Returns:
      A `GradientTransformationExtraArgs` with `optax.EmptyState`; `update` needs
      `params`. It computes in float32 (float64 where a leaf is float64) and returns
      each leaf in its own dtype; what overflows only there, as in float16, becomes its
      largest number.

    Raises:
      ValueError: For contradictory options; from `init` and `update`, while
        tracing, for everything that `find_pairs` raises, for a tree without pairs or
        with leaves that are no arrays, for names that show two adapters on one weight
        (unless `pairs` lists them), and for missing or mismatched `params`.

    References:
      Wang et al., `LoRA-Pro: Are Low-Rank Adapters Properly Optimized?
      <https://arxiv.org/abs/2407.18242>`_, ICLR 2025, Theorems 2.1 and 2.3.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from lorapro_jax import lorapro
      >>> params = {"lora_a": jnp.ones((64, 4)), "lora_b": jnp.zeros((4, 32))}
      >>> tx = optax.chain(lorapro(alpha=8.0), optax.adamw(1e-3))
      >>> state = tx.init(params)
      >>> grads = jax.tree.map(jnp.ones_like, params)
      >>> updates, state = tx.update(grads, state, params)
      >>> params = optax.apply_updates(params, updates)
    """
    check_adjustment(gauge, damping)
    find = pair_finder(
        scale=scale,
        alpha=alpha,
        rslora=rslora,
        pairs=pairs,
        stack_axis=stack_axis,
        on_no_pairs=on_no_pairs,
        wrt=wrt,
    )

    def init_fn(params: optax.Params) -> optax.EmptyState:
        # A wrong tree should fail here, not at the first step.
        warn_of_narrow_factors(find(params), params)
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates,
        state: optax.EmptyState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del extra_args
        view = View.of(find(updates), updates)
        pairs = view.take(updates, params)
        if not pairs:
            return updates, state
        groups = group_pairs(view.pairs, pairs)
        steps = adjust(groups.join(pairs), damping=damping, gauge=gauge)
        return view.put(updates, groups.split(steps)), state

    tx = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    return without_frozen(tx, find, wrt)
