"""Exponential moving averages, as Adam has them, of arrays and of trees of arrays."""

from typing import TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

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


def estimate(
    decay: ArrayLike, count: jax.Array, dtype: DTypeLike, *, nesterov: bool
) -> tuple[jax.Array, jax.Array | None]:
    """What the average and the newest are multiplied with in Adam's direction.

    That of the unbiased average; with Nesterov's momentum where it would be one step
    on, if the newest came once more, as in `optax.scale_by_adam` (Dozat, 2016). None
    for nothing of the newest.
    """
    one, beta = jnp.ones((), dtype), jnp.asarray(decay, dtype)
    if not nesterov:
        return unbiased(one, decay, count), None
    ahead = unbiased(one, decay, optax.safe_increment(count))
    return beta * ahead, (1 - beta) * unbiased(one, decay, count)


def estimated(
    average: T, new: T, decay: ArrayLike, count: jax.Array, *, nesterov: bool
) -> T:
    """The mean of Adam's direction, after `new` has entered `average`."""

    def combined(x: jax.Array, y: jax.Array) -> jax.Array:
        on_average, on_new = estimate(decay, count, x.dtype, nesterov=nesterov)
        return on_average * x if on_new is None else on_average * x + on_new * y

    result: T = jax.tree.map(combined, average, new)
    return result


def copied(pair: PairArrays) -> Both[Factor]:
    """The factors: without a copy, donating the parameters would delete the state."""
    result: Both[Factor] = jax.tree.map(jnp.copy, pair.factors)
    return result


def copied_after(pair: PairArrays, late: Both[Factor]) -> Both[Factor]:
    """The same, as soon as the values of `late`, which are alike, are there.

    XLA would copy first. But where the state is donated the copy goes to the place of
    the former factors, which the step has still to read: so it would be kept elsewhere
    and copied once more at the end.
    """

    def copy(x: jax.Array, y: jax.Array) -> jax.Array:
        whole = jnp.uint64 if y.dtype == jnp.float64 else jnp.uint32
        bits = jax.lax.bitcast_convert_type(y, whole)
        # True of all numbers, which XLA does not know; what makes kernels of it does.
        return jnp.where((bits | 1) != 0, x, jnp.zeros_like(x))

    result: Both[Factor] = jax.tree.map(copy, pair.factors, late)
    return result
