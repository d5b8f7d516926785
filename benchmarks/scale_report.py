"""The table and the plot of `scale.py`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]

PASSES = {"adamw": 7, "lorapro + adamw": 9, "lorapro_adamw": 13}
"""Over the factors' bytes. AdamW reads g, F and two moments and writes three of them;
`lorapro` has to read g and F once more, for their Gram matrices; `lorapro_adamw` reads
g, F, μ and F⁻ twice, then the mean and F, and writes mean, copy and F."""
MIB = 2**20


def floor(row: Row) -> float:
    """The bytes that a chip has to move for this row's update."""
    return float(PASSES[row["contender"]] * row["factor_bytes"])


def show(rows: Sequence[Row]) -> None:
    """Prints the table."""
    table = Table("program", "optimizer", box=box.SIMPLE)
    columns = {
        "pairs": lambda x: f"{x['pairs']:,}",
        "r": lambda x: str(x["rank"]),
        "chips": lambda x: str(x["chips"]),
        "factors": lambda x: f"{x['factor_bytes'] / MIB:.1f}",
        "arguments": lambda x: f"{x['argument_bytes'] / MIB:,.0f}",
        "temporaries": lambda x: f"{x['temp_bytes'] / MIB:,.0f}",
        "moved": lambda x: f"{x['moved_bytes'] / MIB:,.0f}",
        "floor": lambda x: f"{floor(x) / MIB:,.0f}" if _is_update(x) else "",
        "sent": lambda x: f"{x['sent_bytes'] / MIB:.2f}",
        "collectives": lambda x: str(sum(x["collectives"].values())),
        "Mcycles": lambda x: f"{x['estimated_mcycles'] or float('nan'):.1f}",
    }
    for name in columns:
        table.add_column(name, justify="right")
    order = lambda x: (x["platform"], x["program"], x["chips"], x["pairs"], x["rank"])
    for row in sorted(rows, key=order):
        what = f"{row['platform']} {row['model']} {row['program']}"
        table.add_row(what, row["contender"], *(of(row) for of in columns.values()))
    Console(width=150, markup=False).print(table, "Of one chip and step, in MiB.")


def plot(rows: Sequence[Row], output: Path) -> None:
    """Cost of the update against pairs, rank and chips, with the floor."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    of_70b = [x for x in rows if x["model"] == "70b" and x["platform"] == "cpu"]
    of_70b = [x for x in of_70b if _is_update(x)]
    usual = {"pairs": 560, "rank": 16, "chips": 64}
    figure, axes = plt.subplots(2, 3, figsize=(11, 6), sharey="row")
    for column, key in enumerate(usual):
        others = {k: v for k, v in usual.items() if k != key}
        chosen = [x for x in of_70b if all(x[k] == v for k, v in others.items())]
        chosen.sort(key=lambda x: x[key])
        for color, name in enumerate(PASSES):
            mine = [x for x in chosen if x["contender"] == name]
            at = [x[key] for x in mine]
            style = {"color": f"C{color}", "marker": "."}
            moved = [x["moved_bytes"] / MIB for x in mine]
            axes[0, column].plot(at, moved, label=name, **style)
            least = [floor(x) / MIB for x in mine]
            axes[0, column].plot(at, least, ":", color=f"C{color}")
            sent = [x["sent_bytes"] / MIB for x in mine]
            axes[1, column].plot(at, sent, **style)
        for axis in axes[:, column]:
            axis.set_xscale("log", base=2)
            axis.set_xlabel(key)
            axis.set_yscale("log")
    axes[0, 0].set_ylabel("MiB moved by a chip (dotted: floor)")
    axes[1, 0].set_ylabel("MiB sent by a chip")
    axes[0, 0].legend()
    figure.suptitle("An update of Llama 3.1 70B's adapters, by XLA's own count")
    figure.tight_layout()
    figure.savefig(output, dpi=100)
    plt.close(figure)


def _is_update(row: Row) -> bool:
    return bool(row["program"] == "update")
