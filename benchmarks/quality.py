r"""What is lost by LoRA, and how much of it does each method bring back?

    python -m benchmarks.quality                  # everything: many hours on two cores
    python -m benchmarks.quality --quick          # 2 minutes: a smoke test
    python -m benchmarks.quality --tasks prose --ranks 16 --seeds 3 \
        --methods full LoRA:nesterov lorapro_adamw:nesterov    # the main result, 15 min

Four tasks (`benchmarks.tasks`), each from weights that know another, and the methods of
`benchmarks.methods`. All see the same batches, warm up over a tenth of the steps and
decay by a cosine. A sweep begins with two learning rates a decade, grows until the best
is not at its end, and then has both neighbours of the best on a grid of four a decade.
The rate is chosen by the mean validation loss; test data are reported at it, and
differences between methods are those of the same seed: same factors to start from,
same batches.

Each task has a file, `benchmarks/results/quality-TASK.json`, saved after every sweep;
sweeps that are in it with the same steps and at least as many seeds are not run again,
so a run that was stopped goes on. Tasks keep one core busy each, so run two side by
side, each on a core of its own (`taskset -c 0`). How XLA divides sums among threads
changes the pretrained weights, and the runs from them by more than methods differ: so a
row says which weights it is from, and is not compared with others.
`benchmarks.quality_report` says what is made of the results.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from benchmarks.measure import fingerprint, machine, tree_bytes
from benchmarks.methods import ALL_BUT_DENSE, METHODS, Recipe
from benchmarks.quality_report import WIDTH, best_run, load, report, write
from benchmarks.tasks import SETTINGS, Missing, Setting
from examples.training import CHUNK, Method, Task, evaluate, train

GRID = tuple(float(f"{m}e{e}") for e in range(-6, 2) for m in (1, 1.8, 3.2, 5.6))
COARSE = GRID[::2]


class Sweeper(NamedTuple):
    """Trains methods on one task, from the same weights."""

    setting: Setting
    task: Task
    base: Any
    seeds: int
    steps: int
    extensions: int = 4
    refine: bool = True

    def capped(self, loss: Any) -> np.ndarray:
        """Chance level for a run that has diverged: worse is not more informative."""
        loss = np.fmin(loss, math.log(self.setting.classes))
        return np.asarray(loss, np.float64).round(5)

    def measure(self, method: Method, title: str) -> list[dict[str, Any]]:
        """All rates and seeds of a method, an entry for each rate."""
        task = self.task
        bar = lambda chunks: track(chunks, title.ljust(50))
        seeds = jnp.arange(self.seeds)
        runs = train(task, method, self.base, seeds, self.steps, progress=bar).runs
        validation, _ = evaluate(task, method, runs, task.validation)
        test, accuracy = evaluate(task, method, runs, task.test)
        size = tree_bytes(runs.opt_state) // validation.size
        found = zip(method.rates, validation, test, accuracy, strict=True)
        return [
            {
                "rate": rate,
                "validation_loss": self.capped(validation).tolist(),
                "test_loss": self.capped(test).tolist(),
                "test_accuracy": np.asarray(accuracy).round(5).tolist(),
                "state_bytes": size,
            }
            for rate, validation, test, accuracy in found
        ]

    def sweep(self, method: Method, title: str) -> dict[str, Any]:
        """Measures a grid that grows while its best is at an end, then its middle."""
        runs: dict[float, dict[str, Any]] = {}

        def add(rates: Iterable[float]) -> None:
            new = [rate for rate in rates if rate not in runs]
            for i in range(0, len(new), self.setting.together):
                some = tuple(new[i : i + self.setting.together])
                text = f"{title}, rate {', '.join(f'{x:g}' for x in some)}"
                part = self.measure(method._replace(rates=some), text)
                runs.update((run["rate"], run) for run in part)

        add(method.rates)
        for _ in range(self.extensions):
            best = GRID.index(best_run({"runs": list(runs.values())})["rate"])
            beyond = [GRID[k] for k in (best - 2, best + 2) if 0 <= k < len(GRID)]
            if all(rate in runs for rate in beyond):
                break
            add(beyond)
        if self.refine:
            best = GRID.index(best_run({"runs": list(runs.values())})["rate"])
            add(GRID[k] for k in (best - 1, best + 1) if 0 <= k < len(GRID))
        return {"runs": sorted(runs.values(), key=lambda run: run["rate"])}


def rates_of(recipe: Recipe, factor: float, *, quick: bool) -> tuple[float, ...]:
    """Where the sweep of a method begins."""
    low, high = (0.9 * factor * recipe.low, 1.1 * factor * recipe.high)
    rates = [rate for rate in COARSE if low <= rate <= high]
    return tuple(rates[len(rates) // 2 :][:1] if quick else rates)


def prepare(name: str, seeds: int | None, *, quick: bool) -> tuple[Sweeper, float]:
    """The sweeps on one task, and the accuracy of the weights on what they know."""
    setting = SETTINGS[name]
    bar = lambda chunks: track(chunks, f"{name}: what it knows".ljust(50))
    task, base, accuracy = setting.load(quick=quick, bar=bar)
    seeds = 1 if quick else seeds or setting.seeds
    steps = 2 * CHUNK if quick else setting.steps
    sweeper = Sweeper(setting, task, base, seeds, steps)
    return sweeper._replace(extensions=0, refine=False) if quick else sweeper, accuracy


def is_done(row: dict[str, Any], key: dict[str, Any], seeds: int) -> bool:
    """Whether a sweep need not be run again."""
    return key.items() <= row.items() and len(row["runs"][0]["test_loss"]) >= seeds


def run_task(name: str, args: argparse.Namespace, console: Console) -> None:
    """Every method on one task, saved after each."""
    path = args.output / f"quality-{name}.json"
    try:
        sweeper, accuracy = prepare(name, args.seeds, quick=args.quick)
    except Missing as error:
        console.print(f"{name}: skipped, its data are missing: {error}")
        return
    result = load(path) or {"task": name, "rows": []}
    result |= {"machine": machine(), "pretrained_accuracy": accuracy}
    same = {"steps": sweeper.steps, "weights": fingerprint(sweeper.base)}
    for method in args.methods:
        recipe = METHODS[method]
        for rank in args.ranks if recipe.trains is None else [None]:
            key = {"method": method, "rank": rank, **same}
            if any(is_done(row, key, sweeper.seeds) for row in result["rows"]):
                continue
            begun = time.time()
            make = lambda rate, recipe=recipe: recipe.make(rate, 1.0)
            rates = rates_of(recipe, sweeper.setting.rates, quick=args.quick)
            title = f"{name}: {method}" + (f", rank {rank}" if rank else "")
            found = sweeper.sweep(
                Method(method, make, rates, rank, recipe.trains), title
            )
            minutes = round((time.time() - begun) / 60, 1)
            row = {**key, **found, "minutes": minutes}
            rest = [
                x for x in result["rows"] if (x["method"], x["rank"]) != (method, rank)
            ]
            result["rows"] = [*rest, row]
            write(path, result)


def parse() -> argparse.Namespace:
    """The options, `--quick` applied."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one rate, seed and rank")
    parser.add_argument("--tasks", nargs="+", choices=SETTINGS, default=[*SETTINGS])
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=[*ALL_BUT_DENSE]
    )
    parser.add_argument("--ranks", nargs="+", type=int, default=[4, 16])
    parser.add_argument("--seeds", type=int, help="of each task's own number otherwise")
    parser.add_argument("--output", type=Path, help="a folder")
    args = parser.parse_args()
    args.ranks = args.ranks[:1] if args.quick else args.ranks
    args.output = args.output or Path("out" if args.quick else "benchmarks/results")
    return args


def cached(folder: Path = Path("out/jax-cache")) -> None:
    """Programs that differ in nothing but learning rates are compiled once."""
    jax.config.update("jax_compilation_cache_dir", str(folder))


def main(run: Callable[..., None] = run_task) -> None:
    """Runs the benchmark; what is measured is saved after each sweep."""
    args, console = parse(), Console(width=WIDTH, markup=False)
    cached()
    args.output.mkdir(parents=True, exist_ok=True)
    for name in args.tasks:
        run(name, args, console)
    report(args.output, console)


if __name__ == "__main__":
    sys.exit(main())
