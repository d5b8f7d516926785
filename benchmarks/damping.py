"""Which damping? A sweep on the shifted digits, the evidence for the default.

    python -m benchmarks.damping            # 20 minutes on two cores
    python -m benchmarks.damping --quick    # 2 minutes, for a smoke test

For each optimizer behind `lorapro()` (AdamW, and SGD with momentum 0.9) and each
damping: the validation loss and accuracy at the best learning rate of a grid, and at
a tenth of that rate, where a first step that is too long would show. Plain LoRA
stands beside it. Results go to `benchmarks/results/damping.json`.
"""

import argparse
import functools
import json
import math
import platform
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.progress import track
from rich.table import Table

from examples.training import Method, evaluate, new_model, train
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


def pretrain(data, steps):
    """The weights from which every method starts."""
    method = Method("pretraining", optax.adamw, (3e-3,), nnx.Param)
    base = nnx.state(new_model(method))
    trained = train(method, base, data, jnp.zeros(1, int), steps)
    return jax.tree.map(lambda x: x[0, 0], trained.runs.trainable)


def methods():
    """Plain LoRA and `lorapro()` at each damping, before each optimizer."""
    for name, (optimizer, rates) in OPTIMIZERS.items():
        yield name, None, Method(name, optimizer, rates)
        for damping in DAMPINGS:
            chained = lambda rate, optimizer=optimizer, damping=damping: optax.chain(
                lorapro(damping=damping), optimizer(rate)
            )
            yield name, damping, Method(name, chained, rates)


def measure(method, base, data, seeds, steps):
    """Mean over seeds, per rate: validation loss and accuracy, and their spread."""
    trained = train(method, base, data.train, jnp.arange(seeds), steps)
    loss, accuracy = map(np.asarray, evaluate(method, trained.runs, data.validation))
    finite = np.where(np.isfinite(loss), loss, np.inf)
    # Chance level for a run that has diverged: worse is not more informative.
    loss = np.minimum(finite, math.log(10))
    return {
        "rates": list(method.rates),
        "loss": loss.mean(1).tolist(),
        "loss_std": loss.std(1).tolist(),
        "accuracy": accuracy.mean(1).tolist(),
        "accuracy_std": accuracy.std(1).tolist(),
    }


def show(rows, console):
    """One line a method: the best rate, and what is left at a tenth of it."""
    table = Table(
        "optimizer", "damping", "best rate", "loss", "accuracy", "loss at 1/10 of it"
    )
    for row in rows:
        best = int(np.argmin(row["loss"]))
        tenth = best - 2  # the grids have two points a decade
        damping = "LoRA" if row["damping"] is None else f"{row['damping']:g}"
        table.add_row(
            row["optimizer"],
            damping,
            f"{row['rates'][best]:g}",
            f"{row['loss'][best]:.3f} ± {row['loss_std'][best]:.3f}",
            f"{row['accuracy'][best]:.3f} ± {row['accuracy_std'][best]:.3f}",
            f"{row['loss'][tenth]:.3f}" if tenth >= 0 else "-",
        )
    console.print(table)


def main():
    """Runs the sweep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--output", type=Path, default="benchmarks/results/damping.json"
    )
    args = parser.parse_args()
    steps, seeds = (50, 1) if args.quick else (400, 3)

    begun = time.time()
    upright, shifted = load_tasks()
    base = pretrain(upright.train, steps)
    rows = []
    for name, damping, method in track(list(methods()), "sweep"):
        result = measure(method, base, shifted, seeds, steps)
        rows.append({"optimizer": name, "damping": damping, **result})
    show(rows, Console(width=100))
    versions = {"jax": jax.__version__, "python": platform.python_version()}
    record = {
        "device": jax.devices()[0].device_kind,
        "versions": versions,
        "steps": steps,
        "seeds": seeds,
        "seconds": round(time.time() - begun),
        "rows": rows,
    }
    if not args.quick:
        args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
