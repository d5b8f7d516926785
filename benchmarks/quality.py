"""What is lost by LoRA, and how much of it does each method bring back?

    python -m benchmarks.quality            # an hour or more on two cores
    python -m benchmarks.quality --quick    # 2 minutes: a smoke test
    python -m benchmarks.quality --tasks prose --methods full LoRA --ranks 4 --output F

A task keeps one core busy, so run a process for each: side by side, they took an hour;
`benchmarks.quality_report` makes one of their files.

Two tasks that need no download: a vision transformer on shifted digits, and a
byte-level language model that goes from Python source to English prose. Each method
trains with a grid of learning rates, two a decade, that grows until the best is not
at its end, and with three seeds; all see the same batches, warm up over a tenth of
the steps and decay by a cosine. The rate is chosen on validation data, and test data
are reported at it. `benchmarks.quality_report` says what is made of the results.
"""

import argparse
import functools
import itertools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import track

from benchmarks.measure import machine, tree_bytes
from benchmarks.quality_report import best_run, lower_rates, report
from examples import byte_lm, vit_digits
from examples.training import (
    CHUNK,
    Method,
    Task,
    evaluate,
    make_measure,
    pretrain,
    train,
)
from lorapro_jax import lorapro, lorapro_adamw

GRID = tuple(float(f"{m}e{e}") for e in range(-6, 2) for m in (1, 3))
DECAY = 1e-4  # the default of `optax.adamw`


class Setting(NamedTuple):
    """Two tasks: one to know already, and one to learn."""

    load: Callable[[], tuple[Task, Task]]
    classes: int
    pretraining: dict[str, Any]
    steps: int


SETTINGS = {
    "digits": Setting(vit_digits.load_tasks, 10, {"steps": 500, "rate": 3e-3}, 400),
    "prose": Setting(byte_lm.load_tasks, 128, {"steps": 2000, "rate": 1e-2}, 400),
}


def lora_plus(rate: optax.Schedule) -> optax.GradientTransformation:
    """AdamW with 16 times the rate on B, the ratio that LoRA+ recommends."""
    label = lambda path, _: "lora_b" if "lora_b" in jax.tree_util.keystr(path) else "A"
    return optax.partition(
        {"A": optax.adamw(rate), "lora_b": optax.adamw(lambda count: 16 * rate(count))},
        lambda tree: jax.tree_util.tree_map_with_path(label, tree),
    )


# Where the grid begins: what was best on both tasks, and a rate on either side.
METHODS: dict[str, tuple[Callable[[optax.Schedule], Any], tuple[float, float]]] = {
    "full": (optax.adamw, (1e-3, 3e-2)),
    "LoRA": (optax.adamw, (3e-3, 1e-1)),
    "LoRA+": (lora_plus, (3e-4, 1e-2)),
    "lorapro+SGD": (
        lambda rate: optax.chain(lorapro(), optax.sgd(rate, momentum=0.9)),
        (3e-2, 1.0),
    ),
    "lorapro+AdamW": (
        lambda rate: optax.chain(lorapro(), optax.adamw(rate)),
        (3e-3, 1e-1),
    ),
    "lorapro_adamw:dense": (
        functools.partial(lorapro_adamw, moments="dense", weight_decay=DECAY),
        (1e-3, 3e-2),
    ),
    "lorapro_adamw:factored": (
        functools.partial(lorapro_adamw, moments="factored", weight_decay=DECAY),
        (1e-3, 3e-2),
    ),
}


