"""Where factors start, and which ranks they have: from weights and their gradients."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from examples.finetune_llm.errors import Refused
from examples.finetune_llm.kernels import Module, kernel_axes, shape_of
from lorapro_jax import (
    RankTable,
    allocate_ranks,
    estimate_gradients,
    initialize_model,
    initializers,
)

STARTS = {
    "lora": initializers.lora,
    "lora_ga": initializers.lora_ga,
    "gora": initializers.gora,
    "lora_one": initializers.lora_one,
    "pissa": initializers.pissa,
    "olora": initializers.olora,
}


def check_start(
    spec: Any, name: str, modules: Sequence[Module], rank: int, quantise: str | None
) -> None:
    """Raises Refused for a start that these kernels, or a quantised base, rule out."""
    if name not in STARTS:
        raise Refused(f"--start {name} is not among {', '.join(STARTS)}.")
    method = STARTS[name]()
    if quantise and method.changes_weight:
        fine = [x for x, new in STARTS.items() if not new().changes_weight]
        raise Refused(
            f"--start {name} changes the base weights, and --qlora {quantise} cannot "
            f"hold the change; with it, start from {' or '.join(fine)}."
        )
    if name == "lora":
        return
    for module in modules:
        outputs, inputs = shape_of(spec, module)
        side = inputs if name == "gora" else min(inputs, outputs)
        most = side // 2 if name == "lora_ga" else side
        if rank > most:
            raise Refused(
                f"--start {name} needs a rank of at most {most} for "
                f"{' and '.join(module.targets)}, {outputs}×{inputs}; --rank is {rank}."
            )


def gradients_of(
    base: Any,
    modules: Sequence[Module],
    loss_fn: Callable[[Any, Any], jax.Array],
    batches: Iterable[Any],
) -> dict[str, Any]:
    """The mean gradient of these kernels of a model without adapters, by path."""
    paths = "|".join(rf"layers/\d+/{x.path}/{x.kernel}" for x in modules)
    at = lambda path: re.fullmatch(paths, path) is not None
    return estimate_gradients(loss_fn, base, batches, kernels=at)


def ranks_of(
    spec: Any,
    base: Any,
    modules: Sequence[Module],
    gradients: Mapping[str, Any],
    rank: int,
    start: str,
) -> RankTable:
    """GoRA's ranks, at what adapters of one rank would cost.

    Raises:
      Refused: The limits contradict the budget.
    """
    most = 4 * rank
    if start == "lora_ga":  # takes two directions of the gradient for each
        most = min(most, *(min(shape_of(spec, x)) // 2 for x in modules))
    axes = {rf"/{x.path}/": x.inputs for x in modules}
    try:
        return allocate_ranks(
            base, gradients, rank=rank, max_rank=most, input_axes=axes
        )
    except ValueError as error:
        raise Refused(f"--rank-budget {rank}: {error}") from error


def start(
    model: Any,
    name: str,
    modules: Sequence[Module],
    gradients: Mapping[str, Any] | None,
    seed: int,
    **pair_options: Any,
) -> Any:
    """Starts the factors of a model in place.

    Returns:
      A copy of these factors if the base weights changed as well, for
      `save_adapter(initial=...)`; else None.

    Raises:
      Refused: The method cannot start these layers.
    """
    method = STARTS[name]()
    try:
        initialize_model(
            method,
            model,
            gradients,
            key=jax.random.key(seed),
            kernels=kernel_axes(modules),
            **pair_options,
        )
    except ValueError as error:
        raise Refused(f"--start {name}: {error}") from error
    if not method.changes_weight:
        return None
    return jax.tree.map(jnp.copy, nnx.state(model, nnx.LoRAParam))
