"""The learning rate and the weight decay of AdamW, on factors and on other leaves."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ._trees import FindPairs, cast_to, is_traced, positions


def descend(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: jax.typing.ArrayLike,
    mask: Any,
    find: FindPairs,
) -> optax.GradientTransformationExtraArgs:
    """From directions to steps: -lr · direction, and decoupled weight decay.

    A factor becomes √(1 - lr·λ) times what it was, so that the product B A decays by
    1 - lr·λ as the weights do in full fine-tuning; another leaf moves by -lr·λ times
    itself, as in `optax.adamw`.

    Args:
      learning_rate: A number or a schedule.
      weight_decay: λ.
      mask: Which leaves decay: a tree of bools, a prefix of the parameters, or a
        function from the parameters to one; None for all.
      find: From a tree to its pairs.
    """
    # Here, because under a trace even a concrete array compares to a tracer.
    decaying = is_traced(weight_decay) or bool(weight_decay != 0)

    def init_fn(params: optax.Params) -> optax.OptState:
        _which(mask, params)  # a wrong mask should fail here
        if callable(learning_rate):
            return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args
        rate = learning_rate
        if callable(rate):
            rate = rate(state.count)
            state = optax.ScaleByScheduleState(optax.safe_increment(state.count))
        structure: Any = jax.tree.structure(updates)
        directions = structure.flatten_up_to(updates)
        if decaying:
            decays = structure.flatten_up_to(_which(mask, params))
            weights = structure.flatten_up_to(params)
            factors = {i for pair in positions(find(updates), updates) for i in pair}
        else:
            decays, weights, factors = [False] * len(directions), directions, set()

        loss = jnp.clip(rate * weight_decay, 0, 1)  # more than all cannot decay
        shrink = -loss / (1 + jnp.sqrt(1 - loss))  # √(1 - loss) - 1, exact when tiny
        steps = []
        for position, (u, w) in enumerate(zip(directions, weights, strict=True)):
            decayed = decays[position] and position not in factors
            step = -rate * (u + weight_decay * w if decayed else u)
            if decays[position] and position in factors:
                step += shrink * w
            steps.append(cast_to(jnp.asarray(step), u.dtype))
        return jax.tree.unflatten(structure, steps), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _which(mask: Any, params: optax.Params | None) -> optax.Params:
    """A bool for every leaf of `params`."""
    if params is None:
        raise ValueError(
            "Weight decay needs the parameters: call `tx.update(grads, state, params)`."
        )
    flags = mask(params) if callable(mask) else True if mask is None else mask
    return jax.tree.broadcast(flags, params)
