"""What the results of `benchmarks.initializers` say: tables, a picture, a verdict.

As in `benchmarks.quality_report`, a method is reported at the learning rate that is
best on validation data, ± is the standard error of a mean over seeds, and a difference
of test losses, seed by seed, counts where it is over two of its standard errors. It is
called noise otherwise.
"""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table

from benchmarks.quality_report import (
    ERRORS,
    Row,
    best_run,
    difference,
    mean_and_error,
    shown,
    sign,
)

# By their names in `benchmarks.quality`.
FULL, ADAMW = "full", "LoRA"
OPTIMIZERS = {
    FULL: "AdamW",
    ADAMW: "AdamW",
    "lorapro+AdamW": "lorapro, AdamW",
    "lorapro_adamw": "lorapro_adamw",
}
COLORS = {
    None: "0.5",
    "LoRA": "tab:orange",
    "LoRA-GA": "tab:blue",
    "GoRA": "tab:green",
    "LoRA-One": "tab:red",
    "PiSSA": "tab:purple",
}


def write(path: Path, result: dict[str, Any]) -> None:
    """One file a task and rank."""
    path.write_text(json.dumps(result) + "\n")


def name_of(row: Row) -> str:
    """For a line of text."""
    return f"{row['start']} + {OPTIMIZERS[row['method']]}"


def place(row: Row) -> tuple[int, int]:
    """Where the row stands in the table."""
    return [*OPTIMIZERS].index(row["method"]), [*COLORS].index(row["start"])


def find(rows: list[Row], start: str | None, method: str) -> Row | None:
    """The row of a combination, if it was measured."""
    wanted = start, method
    return next((row for row in rows if (row["start"], row["method"]) == wanted), None)


def verdict(rows: list[Row]) -> list[str]:
    """Which combination to use, as far as the numbers tell."""
    adapters = [row for row in rows if row["start"]]
    best = min(adapters, key=lambda row: np.mean(best_run(row)["validation_loss"]))
    ties = [
        row for row in adapters if row is not best and not sign(difference(row, best))
    ]
    lines = [
        f"Lowest validation loss: {name_of(best)}.",
        f"Within noise of its test loss: {', '.join(map(name_of, ties)) or 'none'}.",
    ]
    for method, optimizer in OPTIMIZERS.items():
        same = [row for row in adapters if row["method"] == method]
        found = compared(same, find(rows, "LoRA", method), lambda row: row["start"])
        lines += [f"{optimizer}, {found} than LoRA's start."] if same[1:] else []
    for start in dict.fromkeys(row["start"] for row in adapters):
        same = [row for row in adapters if row["start"] == start]
        optimizer_of = lambda row: OPTIMIZERS[row["method"]]
        found = compared(same, find(rows, start, ADAMW), optimizer_of)
        lines.append(f"From {start}, {found} than AdamW.")
    return lines


def compared(rows: list[Row], other: Row | None, name: Callable[[Row], str]) -> str:
    """Which rows are better than another, and which are worse; the rest is noise."""
    found = [(name(row), difference(row, other)) for row in rows]
    certain = [(name, *x) for name, x in found if x and sign(x)]
    better = [f"{name} ({gap:+.3f})" for name, gap, _ in certain if gap < 0]
    worse = [f"{name} ({gap:+.3f})" for name, gap, _ in certain if gap > 0]
    return f"better: {', '.join(better) or 'none'}; worse: {', '.join(worse) or 'none'}"


def print_table(result: dict[str, Any], console: Console) -> None:
    """A line for each start and optimizer; differences that count have a star."""
    rows, seeds = result["rows"], len(result["rows"][0]["runs"][0]["test_loss"])
    title = f"{result['task']}, rank {result['rank']}, {result['steps']} steps, "
    table = Table(title=title + f"{seeds} seeds")
    for name in ("start", "optimizer", "rate", "test loss", "accuracy"):
        table.add_column(name, no_wrap=True)
    for name in ("− LoRA, AdamW", "− LoRA's start", "− AdamW"):
        table.add_column(name)
    lora = find(rows, "LoRA", ADAMW)
    signed = lambda x: "-" if x is None else f"{x[0]:+.3f}" + "*" * abs(sign(x))
    for method, group in itertools.groupby(rows, lambda row: row["method"]):
        for row in group:
            run, start = best_run(row), row["start"]
            others = lora, find(rows, "LoRA", method), find(rows, start, ADAMW)
            table.add_row(
                start or "all weights",
                OPTIMIZERS[method],
                f"{run['rate']:g}",
                shown(mean_and_error(run["test_loss"]), digits=3),
                shown(mean_and_error(run["test_accuracy"]), digits=3),
                *(signed(difference(row, other)) for other in others),
            )
        table.add_section()
    table.caption = f"* over {ERRORS} standard errors"
    console.print(table)


def print_verdict(result: dict[str, Any], console: Console) -> None:
    """What the table says for certain; of one seed nothing is."""
    one_seed = len(result["rows"][0]["runs"][0]["test_loss"]) == 1
    lines = ["One seed: no verdict."] if one_seed else verdict(result["rows"])
    console.print("\n".join(lines), highlight=False)


def draw_panel(axes, rows: list[Row], method: str) -> None:
    """Validation loss against learning rate, a curve for each start."""
    for row in rows:
        if row["method"] in (FULL, method):
            rates = [run["rate"] for run in row["runs"]]
            loss = np.array(
                [mean_and_error(run["validation_loss"]) for run in row["runs"]]
            )
            style = {"c": COLORS[row["start"]], "label": row["start"] or "all weights"}
            style |= {} if row["start"] else {"ls": "--"}
            axes.errorbar(rates, *loss.T, marker=".", capsize=2, lw=1.2, **style)
    best = [np.mean(best_run(row)["validation_loss"]) for row in rows]
    margin = max(best) - min(best) or min(best)
    axes.set(xscale="log", ylim=(min(best) - 0.1 * margin, max(best) + margin))


def save_picture(results: list[dict[str, Any]], path: Path) -> None:
    """A line of panels for each task and rank, a panel for each optimizer."""
    mpl.use("Agg")
    methods = [method for method in OPTIMIZERS if method != FULL]
    size = 3.7 * len(methods), 3.2 * len(results) + 0.6
    figure, panels = plt.subplots(
        len(results), len(methods), figsize=size, layout="constrained", squeeze=False
    )
    for line, result in zip(panels, results, strict=True):
        for axes, method in zip(line, methods, strict=True):
            draw_panel(axes, result["rows"], method)
            title = f"{result['task']}, rank {result['rank']}: {OPTIMIZERS[method]}"
            axes.set_title(title, size=10)
        line[0].set_ylabel("validation loss, nats")
    for axes in panels[-1]:
        axes.set_xlabel("peak learning rate")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(folder: Path, console: Console) -> None:
    """Tables and verdicts of all results in a folder, and the picture beside them."""
    results = [
        json.loads(path.read_text())
        for path in sorted(folder.glob("initializers-*.json"))
    ]
    for result in results:
        result["rows"].sort(key=place)
        print_table(result, console)
        print_verdict(result, console)
    save_picture(results, folder / "initializers.png")
    console.print(f"{folder}/initializers-*.json, and the picture beside them")
