"""Full fine-tuning, LoRA and LoRA-Pro on the same task, each at its best rate.

    python -m examples.quickstart            # under 4 minutes on two idle CPU cores
    python -m examples.quickstart --quick    # a smoke test, too short to compare

A small vision transformer is pretrained on scikit-learn's digits and then fine-tuned
on the same digits inverted, rotated and relabelled. Each method runs with several
learning rates and five seeds; the rate is chosen on the validation images, and the
test images are reported at it. It ends with a checkpoint: the adapter and the
optimizer state are saved with Orbax, restored, and trained on from, to the same bits.

± is the standard error over the seeds: of a mean, or of the mean difference to LoRA
with the same seed, which is the same start and the same batches. A difference that
Student's t would not tell from 0 at 95 % is called noise.

The lines that make LoRA-Pro of LoRA are in `METHODS`.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import t as student

from benchmarks.measure import machine
from examples.training import (
    CHUNK,
    RANK,
    Method,
    distance_to_full_gradient,
    evaluate,
    make_chunk,
    make_measure,
    pretrain,
    spread,
    start,
    train,
)
from examples.vit_digits import load_tasks
from lorapro_jax import describe_pairs, lorapro, lorapro_adamw

BATCH, PRETRAINING = 32, 500
LOOK = 2  # chunks from one look at the test loss and at the gradients to the next
LOW, HIGH = (3e-3, 1e-2, 3e-2), (1e-2, 3e-2, 1e-1)  # the best is in the middle
METHODS = (
    Method("full fine-tuning", optax.adamw, HIGH, rank=None),
    Method("LoRA", optax.adamw, LOW),
    Method(
        "lorapro, AdamW", lambda rate: optax.chain(lorapro(), optax.adamw(rate)), HIGH
    ),
    Method("lorapro_adamw", lorapro_adamw, LOW),
)
COLORS = ("0.4", "tab:orange", "tab:blue", "tab:red")
CONSOLE = Console(width=100, markup=False)
CAPTION = (
    "G: the gradient of a base weight W, as full fine-tuning has it. E, the equivalent "
    "gradient: what a step along the factors' gradients does to W = W0 + s B A,\nto "
    "first order, from LoRA's gradients or from those of lorapro(). The "
    "norms are over all adapted layers. Curves are means over the seeds."
)


def progress(name):
    """For `train`: a bar on a terminal, else a line at every quarter of the way."""

    def bar(chunks):
        if CONSOLE.is_terminal:
            yield from track(chunks, name.ljust(18), console=CONSOLE)
            return
        begun = time.perf_counter()
        for i, chunk in enumerate(chunks):
            yield chunk
            if 4 * (i + 1) // len(chunks) > 4 * i // len(chunks):
                share, seconds = (i + 1) / len(chunks), time.perf_counter() - begun
                print(f"{name:18} {share:4.0%} {seconds:4.0f} s", flush=True)

    return bar


def watcher(task, method):
    """On the way: the test loss, and how far the step is from the full gradient."""
    adjust = {
        "LoRA": lambda grads, _: grads,
        "lorapro, AdamW": lambda *trees: lorapro().update(trees[0], None, trees[1])[0],
    }.get(method.name)
    measure = make_measure(task, method)
    distances = adjust and distance_to_full_gradient(task, method, adjust)
    return lambda run: (
        measure(run.trainable, run.frozen, task.test)[0],
        distances(run) if distances else (),
    )


def run_method(task, method, base, steps, seeds):
    """All rates and seeds; what is reported is at the best rate."""
    trained = train(
        task,
        method,
        base,
        jnp.arange(seeds),
        steps,
        progress=progress(method.name),
        watch=watcher(task, method),
        watch_every=LOOK,
    )
    validation, _ = evaluate(task, method, trained.runs, task.validation)
    best = int(jnp.nanargmin(validation.mean(1)))
    loss, accuracy = evaluate(task, method, trained.runs, task.test)
    on_the_way, distances = trained.watched
    return {
        "method": method.name,
        "rate": method.rates[best],
        "accuracy": accuracy[best].tolist(),
        "loss": loss[best].tolist(),
        "trainable": sum(x[0, 0].size for x in jax.tree.leaves(trained.runs.trainable)),
        "seconds": trained.seconds,
        "curve": trained.losses[best].mean(0).tolist(),
        "test_curve": [*on_the_way[best].mean(0).tolist(), float(loss[best].mean())],
        "distances": [x[best].mean(0).tolist() for x in distances],
        "sweep": {
            "rates": method.rates,
            "validation_loss": validation.tolist(),
            "test_loss": loss.tolist(),
            "test_accuracy": accuracy.tolist(),
        },
    }


def against(row, other):
    """The difference of two test losses for the same seed, and whether it is noise."""
    difference = np.subtract(row["loss"], other["loss"])
    if row is other or len(difference) < 2:
        return ""
    error = np.std(difference, ddof=1) / np.sqrt(len(difference))
    noise = abs(difference.mean()) < student.ppf(0.975, len(difference) - 1) * error
    return f"{difference.mean():+.3f} ± {error:.3f}{', noise' if noise else ''}"


def print_table(results):
    """Loss and accuracy with their standard errors, and the distances to G."""
    table = Table()
    columns = (
        "method",
        "rate",
        "test loss",
        "less LoRA's",
        "test accuracy",
        "train loss",
    )
    for name in columns:
        table.add_column(name, no_wrap=True)
    lora = next(row for row in results if row["method"] == "LoRA")
    for row in results:
        table.add_row(
            row["method"],
            f"{row['rate']:g}",
            spread(row["loss"]),
            against(row, lora),
            spread(row["accuracy"]),
            f"{np.mean(row['curve'][-CHUNK:]):.3f}",
        )
    CONSOLE.print(table)
    for row in filter(lambda row: row["distances"], results):
        as_is, best, limit = (np.mean(x) for x in row["distances"])
        print(
            f"{row['method']}: mean ‖E - G‖ / ‖G‖ {as_is:.2f}, at its best length "
            f"{best:.2f}, what its factors allow {limit:.2f}"
        )


def save_picture(results, path):
    """Training and test loss, the sweep, and the distance to the full gradient."""
    figure = Figure(figsize=(11, 8.2), layout="constrained")
    (training, test), (sweep, distance) = figure.subplots(2, 2)
    for color, row in zip(COLORS, results, strict=True):
        label = f"{row['method']}, rate {row['rate']:g}"
        smooth = np.mean(np.reshape(row["curve"], (-1, CHUNK)), axis=1)
        training.plot(CHUNK * (np.arange(len(smooth)) + 0.5), smooth, c=color)
        at = LOOK * CHUNK * np.arange(len(row["test_curve"]))
        test.plot(at, row["test_curve"], c=color, label=label)
        rates, losses = row["sweep"]["rates"], np.array(row["sweep"]["test_loss"])
        error = losses.std(1) / np.sqrt(max(1, losses.shape[1] - 1))
        sweep.errorbar(rates, losses.mean(1), error, c=color, capsize=3, marker="o")
        if row["distances"]:
            as_is, best, limit = row["distances"]
            distance.plot(at[:-1], as_is, c=color, label=row["method"])
            distance.plot(at[:-1], best, "--", c=color, label="at its best length")
            distance.plot(at[:-1], limit, ":", c=color, label="what its factors allow")
    training.set(title="training loss, each at its best rate", xlabel="step")
    training.set(ylabel="mean over 25 batches, nats", yscale="log")
    test.set(title="test loss, each at its best rate", xlabel="step", ylabel="nats")
    test.set(yscale="log")
    sweep.set(title="test loss at the end, ± standard error over seeds", ylabel="nats")
    sweep.set(xlabel="learning rate", xscale="log", yscale="log")
    ticks = sorted({rate for row in results for rate in row["sweep"]["rates"]})
    sweep.set_xticks(ticks, [f"{x:g}" for x in ticks])
    sweep.set_xticks([], minor=True)
    distance.set(title="distance of E to the full gradient G", xlabel="step")
    distance.set(ylabel="‖E - G‖ / ‖G‖")
    test.legend()
    distance.legend(ncols=2, fontsize=8, loc="center", bbox_to_anchor=(0.5, 0.62))
    figure.supxlabel(CAPTION, fontsize=8, x=0.02, ha="left")
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
    steps, seeds, rates = (50, 1, slice(1, 3)) if args.quick else (300, 5, slice(None))
    methods = [method._replace(rates=method.rates[rates]) for method in METHODS]
    args.output.mkdir(parents=True, exist_ok=True)

    upright, shifted = (task._replace(batch=BATCH) for task in load_tasks())
    base, accuracy = pretrain(upright, PRETRAINING, progress=progress("pretraining"))
    print(f"pretrained: {accuracy:.3f} of the upright test digits are right")
    adapters = nnx.state(shifted.new_model(RANK, 0), nnx.LoRAParam)
    print(f"the pairs that lorapro() finds, at rank {RANK}:")
    print(describe_pairs(adapters))

    results = [run_method(shifted, method, base, steps, seeds) for method in methods]
    print(
        f"the shifted task: {len(methods[0].rates)} rates × {seeds} seeds a method, "
        f"{steps} steps; at the rate of the lowest validation loss"
    )
    if args.quick:
        print("a smoke test: too short to compare the methods")
    print_table(results)
    save_picture(results, args.output / "quickstart.png")
    record = {"steps": steps, "seeds": seeds, "machine": machine(), "results": results}
    (args.output / "quickstart.json").write_text(json.dumps(record) + "\n")
    checkpoint = check_resume(shifted, base, steps, args.output)
    print(f"{checkpoint}: restored, and training goes on to the same bits")
    print(f"{args.output / 'quickstart.png'}: the picture")


if __name__ == "__main__":
    main()