class Sweeper(NamedTuple):
    """Trains methods on one task, from the same weights."""

    setting: Setting
    task: Task
    base: Any
    seeds: int
    steps: int
    extensions: int = 3

    def capped(self, loss) -> np.ndarray:
        """Chance level for a run that has diverged: worse is not more informative."""
        loss = np.fmin(loss, math.log(self.setting.classes))
        return np.asarray(loss, np.float64).round(5)

    def measure(self, method: Method, title: str) -> dict[str, Any]:
        """All rates and seeds of a method; `runs` has an entry for each rate."""
        task, measure = self.task, make_measure(self.task, method)
        subset = jax.tree.map(lambda x: x[: 4 * task.batch], task.validation)
        trained = train(
            task,
            method,
            self.base,
            jnp.arange(self.seeds),
            self.steps,
            progress=lambda chunks: track(chunks, title.ljust(40)),
            watch=lambda run: measure(run.trainable, run.frozen, subset)[0],
        )
        end, _ = evaluate(task, method, trained.runs, subset)
        curves = jnp.concatenate([trained.watched, end[..., None]], -1)
        validation, _ = evaluate(task, method, trained.runs, task.validation)
        test, accuracy = evaluate(task, method, trained.runs, task.test)
        runs = zip(method.rates, validation, test, accuracy, curves, strict=True)
        return {
            "state_bytes": tree_bytes(trained.runs.opt_state) // end.size,
            "seconds_per_step": trained.seconds / self.steps,
            "runs": [
                {
                    "rate": rate,
                    "validation_loss": self.capped(validation).tolist(),
                    "test_loss": self.capped(test).tolist(),
                    "test_accuracy": np.asarray(accuracy).round(5).tolist(),
                    "curve": self.capped(curve).mean(0).round(5).tolist(),
                }
                for rate, validation, test, accuracy, curve in runs
            ],
        }

    def sweep(self, name: str, rank: int | None, rates, title: str) -> dict[str, Any]:
        """Measures a grid that grows as long as its best rate is at its end."""
        optimizer, _ = METHODS[name]
        method = Method(name, optimizer, tuple(rates), rank)
        row = {"method": name, "rank": rank, **self.measure(method, title)}
        for _ in range(self.extensions):
            runs = row["runs"]
            best = runs.index(best_run(row))
            ends = {0: -1, len(runs) - 1: 1}
            beyond = GRID.index(runs[best]["rate"]) + ends.get(best, 0)
            if best not in ends or beyond not in range(len(GRID)):
                break
            more = method._replace(rates=(GRID[beyond],))
            added = self.measure(more, f"{title}, rate {GRID[beyond]:g}")["runs"]
            row["runs"] = sorted(runs + added, key=lambda run: run["rate"])
        return row


def grid(name: str, rows: list[dict[str, Any]], *, quick: bool) -> list[float]:
    """Where the sweep of a method begins, given those before it on the same task."""
    _, (low, high) = METHODS[name]
    rates = [rate for rate in GRID if low <= rate <= high]
    if quick:
        return rates[len(rates) // 2 :][:1]
    compared = name == "LoRA" or name.startswith("lorapro_adamw")
    full = [row for row in rows if row["method"] == "full"] if compared else []
    return sorted({*rates, *itertools.chain(*map(lower_rates, full))})


def prepare(name: str, args: argparse.Namespace) -> tuple[Sweeper, float]:
    """The sweeps on one task, after pretraining, and its accuracy."""
    setting = SETTINGS[name]
    known, task = setting.load()
    pretraining = setting.pretraining | ({"steps": 50} if args.quick else {})
    bar = lambda chunks: track(chunks, f"{name}: pretraining".ljust(40))
    base, accuracy = pretrain(known, progress=bar, **pretraining)
    sweeper = Sweeper(setting, task, base, args.seeds, setting.steps)
    if args.quick:
        sweeper = sweeper._replace(steps=2 * CHUNK, extensions=0)
    return sweeper, accuracy


def run_task(name, args, save) -> None:
    """Every method on one task; `save` is told the rows so far."""
    sweeper, accuracy = prepare(name, args)
    rows: list[dict[str, Any]] = []
    for method in args.methods:
        for rank in [None] if method == "full" else args.ranks:
            title = f"{name}: {method}" + (f", rank {rank}" if rank else "")
            rates = grid(method, rows, quick=args.quick)
            rows.append(sweeper.sweep(method, rank, rates, title))
            result = {"pretrained_accuracy": accuracy, "steps": sweeper.steps}
            save(result | {"rows": rows})


def parse() -> argparse.Namespace:
    """The options, `--quick` applied."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one rate, seed and rank")
    parser.add_argument("--tasks", nargs="+", choices=SETTINGS, default=[*SETTINGS])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--ranks", nargs="+", type=int, default=[4, 16])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="of the JSON; a PNG goes beside it")
    args = parser.parse_args()
    if args.quick:
        args.ranks, args.seeds = args.ranks[:1], 1
    folder = Path("out" if args.quick else "benchmarks/results")
    args.output = args.output or folder / "quality.json"
    # `full` first: the grids of others take in some of its rates.
    args.methods = [name for name in METHODS if name in args.methods]
    return args


def main():
    """Runs the benchmark; what is measured is saved after each method."""
    args = parse()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    begun = time.time()
    record: dict[str, Any] = {"machine": machine(), "minutes": 0.0, "tasks": {}}

    def save(task, result):
        record["tasks"][task] = result
        record["minutes"] = round((time.time() - begun) / 60, 1)
        args.output.write_text(json.dumps(record) + "\n")

    for name in args.tasks:
        run_task(name, args, functools.partial(save, name))
    report(args.output, Console(width=120))


if __name__ == "__main__":
    main()
