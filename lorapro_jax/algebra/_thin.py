"""Thin m×n matrices: sums of products of an m×r and an r×n array, never formed.

The equivalent gradient s (B a + b A) is one: s times [B, b] on the left and [a; A] on
the right.
"""

from collections.abc import Sequence

import jax.numpy as jnp

from ._factors import (
    Both,
    Factor,
    PairArrays,
    Step,
)
from ._linalg import Norm, root
from ._products import apply, contract, times, unit_of
from ._sharding import replicated


def thin_gradients(
    pair: PairArrays, left: Sequence[Factor], right: Sequence[Factor]
) -> Step:
    """LoRA's gradients s Bᵀ X and s X Aᵀ of a thin X = s Σ left_k right_k.

    Args:
      pair: The factors A and B.
      left: Factors like B.
      right: As many factors like A.
    """
    grad_a, grad_b = pair.factors.map(lambda x: x.map(jnp.zeros_like))
    for x, y in zip(left, right, strict=True):
        grad_a += apply(contract(pair.b, x), y)
        grad_b += apply(contract(pair.a, y), x)
    square = jnp.asarray(pair.scale, pair.dtype) ** 2
    return Both(times(square, grad_a), times(square, grad_b))


def carry(pair: PairArrays, factors: Both[Factor], mean: Step) -> Step:
    """LoRA's gradients, at the factors of today, of a mean M of former steps.

    `project` then gives what the factors of today can express of M.

    Args:
      pair: The factors A and B of today.
      factors: A⁻ and B⁻, those that M = s (B⁻ μ_a + μ_b A⁻) belongs to.
      mean: μ_a and μ_b.
    """
    old, mean = (x.map(lambda y: y.astype(pair.dtype)) for x in (factors, mean))
    return thin_gradients(pair, (old.b, mean.b), (mean.a, old.a))


def motion(now: Both[Factor], before: Both[Factor]) -> Norm:
    """‖B A - B⁻ A⁻‖ of each layer, for factors (A, B) and (A⁻, B⁻) of one dtype."""
    change = now.map(lambda x, y: x.map(jnp.subtract, y), before)
    # It is B (A - A⁻) + (B - B⁻) A⁻, where no large products cancel.
    return norm(Both(before.a, now.b), change)


def norm(factors: Both[Factor], step: Step) -> Norm:
    """‖E‖ of each layer, for E = B a + b A, whatever its size is."""
    unit = unit_of(step)
    a, b = step.map(lambda x: times(1 / unit, x))
    left, right = (factors.b, b), (a, factors.a)
    grams_b = [replicated(contract(x, y)) for x in left for y in left]
    grams_a = [replicated(contract(x, y)) for x in right for y in right]
    products = [x * y for x, y in zip(grams_b, grams_a, strict=True)]
    square = jnp.stack(products).sum((0, -2, -1))
    return Norm(unit, root(jnp.where(square < 0, 0, square)))
