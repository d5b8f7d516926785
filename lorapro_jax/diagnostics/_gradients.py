"""Whether the gradients of each pair are of one weight at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..algebra._factors import PairArrays, in_compute_dtype
from ..algebra._linalg import root
from ..algebra._products import contract, times, unit_of
from ..algebra._sharding import replicated
from ..pairs._find import PairsSpec, find_pairs
from ..pairs._messages import no_pairs_message
from ..transforms._view import View


def check_gradients(
    grads: Any,
    params: Any,
    *,
    pairs: PairsSpec | None = None,
    stack_axis: int | Sequence[int] | None = None,
) -> dict[str, jax.Array]:
    """How far the two gradients of each pair are from being of one weight.

    LoRA-Pro takes g_A = s Bᵀ G and g_B = s G Aᵀ to come from one G, and then
    g_A Aᵀ = Bᵀ g_B, an r×r equation. This is the distance of its two sides:

        ‖g_A Aᵀ - Bᵀ g_B‖ / max(‖g_A Aᵀ‖, ‖Bᵀ g_B‖)

    * Up to 1e-5: rounding. Sound pairs have 2e-7; about 1e-3 is to be expected where
      the model's products of float32 are in TF32, with its ten bits, as they are on
      GPUs unless `jax_default_matmul_precision` says otherwise, and up to 1e-2 with
      gradients in bfloat16.
    * From 0.1 to 1.4: the gradients are not of W = W0 + s B A. One A serves several
      Bs, the forward pass uses the product twice or sums it over heads, the pair was
      read with wrong axes (`pairs=` says others), a factor's gradient is stopped
      (then `wrt=` of `lorapro`), or something before it in the chain, such as
      clipping leaf by leaf or LoRA+, has scaled the two differently.
    * In between: dropout with another mask for each use, or gradients of low
      precision.

    At B = 0, where most runs start, both sides are 0 and so is the distance: check
    after a step. s is not needed, because it is in both.

    Args:
      grads: The gradients, a tree.
      params: The parameters that they were taken of.
      pairs: Explicit pairs, as in `lorapro`.
      stack_axis: The axes along which layers are stacked, as in `lorapro`.

    Returns:
      The distance of each pair by the path of its A: a scalar, or `(*batch)` for
      stacked layers. Works under `jit`.

    Raises:
      ValueError: For no pair, and for everything that `find_pairs` raises.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from lorapro_jax.diagnostics import check_gradients
      >>> key = iter(jax.random.split(jax.random.key(0), 3))
      >>> normal = lambda *shape: jax.random.normal(next(key), shape)
      >>> params = {"lora_a": normal(8, 2), "lora_b": normal(2, 4)}
      >>> x = normal(16, 8)
      >>> loss = lambda p: jnp.sum(jnp.sin(x @ p["lora_a"] @ p["lora_b"]))
      >>> distance = check_gradients(jax.grad(loss)(params), params)
      >>> bool(distance["lora_a"] < 1e-5)
      True
    """
    found = find_pairs(grads, pairs=pairs, stack_axis=stack_axis)
    if not found:
        raise ValueError(no_pairs_message(grads, "There is nothing to check."))
    arrays = map(in_compute_dtype, View.of(found, grads).take(grads, params))
    return {pair.a: _mismatch(x) for pair, x in zip(found, arrays, strict=True)}


def _mismatch(pair: PairArrays) -> jax.Array:
    """The distance of the two sides, `(*batch)`."""
    one = lambda both: both.map(lambda x: times(1 / unit_of(both), x))
    factors, gradients = one(pair.factors), one(pair.gradients)
    sides = contract(gradients.a, factors.a), contract(factors.b, gradients.b)
    size = lambda x: root(jnp.sum(replicated(x) ** 2, (-2, -1)))
    larger = jnp.maximum(*map(size, sides))
    distance = size(replicated(sides[0]) - replicated(sides[1]))
    return distance / jnp.where(larger == 0, 1, larger)
