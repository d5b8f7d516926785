"""The plan of a run: its own step, compiled for its mesh with shapes for arrays."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import keystr, tree_flatten_with_path, tree_map_with_path
from rich.console import Console

from examples.finetune_llm import adapters, models
from examples.finetune_llm.optimizers import new_optimizer
from examples.finetune_llm.options import Options
from examples.finetune_llm.packing import Batch
from examples.finetune_llm.plan import (
    Plan,
    check_plan,
    compile_step,
    device_memory,
    kept_for_backward,
    make_plan,
    print_plan,
)
from examples.finetune_llm.step import ROWS, Run, loss_and_count, make_step, split


def plan_of(
    options: Options, spec: models.Spec, mesh: Mesh, activations: bool = True
) -> Plan:
    """Compiles a step of the run that the options describe.

    Args:
      options: Of the run.
      spec: Of its model.
      mesh: Its mesh.
      activations: Whether to tell them from temporaries, for which the forward pass is
        compiled alone.

    Raises:
      Refused: The compiler says that a device has too little memory.
    """
    base = models.abstract(spec, mesh, options.dtype)
    model = adapters.add_lora(
        spec, base, mesh, rank=options.rank_budget or options.rank,
        alpha=options.alpha, rslora=options.rslora, targets=options.targets,
        quantise=options.qlora,
    )  # fmt: skip
    parts = split(model)
    tx = new_optimizer(
        options.optimizer, options.rate, weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        pair_options=adapters.pair_options(options),
    )  # fmt: skip
    run = abstract_run(parts.trainable, tx, mesh)
    batch = abstract_batch(options.batch, options.length, mesh)
    where = jax.tree.map(lambda x: x.sharding, run)
    step = make_step(
        spec, parts.graph, tx, mesh=mesh, accumulate=options.accumulate,
        out_shardings=where,
    )  # fmt: skip

    def loss_fn(trainable, frozen, batch):
        model = nnx.merge(parts.graph, trainable, frozen)
        return loss_and_count(spec, model, batch)[0]

    part = abstract_batch(options.batch // options.accumulate, options.length, mesh)
    with mesh, first_devices_of(mesh):
        compiled = compile_step(step, run, parts.frozen, batch)
        kept = 0
        if activations:
            kept = kept_for_backward(loss_fn, parts.trainable, parts.frozen, part)
    return make_plan(
        compiled, kept, parameters=parts.frozen, adapters=run.trainable,
        optimizer=run.opt_state, batch=batch,
    )  # fmt: skip


@contextlib.contextmanager
def first_devices_of(mesh: Mesh) -> Iterator[None]:
    """Lets `jax.devices` be the mesh's, which may be a topology's.

    tunix asks the first device whether to say how activations are divided: on CPUs it
    does not, and a CPU is what compiles for a topology.
    """
    before = jax.devices
    jax.devices = lambda *_: list(mesh.devices.flat)
    try:
        yield
    finally:
        jax.devices = before


def abstract_run(trainable: Any, tx: Any, mesh: Mesh) -> Run:
    """A run at its start as shapes: moments where the factors are, the rest everywhere.

    What is a moment is told by its path, which ends as that of its factor, and its
    shape.
    """
    factors = [
        (keystr(path), x.shape, x.sharding)
        for path, x in tree_flatten_with_path(trainable)[0]
    ]
    state = jax.eval_shape(tx.init, trainable)

    def place(path: Any, x: Any) -> jax.ShapeDtypeStruct:
        name, everywhere = keystr(path), NamedSharding(mesh, P())
        found = [
            s for at, shape, s in factors if name.endswith(at) and shape == x.shape
        ]
        where = found[0] if found else everywhere
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    return Run(trainable, tree_map_with_path(place, state), step)


def abstract_batch(rows: int, length: int, mesh: Mesh) -> Batch:
    """A batch of all processes as shapes."""
    place = lambda dtype: jax.ShapeDtypeStruct(
        (rows, length), dtype, sharding=NamedSharding(mesh, ROWS)
    )
    numbers = place(jnp.int32)
    return Batch(numbers, numbers, numbers, place(jnp.bool_))


def plan_run(options: Options, spec: models.Spec, mesh: Mesh, console: Console) -> None:
    """Prints the plan, and refuses it if the device has less."""
    device = mesh.devices.flat[0]
    shape = ", ".join(f"{k}={v}" for k, v in mesh.shape.items())
    title = (
        f"{spec.folder}: {spec.family}, {options.batch} rows of {options.length} "
        f"tokens in {options.accumulate} parts, {options.optimizer}; {mesh.size} × "
        f"{device.device_kind} as {shape}"
    )
    limit = device_memory(device, options.memory)
    found = plan_of(options, spec, mesh)
    print_plan(found, limit, title, console)
    check_plan(found, limit)


def check_memory(options: Options, spec: models.Spec, mesh: Mesh) -> None:
    """Refuses a run that does not fit, where the memory of a device is known."""
    limit = device_memory(mesh.local_mesh.devices.flat[0], options.memory)
    if limit is None:
        return
    if plan_of(options, spec, mesh, activations=False).total > limit:
        check_plan(plan_of(options, spec, mesh), limit)
