"""What the results of `benchmarks.quality` say: figures, tables and a picture.

    python -m benchmarks.quality_report benchmarks/results/quality.json
    python -m benchmarks.quality_report FIRST.json SECOND.json --output BOTH.json

A run's losses are means over seeds; ± is the standard deviation between seeds. The
good range of a method is where the validation loss is within 5 % of its best, by
straight lines between the rates measured, on a logarithmic axis. A gap between LoRA
and full fine-tuning is only divided up where it is over two standard deviations.
"""

import argparse
import itertools
import json
import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table

from examples.training import CHUNK

TOLERANCE = 1.05
GAP = 2  # standard deviations: a share of less would be a share of noise
COLORS = {
    "full": "0.5",
    "LoRA": "tab:orange",
    "LoRA+": "tab:green",
    "lorapro+SGD": "tab:purple",
    "lorapro+AdamW": "tab:cyan",
    "lorapro_adamw:dense": "tab:blue",
    "lorapro_adamw:factored": "tab:red",
}

Row = dict[str, Any]


def best_run(row: Row) -> dict[str, Any]:
    """The runs at the rate with the lowest validation loss."""
    return min(row["runs"], key=lambda run: np.mean(run["validation_loss"]))


def good_range(row: Row) -> tuple[float, float, bool]:
    """The ends of the good range, and whether both are within the grid."""
    runs, best = row["runs"], row["runs"].index(best_run(row))
    loss = [np.mean(run["validation_loss"]) for run in runs]
    limit, logs = TOLERANCE * loss[best], [math.log(run["rate"]) for run in runs]

    def end(indices):
        """The last rate within the limit on the way along `indices`."""
        for here, there in itertools.pairwise(indices):
            if loss[there] > limit:
                part = (limit - loss[here]) / (loss[there] - loss[here])
                return logs[here] + part * (logs[there] - logs[here]), True
        return logs[indices[-1]], False

    low, low_found = end(list(range(best, -1, -1)))
    high, high_found = end(list(range(best, len(runs))))
    return math.exp(low), math.exp(high), low_found and high_found


def lower_rates(full: Row) -> list[float]:
    """Of the grid: the lower half of full fine-tuning's good range, up to its best.

    If there is none, the next rate below the best.
    """
    low, high, _ = good_range(full)
    best = best_run(full)["rate"]
    below = [run["rate"] for run in full["runs"] if run["rate"] <= best]
    half = [rate for rate in below if low <= rate <= math.sqrt(low * high)]
    return half or below[-2:][:1]


def steps_to(curve: list[float], goal: float) -> float | None:
    """The step at which a curve first is at the goal, None if it never is."""
    if curve[0] <= goal:
        return 0.0
    for i, (before, after) in enumerate(itertools.pairwise(curve)):
        if after <= goal:
            return CHUNK * (i + (before - goal) / (before - after))
    return None


def spread(run, key) -> tuple[float, float]:
    """Mean and standard deviation over seeds."""
    return np.mean(run[key]), np.std(run[key], ddof=min(1, len(run[key]) - 1))


def behind(run, full) -> tuple[float, float]:
    """How much larger the test loss is, and the standard deviation of the two."""
    (own, own_std), (best, best_std) = (spread(x, "test_loss") for x in (run, full))
    return own - best, math.hypot(own_std, best_std) / math.sqrt(2)


def share_closed(run, lora, full) -> float | None:
    """The part of LoRA's gap in test loss that is closed, None if there is no gap."""
    gap, std = behind(lora, full)
    return 1 - behind(run, full)[0] / gap if gap > GAP * std else None


def at_lower_rates(row: Row, lora: Row, full: Row) -> dict[str, float | None]:
    """The share of the gap closed where all three have the same, lower rate."""
    runs = [{run["rate"]: run for run in x["runs"]} for x in (row, lora, full)]
    rates = [rate for rate in lower_rates(full) if all(rate in x for x in runs)]
    return {f"{rate:g}": share_closed(*(x[rate] for x in runs)) for rate in rates}


def figures(row: Row, lora: Row | None, full: Row | None) -> dict[str, Any]:
    """What is reported of a method, beside LoRA of the same rank and full."""
    run = best_run(row)
    low, high, found = good_range(row)
    loss, loss_std = spread(run, "test_loss")
    accuracy, accuracy_std = spread(run, "test_accuracy")
    result = {
        "rate": run["rate"],
        "test_loss": loss,
        "test_loss_std": loss_std,
        "test_accuracy": accuracy,
        "test_accuracy_std": accuracy_std,
        "good_range": [low, high],
        "good_range_is_at_least": not found,
    }
    if full and full is not row:
        result["behind_full"], std = behind(run, best_run(full))
        if std:
            result["behind_full_in_std"] = result["behind_full"] / std
    if lora:
        goal = best_run(lora)["curve"][-1]
        result["steps_to_lora"] = steps_to(run["curve"], goal)
    if lora and full and row not in (lora, full):
        result["gap_closed"] = share_closed(run, best_run(lora), best_run(full))
        # The rates of other methods are of another kind.
        if row["method"].startswith("lorapro_adamw"):
            result["gap_closed_at_lower_rates"] = at_lower_rates(row, lora, full)
    return result


