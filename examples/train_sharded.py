"""LoRA-Pro on many devices and hosts: data-parallel and FSDP, with checkpoints.

One process, on all devices that it sees, or on four simulated ones:

    python -m examples.train_sharded --quick
    python -m examples.train_sharded --quick --cpu-devices 4 --fsdp 2

Two processes on one machine (`--process 1` in a second terminal):

    python -m examples.train_sharded --quick --cpu-devices 2 --fsdp 2 \
        --coordinator localhost:8476 --processes 2 --process 0

On every host of a TPU pod, or with `srun` before it in a Slurm job:

    python -m examples.train_sharded --cluster --fsdp 8 --output /shared/run

A byte-level transformer is pretrained on Python source, then fine-tuned on English
prose. Weights, factors and optimizer state are divided over the mesh axis "fsdp", the
batch over both axes; each process loads its own rows of it. `--output` is one folder
for all processes: it gets a checkpoint every `--save-every` steps, and the same command
goes on from the last complete one, on any mesh. All need the same version of Python.
"""

import functools
import json
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import keystr, tree_map_with_path
from rich.progress import track

from examples.byte_lm import ByteLM, load_tasks
from examples.checkpointing import open_checkpoints, restore, save
from examples.training import Data, loss_and_accuracy, schedule
from lorapro_jax import lorapro, lorapro_adamw

OPTIMIZERS = {
    "adamw": optax.adamw,
    "lorapro_adamw": lorapro_adamw,
    "lorapro": lambda rate: optax.chain(lorapro(), optax.adamw(rate)),
}
RANK_AXIS = {"lora_a": -1, "lora_b": 0}  # of the factors, and of what is like them


class Run(NamedTuple):
    """What a checkpoint holds; the batches depend on the seed and the step alone."""

    trainable: Any
    opt_state: Any
    step: jax.Array
    losses: jax.Array  # of all steps, 0 for those to come


class Phase(NamedTuple):
    """What to train and how: the settings that go into a checkpoint, too."""

    name: str
    rank: int | None  # None trains all weights, without adapters
    optimizer: str
    rate: float
    steps: int
    batch: int
    depth: int
    seed: int


def join_processes(args: Namespace) -> None:
    """Connects to the other processes, if the command line says that there are any."""
    if args.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.cpu_devices)
    if args.coordinator:
        jax.distributed.initialize(args.coordinator, args.processes, args.process)
    elif args.cluster:
        jax.distributed.initialize()


