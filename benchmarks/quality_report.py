"""What the results of `benchmarks.quality` say: tables, a picture, and the verdicts.

    python -m benchmarks.quality_report              # of benchmarks/results
    python -m benchmarks.quality_report FOLDER

± is everywhere the standard error of a mean over seeds. A difference between two
methods is the mean of the differences between their test losses with the same seed,
each method at the rate that is best on validation data. It counts where it is over two
standard errors, and is called noise otherwise. Beside LoRA stands full fine-tuning of
the kernels alone, which are the weights that adapters move: that is what a LoRA
optimizer can be measured by, as full fine-tuning moves biases and norms as well.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table

ERRORS = 2  # standard errors: a difference of less is noise
WIDTH = 170  # of the tables, in which no number may be cut
LORA, NESTEROV, KERNELS = "LoRA", "LoRA:nesterov", "full:kernels"
COLORS = {
    "full": "0.2",
    "full:nesterov": "tab:brown",
    "full:kernels": "0.6",
    "LoRA": "navajowhite",
    "LoRA:nesterov": "tab:orange",
    "LoRA+": "tab:green",
    "Riemannian": "tab:olive",
    "lora_rite": "tab:purple",
    "lorapro+AdamW": "tab:cyan",
    "lorapro_adamw": "lightcoral",
    "lorapro_adamw:nesterov": "tab:red",
    "lorapro_adamw:dense": "tab:blue",
}

Row = dict[str, Any]


def load(path: Path) -> dict[str, Any] | None:
    """A file of results, None where there is none."""
    return json.loads(path.read_text()) if path.exists() else None


def write(path: Path, result: dict[str, Any]) -> None:
    """A line for each sweep, so that a change to one is a change to one line."""
    rows = ",\n  ".join(json.dumps(row) for row in result["rows"])
    rest = json.dumps({k: v for k, v in result.items() if k != "rows"}, indent=1)
    path.write_text(f'{rest[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n')


def best_run(row: Row) -> dict[str, Any]:
    """The runs at the rate with the lowest validation loss."""
    return min(row["runs"], key=lambda run: np.mean(run["validation_loss"]))


def mean_and_error(values: Any) -> tuple[float, float]:
    """Over seeds; the error of one value is not known."""
    values = np.asarray(values, np.float64)
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), float(error)


def shown(found: tuple[float, float], sign: str = "", digits: int = 4) -> str:
    """A mean and its error; of one seed only the mean."""
    mean, error = found
    text = f"{mean:{sign}.{digits}f}"
    return text if math.isnan(error) else f"{text} ± {error:.{digits}f}"


def difference(row: Row, other: Row | None) -> tuple[float, float] | None:
    """How much larger the test loss is than the other's, by seed, and its error.

    None where there is nothing to compare: runs from other pretrained weights differ
    by more than methods do.
    """
    if other is None or other is row or row.get("weights") != other.get("weights"):
        return None
    both = [best_run(x)["test_loss"] for x in (row, other)]
    count = min(map(len, both))
    return mean_and_error(np.subtract(both[0][:count], both[1][:count]))


def sign(found: tuple[float, float] | None) -> int:
    """-1 for ahead, 1 for behind, 0 for noise or nothing to compare."""
    if found is None or not abs(found[0]) > ERRORS * found[1]:
        return 0
    return -1 if found[0] < 0 else 1


def find(rows: list[Row], method: str) -> Row | None:
    """The sweep of a method among those of a setting, if it was run."""
    return next((row for row in rows if row["method"] == method), None)


def settings(results: list[dict[str, Any]]) -> list[tuple[str, int, list[Row]]]:
    """Tasks and ranks, and the sweeps that stand beside each other in each."""
    order = [*COLORS]
    found = []
    for result in results:
        rows = sorted(result["rows"], key=lambda row: order.index(row["method"]))
        for rank in sorted({row["rank"] for row in rows if row["rank"]}):
            some = [row for row in rows if row["rank"] in (None, rank)]
            found.append((result["task"], rank, some))
    return found


def print_table(task: str, rank: int, rows: list[Row], console: Console) -> None:
    """A line for each method."""
    seeds = sorted({len(row["runs"][0]["test_loss"]) for row in rows})
    title = f"{task}, rank {rank}, {rows[0]['steps']} steps, seeds: "
    table = Table(title=title + " to ".join(map(str, seeds)))
    for name in ("method", "rate", "test loss", "accuracy"):
        table.add_column(name, no_wrap=True)
    for name in (f"− {LORA}", f"− {NESTEROV}", f"− {KERNELS}", "state kB"):
        table.add_column(name, no_wrap=True)
    others = [find(rows, name) for name in (LORA, NESTEROV, KERNELS)]
    for row in rows:
        run, marks = best_run(row), {-1: " ahead", 0: "", 1: " behind"}
        compared = [difference(row, other) for other in others]
        table.add_row(
            row["method"],
            f"{run['rate']:g}",
            shown(mean_and_error(run["test_loss"])),
            shown(mean_and_error(run["test_accuracy"]), digits=3),
            *(shown(x, "+") + marks[sign(x)] if x else "-" for x in compared),
            f"{run['state_bytes'] / 1e3:.0f}",
        )
    console.print(table)


def verdicts(results: list[dict[str, Any]], other: str) -> list[str]:
    """For each method: in how many settings it is ahead of another, and behind."""
    lines = []
    for method in COLORS:
        signs = []
        for _, _, rows in settings(results):
            row = find(rows, method)
            found = difference(row, find(rows, other)) if row else None
            signs += [] if found is None else [sign(found)]
        if signs:
            lines.append(
                f"{method}: ahead of {other} in {signs.count(-1)} of {len(signs)} "
                f"settings, behind in {signs.count(1)}, noise in {signs.count(0)}"
            )
    return lines


def draw_panel(axes: Any, rows: list[Row]) -> None:
    """Validation loss against learning rate, a curve a method."""
    for row in rows:
        rates = [run["rate"] for run in row["runs"]]
        loss = np.array([mean_and_error(x["validation_loss"]) for x in row["runs"]])
        style = {"c": COLORS[row["method"]], "label": row["method"]}
        if row["rank"] is None:
            style["ls"] = "--"
        axes.errorbar(rates, *loss.T, marker=".", capsize=2, lw=1.2, **style)
    best = [np.mean(best_run(row)["validation_loss"]) for row in rows]
    margin = max(best) - min(best) or min(best)
    axes.set(xscale="log", ylim=(min(best) - 0.1 * margin, max(best) + margin))


def save_picture(results: list[dict[str, Any]], path: Path) -> None:
    """A line of panels for each task, a panel for each rank."""
    mpl.use("Agg")
    found = settings(results)
    names = list(dict.fromkeys(task for task, _, _ in found))
    columns = max(sum(task == name for task, _, _ in found) for name in names)
    figure, panels = plt.subplots(
        len(names), columns, figsize=(4.6 * columns, 3.4 * len(names) + 0.6),
        layout="constrained", squeeze=False,
    )  # fmt: skip
    for axes in panels.flat:
        axes.set_axis_off()
    for line, name in zip(panels, names, strict=True):
        own = [x for x in found if x[0] == name]
        for axes, (_, rank, rows) in zip(line, own, strict=False):
            axes.set_axis_on()
            draw_panel(axes, rows)
            axes.set_title(f"{name}, rank {rank}", size=10)
            axes.set_xlabel("peak learning rate (LoRA+: of A)")
            axes.set_ylabel("validation loss, nats")
    handles: dict[str, Any] = {}
    for axes in panels.flat:
        handles |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    lines, names = list(handles.values()), list(handles)
    figure.legend(lines, names, loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(folder: Path, console: Console) -> None:
    """Prints the tables and verdicts of all tasks, and draws the picture."""
    results = [load(path) for path in sorted(folder.glob("quality-*.json"))]
    results = [result for result in results if result and result["rows"]]
    if not results:
        return
    for task, rank, rows in settings(results):
        print_table(task, rank, rows, console)
    lines = verdicts(results, NESTEROV) + verdicts(results, KERNELS)
    console.print(*lines, sep="\n", highlight=False)
    if settings(results):
        save_picture(results, folder / "quality.png")
    console.print(f"{folder}/quality-*.json, and the picture {folder}/quality.png")


def main() -> None:
    """Makes the report anew."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default="benchmarks/results")
    report(parser.parse_args().folder, Console(width=WIDTH, markup=False))


if __name__ == "__main__":
    main()
