"""The training loop: what happens between steps, and before and after them.

On one mesh a run ends with the same bits however often it is killed and goes on.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from examples.finetune_llm.checkpoints import Saver
from examples.finetune_llm.data import batches
from examples.finetune_llm.packing import Batch
from examples.finetune_llm.step import (
    ROWS,
    Metrics,
    Parts,
    Run,
    loss_and_count,
    loss_and_gradient,
    make_step,
    mean_loss,
    split,
)

__all__ = [
    "Metrics",
    "Parts",
    "Run",
    "abstract_run",
    "begin",
    "fit",
    "loss_and_count",
    "loss_and_gradient",
    "make_step",
    "mean_loss",
    "put",
    "share_of_process",
    "split",
]


def unreported(step: int, metrics: dict[str, float]) -> None:
    """For those who do not want to know."""


def begin(trainable: Any, tx: optax.GradientTransformation, mesh: Mesh) -> Run:
    """A run at its start, on the mesh, without touching the given arrays."""

    def place(x):
        there = isinstance(x.sharding, NamedSharding) and x.sharding.mesh == mesh
        return jnp.copy(x) if there else jax.device_put(x, NamedSharding(mesh, P()))

    trainable = jax.tree.map(place, trainable)
    where = jax.tree.map(lambda x: x.sharding, abstract_run(trainable, tx, mesh))
    opt_state = jax.jit(tx.init, out_shardings=where.opt_state)(trainable)
    return Run(trainable, opt_state, jax.device_put(jnp.int32(0), where.step))


def abstract_run(trainable: Any, tx: optax.GradientTransformation, mesh: Mesh) -> Run:
    """Shapes and shardings of a run, from arrays or from shapes with shardings.

    What the optimizer keeps for a factor in the factor's shape is divided as the factor
    is; the rest is small, and on every device.
    """
    like = {tuple(path): x for path, x in jax.tree.leaves_with_path(trainable)}

    def place(path, x):
        owners = [like[y] for i in range(len(path)) if (y := tuple(path[i:])) in like]
        same = [owner.sharding for owner in owners if owner.shape == x.shape]
        where = same[0] if same else NamedSharding(mesh, P())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    new = lambda trainable: Run(trainable, tx.init(trainable), jnp.int32(0))
    shapes = jax.eval_shape(new, trainable)
    return jax.tree_util.tree_map_with_path(place, shapes)


def share_of_process(mesh: Mesh, rows: int) -> tuple[int, int]:
    """Which share of a batch's rows this process holds, and how many shares there are.

    Processes that hold the same rows, because only "tp" divides them, share a share.
    """
    held: Any = NamedSharding(mesh, ROWS).addressable_devices_indices_map((rows,))
    bounds = [index[0].indices(rows)[:2] for index in held.values()]
    first, last = min(x for x, _ in bounds), max(x for _, x in bounds)
    return first // (last - first), rows // (last - first)


def put(batch: Batch, mesh: Mesh, rows: int) -> Batch:
    """This process's share of a batch as arrays of all processes, `(rows, t)`."""
    where = NamedSharding(mesh, ROWS)
    place = lambda x: jax.make_array_from_process_local_data(
        where, x, (rows, *x.shape[1:])
    )
    return jax.tree.map(place, batch)


def fit(
    spec: Any,
    model: nnx.Module,
    tx: optax.GradientTransformation,
    examples: Sequence[Any],
    *,
    mesh: Mesh,
    steps: int,
    batch: int,
    length: int,
    seed: int,
    packing: bool = False,
    accumulate: int = 1,
    trains: Any = nnx.LoRAParam,
    folder: Path | None = None,
    save_every: int = 100,
    settings: dict[str, Any] | None = None,
    report: Callable[[int, dict[str, float]], None] = unreported,
    watch: Sequence[tuple[int, Callable[[int, nnx.Module], None]]] = (),
) -> int:
    """Trains a model in place, from the latest checkpoint on if there is one.

    Args:
      spec: From `models.read_spec`.
      model: With adapters, on the mesh.
      tx: From `new_optimizer`.
      examples: From `read_examples`, the same in every process.
      mesh: With an axis "fsdp"; its size times `accumulate` divides `batch`.
      steps: To have done at the end, those before a restart included.
      batch: Rows of a step.
      length: Tokens of a row.
      seed: Of the order of the data.
      packing: Whether short examples share a row.
      accumulate: Parts that a batch is computed in, one after the other.
      trains: Filter of what is trained.
      folder: Of the checkpoints; None for none.
      save_every: Steps between checkpoints; the last step is saved, too, and alone
        with 0.
      settings: What a checkpoint must have been made with to go on from it, as JSON.
      report: Called for every step k = 1, 2, … in order, with the metrics `loss`,
        `tokens`, `gradient_norm` and `seconds`.
      watch: Functions of the steps done and the model, each with the number of steps
        between its calls (0 for never); all are called after the last step as well.

    A watching function is given the arrays of the run: it may not keep them, because
    the next step consumes them.

    Returns:
      The steps that were done before, by the checkpoint; 0 for a new run.
    """
    parts = split(model, trains)
    run = begin(parts.trainable, tx, mesh)
    where = jax.tree.map(lambda x: x.sharding, run)
    step_fn = make_step(
        spec, parts.graph, tx, mesh=mesh, accumulate=accumulate, out_shardings=where
    )
    index, count = share_of_process(mesh, batch)
    source = batches(
        examples, batch=batch, length=length, seed=seed, packing=packing,
        process_index=index, process_count=count,
    )  # fmt: skip
    save_every = save_every or steps
    with Saver(folder, save_every, steps, settings or {}) as saver, mesh:
        run = saver.resume(run)
        before = int(run.step)
        source.set_state({"next_index": before})
        reporter = Reporter(report)
        for step in range(before + 1, steps + 1):
            run, metrics = step_fn(run, parts.frozen, put(next(source), mesh, batch))
            reporter(step, metrics)
            due = [fn for n, fn in watch if n and (step % n == 0 or step == steps)]
            if due:
                reporter.flush()
                now = nnx.merge(parts.graph, run.trainable, parts.frozen)
                for fn in due:
                    fn(step, now)
                reporter.begun = time.perf_counter()
            if step % save_every == 0 or step == steps:
                reporter.flush()  # what a checkpoint is behind has been reported
            saver(step, run)
        reporter.flush()
    nnx.update(model, run.trainable)
    return before


class Reporter:
    """Reads a step's metrics when the next one has begun: the device need not wait."""

    def __init__(self, report: Callable[[int, dict[str, float]], None]):
        self.report = report
        self.waiting: tuple[int, Metrics] | None = None
        self.begun = time.perf_counter()

    def __call__(self, step: int, metrics: Metrics) -> None:
        """Reports the step before."""
        self.flush()
        self.waiting = step, metrics

    def flush(self) -> None:
        """Reports what has not been, and so waits for it."""
        if self.waiting is None:
            return
        step, metrics = self.waiting
        values = {k: float(v) for k, v in metrics._asdict().items()}
        now = time.perf_counter()
        self.report(step, {**values, "seconds": now - self.begun})
        self.begun, self.waiting = now, None
