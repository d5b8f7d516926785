"""What a step on the factors does to the weight."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ._adjust import equivalent
from ._factors import PairArrays, in_compute_dtype
from ._layout import (
    Axes,
    LayoutError,
    LoRAPair,
    check_axes,
    infer_axes,
)


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
      scale: s of W = W0 + s B A, a scalar.
      pair: The axes of the factors as `find_pairs` returns them, needed for stacked
        layers and for square factors; its paths and scale are not used.

    Returns:
      In float32, or float64 if an array is: the shape of the weight, `(*in, *out)`;
      with PyTorch's layout `(*out, *in)`. Batch axes come first.

    Raises:
      ValueError: Shapes that are no LoRA pair or more than one.

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
    at_a, at_b = axes.split()
    arrays = in_compute_dtype(PairArrays(a, b, da, db, scale, at_a, at_b))
    out_by_in = equivalent(arrays, arrays.grad_a, arrays.grad_b)
    if axes.a_rank < axes.b_rank:  # PyTorch's layout: the weight is (out, in)
        return out_by_in
    first, count = len(axes.b_batch), len(at_b.features(b.ndim))
    return jnp.moveaxis(out_by_in, range(first, first + count), range(-count, 0))


def _axes(
    a: jax.Array, b: jax.Array, da: jax.Array, db: jax.Array, pair: LoRAPair | None
) -> Axes:
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
        return check_axes(a.shape, b.shape, pair[2:6])
    except LayoutError as error:
        raise ValueError(
            f"Factors of shape {a.shape} and {b.shape} cannot be read as one LoRA "
            f"pair: {error}. Pass `pair=` from `find_pairs`, or a `LoRAPair` with all "
            "axes."
        ) from None
