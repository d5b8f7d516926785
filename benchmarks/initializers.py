"""Where should the factors start, and which optimizer suits which start?

    python -m benchmarks.initializers            # an hour or more on two cores
    python -m benchmarks.initializers --quick    # 2 minutes: a smoke test
    python -m benchmarks.initializers --tasks prose --rank 16
    python -m benchmarks.initializers --report   # of the results that are there

The tasks, the optimizers and the sweeps are those of `benchmarks.quality`; side by
side, a process for each task, they take less. Every start is trained by AdamW, by
`lorapro()` before AdamW and by `lorapro_adamw`.

"LoRA" is what `nnx.LoRA` does by itself: A uniform with variance 2/n, and B = 0. The
others are those of `lorapro_jax.initializers` with their default arguments and s = 1,
the scale of `nnx.LoRA`. The gradients they start from are the means over the first 8
batches that the run will train on, at the pretrained weights, once for each seed; so
each seed has base weights of its own where a method changes these. A layer that is too
small for a method starts as in "LoRA": at rank 4 the first of the digits' for LoRA-GA,
which needs 8 singular vectors, and it has 4 inputs.

`benchmarks.initializers_report` says what is made of the results.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console
from rich.progress import track

from benchmarks.initializers_report import FULL, OPTIMIZERS, find, report, write
from benchmarks.measure import fingerprint, machine
from benchmarks.methods import METHODS
from benchmarks.quality import COARSE, Sweeper, cached, prepare
from examples.training import Method, Run, Task, loss_and_accuracy, take_batch
from lorapro_jax import estimate_gradients, find_pairs, initialize_adapters
from lorapro_jax.initializers import Initializer, gora, lora_ga, lora_one, pissa


class Start(NamedTuple):
    """How factors start, and how many inputs and outputs a layer needs for it."""

    method: Initializer
    size_over_rank: int = 1


STARTS = {
    "LoRA": None,
    "LoRA-GA": Start(lora_ga(), 2),
    "GoRA": Start(gora()),
    "LoRA-One": Start(lora_one()),
    "PiSSA": Start(pissa()),
}
BATCHES = 8
# Where each sweep begins: `benchmarks.quality` found all best rates in here.
RATES = tuple(rate for rate in COARSE if 3.2e-3 <= rate <= 3.2e-2)
TASKS = ("digits", "prose")


def first_gradients(task: Task, state: Any, graph: nnx.GraphDef, key: jax.Array) -> Any:
    """The mean gradient over the batches that a run with this key trains on first."""
    steps = [Run(None, None, None, None, key, jnp.int32(i)) for i in range(BATCHES)]
    return estimate_gradients(
        lambda state, batch: loss_and_accuracy(nnx.merge(graph, state), batch)[0],
        state,
        [take_batch(step, task) for step in steps],
        progress=False,
    )


def started(
    start: Start, state: Any, gradients: Any, key: jax.Array, scale: float = 1.0
) -> Any:
    """The state with factors that start so, where the layer is large enough."""
    kernel = lambda pair: pair.a.removesuffix("lora/lora_a") + "kernel"
    pairs = [
        pair
        for pair in find_pairs(state)
        if min(gradients[kernel(pair)].shape) >= start.size_over_rank * pair.rank
    ]
    options = {"key": key, "pairs": pairs, "scale": scale}
    return initialize_adapters(start.method, state, gradients, **options)


def states_of(task: Task, base: nnx.State, rank: int, seed: int) -> dict[str, Any]:
    """The whole state of the model by the name of its start."""
    model = task.new_model(rank, seed)
    nnx.update(model, base)
    graph, state = nnx.split(model)
    key = jax.random.key(seed)
    gradients = first_gradients(task, state, graph, key)
    return {
        name: state if start is None else started(start, state, gradients, key)
        for name, start in STARTS.items()
    }


def start_from(task: Task, states: Sequence[Any]) -> Task:
    """The task with models that start from these states, one for each seed.

    The base weights are in there, so `train` is to get none.
    """
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

    def new_model(rank, seed):
        model = task.new_model(rank, seed)
        nnx.update(model, jax.tree.map(lambda x: x[seed], stacked))
        return model

    return task._replace(new_model=new_model)


def run_task(name: str, args: argparse.Namespace, path: Path) -> None:
    """Every start with every optimizer on one task; saved after each."""
    sweeper, accuracy = prepare(name, args.seeds, quick=args.quick)
    task, base = sweeper.task, sweeper.base
    rates = RATES[1:2] if args.quick else RATES
    result: dict[str, Any] = {
        "machine": machine(),
        "task": name,
        "rank": args.rank,
        "steps": sweeper.steps,
        "pretrained_accuracy": accuracy,
        "weights": fingerprint(base),
    }
    rows = json.loads(path.read_text())["rows"] if known(args, path, sweeper) else []

    def add(sweeper: Sweeper, start: str | None, method: str) -> None:
        if find(rows, start, method) is None:
            rank = None if start is None else args.rank
            title = f"{name}: {start or 'all weights'}, {OPTIMIZERS[method]}"
            make = lambda rate: METHODS[method].make(rate, 1.0)
            tried = Method(method, make, rates, rank, METHODS[method].trains)
            found = sweeper.sweep(tried, title)
            rows.append({"start": start, "method": method, "rank": rank, **found})
        write(path, result | {"rows": rows})

    add(sweeper, None, FULL)
    seeds = track(range(args.seeds), f"{name}: gradients and starts".ljust(40))
    states = [states_of(task, base, args.rank, seed) for seed in seeds]
    for method in OPTIMIZERS:
        for start in STARTS if method != FULL else ():
            begins = start_from(task, [of_seed[start] for of_seed in states])
            add(sweeper._replace(task=begins, base=nnx.State({})), start, method)


def known(args: argparse.Namespace, path: Path, sweeper: Sweeper) -> bool:
    """Whether there are rows to go on with; ValueError if they are of other runs."""
    if not (args.resume and path.exists()):
        return False
    result = json.loads(path.read_text())
    seeds = len(result["rows"][0]["runs"][0]["test_loss"])
    found = result["steps"], seeds, result.get("weights")
    if found != (sweeper.steps, sweeper.seeds, fingerprint(sweeper.base)):
        raise ValueError(
            f"{path} has (steps, seeds, pretrained weights) {found}: pass the first "
            "two, and the same cores. Without `--resume` all is run anew."
        )
    return True


def parse() -> argparse.Namespace:
    """The options, `--quick` applied."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one task, rate and seed")
    parser.add_argument("--tasks", nargs="+", choices=TASKS)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="a folder")
    parser.add_argument("--resume", action="store_true", help="keep what is done")
    parser.add_argument("--report", action="store_true", help="do not measure")
    args = parser.parse_args()
    args.seeds = 1 if args.quick else args.seeds
    args.tasks = args.tasks or (["digits"] if args.quick else [*TASKS])
    args.output = args.output or Path("out" if args.quick else "benchmarks/results")
    return args


def main():
    """Runs the benchmark, a file for each task and rank, and reports all of them."""
    args = parse()
    args.output.mkdir(parents=True, exist_ok=True)
    cached()  # all starts of one optimizer are the same program
    for name in args.tasks if not args.report else ():
        run_task(name, args, args.output / f"initializers-{name}-{args.rank}.json")
    report(args.output, Console(width=120, markup=False))


if __name__ == "__main__":
    main()
