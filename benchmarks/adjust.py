"""What LoRA-Pro costs: time, memory, compilation, beside AdamW and the paper.

For the adapter trees of whole models, at several ranks, one run measures

* `lorapro`: the adjustment alone, from gradients and factors to new arrays;
* `adamw`: a step of `optax.adamw` with donated parameters and state;
* `lorapro + adamw`: a step of the two chained, donated likewise;
* `lorapro_adamw`: a step of it with factored moments, donated likewise, and up to
  rank 16 with Nesterov's momentum;
* `literal`: the paper's formula with its m×m projector (`literal.py`), at rank 8.
  **Extrapolated**: one pair of each distinct shape is timed, and multiplied by the
  number of pairs of that shape. Its memory is that of the largest single pair, and
  is held against that of `lorapro()` on the same pair alone.

Results are checked before anything is timed. The contenders then take turns, so
that what else the machine does hits all alike. `x adamw` and `x lorapro` are the
medians over the turns of the ratio within a turn. `floor` is the time that the memory
needs for each array once (gradients and factors in, steps out; for AdamW also its
state), at the bandwidth of a copy in place. Gradients stay the same from step to step:
the numbers in them do not matter for the time. On a GPU, `device` is what it did in a
step by its own profile, without the waits for Python. A second table holds the figures
against the limits in `limits.py`.

    $ python -m benchmarks.adjust --quick    # one small tree, under a minute
    $ python -m benchmarks.adjust            # all, to benchmarks/results/
    $ python -m benchmarks.adjust --stacking default never    # of like pairs
"""

import argparse
import collections
import math
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich import box
from rich.console import Console
from rich.table import Table

from lorapro_jax import lorapro, lorapro_adamw
from lorapro_jax.transforms import _groups

from . import limits
from .literal import check, literal, reference
from .measure import Contender, copy_bandwidth, machine, on_device, save, tree_bytes
from .trees import SCALE, TREES, build, is_stacked, random_pair, weights

RANKS = {
    "vit-b16": (8, 16, 64),
    "t5-base": (8, 16, 64, 128),
    "llama2-7b": (8, 16, 64),
    "llama2-7b-leaves": (8, 16, 64),
}
STACKING = {"default": _groups._stacking_pays}
STACKING |= {"always": lambda: True, "never": lambda: False}
STACKED = {"always": ", stacked", "never": ", one by one"}
NESTEROV, NESTEROV_UP_TO = "lorapro_adamw, Nesterov", 16  # beyond, memory is short
LITERAL_RANK = 8
DAMPING = 0.1
RESULTS = pathlib.Path(__file__).parent / "results"


def _adjusting(params: Any, grads: Any, damping: float = DAMPING) -> Contender:
    tx = lorapro(scale=SCALE, damping=damping)

    def step(params: Any, grads: Any) -> Any:
        return tx.update(grads, optax.EmptyState(), params)[0]

    return Contender("lorapro", step, params, grads).compile()


def _stepping(
    name: str, tx: optax.GradientTransformation, params: Any, grads: Any
) -> Contender:
    def step(carry: Any, grads: Any) -> Any:
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    own = jax.tree.map(jnp.copy, params)  # donated, so not to be shared
    return Contender(name, step, (own, tx.init(own)), grads, donate=True).compile()


def _literals(tree: str, rank: int) -> list[Contender]:
    """One pair of each distinct shape, checked against the package undamped."""
    counts = collections.Counter(shape for *_, shape in weights(tree))
    contenders = []
    for shape, count in counts.items():
        a, b, grad_a, grad_b, *_ = map(jnp.array, random_pair(shape, rank, seed=0))
        contender = Contender(
            f"literal {shape}",
            lambda factors, grads: literal(*factors, *grads, SCALE),
            (a.T, b.T),  # the paper's A and B
            (grad_a.T, grad_b.T),
            count=count,
        ).compile()
        factors = {"lora_a": a, "lora_b": b}
        grads = {"lora_a": grad_a, "lora_b": grad_b}
        ours = _adjusting(factors, grads, damping=0.0)
        steps = ours.run()
        check(contender.name, contender.run(), (steps["lora_a"].T, steps["lora_b"].T))
        contender.x_temp = contender.temp_bytes / ours.temp_bytes
        contenders.append(contender)
    return contenders


