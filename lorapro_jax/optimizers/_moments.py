"""Exponential moving averages, as Adam has them, of arrays and of trees of arrays."""

from typing import TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from ..algebra._factors import Both, Factor, PairArrays

T = TypeVar("T")


def decayed(old: T, new: T, decay: ArrayLike) -> T:
    """The average one step on: `decay · old + (1 - decay) · new`."""

    def average(x: jax.Array, y: jax.Array) -> jax.Array:
        keep = jnp.asarray(decay, y.dtype)
        return keep * x.astype(y.dtype) + (1 - keep) * y

    result: T = jax.tree.map(average, old, new)
    return result


def unbiased(average: T, decay: ArrayLike, count: jax.Array) -> T:
    """An average that began at 0, without its bias towards it, after `count` steps."""

    def corrected(x: jax.Array) -> jax.Array:
        return x / (1 - jnp.asarray(decay, x.dtype) ** count.astype(x.dtype))

    result: T = jax.tree.map(corrected, average)
    return result


def estimated(
    average: T, new: T, decay: ArrayLike, count: jax.Array, *, nesterov: bool
) -> T:
    """The mean that Adam's direction is made of, after `new` has entered `average`.

    The unbiased average; with Nesterov's momentum where it would be one step on, if
    `new` came once more, as in `optax.scale_by_adam` (Dozat, 2016).
    """
    if not nesterov:
        return unbiased(average, decay, count)
    ahead = unbiased(average, decay, optax.safe_increment(count))
    return decayed(ahead, unbiased(new, decay, count), decay)


def copied(pair: PairArrays) -> Both[Factor]:
    """The factors: without a copy, donating the parameters would delete the state."""
    result: Both[Factor] = jax.tree.map(jnp.copy, pair.factors)
    return result
