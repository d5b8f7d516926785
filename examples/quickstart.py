"""Full fine-tuning, LoRA and LoRA-Pro on the same task, each at its best rate.

    python -m examples.quickstart            # under 7 minutes on two CPU cores
    python -m examples.quickstart --quick    # a smoke test, too short to compare

A small vision transformer is pretrained on scikit-learn's digits and then fine-tuned
on the same digits inverted, rotated and relabelled. Each method runs with several
learning rates and three seeds; the rate is chosen on the validation images, and the
test images are reported at it. It ends with a checkpoint: the adapter and the
optimizer state are saved with Orbax, restored, and trained on from, to the same bits.

The lines that make LoRA-Pro of LoRA are in `METHODS`.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from matplotlib import pyplot as plt
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.measure import machine
from examples.training import (
    CHUNK,
    RANK,
    Method,
    distance_to_full_gradient,
    evaluate,
    make_chunk,
    pretrain,
    spread,
    start,
    train,
)
from examples.vit_digits import load_tasks
from lorapro_jax import describe_pairs, lorapro, lorapro_adamw

METHODS = (
    Method("full fine-tuning", optax.adamw, (1e-3, 3e-3, 1e-2, 3e-2), rank=None),
    Method("LoRA", optax.adamw, (1e-3, 3e-3, 1e-2, 3e-2)),
    Method(
        "lorapro, AdamW",
        lambda rate: optax.chain(lorapro(), optax.adamw(rate)),
        (3e-3, 1e-2, 3e-2, 1e-1),
    ),
    Method("lorapro_adamw", lorapro_adamw, (1e-3, 3e-3, 1e-2, 3e-2)),
)
COLORS = ("0.4", "tab:orange", "tab:blue", "tab:red")


def bar(name):
    """A progress bar for `train`."""
    return lambda chunks: track(chunks, name.ljust(18))


def watcher(task, method):
    """Measures on the way how far the step is from the full gradient."""
    adjust = {
        "LoRA": lambda grads, _: grads,
        "lorapro, AdamW": lambda *trees: lorapro().update(trees[0], None, trees[1])[0],
    }
    if method.name not in adjust:
        return None
    return distance_to_full_gradient(task, method, adjust[method.name])


def run_method(task, method, base, steps, seeds):
    """All rates and seeds; what is reported is at the best rate."""
    trained = train(
        task,
        method,
        base,
        jnp.arange(seeds),
        steps,
        progress=bar(method.name),
        watch=watcher(task, method),
    )
    validation, _ = evaluate(task, method, trained.runs, task.validation)
    best = int(jnp.nanargmin(validation.mean(1)))
    loss, accuracy = evaluate(task, method, trained.runs, task.test)
    distances = trained.watched and [x[best].mean(0).tolist() for x in trained.watched]
    return {
        "method": method.name,
        "rate": method.rates[best],
        "accuracy": accuracy[best].tolist(),
        "loss": loss[best].tolist(),
        "trainable": sum(x[0, 0].size for x in jax.tree.leaves(trained.runs.trainable)),
        "seconds": trained.seconds,
        "curve": trained.losses[best].mean(0).tolist(),
        "distances": distances,
        "sweep": {
            "rates": method.rates,
            "validation_loss": validation.tolist(),
            "test_accuracy": accuracy.tolist(),
        },
    }


def print_table(results, console):
    """Test accuracy and loss with their spread over seeds."""
    table = Table("method", "rate", "accuracy", "loss", "trainable", "seconds a run")

    for row in results:
        table.add_row(
            row["method"],
            f"{row['rate']:g}",
            spread(row["accuracy"]),
            spread(row["loss"]),
            f"{row['trainable']:,}",
            f"{row['seconds']:.1f}",
        )
    console.print(table)
    for row in results:
        if row["distances"]:
            as_is, best, limit = (np.mean(x) for x in row["distances"])
            console.print(
                f"{row['method']}: mean ‖E - G‖ / ‖G‖ {as_is:.2f}, at its best length "
                f"{best:.2f}, what its factors allow {limit:.2f}"
            )


def save_picture(results, path):
    """Loss curves, and the distance of the step to the full gradient."""
    mpl.use("Agg")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for color, row in zip(COLORS, results, strict=True):
        smooth = np.mean(np.reshape(row["curve"], (-1, CHUNK)), axis=1)
        label = f"{row['method']}, rate {row['rate']:g}"
        left.plot(CHUNK * (np.arange(len(smooth)) + 0.5), smooth, c=color, label=label)
        if row["distances"]:
            as_is, best, limit = row["distances"]
            at = CHUNK * np.arange(len(as_is))
            right.plot(at, as_is, c=color, label=row["method"])
            right.plot(at, best, "--", c=color, label="at its best length")
            right.plot(at, limit, ":", c=color, label="what its factors allow")
    left.set(xlabel="step", ylabel="training loss, nats", yscale="log")
    right.set(xlabel="step", ylabel="‖E - G‖ / ‖G‖")
    right.set_title("distance of the equivalent gradient to the full one", size=10)
    left.legend()
    right.legend(ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16), fontsize=8)
    figure.savefig(path, dpi=110)


def check_resume(task, base, steps, folder):
    """Saves a run half-way with Orbax; both it and its copy go on identically."""
    method = METHODS[-1]
    chunk = jax.jit(make_chunk(task, method, steps))
    begin = start(task, method, base, steps)
    run, _ = chunk(begin(method.rates[1], 0))

    folder = (folder / "checkpoint").absolute()
    saved = {"adapter": run.trainable, "optimizer": run.opt_state, "step": run.step}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, saved, force=True)
        checkpointer.wait_until_finished()
        # A template without values: what a new process would have.
        restored = checkpointer.restore(folder, jax.eval_shape(lambda: saved))

    resumed = begin(method.rates[1], 0)._replace(
        trainable=restored["adapter"],
        opt_state=restored["optimizer"],
        step=restored["step"],
    )
    (run, losses), (resumed, same_losses) = chunk(run), chunk(resumed)
    np.testing.assert_array_equal(losses, same_losses)
    for x, y in zip(
        jax.tree.leaves((run.trainable, run.opt_state)),
        jax.tree.leaves((resumed.trainable, resumed.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)
    return folder


def main():
    """Runs the whole job."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps, one seed")
    parser.add_argument("--output", type=Path, default=Path("out/quickstart"))
    args = parser.parse_args()
    steps, seeds, rates = (50, 1, slice(1, 3)) if args.quick else (500, 3, slice(None))
    methods = [method._replace(rates=method.rates[rates]) for method in METHODS]
    args.output.mkdir(parents=True, exist_ok=True)
    console = Console(width=100)

    upright, shifted = load_tasks()
    base, accuracy = pretrain(upright, steps, progress=bar("pretraining"))
    console.print(f"pretrained: {accuracy:.3f} of the upright test digits are right")
    adapters = nnx.state(shifted.new_model(RANK, 0), nnx.LoRAParam)
    console.print(f"the pairs that lorapro() finds, at rank {RANK}:")
    console.print(describe_pairs(adapters), markup=False, highlight=False)

    results = [run_method(shifted, method, base, steps, seeds) for method in methods]
    console.print(
        f"the shifted task: {len(methods[0].rates)} rates × {seeds} seeds a method, "
        f"{steps} steps; test images, at the rate of the lowest validation loss"
    )
    if args.quick:
        console.print("a smoke test: too short to compare the methods")
    print_table(results, console)
    save_picture(results, args.output / "quickstart.png")
    record = {"steps": steps, "seeds": seeds, "machine": machine(), "results": results}
    (args.output / "quickstart.json").write_text(json.dumps(record) + "\n")
    checkpoint = check_resume(shifted, base, steps, args.output)
    console.print(f"{checkpoint}: restored, and training goes on to the same bits")
    console.print(f"{args.output / 'quickstart.png'}: the picture")


if __name__ == "__main__":
    main()
