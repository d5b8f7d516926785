"""What the results of `benchmarks.transfer` say: the regret of keeping one rate.

The regret of a learning rate in a cell is how much higher its validation loss (nats,
mean over seeds) is than that of the best rate of the same cell. A method keeps one rate
for all cells: its own best at rank 4, s = 1, from LoRA's start; or the best rate of
full fine-tuning. Where that rate was not measured, it is far from the best of the cell
and the regret is read off the nearest that was, which is less than the truth.
"""

from fractions import Fraction
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table

from benchmarks.quality_report import COLORS, Row, best_run, load

FULL = "full"


def loss_at(row: Row, rate: float) -> float:
    """The mean validation loss at a rate, or at the nearest that was measured."""
    near = min(row["runs"], key=lambda run: abs(np.log(run["rate"] / rate)))
    return float(np.mean(near["validation_loss"]))


def regret(row: Row, rate: float) -> float:
    """Of a rate in a cell."""
    return loss_at(row, rate) - float(np.mean(best_run(row)["validation_loss"]))


def of_method(rows: list[Row], method: str) -> list[Row]:
    """Its cells, in the order of the picture."""
    place = lambda row: (
        row["start"] != "LoRA",
        row["rank"] or 0,
        row["start"],
        row["scale"],
    )
    return sorted((row for row in rows if row["method"] == method), key=place)


def kept_rate(rows: list[Row]) -> float | None:
    """The best rate at rank 4, s = 1, from LoRA's own start."""
    plain = {"rank": 4, "scale": 1.0, "start": "LoRA"}
    found = [row for row in rows if plain.items() <= row.items()]
    return best_run(found[0])["rate"] if found else None


def summarise(rows: list[Row]) -> list[dict[str, Any]]:
    """A line for each method: its best rates, and the regrets over its cells."""
    full = of_method(rows, FULL)
    full_rate = best_run(full[0])["rate"] if full else None
    lines = []
    methods = {row["method"] for row in rows if row["rank"]}
    for method in sorted(methods, key=[*COLORS].index):
        own = of_method(rows, method)
        best = [best_run(row)["rate"] for row in own]
        line = {"method": method, "cells": len(own), "best": [min(best), max(best)]}
        for name, rate in (("own", kept_rate(own)), ("full", full_rate)):
            if rate is not None:
                found = [regret(row, rate) for row in own]
                scales = [
                    x
                    for x, row in zip(found, own, strict=True)
                    if row["start"] == "LoRA"
                ]
                line[name] = {
                    "rate": rate, "mean": float(np.mean(found)), "worst": max(found),
                    "worst of ranks and scales": max(scales, default=float("nan")),
                    "same": sum(rate == x for x in best),
                }  # fmt: skip
        lines.append(line)
    return lines


def print_table(lines: list[dict[str, Any]], console: Console) -> None:
    """Both ways to keep a rate, side by side."""
    table = Table(
        title="regret of one learning rate for all cells, validation loss, nats"
    )
    for name in (
        "method",
        "cells",
        "best rates",
        "own best at r 4, s 1",
        "mean",
        "worst",
    ):
        table.add_column(name, no_wrap=name != "own best at r 4, s 1")
    for name in ("full fine-tuning's best", "mean", "worst", "is best in"):
        table.add_column(name, no_wrap=name != "full fine-tuning's best")
    for line in lines:
        own, full = line.get("own"), line.get("full")
        numbers = lambda x: (
            [f"{x['rate']:g}", f"{x['mean']:.3f}", f"{x['worst']:.3f}"]
            if x
            else ["-"] * 3
        )
        table.add_row(
            line["method"],
            str(line["cells"]),
            "{:g} to {:g}".format(*line["best"]),
            *numbers(own),
            *numbers(full),
            f"{full['same']} of {line['cells']}" if full else "-",
        )
    console.print(table)


def cell_of(row: Row) -> tuple[bool, int, str, float]:
    """What tells a line of the picture from another, in their order."""
    return row["start"] != "LoRA", row["rank"], row["start"], row["scale"]


def name_of(cell: tuple[bool, int, str, float]) -> str:
    """For the axis."""
    other, rank, start, scale = cell
    return f"r {rank}, {start}" if other else f"r {rank}, s {Fraction(scale)}"


def draw_panel(
    axes: Any, rows: list[Row], cells: list[Any], rates: list[float], full: float | None
) -> Any:
    """A line for each cell, a column for each rate, the colour of the regret."""
    grid = np.full((len(cells), len(rates)), np.nan)
    for row in rows:
        line = cells.index(cell_of(row))
        for run in row["runs"]:
            grid[line, rates.index(run["rate"])] = regret(row, run["rate"])
        axes.plot(rates.index(best_run(row)["rate"]), line, "*", c="k", ms=6)
    image = axes.imshow(
        np.maximum(grid, 1e-3), aspect="auto", cmap="RdYlGn_r",
        norm=mpl.colors.LogNorm(3e-3, 1.0),
    )  # fmt: skip
    axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates], rotation=90)
    axes.set_yticks(range(len(cells)), [name_of(cell) for cell in cells], size=8)
    axes.tick_params(labelsize=8)
    if full in rates:
        axes.axvline(rates.index(full), c="k", lw=1, ls=":")
    axes.set_title(rows[0]["method"], size=9)
    return image


def save_picture(rows: list[Row], path: Path) -> None:
    """A panel for each method: where its stars line up, the rate transfers."""
    mpl.use("Agg")
    adapted = [row for row in rows if row["rank"]]
    methods = sorted({row["method"] for row in adapted}, key=[*COLORS].index)
    full = of_method(rows, FULL)
    full_rate = best_run(full[0])["rate"] if full else None
    cells = sorted({cell_of(row) for row in adapted})
    rates = sorted({run["rate"] for row in adapted for run in row["runs"]})
    figure, panels = plt.subplots(
        1, len(methods), figsize=(1.9 * len(methods) + 2, 0.19 * len(cells) + 1.9),
        layout="constrained", squeeze=False, sharey=True,
    )  # fmt: skip
    for axes, method in zip(panels[0], methods, strict=True):
        image = draw_panel(axes, of_method(rows, method), cells, rates, full_rate)
    figure.supxlabel("peak learning rate", size=9)
    figure.colorbar(image, ax=panels[0, -1], extend="max").set_label("regret, nats")
    title = "Stars: the best rate of a line. Dotted: full fine-tuning's best rate."
    figure.suptitle(title, size=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(path: Path, console: Console) -> None:
    """Prints the table, and draws the picture beside the JSON."""
    result = load(path)
    if not result or not any(row["rank"] for row in result["rows"]):
        return
    print_table(summarise(result["rows"]), console)
    save_picture(result["rows"], path.with_suffix(".png"))
    console.print(f"{path}, and the picture beside it")
