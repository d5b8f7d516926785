"""LoRA-Pro for Optax: LoRA steps as close to full fine-tuning as its rank allows.

    tx = optax.chain(lorapro(), optax.adamw(1e-4))  # better gradients for any optimizer
    tx = lorapro_adamw(1e-4)  # AdamW as full fine-tuning would run it

Optimizers:
    lorapro                LoRA's gradients in, those closest to the full gradient out
    lorapro_adamw          AdamW in the space of the weights, at LoRA's memory
    scale_by_lorapro_adam  its direction, without learning rate and weight decay
    lora_rite              LoRA-RITE: steps that do not depend on how B A is split
    scale_by_lora_rite     its direction
    stochastic_rounding    steps below the rounding of factors in bfloat16

Pairs:
    find_pairs             which leaves of a tree are A and B, and how they are read
    describe_pairs         the same as a table, to look at before training

Starts and ranks:
    initialize_adapters    the factors of a tree start as a method says
    initialize_model       the same on an NNX model, in place
    estimate_gradients     the mean gradient of the base weights, for such methods
    allocate_ranks         more rank where weights and gradients are large
    resize_adapters        factors of other ranks, and the optimizer's state with them

Base weights:
    merge_adapters         W0 + s B A in place of W0, and B = 0 or no factors
    merge_model            the same on an NNX model, in place

Diagnostics:
    equivalent_gradient    what a step on the factors does to the weight

Modules, loaded on access:
    lorapro_jax.initializers, lorapro_jax.peft, lorapro_jax.keras,
    lorapro_jax.diagnostics

Wang et al., "LoRA-Pro: Are Low-Rank Adapters Properly Optimized?", ICLR 2025,
arXiv 2407.18242.
"""

import importlib
from importlib.metadata import version as _version
from typing import Any

from .diagnostics import equivalent_gradient
from .initializers._models import initialize_model
from .initializers._trees import initialize_adapters
from .optimizers._adamw import (
    ScaleByLoRAProAdamState,
    lorapro_adamw,
    scale_by_lorapro_adam,
)
from .optimizers._lorapro import lorapro
from .optimizers._rite import ScaleByLoRARiteState, lora_rite, scale_by_lora_rite
from .pairs._axes import LoRAPair
from .pairs._describe import describe_pairs
from .pairs._find import find_pairs
from .ranks._allocate import allocate_ranks
from .ranks._resize import Resized, resize_adapters
from .ranks._table import RankTable
from .transforms._rounding import stochastic_rounding
from .weights._estimate import estimate_gradients
from .weights._merge import merge_adapters
from .weights._models import merge_model

__all__ = [
    "LoRAPair",
    "RankTable",
    "Resized",
    "ScaleByLoRAProAdamState",
    "ScaleByLoRARiteState",
    "allocate_ranks",
    "describe_pairs",
    "equivalent_gradient",
    "estimate_gradients",
    "find_pairs",
    "initialize_adapters",
    "initialize_model",
    "lora_rite",
    "lorapro",
    "lorapro_adamw",
    "merge_adapters",
    "merge_model",
    "resize_adapters",
    "scale_by_lora_rite",
    "scale_by_lorapro_adam",
    "stochastic_rounding",
]

__version__ = _version("lorapro_jax")

_MODULES = ("diagnostics", "initializers", "keras", "peft")


def __getattr__(name: str) -> Any:
    """Loads a public module when it is first used."""
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES, "__version__"])