def make_mesh(devices: Sequence[jax.Device], fsdp: int | None, batch: int) -> Mesh:
    """A mesh with `fsdp` devices to one copy of the weights, by default all."""
    count, fsdp = len(devices), fsdp or len(devices)
    if count % fsdp or batch % count:
        rule = f"--fsdp {fsdp} has to divide {count}, and {count} --batch {batch}"
        raise ValueError(f"found {count} devices: {rule}.")
    shape, types = (count // fsdp, fsdp), (AxisType.Auto,) * 2
    return jax.make_mesh(shape, ("data", "fsdp"), types, devices=devices)


def shardings(run: Run, mesh: Mesh) -> Run:
    """Divides each array on the largest axis that allows it and is not the rank."""

    def place(path, x):
        names, parts = keystr(path), mesh.shape["fsdp"]
        rank = [axis % x.ndim for name, axis in RANK_AXIS.items() if name in names]
        fits = [i for i in range(x.ndim) if i not in rank and x.shape[i] % parts == 0]
        largest = max(fits, key=lambda i: x.shape[i], default=None)
        spec = ["fsdp" if i == largest else None for i in range(x.ndim)]
        return NamedSharding(mesh, P(*spec))

    return tree_map_with_path(place, run)._replace(losses=NamedSharding(mesh, P()))


def load_batch(data: Data, phase: Phase, step: int, mesh: Mesh) -> Data:
    """The batch of a step as global arrays; each process reads only its own rows."""
    rng = np.random.default_rng((phase.seed, step))
    rows = rng.integers(len(data.labels), size=phase.batch)
    mine = np.split(rows, jax.process_count())[jax.process_index()]
    where = NamedSharding(mesh, P(("data", "fsdp")))
    put = lambda x: jax.make_array_from_process_local_data(where, np.asarray(x)[mine])
    return jax.tree.map(put, data)


def train(phase: Phase, data: Data, frozen: tuple, mesh: Mesh, args: Namespace) -> Run:
    """Trains on from the latest checkpoint; `frozen` is empty or holds the base."""
    tx = OPTIMIZERS[phase.optimizer](schedule(phase.rate, phase.steps))
    kind = nnx.Param if phase.rank is None else nnx.LoRAParam
    new_model = lambda: ByteLM(nnx.Rngs(phase.seed), depth=phase.depth, rank=phase.rank)

    def begin():
        trainable, losses = nnx.state(new_model(), kind), jnp.zeros(phase.steps)
        return Run(trainable, tx.init(trainable), jnp.int32(0), losses)

    graph, abstract = nnx.graphdef(nnx.eval_shape(new_model)), jax.eval_shape(begin)
    where = shardings(abstract, mesh)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=where)
    def train_step(run, frozen, batch):
        loss_fn = lambda x: loss_and_accuracy(nnx.merge(graph, x, *frozen), batch)[0]
        loss, grads = jax.value_and_grad(loss_fn)(run.trainable)
        updates, opt_state = tx.update(grads, run.opt_state, run.trainable)
        new = optax.apply_updates(run.trainable, updates), opt_state
        return Run(*new, run.step + 1, run.losses.at[run.step].set(loss))

    with open_checkpoints(args.output / phase.name, args.save_every) as manager:
        run = restore(manager, abstract, where, phase._asdict())
        run = run or jax.jit(begin, out_shardings=where)()
        steps = range(int(run.step), phase.steps)
        for step in track(steps, phase.name, disable=jax.process_index() > 0):
            batch = load_batch(data, phase, step, mesh)
            run = jax.block_until_ready(train_step(run, frozen, batch))
            save(manager, step + 1, run, phase._asdict(), last=step + 1 == phase.steps)
    return run


def run_phases(args: Namespace, mesh: Mesh) -> dict[str, list[float]]:
    """Both phases; returns the losses of all their steps."""
    common = (args.steps, args.batch, args.depth, args.seed)
    first = Phase("pretraining", None, "adamw", 3e-3, *common)
    second = Phase("fine-tuning", args.rank, args.optimizer, args.rate, *common)
    source, prose = load_tasks()
    base = train(first, source.train, (), mesh, args)
    tuned = train(second, prose.train, (base.trainable,), mesh, args)
    return {first.name: base.losses.tolist(), second.name: tuned.losses.tolist()}


def parse(argv: Sequence[str] | None = None) -> Namespace:
    """Reads the command line."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--steps", type=int, default=400, help="of each of the two phases")
    add("--quick", dest="steps", action="store_const", const=100, help="--steps 100")
    add("--output", type=Path, default=Path("out/train_sharded"))
    add("--optimizer", choices=OPTIMIZERS, default="lorapro_adamw")
    add("--rate", type=float, default=1e-2, help="peak learning rate of fine-tuning")
    add("--rank", type=int, default=4)
    add("--batch", type=int, default=16, help="windows of 64 bytes, of all processes")
    add("--depth", type=int, default=3, help="blocks of the model")
    add("--seed", type=int, default=0)
    add("--save-every", type=int, default=25, help="steps between checkpoints")
    add("--fsdp", type=int, help="devices to one copy of the weights (default: all)")
    add("--cpu-devices", type=int, help="simulate so many in this process")
    add("--coordinator", help="host:port of process 0; needs the next two")
    add("--processes", type=int)
    add("--process", type=int, help="the number of this one")
    add("--cluster", action="store_true", help="find the processes as a cluster does")
    return parser.parse_args(argv)


def main() -> None:
    """Runs the whole job."""
    args = parse()
    join_processes(args)
    losses = run_phases(args, make_mesh(jax.devices(), args.fsdp, args.batch))
    if jax.process_index() == 0:
        (args.output / "losses.json").write_text(json.dumps(losses) + "\n")
        for name, values in losses.items():
            tenths = np.array_split(values, min(10, len(values)))
            print(f"{name}: loss {tenths[0].mean():.3f} -> {tenths[-1].mean():.3f}")


if __name__ == "__main__":
    main()