def summarise(rows: list[Row]) -> list[dict[str, Any]]:
    """The figures of all methods on one task; those of `full` once for each rank."""
    find = lambda name, rank: next(
        (row for row in rows if (row["method"], row["rank"]) == (name, rank)), None
    )
    summary = []
    for rank in sorted({row["rank"] for row in rows if row["rank"]}) or [None]:
        for row in rows:
            if row["rank"] in (None, rank):
                found = figures(row, find("LoRA", rank), find("full", None))
                found |= {k: row[k] for k in ("state_bytes", "seconds_per_step")}
                summary.append({"method": row["method"], "rank": rank, **found})
    digits = lambda number: float(f"{float(number):.5g}")
    return json.loads(json.dumps(summary), parse_float=digits)


def print_tables(name, result, console):
    """A table for each rank."""
    for rank, rows in itertools.groupby(result["summary"], lambda row: row["rank"]):
        title = f"{name}, rank {rank}, {result['steps']} steps, {result['seeds']} seeds"
        print_table(title, rows, console)


def print_table(title, rows, console):
    """One line a method, and how far LoRA is behind."""
    table = Table(title=title)
    names = "method", "rate", "test loss", "accuracy", "gap closed", "at low rates"
    for name in (*names, "steps to LoRA", "good range", "state kB", "ms a step"):
        table.add_column(name, no_wrap=name in names[:4])
    percent = lambda x: "-" if x is None else f"{100 * x:.0f} %"
    for row in rows:
        low, high = row["good_range"]
        lower = row.get("gap_closed_at_lower_rates", {}).items()
        steps = row.get("steps_to_lora")
        table.add_row(
            row["method"],
            f"{row['rate']:g}",
            f"{row['test_loss']:.3f} ± {row['test_loss_std']:.3f}",
            f"{row['test_accuracy']:.3f} ± {row['test_accuracy_std']:.3f}",
            percent(row.get("gap_closed")),
            "\n".join(f"{rate}: {percent(share)}" for rate, share in lower) or "-",
            "-" if steps is None else f"{steps:.0f}",
            ("≥" if row["good_range_is_at_least"] else "") + f"×{high / low:.1f}",
            f"{row['state_bytes'] / 1e3:.0f}",
            f"{1e3 * row['seconds_per_step']:.1f}",
        )
        if row["method"] == "LoRA" and "behind_full_in_std" in row:
            table.caption = (
                f"LoRA is {row['behind_full']:.3f} behind full fine-tuning, "
                f"{row['behind_full_in_std']:.1f} standard deviations"
            )
    console.print(table)


def draw_panel(axes, rows, rank):
    """Validation loss against learning rate, a curve a method, and the good range."""
    for row in rows:
        if row["rank"] in (None, rank):
            rates = [run["rate"] for run in row["runs"]]
            loss = np.array([spread(run, "validation_loss") for run in row["runs"]])
            style = {"c": COLORS[row["method"]], "label": row["method"]}
            if row["rank"] is None:
                style["ls"] = "--"
            axes.errorbar(rates, *loss.T, marker=".", capsize=2, lw=1.2, **style)
    best = [np.mean(best_run(row)["validation_loss"]) for row in rows]
    margin = max(best) - min(best) or min(best)
    axes.set(xscale="log", ylim=(min(best) - 0.1 * margin, max(best) + margin))


def save_picture(tasks, path):
    """A panel for each task and rank."""
    mpl.use("Agg")
    ranks = sorted({row["rank"] for x in tasks.values() for row in x["summary"]})
    figure, panels = plt.subplots(
        len(tasks),
        len(ranks),
        figsize=(5 * len(ranks), 3.6 * len(tasks)),
        layout="constrained",
        squeeze=False,
    )
    for line, (name, result) in zip(panels, tasks.items(), strict=True):
        for axes, rank in zip(line, ranks, strict=True):
            draw_panel(axes, result["rows"], rank)
            axes.set_title(f"{name}, rank {rank}", size=10)
        line[0].set_ylabel("validation loss, nats")
    for axes in panels[-1]:
        axes.set_xlabel("peak learning rate (LoRA+: of A)")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=2 * len(ranks), fontsize=8
    )
    figure.savefig(path, dpi=110)


def report(path: Path, console: Console) -> None:
    """Adds the figures to the JSON, prints them, and draws the picture beside it."""
    record = json.loads(path.read_text())
    for name, result in record["tasks"].items():
        result["summary"] = summarise(result["rows"])
        result["seeds"] = len(result["rows"][0]["runs"][0]["test_loss"])
        print_tables(name, result, console)
    path.write_text(json.dumps(record) + "\n")
    save_picture(record["tasks"], path.with_suffix(".png"))
    console.print(f"{record['minutes']} minutes; {path}, and the picture beside it")


def merge(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The tasks and methods of all; of a method that occurs twice, the later."""
    merged = records[0]
    for record in records[1:]:
        merged["minutes"] = round(merged["minutes"] + record["minutes"], 1)
        for name, result in record["tasks"].items():
            old = merged["tasks"].setdefault(name, result)["rows"]
            rows = {(row["method"], row["rank"]): row for row in old + result["rows"]}
            merged["tasks"][name]["rows"] = list(rows.values())
    return merged


def main():
    """Makes the report of a file anew, or of several as one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, help="for several paths")
    args = parser.parse_args()
    merged = merge([json.loads(path.read_text()) for path in args.paths])
    output = args.output or args.paths[0]
    output.write_text(json.dumps(merged) + "\n")
    report(output, Console(width=120))


if __name__ == "__main__":
    main()
