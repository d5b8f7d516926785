"""Steps below the rounding of a narrow parameter, taken with the right probability."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from .._checks import is_traced
from ..pairs._axes import LoRAPair
from ..pairs._leaves import index_leaves

_WIDTH = 16
"""Of a bfloat16, the upper half of a float32."""


def warn_of_narrow_factors(pairs: Sequence[LoRAPair], params: Any) -> None:
    """Warns where a factor is 16 bits wide: it stalls at usual learning rates."""
    leaves = index_leaves(params)
    paths = [path for pair in pairs for path in pair.paths]
    narrow = [path for path in paths if leaves[path].value.dtype.itemsize == 2]
    if narrow:
        path = narrow[0]
        warnings.warn(
            f"LoRA factors are 16 bits wide, such as `{path}` "
            f"({leaves[path].value.dtype}). Most steps at usual learning rates are "
            "below their rounding and are lost. Keep the factors in float32, also "
            "beside base weights in bfloat16; or, for bfloat16, put "
            "`lorapro_jax.stochastic_rounding()` last in the chain, and filter this "
            "warning.",
            stacklevel=4,
        )


class StochasticRoundingState(NamedTuple):
    """State of `stochastic_rounding`.

    Attributes:
      key: Of `jax.random`, as its data: uint32, so that any checkpoint holds it.
    """

    key: jax.Array


def stochastic_rounding(seed: ArrayLike = 0) -> optax.GradientTransformation:
    """Lets parameters in bfloat16 follow steps that are smaller than their rounding.

    A bfloat16 has 8 bits, so a step of less than 1/512 of a parameter is lost when it
    is added, and at usual learning rates that is nearly every step. This rounds the sum
    up or down at random, such that its mean is the exact one. Put it last in a chain:

        tx = optax.chain(lorapro_adamw(1e-3), stochastic_rounding())

    Leaves of other dtypes pass through. Factors in float32 are better still, and cost
    next to nothing beside base weights in bfloat16: prefer them.

    Args:
      seed: The seed of the random numbers, an integer.

    Returns:
      A `GradientTransformation` with a `StochasticRoundingState`; `update` needs
      `params`.

    Raises:
      ValueError: `update` is called without `params`, or the seed is no integer.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from lorapro_jax import stochastic_rounding
      >>> tx = stochastic_rounding()
      >>> params = jnp.ones(1000, jnp.bfloat16)
      >>> step = jnp.full(1000, 1e-4, jnp.bfloat16)
      >>> updates, _ = tx.update(step, tx.init(params), params)
      >>> bool(abs(updates.astype(jnp.float32).mean() / 1e-4 - 1) < 0.5)
      True
    """
    if isinstance(seed, bool) or not (isinstance(seed, int) or is_traced(seed)):
        raise ValueError(f"`seed={seed!r}` has to be an integer.")

    def init_fn(params: optax.Params) -> StochasticRoundingState:
        del params
        return StochasticRoundingState(jax.random.key_data(jax.random.key(seed)))

    def update_fn(
        updates: optax.Updates,
        state: StochasticRoundingState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, StochasticRoundingState]:
        if params is None:
            raise ValueError(
                "Stochastic rounding needs the parameters: call "
                "`tx.update(grads, state, params)`."
            )
        key, next_key = jax.random.split(jax.random.wrap_key_data(state.key))
        treedef: Any
        leaves, treedef = jax.tree.flatten(updates)
        keys = jax.random.split(key, max(len(leaves), 1))
        steps = [
            _rounded(*x)
            for x in zip(keys, leaves, treedef.flatten_up_to(params), strict=True)
        ]
        new = StochasticRoundingState(jax.random.key_data(next_key))
        return treedef.unflatten(steps), new

    return optax.GradientTransformation(init_fn, update_fn)


def _rounded(key: jax.Array, step: jax.Array, param: jax.Array) -> jax.Array:
    """The step to one of the two neighbours of `param + step` in bfloat16."""
    if jnp.asarray(param).dtype != jnp.bfloat16:
        return step
    total = param.astype(jnp.float32) + step.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(total, jnp.uint32)
    noise = jax.random.bits(key, total.shape, jnp.uint32) >> _WIDTH
    # The size of a float grows with its bits, of either sign. What is not finite stays.
    high = (bits + noise) >> _WIDTH << _WIDTH
    near = jax.lax.bitcast_convert_type(high, jnp.float32)
    # With noise, the bits of some NaN are those of a number.
    rounded = jnp.where(jnp.isfinite(total) & jnp.isfinite(near), near, total)
    moved = rounded - param.astype(jnp.float32)
    return moved.astype(step.dtype)
