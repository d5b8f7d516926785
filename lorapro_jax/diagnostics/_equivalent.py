"""What a step on the factors does to the weight."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ..algebra._adjust import equivalent
from ..algebra._factors import (
    Both,
    Factor,
    PairArrays,
    in_compute_dtype,
)
from ..pairs._axes import Axes, LayoutError, LoRAPair, check_axes
from ..pairs._infer import infer_axes


def equivalent_gradient(
    a: jax.Array,
    b: jax.Array,
    da: jax.Array,
    db: jax.Array,
    scale: ArrayLike = 1.0,
    *,
    pair: LoRAPair | None = None,
) -> jax.Array:
    """The first-order change of the weight when (A, B) moves by (da, db).

    In the paper's notation `s (B da + db A)`: for gradients of the factors this is
    the gradient that a full fine-tuning step would have to use to do the same.

    Args:
      a: A, `(*in, r)`; or `(r, *in)` with a B of `(out, r)`, as in PyTorch.
      b: B, `(r, *out)`.
      da: The step or gradient of A, like `a`.
      db: The step or gradient of B, like `b`.
      scale: The scale s of W = W0 + s B A: a scalar, or for stacked layers an array of
        their shape with one for each.
      pair: The axes of the factors as `find_pairs` returns them, needed for stacked
        layers and for square factors; its paths and scale are not used.

    Returns:
      In float32, or float64 if an array is: the shape of the weight, `(*in, *out)`;
      with PyTorch's layout `(*out, *in)`. Batch axes come first.

    Raises:
      ValueError: Shapes that are no LoRA pair or more than one, complex arrays, or a
        scale that is neither a real number nor one for each layer.

    References:
      Wang et al., `LoRA-Pro: Are Low-Rank Adapters Properly Optimized?
      <https://arxiv.org/abs/2407.18242>`_, 2025, section 2.2.

    Examples:
      >>> import jax.numpy as jnp
      >>> from lorapro_jax import equivalent_gradient
      >>> a, b = jnp.ones((64, 4)), jnp.zeros((4, 32))
      >>> equivalent_gradient(a, b, 0 * a, jnp.ones_like(b), 2.0)[0, 0]
      Array(8., dtype=float32)
    """
    a, b, da, db = (jnp.asarray(x) for x in (a, b, da, db))
    axes = _axes(a, b, da, db, pair)
    at_a, at_b = axes.factor_axes
    _check_scale(scale, tuple(a.shape[axis] for axis in at_a.batch))
    step = Both(Factor(da, at_a), Factor(db, at_b))
    pair_arrays = PairArrays(Factor(a, at_a), Factor(b, at_b), step, scale)
    arrays = in_compute_dtype(pair_arrays)
    out_by_in = equivalent(arrays, arrays.gradients)
    if axes.a_rank < axes.b_rank:  # PyTorch's layout: the weight is (out, in)
        return out_by_in
    first, count = len(axes.b_batch), len(arrays.b.features)
    return jnp.moveaxis(out_by_in, range(first, first + count), range(-count, 0))


def _axes(
    a: jax.Array, b: jax.Array, da: jax.Array, db: jax.Array, pair: LoRAPair | None
) -> Axes:
    """The axes of factors that may stand together, from `pair` or from the shapes."""
    if (a.shape, b.shape) != (da.shape, db.shape):
        raise ValueError(
            f"The steps have shapes {da.shape} and {db.shape}, their factors {a.shape} "
            f"and {b.shape}. Pass `(a, b, da, db)` in this order."
        )
    if any(jnp.iscomplexobj(x) for x in (a, b, da, db)):
        raise ValueError("Complex factors are not supported; pass real arrays.")
    try:
        if pair is None:
            return infer_axes(a.shape, b.shape, ("jax", "torch"), ())
        return check_axes(a.shape, b.shape, pair)
    except LayoutError as error:
        raise ValueError(
            f"Factors of shape {a.shape} and {b.shape} cannot be read as one LoRA "
            f"pair: {error}. Pass `pair=` from `find_pairs`, or a `LoRAPair` with all "
            "axes."
        ) from None


def _check_scale(scale: ArrayLike, batch: tuple[int, ...]) -> None:
    """Raises ValueError where a scale is neither a number nor one for each layer."""
    array = scale if isinstance(scale, jax.Array) else np.asarray(scale)
    shape, kind = array.shape, array.dtype
    real = jnp.issubdtype(kind, jnp.floating) or jnp.issubdtype(kind, jnp.integer)
    if not real or shape not in ((), batch):
        layers = f", or an array of shape {batch}" if batch else ""
        raise ValueError(
            f"`scale` is {kind} of shape {shape}. Pass one real number{layers}."
        )