def _check_adjusted(tree: str, rank: int, result: Any) -> float:
    """The largest error of one pair of each distinct shape."""
    first: dict[tuple[int, int], tuple[int, str, str]] = {}
    for seed, (block, layer, shape) in enumerate(weights(tree)):
        first.setdefault(shape, (seed, block, layer))
    errors = []
    for shape, (seed, block, layer) in first.items():
        a, b, _, _, left, right = random_pair(shape, rank, seed)
        expected = reference(a.T, b.T, right.T, left.T, SCALE, DAMPING)
        stack, _, i = block.rpartition("_")
        if is_stacked(tree):
            got = jax.tree.map(lambda x, i=int(i): x[i], result[stack][layer])
        else:
            got = result[block][layer]
        steps = got["lora_a"].T, got["lora_b"].T
        errors.append(check(f"{tree} r={rank} {block}/{layer}", steps, expected))
    return max(errors)


class Case(NamedTuple):
    """All contenders on one tree, compiled.

    Attributes:
      facts: What the rows of all of them say.
      steps: `lorapro`, `adamw`, and both kinds of steps with LoRA-Pro.
      literals: The paper's formula for each shape.
    """

    facts: dict[str, Any]
    steps: list[Contender]
    literals: list[Contender]

    @classmethod
    def of(cls, tree: str, rank: int, with_literal: bool) -> "Case":
        """Compiles, and checks the adjustment."""
        params, grads = build(tree, rank)
        adjusting = _adjusting(params, grads)
        error = _check_adjusted(tree, rank, adjusting.run())
        chain = optax.chain(lorapro(scale=SCALE, damping=DAMPING), optax.adamw(1e-4))
        others = {
            "adamw": optax.adamw(1e-4),
            "lorapro + adamw": chain,
            "lorapro_adamw": lorapro_adamw(1e-4, scale=SCALE),
        }
        if rank <= NESTEROV_UP_TO:
            others[NESTEROV] = lorapro_adamw(1e-4, scale=SCALE, nesterov=True)
        steps = [_stepping(name, tx, params, grads) for name, tx in others.items()]
        facts = {"tree": tree, "rank": rank, "pairs": len([*weights(tree)])}
        facts |= {"factor_bytes": tree_bytes(params), "relative_error": error}
        literals = _literals(tree, rank) if with_literal else []
        return cls(facts, [adjusting, *steps], literals)

    def time(self, repeat: int) -> None:
        """All of them in turns, so that what else happens hits all alike."""
        contenders = self.steps + self.literals
        for contender in contenders:
            contender.run()  # warm-up
        rng = np.random.default_rng(0)
        for _ in range(repeat):
            for i in rng.permutation(len(contenders)):  # none profits from another
                contenders[i].time()

    def rows(self) -> Iterator[dict[str, Any]]:
        """A row for each contender."""
        size = self.facts["factor_bytes"]
        for contender in self.steps:
            row = _row([contender], self.steps, size) | on_device(contender)
            yield self.facts | row
        if self.literals:
            count = len(self.literals)
            note = f"extrapolated from one pair of each of {count} shapes"
            row = _row(self.literals, self.steps, size)
            row |= {"contender": "literal", "note": note}
            x_temp = min(x.x_temp for x in self.literals)
            yield self.facts | row | {"x_temp_of_a_pair": x_temp}


def run_case(
    tree: str, rank: int, repeat: int, with_literal: bool
) -> Iterator[dict[str, Any]]:
    """Checks and times all contenders on one tree: a row for each."""
    case = Case.of(tree, rank, with_literal and rank == LITERAL_RANK)
    case.time(repeat)
    yield from case.rows()


