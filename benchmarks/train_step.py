"""What LoRA-Pro adds to a whole training step: forward, backward and optimizer.

Real models on real data, all with LoRA of rank 8 on every linear layer: the vision
transformer and the byte-level language model of the examples at their sizes, and the
latter with 12 layers of width 768 on 1,024 tokens. The contenders differ in their
optimizer alone: `optax.adamw`, `lorapro()` before it, and `lorapro_adamw`. Each is
checked to lower the loss of a batch before it is timed. They take turns, so that what
else the machine does hits all alike; `x LoRA` is the median over the turns of the
ratio within a turn, ± half the range between its quartiles, and is held against the
most that it should be.

    $ python -m benchmarks.train_step --quick    # the small models, under a minute
    $ python -m benchmarks.train_step            # all, to benchmarks/results/
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from rich import box
from rich.console import Console
from rich.table import Table

from examples import byte_lm, vit_digits
from examples.training import Data, loss_and_accuracy
from lorapro_jax import lorapro, lorapro_adamw

from .measure import Contender, machine, save

RANK, RATE = 8, 1e-4
RESULTS = Path(__file__).parent / "results"
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "LoRA, AdamW": lambda: optax.adamw(RATE),
    "lorapro, AdamW": lambda: optax.chain(lorapro(), optax.adamw(RATE)),
    "lorapro_adamw": lambda: lorapro_adamw(RATE),
}
LIMITS = {
    "cpu": {"lorapro, AdamW": 1.03, "lorapro_adamw": 1.06},
    "gpu": {"lorapro, AdamW": 1.01, "lorapro_adamw": 1.02},
}


class Model(NamedTuple):
    """A model with adapters, the data it learns, and how much of it at once."""

    new: Callable[[], nnx.Module]
    load: Callable[[], Data]
    batch: int
    steps_a_turn: int


def _large() -> nnx.Module:
    return byte_lm.ByteLM(nnx.Rngs(0), width=768, depth=12, heads=12, rank=RANK)


MODELS = {
    "ViT, width 48": Model(
        lambda: vit_digits.new_vit(RANK, 0), lambda: vit_digits.load_tasks()[1].train,
        64, 40,
    ),
    "LM, width 64": Model(
        lambda: byte_lm.new_lm(RANK, 0), lambda: byte_lm.load_tasks()[1].train, 16, 40
    ),
    "LM, width 768": Model(_large, lambda: byte_lm.load_tasks()[1].train, 16, 1),
}  # fmt: skip


def contender(model: Model, batch: Data, name: str) -> Contender:
    """A compiled training step, donated, that lowers the loss of its batch."""
    graph, trainable, frozen = nnx.split(model.new(), nnx.LoRAParam, ...)
    tx = OPTIMIZERS[name]()

    def loss_fn(trainable, frozen, batch):
        return loss_and_accuracy(nnx.merge(graph, trainable, frozen), batch)[0]

    def step(carry, fixed):
        trainable, opt_state = carry
        grads = jax.grad(loss_fn)(trainable, *fixed)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state

    carry = trainable, tx.init(trainable)
    found = Contender(name, step, carry, (frozen, batch), donate=True).compile()
    measure = jax.jit(loss_fn)
    before = float(measure(trainable, frozen, batch))
    for _ in range(4):
        found.run()
    after = float(measure(found.carry[0], frozen, batch))
    if not after < before:
        raise AssertionError(f"{name}: the loss went from {before} to {after}")
    return found


def run_model(name: str, turns: int) -> list[dict[str, Any]]:
    """A row for each contender."""
    model = MODELS[name]
    batch = jax.tree.map(lambda x: x[: model.batch], model.load())
    contenders = [contender(model, batch, optimizer) for optimizer in OPTIMIZERS]
    rng = np.random.default_rng(0)
    totals: dict[str, list[float]] = {x.name: [] for x in contenders}
    for _ in range(turns):
        for i in rng.permutation(len(contenders)):
            one = contenders[i]
            for _ in range(model.steps_a_turn):
                one.time()
            totals[one.name].append(float(np.mean(one.times[-model.steps_a_turn :])))
    baseline = np.array(totals["LoRA, AdamW"])
    rows = []
    for one in contenders:
        ratios = np.array(totals[one.name]) / baseline
        low, median, high = np.percentile(ratios, (25, 50, 75))
        rows.append(
            {
                "model": name,
                "contender": one.name,
                "median_ms": 1e3 * float(np.median(totals[one.name])),
                "x_lora": float(median),
                "spread": float(high - low) / 2,
                "limit": LIMITS[_platform()].get(one.name),
                "compile_s": one.trace_s + one.compile_s,
            }
        )
    return rows


def _platform() -> str:
    return "cpu" if jax.default_backend() == "cpu" else "gpu"


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows for people."""
    result = Table("model", "optimizer", box=box.SIMPLE)
    for column in ("ms a step", "x LoRA", "at most", "", "compile"):
        result.add_column(column, justify="right")
    for row in rows:
        limit = row["limit"]
        verdict = ("yes" if row["x_lora"] <= limit else "NO") if limit else ""
        result.add_row(
            row["model"],
            row["contender"],
            f"{row['median_ms']:.2f}",
            f"{row['x_lora']:.3f} ± {row['spread']:.3f}",
            f"{limit:.2f}" if limit else "",
            verdict,
            f"{row['compile_s']:.1f} s",
        )
    return result


def main() -> None:
    """Times the models asked for, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description="What LoRA-Pro adds to a step.")
    parser.add_argument("--quick", action="store_true", help="small models, few turns")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--output", type=Path, help="of the JSON")
    args = parser.parse_args()
    if args.quick:
        args.models, args.turns = list(MODELS)[:2], 3
    rows: list[dict[str, Any]] = []
    for name in args.models:
        print(f"{name} ...", file=sys.stderr)
        rows += run_model(name, args.turns)
    Console(width=110, markup=False).print(table(rows))
    output = args.output or RESULTS / f"train-step-{_platform()}.json"
    save({"machine": machine(), "rows": rows}, output)


if __name__ == "__main__":
    main()
