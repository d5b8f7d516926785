"""`lora_rite()`: LoRA-RITE, whose step does not depend on how B A is split.

The direction is that of the rule `Rite`; learning rate and weight decay follow it, as
in any Optax chain.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import optax
from jax.typing import ArrayLike, DTypeLike

from .._checks import check_bool, check_float_dtype, check_number, check_positive
from ..pairs._find import PairsSpec
from ..pairs._scale import ScaleSpec
from ..transforms._descent import descending
from ..transforms._options import OnNoPairs, pair_finder
from ..transforms._over_pairs import OverPairsState, over_pairs
from ..transforms._wrt import WrtSpec, without_frozen
from ._rite_rule import Rite

ScaleByLoRARiteState: TypeAlias = OverPairsState
"""State of `scale_by_lora_rite`. Its `pairs` are `RiteMoments`, with trees `mu`, `nu`,
`frames`, `spectrum` and `rho`; its `others` are those of `optax.scale_by_adam` for all
other leaves. All of it is float32, or float64 for a pair with a float64 factor and for
other float64 leaves."""


def scale_by_lora_rite(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-6,
    *,
    escape_mass: bool = True,
    max_grad_norm: ArrayLike | None = 1.0,
    mu_dtype: DTypeLike | None = None,
    scale: ScaleSpec = 1.0,
    alpha: ScaleSpec | None = None,
    rslora: bool = False,
    pairs: PairsSpec | None = None,
    stack_axis: int | Sequence[int] | None = None,
    on_no_pairs: OnNoPairs = "error",
    wrt: WrtSpec = "both",
) -> optax.GradientTransformationExtraArgs:
    """LoRA-RITE's direction.

    See `lora_rite`, which adds the learning rate and the weight decay. Like
    `optax.scale_by_adam`, it does not turn the sign: chain it with
    `optax.scale_by_learning_rate`. `optax.add_decayed_weights` behind it decays A and
    B each, and so the product twice.

    Args:
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment.
      escape_mass: Whether the second moment makes up for what it loses as the factors
        turn; `lora_rite` explains all options.
      max_grad_norm: The bound of the unmagnified gradients' norm over the whole tree;
        None for no clipping.
      mu_dtype: The dtype of the first moments.
      scale: The s of the forward pass, as in `lorapro`.
      alpha: The numerator of s = alpha / r, instead of `scale`.
      rslora: Whether s is alpha / sqrt(r).
      pairs: Explicit pairs instead of those found by name.
      stack_axis: The axes along which layers are stacked.
      on_no_pairs: `"error"`, or `"ignore"` to let a tree without a pair pass.
      wrt: Which factors move.

    Returns:
      A `GradientTransformationExtraArgs` with a `ScaleByLoRARiteState`; `update` needs
      `params` and returns each leaf in the wider dtype of gradient and parameter.

    Raises:
      ValueError: As `lora_rite`.
    """
    check_number("b1", b1, 0, 1)
    check_number("b2", b2, 0, 1)
    check_number("eps", eps, 0, math.inf)
    check_bool("escape_mass", escape_mass)
    check_float_dtype("mu_dtype", mu_dtype)
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
    rule = Rite(b1, b2, eps, escape_mass, mu_dtype)
    adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype)
    return without_frozen(over_pairs(rule, find, adam, max_grad_norm), find, wrt)


def lora_rite(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-6,
    weight_decay: ArrayLike = 0.0,
    mask: Any = None,
    *,
    escape_mass: bool = True,
    max_grad_norm: ArrayLike | None = 1.0,
    mu_dtype: DTypeLike | None = None,
    scale: ScaleSpec = 1.0,
    alpha: ScaleSpec | None = None,
    rslora: bool = False,
    pairs: PairsSpec | None = None,
    stack_axis: int | Sequence[int] | None = None,
    on_no_pairs: OnNoPairs = "error",
    wrt: WrtSpec = "both",
) -> optax.GradientTransformationExtraArgs:
    """LoRA-RITE: adaptive steps that do not depend on how B A is split.

    The same B A can be written as (B Q)(Q⁻¹ A) for any invertible Q, and AdamW on A
    and B takes another step on the product for each. This takes the same. Of each
    gradient it removes the size of the other factor, which leaves the *unmagnified*
    gradients Q_Bᵀ G and G Q_A of W's gradient G, with Q_B and Q_A orthonormal bases of
    the columns of B and of the rows of A. On each of these it runs a matrix form of
    Adam whose second moment is r×r and whose moments turn with the bases. Leaves that
    are no factor get plain AdamW. Unlike `optax.adamw`, it does not decay by default.

    The state is that of AdamW on A and B and some r×r matrices. A step calls `eigh`
    twice: for all Gram matrices, and for all second moments.

    From the authors' algorithm and their public code are the order of the two moments
    (the first is of preconditioned gradients), the averages with bias correction, the
    escaped mass, ε outside of the root, the clipping, and all defaults but that of
    `escape_mass`. What is different:

    * The bases are polar factors, and not from QR. The steps on B A are the same, and
      directions that a factor lacks, as all of B at its start, are left out.
    * Gradients and steps are divided by s. The learning rate is in the space of W and
      does not depend on s, and neither does ε.
    * Weight decay acts on the product B A, as in `lorapro_adamw`: A and B each become
      √(1 - lr·λ) times what they were, where theirs are 1 - lr·λ times.
    * Their code sets a gradient with a root mean square above 1 to 0, and has options
      to bound the update and to balance the factors. These are not here.
    * Eigenvalues of a second moment below its rounding count as that much, so that
      what is small in float32 is not magnified.

    NaN and infinity persist in the moments of their layer, as in `optax.adamw`;
    `optax.apply_if_finite` drops such steps. It cannot be differentiated with respect
    to factors or gradients, and says so.

    Args:
      learning_rate: A number or an Optax schedule. The authors try 2e-4 to 1e-3 on
        Gemma 2B.
      b1: Decay of the first moment, in [0, 1).
      b2: Decay of the second moment, in [0, 1).
      eps: Added to the root of the second moment. Under clipping, gradients are small:
        smaller than this they are not brought to size.
      weight_decay: λ, at least 0.
      mask: Which leaves decay: a tree of bools, a prefix of the parameters' tree, or
        a function from the parameters to one; None for all. A mask that names one
        factor of a pair decays the product half as much. Under
        `optax.inject_hyperparams`, name a function in `static_args`.
      escape_mass: Whether what the second moment loses as a basis turns away from it,
        the largest difference of its eigenvalues, is added to all of them. True is
        the paper's algorithm; in the authors' code it is an option that is off. It
        costs one more matrix for each factor in the second `eigh`.
      max_grad_norm: Clips the unmagnified gradients and the gradients of other leaves
        by their common norm. It is the only guard against a single large gradient,
        which would otherwise stay in the second moments for some 1/(1 - b2) steps. A
        gradient that is not finite does not count. None for no clipping.
      mu_dtype: Of the first moments; by default float32, as all of the state is
        (float64 for float64 parameters), whatever the dtype of the factors.
      scale: The s of the forward pass; see `lorapro`, as for everything below.
      alpha: The numerator of s = alpha / r, instead of `scale`.
      rslora: Whether s is alpha / sqrt(r).
      pairs: Explicit pairs instead of those found by name. What is not among them
        gets plain AdamW, whatever its name.
      stack_axis: The axes along which layers are stacked.
      on_no_pairs: `"error"`, or `"ignore"` for plain AdamW in a tree without a pair.
      wrt: Which factors move, `"both"`, `"a"`, `"b"` or `{regex: which}`, as in
        `lorapro`. With `"b"` this is LoRA-RITE of B only: A and its basis stay, so
        that there is no state for A and nothing escapes, and B follows the matrix form
        of Adam on G Q_A, where LoRA-FA has Adam itself on the gradient of B.

    Returns:
      A `GradientTransformationExtraArgs`; the first part of its state is a
      `ScaleByLoRARiteState`. `update` needs `params`, computes in float32 (float64
      where a leaf is float64) and returns each leaf in the wider dtype of gradient and
      parameter. A gradient that is not finite spoils its own layer only.

    Raises:
      ValueError: For options out of range, and everything that `lorapro` raises.

    References:
      Yen et al., `LoRA Done RITE: Robust Invariant Transformation Equilibration for
      LoRA Optimization <https://arxiv.org/abs/2410.20625>`_, ICLR 2025, algorithm 1,
      and its `code <https://github.com/gkevinyen5418/LoRA-RITE>`_.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from lorapro_jax import lora_rite
      >>> params = {"lora_a": jnp.ones((64, 4)), "lora_b": jnp.zeros((4, 32))}
      >>> tx = lora_rite(1e-3, weight_decay=0.01, alpha=8.0)
      >>> state = tx.init(params)
      >>> grads = jax.tree.map(jnp.ones_like, params)
      >>> updates, state = tx.update(grads, state, params)
      >>> params = optax.apply_updates(params, updates)
    """
    return descending(
        functools.partial(
            scale_by_lora_rite,
            b1,
            b2,
            eps,
            escape_mass=escape_mass,
            max_grad_norm=max_grad_norm,
            mu_dtype=mu_dtype,
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