def _row(
    parts: list[Contender], contenders: list[Contender], factor_bytes: int
) -> dict[str, Any]:
    adjusting, adamw, *_ = contenders
    times = [sum(turn) for turn in zip(*(part.times for part in parts), strict=True)]
    moved = sum(part.count * part.moved for part in parts)
    temp = max(part.temp_bytes for part in parts)
    cpu = [sum(x) for x in zip(*(part.cpu_times for part in parts), strict=True)]
    median = float(np.median(times))
    return {
        "contender": parts[0].name,
        "median_ms": 1e3 * median,
        "best_ms": 1e3 * min(times),
        "x_adamw": float(np.median(np.divide(times, adamw.times))),
        "cpu_ms": 1e3 * float(np.median(cpu)),
        "x_adamw_cpu": float(np.median(np.divide(cpu, adamw.cpu_times))),
        "x_lorapro": float(np.median(np.divide(times, adjusting.times))),
        "temp_bytes": temp,
        "temp_per_factor_bytes": temp / factor_bytes,
        "moved_bytes": moved,
        "gb_per_s": moved / median / 1e9,
        "trace_s": sum(part.trace_s for part in parts),
        "compile_s": sum(part.compile_s for part in parts),
    }


def table(rows: Sequence[dict[str, Any]], bandwidth: float) -> Table:
    """The rows for people, with GB/s of a copy; the JSON holds more."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "ms": lambda row: f"{row['median_ms']:.1f}",
        "best": lambda row: f"{row['best_ms']:.1f}",
        "x adamw": lambda row: f"{row['x_adamw']:.2f}",
        "x cpu": lambda row: f"{row['x_adamw_cpu']:.2f}",
        "x lorapro": lambda row: f"{row['x_lorapro']:.2f}",
        "device": lambda row: f"{row.get('device_ms', math.nan):.2f}",
        "floor": lambda row: f"{row['moved_bytes'] / bandwidth / 1e6:.1f}",
        "temp MiB": lambda row: f"{row['temp_bytes'] / 2**20:.1f}",
        "/factors": lambda row: f"{row['temp_per_factor_bytes']:.2f}",
        "compile": lambda row: f"{row['trace_s'] + row['compile_s']:.1f} s",
    }
    if not any("device_ms" in row for row in rows):
        del columns["device"]
    result = Table("tree", "r", "contender", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in columns:
        result.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        name = row["contender"] + ("*" if "note" in row else "")
        tree = row["tree"] + STACKED.get(row.get("stacking"), "")
        cells = [cell(row) for cell in columns.values()]
        result.add_row(tree, str(row["rank"]), name, *cells)
    return result


def main() -> None:
    """Runs the cases asked for, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description="What LoRA-Pro costs.")
    parser.add_argument("--quick", action="store_true", help="ViT-B/16 at rank 8 only")
    parser.add_argument("--trees", nargs="+", choices=TREES, default=list(TREES))
    parser.add_argument("--ranks", nargs="+", type=int, help="of all trees")
    parser.add_argument(
        "--stacking", nargs="+", choices=STACKING, default=["default"],
        help="of like pairs; of trees with leaves it makes no difference",
    )  # fmt: skip
    parser.add_argument("--repeat", type=int, default=15, help="turns (default: 15)")
    parser.add_argument("--no-literal", action="store_true")
    parser.add_argument("--output", type=pathlib.Path, help="of the JSON")
    args = parser.parse_args()
    if args.quick:
        args.trees, args.ranks = ["vit-b16"], [LITERAL_RANK]

    jax.config.update("jax_enable_compilation_cache", False)  # compilation is timed
    info = machine()
    rows: list[dict[str, Any]] = []
    for tree in args.trees:
        for rank in args.ranks or RANKS[tree]:
            for stacking in args.stacking:
                print(f"{tree} r={rank} ...", file=sys.stderr)
                _groups._stacking_pays = STACKING[stacking]
                found = run_case(tree, rank, args.repeat, not args.no_literal)
                rows += [row | {"stacking": stacking} for row in found]
    speeds = copy_bandwidth()

    kind = "cpu" if info["platform"] == "cpu" else "gpu"
    usual = [row for row in rows if row["stacking"] == args.stacking[0]]
    checks = limits.checks(usual, kind)
    Console(width=120, markup=False).print(
        table(rows, speeds["in_place"]), limits.table(checks)
    )
    print("* extrapolated from one pair of each shape; memory: the largest pair")
    print(", ".join(f"copy GB/s {k} {v:.1f}" for k, v in speeds.items()))

    output = args.output or RESULTS / f"adjust-{kind}.json"
    report = {"machine": info, "copy_gb_per_s": speeds, "rows": rows}
    report["checks"] = [check._asdict() for check in checks]
    save(report, output)


if __name__ == "__main__":
    main()
