"""The optimizers of the command line, by name; clipping, decay and rate in one way."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import optax

from lorapro_jax import lora_rite, lorapro, lorapro_adamw


def schedule(rate: Any, steps: int, warmup: float) -> optax.Schedule:
    """Linear warm-up, then a cosine that is 0 after the last step.

    Args:
      rate: The largest learning rate; a number, or an array under `jit`.
      steps: Of the whole run.
      warmup: Share of the steps. The first step has a rate above 0 already.
    """
    warm = min(round(warmup * steps), steps - 1)
    shape = optax.cosine_decay_schedule(1.0, steps - warm)
    if warm:
        rise = optax.linear_schedule(1 / (warm + 1), 1.0, warm)
        shape = optax.join_schedules([rise, shape], [warm])
    return lambda count: rate * shape(count)


def _clipped(max_grad_norm: float | None, *rest: Any) -> Any:
    """Clips the gradients of all factors by their common norm before the rest."""
    clip = [optax.clip_by_global_norm(max_grad_norm)] if max_grad_norm else []
    return optax.chain(*clip, *rest)


def _lora(rate, decay, norm, pairs, *, nesterov=False):
    return _clipped(norm, optax.adamw(rate, weight_decay=decay, nesterov=nesterov))


def _lora_rite(rate, decay, norm, pairs):
    return lora_rite(rate, weight_decay=decay, max_grad_norm=norm, **pairs)


def _lorapro(rate, decay, norm, pairs):
    return _clipped(norm, lorapro(**pairs), optax.adamw(rate, weight_decay=decay))


def _lorapro_adamw(rate, decay, norm, pairs, *, nesterov=False):
    return lorapro_adamw(
        rate, weight_decay=decay, max_grad_norm=norm, nesterov=nesterov, **pairs
    )


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "lora": _lora,
    "lora_nesterov": functools.partial(_lora, nesterov=True),
    "lora_rite": _lora_rite,
    "lorapro": _lorapro,
    "lorapro_adamw": _lorapro_adamw,
    "lorapro_adamw_nesterov": functools.partial(_lorapro_adamw, nesterov=True),
}


def new_optimizer(
    name: str,
    rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = None,
    pair_options: Mapping[str, Any],
) -> optax.GradientTransformation:
    """One of `OPTIMIZERS`.

    Args:
      name: `"lora"` and `"lora_nesterov"` are AdamW on the factors, the others those
        of `lorapro_jax`; `"lorapro"` stands before AdamW.
      rate: A number or a schedule.
      weight_decay: Of the factors, or of their product where the optimizer works in
        the space of the weights.
      max_grad_norm: What it bounds is the norm of the factors' gradients for the first
        two and `"lorapro"`; for the other two see them. None or 0 for no clipping.
      pair_options: The s of the forward pass, as `adapters.pair_options` says it.
    """
    return OPTIMIZERS[name](rate, weight_decay, max_grad_norm or None, pair_options)
