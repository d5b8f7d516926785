"""What a run leaves to look at: metrics as JSONL and for TensorBoard, a picture."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from tensorboardX import SummaryWriter

METRICS, PICTURE, SETTINGS = "metrics.jsonl", "picture.png", "run.json"


class Report:
    """Metrics by step, in a file of lines and in TensorBoard's format.

    A run that goes on from a checkpoint repeats the steps behind it, so lines of later
    steps are taken away first. Only one process of a run may be `active`.
    """

    def __init__(self, folder: Path, *, step: int = 0, active: bool = True):
        self.active = active
        if active:
            keep = [row for row in read_metrics(folder) if row["step"] <= step]
            folder.mkdir(parents=True, exist_ok=True)
            _replace(folder / METRICS, "".join(map(_line, keep)))
            self.file = (folder / METRICS).open("a", encoding="utf-8")
            board = folder / "tensorboard"
            self.board = SummaryWriter(str(board), purge_step=step + 1)

    def write(self, step: int, **values: Any) -> None:
        """Adds the numbers of a step; a text goes to TensorBoard as text."""
        if not self.active:
            return
        self.file.write(_line({"step": step, **values}))
        self.file.flush()
        for name, value in values.items():
            if isinstance(value, str):
                self.board.add_text(name, value, step)
            else:
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes out what is buffered."""
        if self.active:
            self.file.close()
            self.board.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run; one that was cut off by a crash does not count."""
    path = folder / METRICS
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _line(row: dict[str, Any]) -> str:
    # JSON has no NaN; `null` is what other readers understand.
    plain = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v
        for k, v in row.items()
    }
    return json.dumps(plain, ensure_ascii=False) + "\n"


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text, "utf-8")
    os.replace(temporary, path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a file that is either complete or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def curve(rows: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric, where it was written and is finite."""
    found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def save_picture(
    path: Path,
    runs: dict[str, Sequence[dict[str, Any]]],
    sweep: Sequence[tuple[float, float]] = (),
) -> None:
    """Losses against the step; with a sweep, also validation loss against the rate.

    Args:
      path: The file, whose suffix says the format.
      runs: The metrics of each run by its name.
      sweep: Pairs of rate and validation loss.
    """
    mpl.use("Agg")
    panels = 2 if sweep else 1
    figure, axes = plt.subplots(
        1, panels, figsize=(5.2 * panels, 3.8), layout="constrained", squeeze=False
    )
    left = axes[0, 0]
    for i, (name, rows) in enumerate(runs.items()):
        steps, losses = curve(rows, "loss")
        width = max(1, len(losses) // 20)
        smooth = np.convolve(losses, np.ones(width) / width, "valid") if losses else []
        left.plot(steps[width - 1 :], smooth, c=f"C{i}", label=f"{name}, training")
        steps, losses = curve(rows, "validation_loss")
        left.plot(steps, losses, "o--", c=f"C{i}", label=f"{name}, validation")
    left.set(xlabel="step", ylabel="loss, nats per token")
    left.legend()
    if sweep:
        rates, losses = zip(*sweep, strict=True)
        right = axes[0, 1]
        right.plot(rates, losses, "o-")
        right.set(
            xscale="log", xlabel="peak learning rate", ylabel="validation loss, nats"
        )
        right.set_xticks(rates, [f"{rate:g}" for rate in rates])
        right.minorticks_off()
    figure.savefig(path, dpi=110)
    plt.close(figure)
