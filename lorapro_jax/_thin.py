"""Thin m×n matrices: sums of products of an m×r and an r×n array, never formed.

The equivalent gradient s (B a + b A) is one: s times [B, b] on the left and [a; A] on
the right.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ._adjust import Step
from ._factors import PairArrays, apply, contract, largest_entry, replicated, times
from ._layout import FactorAxes
from ._linalg import power_of_two, safe_norm


def thin_gradients(
    pair: PairArrays, left: Sequence[jax.Array], right: Sequence[jax.Array]
) -> Step:
    """LoRA's gradients s Bᵀ X and s X Aᵀ of a thin X = s Σ left_k right_k.

    Args:
      pair: The factors A and B.
      left: Arrays like B.
      right: As many like A.
    """
    grad_a, grad_b = jnp.zeros_like(pair.a), jnp.zeros_like(pair.b)
    for x, y in zip(left, right, strict=True):
        grad_a += apply(contract(pair.b, x, pair.b_axes), y, pair.a_axes)
        grad_b += apply(contract(pair.a, y, pair.a_axes), x, pair.b_axes)
    square = jnp.asarray(pair.scale, pair.a.dtype) ** 2
    return square * grad_a, square * grad_b


def energies(pair: PairArrays, a: jax.Array, b: jax.Array) -> Step:
    """The row and the column sums of E∘E, exactly, for E = s (B a + b A).

    Returns:
      The rows, like B, and the columns, like A, with a rank axis of size 1.
    """
    unit, e = _in_units(pair, a, b)
    (x, y), (z, w) = (e.b, e.grad_b), (e.grad_a, e.a)
    rows = _row_sums((x, y), (z, w), pair.b_axes, pair.a_axes)
    columns = _row_sums((z, w), (x, y), pair.a_axes, pair.b_axes)
    square = (jnp.asarray(pair.scale, unit.dtype) * unit) ** 2
    return times(square, rows, pair.b_axes), times(square, columns, pair.a_axes)


def norm(pair: PairArrays, a: jax.Array, b: jax.Array) -> jax.Array:
    """‖E‖ over all layers of a pair, a scalar, for E = s (B a + b A)."""
    unit, e = _in_units(pair, a, b)
    left, right = (e.b, e.grad_b), (e.grad_a, e.a)
    grams_b = [contract(x, y, pair.b_axes) for x in left for y in left]
    grams_a = [contract(x, y, pair.a_axes) for x in right for y in right]
    products = [
        replicated(x) * replicated(y) for x, y in zip(grams_b, grams_a, strict=True)
    ]
    square = jnp.maximum(jnp.stack(products).sum((0, -2, -1)), 0)
    scale = jnp.abs(jnp.asarray(pair.scale, square.dtype))
    return safe_norm(scale * unit * jnp.sqrt(square))


def _in_units(
    pair: PairArrays, a: jax.Array, b: jax.Array
) -> tuple[jax.Array, PairArrays]:
    """A power of two, `(*batch)`, and the pair with the steps in its units.

    Squares of those do not overflow in between.
    """
    unit = power_of_two(largest_entry(pair._replace(a=a, b=b)))
    a, b = times(1 / unit, a, pair.a_axes), times(1 / unit, b, pair.b_axes)
    return unit, pair._replace(grad_a=a, grad_b=b)


def _row_sums(
    left: Step, right: Step, left_axes: FactorAxes, right_axes: FactorAxes
) -> jax.Array:
    """Σ_j X_ij² for X = Σ_k left_k right_k, like `left` with a rank axis of 1."""
    (x, y), (z, w) = left, right
    sums = (
        x * apply(contract(z, z, right_axes), x, left_axes)
        + 2 * x * apply(contract(z, w, right_axes), y, left_axes)
        + y * apply(contract(w, w, right_axes), y, left_axes)
    ).sum(left_axes.rank, keepdims=True)
    return jnp.maximum(sums, 0)  # cancellation may leave less
