"""From the options of a run to a model with adapters that have started."""

import itertools
from typing import Any

from examples.finetune_llm.data import batches
from examples.finetune_llm.kernels import chosen
from examples.finetune_llm.lora import add_lora as add_lora
from examples.finetune_llm.lora import check_quantised, scale_of
from examples.finetune_llm.starts import (
    STARTS,
    check_start,
    gradients_of,
    ranks_of,
    start,
)
from examples.finetune_llm.step import mean_loss
from examples.finetune_llm.training import put, share_of_process


def pair_options(options: Any) -> dict[str, Any]:
    """How the forward pass multiplies B A, as all of `lorapro_jax` takes it.

    With `--rank-budget` all adapters have the scale of one with that rank, as in GoRA.
    """
    if options.rank_budget is None:
        return {"alpha": options.alpha, "rslora": options.rslora}
    scale = scale_of(options.alpha, options.rank_budget, options.rslora)
    return {"scale": scale}


def check(spec: Any, options: Any) -> None:
    """Raises Refused for adapters that cannot be, before anything is loaded."""
    modules = chosen(spec, options.targets)
    # With a budget, ranks stay within what the kernels allow.
    rank = options.rank if options.rank_budget is None else 1
    check_quantised(options.qlora)
    check_start(spec, options.start, modules, rank, options.qlora)


def adapted(base: Any, options: Any, inputs: Any) -> tuple[Any, Any]:
    """A model with adapters as the options ask for.

    Args:
      base: From `models.load`; with `--qlora` its arrays are used up.
      options: Those of the command.
      inputs: With `spec`, `mesh`, and `train`, the examples.

    Returns:
      The model; and if its start changed the base weights, the factors at the start,
      which `save_adapter(initial=...)` needs, else None.

    Raises:
      Refused: Options that do not fit each other or the model.
    """
    check(inputs.spec, options)
    modules = chosen(inputs.spec, options.targets)
    gradients = ranks = None
    if STARTS[options.start]().needs_gradient or options.rank_budget is not None:
        loss_fn = lambda model, batch: mean_loss(inputs.spec, model, batch)
        with inputs.mesh:
            gradients = gradients_of(base, modules, loss_fn, _some(options, inputs))
    if options.rank_budget is not None:
        ranks = ranks_of(
            inputs.spec, base, modules, gradients, options.rank_budget, options.start
        )
    model = add_lora(
        inputs.spec,
        base,
        inputs.mesh,
        rank=options.rank,
        alpha=options.alpha,
        rslora=options.rslora,
        targets=options.targets,
        quantise=options.qlora,
        seed=options.seed,
        ranks=ranks,
    )
    scale = pair_options(options)
    return model, start(model, options.start, modules, gradients, options.seed, **scale)


def _some(options: Any, inputs: Any) -> list[Any]:
    """The first batches of the training, on the mesh."""
    rows = options.batch // options.accumulate
    index, count = share_of_process(inputs.mesh, rows)
    source = batches(
        inputs.train,
        batch=rows,
        length=options.length,
        seed=options.seed,
        packing=options.packing,
        process_index=index,
        process_count=count,
    )
    some = itertools.islice(source, options.start_batches)
    return [put(batch, inputs.mesh, rows) for batch in some]
