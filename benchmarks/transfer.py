r"""Does one learning rate serve every rank, scale and start?

    python -m benchmarks.transfer            # four hours on one core, in parts
    python -m benchmarks.transfer --quick    # 2 minutes: a smoke test
    python -m benchmarks.transfer --methods full LoRA:nesterov lorapro_adamw:nesterov \
        --ranks 4 --starts LoRA              # enough to see it, 15 minutes
    python -m benchmarks.transfer --report   # of the results that are there

The byte-level language model of `benchmarks.quality` goes from Python source to prose
in 200 steps, with ranks from 2 to 64 (which is the width: no limit any more), and s in
W0 + s B A from 1/16 to 16. So the conventions are all in there: alpha = 1, r, 2r or 16
at these ranks, divided by r or by its root, are s from 1/64 to 11. At ranks 4 and 16
also from other starts: PiSSA, LoRA-GA, and an A that is 8 times as large, or as small,
as LoRA's own.

Every cell is a sweep over learning rates, two a decade, which grows until the best is
not at its end; three seeds. The *regret* of a rate in a cell is how much higher its
validation loss is than the best of that cell, whose runs are all from the same weights.
`benchmarks.transfer_report` says how large it is when one rate is kept for all cells.
Cells that are in the results already are not run again.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.progress import track

from benchmarks.initializers import Start, first_gradients, started
from benchmarks.measure import fingerprint, machine
from benchmarks.methods import METHODS
from benchmarks.quality import COARSE, cached
from benchmarks.quality_report import WIDTH, best_run, load, write
from benchmarks.tasks import SETTINGS
from benchmarks.transfer_report import report
from examples.byte_lm import ByteLM
from examples.training import Data, Run, Task, loss_and_accuracy, schedule, take_batch
from lorapro_jax.initializers import lora_ga, pissa

STEPS, SEEDS, WORST = 200, 3, float(np.log(128))
SCALES = (1 / 16, 1 / 4, 1.0, 4.0, 16.0)
RANKS = {2: SCALES[::2], 4: SCALES, 16: SCALES[::2], 64: SCALES[::2]}
STARTS: dict[str, Start | float] = {
    "LoRA": 1.0, "A * 8": 8.0, "A / 8": 1 / 8,
    "PiSSA": Start(pissa(), 2), "LoRA-GA": Start(lora_ga(), 2),
}  # fmt: skip
OTHER_STARTS_AT = (4, 16)
RATES = {  # where sweeps begin, at rank 4 and s = 1; one that ends too soon goes on
    "LoRA": (3.2e-3, 3.2e-1), "LoRA:nesterov": (3.2e-3, 3.2e-1),
    "lorapro+AdamW": (3.2e-3, 3.2e-1), "LoRA+": (3.2e-4, 3.2e-2),
}  # fmt: skip
OTHERS = (1e-3, 1e-1)
TRIED = (
    "full", "LoRA", "LoRA:nesterov", "LoRA+", "lora_rite", "lorapro+AdamW",
    "lorapro_adamw", "lorapro_adamw:nesterov",
)  # fmt: skip


class Scale(nnx.Variable[jax.Array]):
    """The s of a layer."""


class ScaledLinear(nnx.LoRALinear):
    """W0 x + s B A x, with s in the state."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.s = Scale(jnp.ones(()))

    def __call__(self, inputs: Any, out_sharding: Any = None) -> Any:  # noqa: D102
        base = nnx.Linear.__call__(self, inputs, out_sharding)
        return base + self.s[...] * self.lora(inputs)


class Cell(NamedTuple):
    """What a learning rate should not depend on."""

    rank: int | None
    scale: float
    start: str


def new_model(rank: int | None, seed: Any) -> ByteLM:
    """The model of `examples.byte_lm`, with an s in every layer."""
    return ByteLM(nnx.Rngs(jax.random.key(seed)), rank=rank, adapted=ScaledLinear)


def begin(task: Task, base: nnx.State, cell: Cell, seed: int) -> nnx.State:
    """The whole state of the model before the first step."""
    model = new_model(cell.rank, seed)
    nnx.update(model, base)
    graph, state = nnx.split(model)
    if cell.rank is None:
        return state
    start, scale = STARTS[cell.start], jnp.asarray(cell.scale)
    scaled = lambda _, x: x.replace(scale) if isinstance(x, Scale) else x
    state = nnx.map_state(scaled, state)
    if isinstance(start, float):
        larger = lambda path, x: (
            x.replace(x[...] * start) if path[-1] == "lora_a" else x
        )
        return nnx.map_state(larger, state)
    key = jax.random.key(seed)
    gradients = first_gradients(task, state, graph, key)
    return started(start, state, gradients, key, cell.scale)


def make_runs(
    task: Task, method: str, rank: int | None, steps: int
) -> Callable[..., Any]:
    """A compiled `(states, scale, rates, seeds)` to validation and test losses.

    The states, rates and seeds have a leading axis, one entry a run.
    """
    recipe = METHODS[method]
    trains = recipe.trains or nnx.LoRAParam
    graph = nnx.graphdef(new_model(rank, 0))

    def loss_of(trainable: Any, frozen: Any, data: Data) -> jax.Array:
        return loss_and_accuracy(nnx.merge(graph, trainable, frozen), data)[0]

    def run(state: Any, scale: Any, rate: Any, seed: Any) -> tuple[jax.Array, ...]:
        trainable, frozen = state.split(trains, ...)
        tx = recipe.make(schedule(rate, steps), scale)
        key = jax.random.key(seed)

        def step(carry: Any, index: Any) -> tuple[Any, None]:
            trainable, opt_state = carry
            batch = take_batch(Run(None, None, None, None, key, index), task)
            grads = jax.grad(loss_of)(trainable, frozen, batch)
            updates, opt_state = tx.update(grads, opt_state, trainable)
            return (optax.apply_updates(trainable, updates), opt_state), None

        start = trainable, tx.init(trainable)
        (trainable, _), _ = jax.lax.scan(step, start, jnp.arange(steps))
        return tuple(
            loss_of(trainable, frozen, x) for x in (task.validation, task.test)
        )

    return jax.jit(jax.vmap(run, in_axes=(0, None, 0, 0)))


