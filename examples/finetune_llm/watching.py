"""What is looked at between steps: validation loss, samples, gradients."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.finetune_llm.data import in_order
from examples.finetune_llm.evaluation import Loss, new_generator
from examples.finetune_llm.inputs import Inputs
from examples.finetune_llm.options import Options
from examples.finetune_llm.reports import Report
from examples.finetune_llm.training import (
    loss_and_gradient,
    put,
    share_of_process,
    split,
)
from lorapro_jax.diagnostics import check_gradients

SAMPLES = 2
Watch = tuple[int, Callable[[int, nnx.Module], None]]


def watches(
    options: Options,
    inputs: Inputs,
    report: Report,
    measure: Callable[[nnx.Module], Loss],
    show: Callable[[str], None],
) -> list[Watch]:
    """What `fit` is to call, and how often.

    Args:
      options: Of the run.
      inputs: Of the run.
      report: Where the results go.
      measure: From `evaluation.perplexity`, on validation data.
      show: Is given lines for the screen.
    """

    def validate(step: int, model: nnx.Module) -> None:
        found = measure(model)
        report.write(step, validation_loss=found.loss, perplexity=found.perplexity)
        show(f"step {step}: validation loss {found.loss:.4f}")

    chosen: list[Watch] = [(options.evaluate_every, validate)]
    if options.sample_every:
        prompts = [_prompt(x) for x in inputs.validation[:SAMPLES]]
        generate = new_generator(
            inputs.spec, inputs.tokenizer, prompts, mesh=inputs.mesh,
            tokens=options.answer_tokens, batch=len(prompts),
        )  # fmt: skip

        def sample(step: int, model: nnx.Module) -> None:
            for i, (prompt, text) in enumerate(
                zip(prompts, generate(model), strict=True)
            ):
                report.write(step, **{f"sample_{i}": text})
                asked = inputs.tokenizer.decode(prompt, skip_special_tokens=True)
                show(f"step {step}: {asked!r} → {text!r}")

        chosen.append((options.sample_every, sample))
    if options.diagnostics:
        check = new_gradient_check(options, inputs)

        def diagnose(step: int, model: nnx.Module) -> None:
            worst = check(model)
            report.write(step, gradient_mismatch=worst)
            show(f"step {step}: gradients of factors differ by {worst:.1e} at most")

        chosen.append((options.evaluate_every, diagnose))
    return chosen


def _prompt(example: Any) -> list[int]:
    """Up to the first answer; of a text that is all answer, the first quarter."""
    first = int(np.argmax(example.answers))
    first = first if first > 1 else max(1, len(example.tokens) // 4)
    return example.tokens[:first].tolist()


def new_gradient_check(
    options: Options, inputs: Inputs
) -> Callable[[nnx.Module], float]:
    """A function from a model to the largest distance of `check_gradients`.

    It takes the gradients of one batch of validation data.
    """
    index, count = share_of_process(inputs.mesh, options.batch)
    local = in_order(
        inputs.validation, batch=options.batch, length=options.length,
        packing=options.packing, process_index=index, process_count=count,
    )[0]  # fmt: skip
    jitted: dict[Any, Any] = {}

    def check(model: nnx.Module) -> float:
        parts = split(model)

        def worst(trainable, frozen, batch):
            now = parts._replace(trainable=trainable, frozen=frozen)
            accumulate, mesh = options.accumulate, inputs.mesh
            grads = loss_and_gradient(inputs.spec, now, batch, accumulate, mesh)[2]
            return jnp.stack(
                [x.max() for x in check_gradients(grads, trainable).values()]
            ).max()

        run = jitted.setdefault("worst", jax.jit(worst))
        with inputs.mesh:
            batch = put(local, inputs.mesh, options.batch)
            return float(run(parts.trainable, parts.frozen, batch))

    return check
