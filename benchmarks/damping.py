"""Which damping? A sweep on the shifted digits, the evidence for the default.

    python -m benchmarks.damping            # 20 minutes on two cores
    python -m benchmarks.damping --quick    # 2 minutes, for a smoke test
    python -m benchmarks.damping --optimizers SGD --dampings 0.1 --seeds 10 --output F

For each optimizer behind `lorapro()` (AdamW, and SGD with momentum 0.9) and each
damping: the validation loss and accuracy at the best learning rate of a grid, and at
a tenth of that rate, where a first step that is too long would show. Plain LoRA
stands beside it; ± is the standard error of a mean over seeds. Results go to
`benchmarks/results/damping.json`.
"""

import argparse
import functools
import json
import math
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.measure import machine
from examples.training import Method, evaluate, pretrain, spread, train
from examples.vit_digits import load_tasks
from lorapro_jax import lorapro

DAMPINGS = (0.0, 1e-4, 1e-2, 0.1, 1.0, 10.0)
OPTIMIZERS = {
    "AdamW": (optax.adamw, (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)),
    "SGD": (
        functools.partial(optax.sgd, momentum=0.9),
        (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0),
    ),
}


def methods(names, dampings):
    """Plain LoRA and `lorapro()` at each damping, before each optimizer."""
    for name in names:
        optimizer, rates = OPTIMIZERS[name]
        yield name, None, Method(name, optimizer, rates)
        for damping in dampings:
            chained = lambda rate, optimizer=optimizer, damping=damping: optax.chain(
                lorapro(damping=damping), optimizer(rate)
            )
            yield name, damping, Method(name, chained, rates)


def measure(task, method, base, seeds, steps):
    """Per rate: validation loss and accuracy over seeds, test accuracy by seed."""
    trained = train(task, method, base, jnp.arange(seeds), steps)
    loss, accuracy = evaluate(task, method, trained.runs, task.validation)
    finite = np.where(np.isfinite(loss), loss, np.inf)
    # Chance level for a run that has diverged: worse is not more informative.
    loss = np.minimum(finite, math.log(10))
    _, test_accuracy = evaluate(task, method, trained.runs, task.test)
    return {
        "rates": list(method.rates),
        "loss": loss.mean(1).tolist(),
        "loss_std": loss.std(1).tolist(),
        "accuracy": accuracy.mean(1).tolist(),
        "accuracy_std": accuracy.std(1).tolist(),
        "test_accuracy": test_accuracy.tolist(),
    }


def show(rows, console):
    """One line a method: the best rate, and what is left at a tenth of it."""
    table = Table(
        "optimizer", "damping", "best rate", "loss", "accuracy", "test", "loss at 1/10"
    )
    for row in rows:
        best = int(np.argmin(row["loss"]))
        tenth = best - 2  # the grids have two points a decade
        damping = "LoRA" if row["damping"] is None else f"{row['damping']:g}"
        tests = row["test_accuracy"][best]
        freedom = math.sqrt(max(len(tests) - 1, 1))
        table.add_row(
            row["optimizer"],
            damping,
            f"{row['rates'][best]:g}",
            f"{row['loss'][best]:.3f} ± {row['loss_std'][best] / freedom:.3f}",
            f"{row['accuracy'][best]:.3f} ± {row['accuracy_std'][best] / freedom:.3f}",
            spread(tests),
            f"{row['loss'][tenth]:.3f}" if tenth >= 0 else "-",
        )
    console.print(table)


def main():
    """Runs the sweep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS)
    parser.add_argument("--dampings", nargs="*", type=float, default=DAMPINGS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="of the JSON")
    args = parser.parse_args()
    steps, seeds = (50, 1) if args.quick else (400, args.seeds)
    chosen = args.optimizers or list(OPTIMIZERS)

    begun = time.time()
    upright, shifted = load_tasks()
    base, _ = pretrain(upright, steps)
    rows = []
    for name, damping, method in track(list(methods(chosen, args.dampings)), "sweep"):
        result = measure(shifted, method, base, seeds, steps)
        rows.append({"optimizer": name, "damping": damping, **result})
    show(rows, Console(width=100, markup=False))
    record = {
        "steps": steps,
        "seeds": seeds,
        "seconds": round(time.time() - begun),
        "machine": machine(),
        "rows": rows,
    }
    if args.output or not args.quick:
        output = args.output or Path("benchmarks/results/damping.json")
        output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
