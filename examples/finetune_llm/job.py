"""The whole job: check, load, adapt, train, evaluate, export, report."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import multihost_utils
from rich.console import Console
from rich.progress import Progress

from examples.finetune_llm import (
    adapters,
    agreement,
    checkpoints,
    demo,
    export,
    models,
)
from examples.finetune_llm.evaluation import answers, perplexity
from examples.finetune_llm.folder import check_output, claim
from examples.finetune_llm.inputs import Inputs, is_first, read_inputs, read_model
from examples.finetune_llm.mesh import join_processes
from examples.finetune_llm.optimizers import new_optimizer, schedule
from examples.finetune_llm.options import Options
from examples.finetune_llm.planning import check_memory, plan_run
from examples.finetune_llm.reports import (
    PICTURE,
    Report,
    read_metrics,
    save_picture,
    write_json,
)
from examples.finetune_llm.sweep import Swept, best, print_sweep, sweep
from examples.finetune_llm.training import fit
from examples.finetune_llm.watching import watches


def run(options: Options) -> None:
    """Does what the options say.

    Raises:
      Refused: Before anything is loaded or overwritten, for what cannot work.
    """
    join_processes(options)
    console = Console(
        width=88, markup=False, quiet=not is_first(), highlight=False, soft_wrap=True
    )
    if options.plan:
        plan_run(options, *read_model(options), console)
        return
    check_output(options)
    _wait("the look at the folder")  # in which the first is about to write
    asked = options
    if options.demo:
        if is_first():
            claim(asked)
            demo.prepare(options)
        _wait("the demo's base and data")
        options = demo.with_files(options)
    inputs = read_inputs(options, console.print)
    check_memory(options, inputs.spec, inputs.mesh)
    if is_first():
        claim(asked)
    _wait("the settings")
    Job(options, inputs, console).run()


def _wait(what: str) -> None:
    """Until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