class Sweep(NamedTuple):
    """One method on the task; `programs` are by rank."""

    task: Task
    base: nnx.State
    method: str
    programs: dict[int | None, Any]
    seeds: int = SEEDS
    steps: int = STEPS
    extensions: int = 4

    def measure(self, cell: Cell, rates: list[float]) -> list[dict[str, Any]]:
        """All rates and seeds, an entry for each rate."""
        states = [begin(self.task, self.base, cell, seed) for seed in range(self.seeds)]
        stacked = jax.tree.map(
            lambda *xs: jnp.concatenate([jnp.stack(xs)] * len(rates)), *states
        )
        if cell.rank not in self.programs:
            made = make_runs(self.task, self.method, cell.rank, self.steps)
            self.programs[cell.rank] = made
        runs = self.programs[cell.rank]
        each = jnp.repeat(jnp.asarray(rates), self.seeds)
        seeds = jnp.tile(jnp.arange(self.seeds), len(rates))
        found = runs(stacked, jnp.asarray(cell.scale), each, seeds)
        losses = [
            np.fmin(np.asarray(x, np.float64), WORST).round(5).reshape(len(rates), -1)
            for x in found
        ]
        return [
            {"rate": r, "validation_loss": v.tolist(), "test_loss": t.tolist()}
            for r, v, t in zip(rates, *losses, strict=True)
        ]

    def cell(self, cell: Cell, rates: Iterable[float]) -> list[dict[str, Any]]:
        """The sweep of one cell."""
        runs = self.measure(cell, list(rates))
        for _ in range(self.extensions):
            runs.sort(key=lambda run: run["rate"])
            best = runs.index(best_run({"runs": runs}))
            if 0 < best < len(runs) - 1:
                break
            at = COARSE.index(runs[best]["rate"])
            beyond = [at - 1, at - 2] if best == 0 else [at + 1, at + 2]
            more = [COARSE[k] for k in beyond if 0 <= k < len(COARSE)]
            if not more:
                break
            runs += self.measure(cell, more)
        return sorted(runs, key=lambda run: run["rate"])


def cells(method: str, args: argparse.Namespace) -> list[Cell]:
    """All that a method is tried on."""
    if METHODS[method].trains is not None:
        return [Cell(None, 1.0, "LoRA")]
    found = []
    for rank in args.ranks:
        if "LoRA" in args.starts:
            found += [Cell(rank, scale, "LoRA") for scale in args.scales or RANKS[rank]]
        if rank in OTHER_STARTS_AT:
            found += [Cell(rank, 1.0, x) for x in args.starts if x != "LoRA"]
    return found


def parse() -> argparse.Namespace:
    """The options, `--quick` applied."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two cells, two rates")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*TRIED])
    parser.add_argument("--ranks", nargs="+", type=int, choices=RANKS, default=[*RANKS])
    parser.add_argument("--scales", nargs="+", type=float)
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=[*STARTS])
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--output", type=Path, help="of the JSON; a PNG goes beside it")
    parser.add_argument("--report", action="store_true", help="do not measure")
    args = parser.parse_args()
    folder = Path("out" if args.quick else "benchmarks/results")
    args.output = args.output or folder / "transfer.json"
    if args.quick:
        args.ranks, args.scales, args.starts = [4], [1.0, 16.0], ["LoRA"]
        args.methods, args.seeds = args.methods[:1] + args.methods[-1:], 1
    return args


def main() -> None:
    """Runs what is not in the results yet, saved after each cell; then reports."""
    args, console = parse(), Console(width=WIDTH, markup=False)
    cached()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    result = load(args.output) or {"task": "prose", "rows": []}
    bar = lambda chunks: track(chunks, "what it knows".ljust(50))
    if not args.report:
        task, base, _ = SETTINGS["prose"].load(quick=args.quick, bar=bar)
        result |= {"machine": machine(), "steps": 10 if args.quick else STEPS}
        weights = fingerprint(base)
    for method in args.methods if not args.report else ():
        sweep = Sweep(task, base, method, {}, args.seeds, result["steps"])
        low, high = RATES.get(method, OTHERS)
        rates = [rate for rate in COARSE if low <= rate <= high]
        if args.quick:
            rates, sweep = rates[3:5], sweep._replace(extensions=0)
        for cell in track(cells(method, args), method.ljust(50)):
            key = {"method": method, **cell._asdict()}
            if any(key.items() <= row.items() for row in result["rows"]):
                continue
            begun = time.time()
            runs = sweep.cell(cell, rates)
            row = {**key, "weights": weights, "runs": runs}
            row["minutes"] = round((time.time() - begun) / 60, 2)
            result["rows"].append(row)
            write(args.output, result)
    report(args.output, console)


if __name__ == "__main__":
    sys.exit(main())
