"""A sweep over learning rates: the best on validation data is kept."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from examples.finetune_llm.errors import Refused


class Swept(NamedTuple):
    """One run of a sweep.

    Attributes:
      rate: Its peak learning rate.
      loss: On validation data, at its end, in nats; NaN where it diverged.
      folder: Its files.
    """

    rate: float
    loss: float
    folder: Path


def run_folder(output: Path, rate: float) -> Path:
    """Where a run of a sweep is kept."""
    return output / "rates" / f"{rate:g}"


def sweep(
    rates: Sequence[float], output: Path, train: Callable[[float, Path], float]
) -> list[Swept]:
    """Trains once with each rate, in ascending order.

    Args:
      rates: The rates.
      output: Of the whole sweep.
      train: From a rate and a folder to the loss on validation data. A run that is
        complete in its folder gives its loss again.
    """
    folders = {rate: run_folder(output, rate) for rate in sorted(set(rates))}
    return [Swept(rate, train(rate, at), at) for rate, at in folders.items()]


def best(runs: Sequence[Swept]) -> Swept:
    """The run with the lowest loss.

    Raises:
      Refused: No run has a loss that is a number.
    """
    finite = [run for run in runs if math.isfinite(run.loss)]
    if not finite:
        rates = ", ".join(f"{run.rate:g}" for run in runs)
        raise Refused(f"every rate of {rates} diverged; give lower ones to --rates.")
    return min(finite, key=lambda run: run.loss)


def print_sweep(runs: Sequence[Swept], console: Console) -> None:
    """A table, the best run marked, with a word where the best may lie outside."""
    first = best(runs)
    table = Table("rate", "validation loss", "")
    for run in runs:
        table.add_row(f"{run.rate:g}", f"{run.loss:.4f}", "best" * (run is first))
    console.print(table)
    if len(runs) > 1 and first in (runs[0], runs[-1]):
        side = "lower" if first is runs[0] else "higher"
        console.print(f"the best rate is at the edge: try {side} ones, too")