class Job:
    """A model with its adapters, and what is done with it."""

    def __init__(self, options: Options, inputs: Inputs, console: Console):
        self.options, self.inputs, self.console = options, inputs, console
        self.settings = options.settings() | {"steps": inputs.steps}
        self.measure = perplexity(
            inputs.spec, inputs.validation, mesh=inputs.mesh, batch=options.batch,
            length=options.length, packing=options.packing,
        )  # fmt: skip
        console.print(
            f"{inputs.spec.family} of {options.model}, mesh "
            f"{dict(inputs.mesh.shape)}; {len(inputs.train)} examples to learn from, "
            f"{len(inputs.validation)} to evaluate on; {inputs.steps} steps"
        )
        base = models.load(inputs.spec, inputs.mesh, options.dtype)
        self.before = self.measure(base).loss
        self.model, self.changed = adapters.adapted(base, options, inputs)
        # A copy: training consumes what it is given.
        self.start = jax.tree.map(jnp.copy, nnx.state(self.model, nnx.LoRAParam))

    def run(self) -> None:
        """Trains, with one rate or several; evaluates and exports the best."""
        output, rates = self.options.output, self.options.rates
        swept: list[Swept] = []
        if rates:
            swept = sweep(rates, output, self.train)
            print_sweep(swept, self.console)
            chosen = best(swept)
            # Its last checkpoint is the winner.
            self.train(chosen.rate, chosen.folder)
        else:
            loss = self.train(self.options.rate, output)
            chosen = Swept(self.options.rate, loss, output)
        result = self.evaluate(chosen)
        result["logits"] = self.export()
        if is_first():
            runs = {f"rate {x.rate:g}": read_metrics(x.folder) for x in swept}
            runs = runs or {self.options.optimizer: read_metrics(output)}
            pairs = [(x.rate, x.loss) for x in swept]
            save_picture(output / PICTURE, runs, pairs)
            result["sweep"] = [[x.rate, x.loss] for x in swept]
            write_json(output / "result.json", result)
            self.console.print(f"{output / PICTURE}: the picture")

    def train(self, rate: float, folder: Path) -> float:
        """One run from the start of the factors on; its loss on validation data.

        A run that has a checkpoint in its folder goes on from it.
        """
        options, inputs = self.options, self.inputs
        nnx.update(self.model, jax.tree.map(jnp.copy, self.start))
        settings = {**self.settings, "rate": rate}
        done = checkpoints.check(folder / "checkpoints", settings)
        rates = schedule(rate, inputs.steps, options.warmup)
        tx = new_optimizer(
            options.optimizer, rates, weight_decay=options.weight_decay,
            max_grad_norm=options.max_grad_norm,
            pair_options=adapters.pair_options(options),
        )  # fmt: skip
        title = f"rate {rate:g}"
        hidden = not self.console.is_terminal
        bar = Progress(console=self.console, transient=True, disable=hidden)
        with Report(folder, step=done, active=is_first()) as report, bar:
            task = bar.add_task(title, total=inputs.steps, completed=done)

            def tell(step: int, metrics: dict[str, float]) -> None:
                bar.update(task, completed=step)
                report.write(step, **metrics, learning_rate=float(rates(step - 1)))

            fit(
                inputs.spec, self.model, tx, inputs.train, mesh=inputs.mesh,
                steps=inputs.steps, batch=options.batch, length=options.length,
                seed=options.seed, packing=options.packing,
                accumulate=options.accumulate, folder=folder / "checkpoints",
                save_every=options.save_every, settings=settings, report=tell,
                watch=watches(
                    options, inputs, report, self.measure,
                    lambda text: self.console.print(f"{title}, {text}"),
                ),
            )  # fmt: skip
        return self.measure(self.model).loss

    def evaluate(self, chosen: Swept) -> dict[str, Any]:
        """Says what came out, and returns it for a file."""
        options, inputs = self.options, self.inputs
        result = {
            "rate": chosen.rate,
            "validation_loss_before": self.before,
            "validation_loss": chosen.loss,
            "perplexity": math.exp(chosen.loss) if chosen.loss < 700 else None,
        }
        self.console.print(
            f"validation loss {self.before:.4f} before, {chosen.loss:.4f} after"
        )
        if options.evaluate:
            ask = answers(
                inputs.spec, inputs.tokenizer, inputs.questions, kind=options.evaluate,
                mesh=inputs.mesh, tokens=options.answer_tokens,
            )  # fmt: skip
            found = ask(self.model)
            result[options.evaluate] = found.score
            self.console.print(
                f"{options.evaluate}: {sum(found.right)} of {len(found.right)} right"
            )
            lines = [
                json.dumps({"answer": text, "right": right}, ensure_ascii=False) + "\n"
                for text, right in zip(found.texts, found.right, strict=True)
            ]
            if is_first():
                (options.output / "answers.jsonl").write_text("".join(lines), "utf-8")
        return result

    def export(self) -> dict[str, float]:
        """Writes the PEFT folder and the merged Hugging Face folder.

        Returns:
          For the demo, how far PyTorch's logits from them are off, where it is.
        """
        spec, output = self.inputs.spec, self.options.output
        scale = adapters.pair_options(self.options)
        adapter, merged = output / "adapter", output / "merged"
        export.save_adapter(spec, self.model, adapter, initial=self.changed, **scale)
        self.console.print(f"{adapter}: the adapter, for PEFT")
        self.console.print(export.save_merged(spec, self.model, merged, **scale))
        if not (self.options.demo and is_first() and jax.process_count() == 1):
            return {}
        if not agreement.can_compare():
            self.console.print("install lorapro_jax[torch] to compare with PyTorch")
            return {}
        tokens = self.inputs.validation[0].tokens[None]
        found = agreement.differences(spec, self.model, tokens, output)
        for name, far in found.items():
            self.console.print(f"logits of {name}: within {far:.1e} of those here")
        return found
