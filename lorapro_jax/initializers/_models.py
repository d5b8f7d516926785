"""An initialiser on an NNX model, in place."""

from __future__ import annotations

from typing import Any

import jax

from ..weights._given import KernelsSpec
from ..weights._models import check_module, known_orders
from ._contract import Initializer
from ._trees import start_adapters


def initialize_model(
    method: Initializer,
    model: Any,
    gradients: Any = None,
    *,
    key: jax.Array,
    kernels: KernelsSpec | None = None,
    **options: Any,
) -> None:
    """`initialize_adapters` on an NNX model, in place.

    Until it is done, the base kernels that change are there twice. The model tells
    more than its state does: the kernels of Flax's `Linear`, `LinearGeneral` and `Conv`
    have their inputs first, even where they are square.

    Args:
      method: See `initialize_adapters`.
      model: An `nnx.Module`.
      gradients: See `initialize_adapters`.
      key: See `initialize_adapters`.
      kernels: See `initialize_adapters`.
      **options: The others of `initialize_adapters`.

    Raises:
      ValueError: As `initialize_adapters`; the model is then as it was.
      TypeError: An argument is of another kind.

    Examples:
      >>> import jax
      >>> from flax import nnx
      >>> from lorapro_jax import initialize_model
      >>> from lorapro_jax.initializers import olora
      >>> model = nnx.LoRALinear(6, 5, lora_rank=2, rngs=nnx.Rngs(0))
      >>> initialize_model(olora(), model, key=jax.random.key(1))
      >>> bool((model.lora.lora_b[...] != 0).all())
      True
    """
    from flax import nnx

    check_module(model)
    state = nnx.state(model)
    new = start_adapters(
        method, state, gradients, key, kernels, options, known_orders(model)
    )
    nnx.update(model, new)
