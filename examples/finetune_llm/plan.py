"""Memory per device of a training step, from its compilation: nothing is run.

The step that training would run is compiled for its mesh, with shapes in place of
arrays. What goes in and stays (weights, adapters, the optimizer's state, the batch) is
counted by how it is divided; XLA says what it needs beside that while it runs.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.table import Table

from examples.finetune_llm.errors import Refused

GIB = 2**30


class Plan(NamedTuple):
    """Bytes on the device that has most.

    Attributes:
      parameters: The base, as it is kept.
      adapters: Its factors.
      optimizer: The state of the optimizer.
      batch: Tokens and masks of a step.
      activations: What the forward pass keeps for the backward pass.
      temporaries: The rest of what a step needs beside these: gradients, logits, what
        is gathered from other devices.
    """

    parameters: int
    adapters: int
    optimizer: int
    batch: int
    activations: int
    temporaries: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def bytes_of(tree: Any) -> int:
    """Of the part of a tree that one device has; shapes may stand for arrays."""

    def one(x: Any) -> int:
        sharding = getattr(x, "sharding", None)
        shape = sharding.shard_shape(x.shape) if sharding else x.shape
        # Four bits are kept in half a byte.
        bits = 4 if "int4" in x.dtype.name else 8 * x.dtype.itemsize
        return -(-math.prod(shape) * bits // 8)

    return sum(one(x) for x in jax.tree.leaves(tree) if hasattr(x, "dtype"))


def compile_step(step: Any, *args: Any) -> Any:
    """The compiled program of a jitted function for arguments given as shapes.

    Raises:
      Refused: The compiler knows the device's memory, and it is too little.
    """
    try:
        return step.lower(*args).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        lines = [x.strip() for x in str(error).splitlines() if x.strip()]
        raise Refused(
            f"too little memory per device: {' '.join(lines[:2])} {REMEDY}"
        ) from None


def kept_for_backward(loss_fn: Callable[..., Any], *args: Any) -> int:
    """Bytes per device that the forward pass leaves to the backward pass.

    These are the values that `jax.vjp` closes over, apart from the arguments
    themselves. Their shardings are those that XLA chooses.

    Args:
      loss_fn: Of the differentiated argument and others, to a number.
      *args: Shapes with shardings; the first one is differentiated.
    """

    def forward(first: Any, *rest: Any) -> list[jax.Array]:
        _, backward = jax.vjp(lambda x: loss_fn(x, *rest), first)
        return [x for x in jax.tree.leaves(backward) if hasattr(x, "dtype")]

    closed = jax.make_jaxpr(forward)(*args)
    given = set(closed.jaxpr.invars)
    made = [
        i
        for i, x in enumerate(closed.jaxpr.outvars)
        if not hasattr(x, "val") and x not in given
    ]
    pick = lambda *xs: {i: forward(*xs)[i] for i in made}
    compiled = jax.jit(pick).lower(*args).compile()
    shapes, where = jax.eval_shape(pick, *args), compiled.output_shardings
    placed = {
        i: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where[i])
        for i, x in shapes.items()
    }
    return bytes_of(placed)


def make_plan(
    compiled: Any, activations: int, *, parameters: Any, adapters: Any, **others: Any
) -> Plan:
    """Puts together what is known of a step.

    Args:
      compiled: From `compile_step`.
      activations: From `kept_for_backward`; XLA may keep less.
      parameters: A tree of shapes, as all that follow.
      adapters: The factors.
      **others: `optimizer` and `batch`.
    """
    heap = compiled.memory_analysis().temp_size_in_bytes
    kept = min(activations, heap)
    sizes = {name: bytes_of(tree) for name, tree in others.items()}
    return Plan(
        bytes_of(parameters),
        bytes_of(adapters),
        **sizes,
        activations=kept,
        temporaries=heap - kept,
    )


REMEDY = (
    "Take a larger mesh, a smaller --batch or more parts of it (--accumulate), a "
    "smaller --length, --remat, or --qlora."
)


def device_memory(device: jax.Device, gib: float | None) -> int | None:
    """Bytes that a device has, or None where it does not say and the user did not."""
    if gib is not None:
        return int(gib * GIB)
    try:
        stats = device.memory_stats()
    except jax.errors.JaxRuntimeError:  # of a topology without hardware
        return None
    return (stats or {}).get("bytes_limit")


def shown(size: float) -> str:
    """A number of bytes for people."""
    unit, name = (GIB, "GiB") if size >= GIB / 10 else (2**20, "MiB")
    return f"{size / unit:.2f} {name}"


def check_plan(plan: Plan, limit: int | None) -> None:
    """Raises Refused if a device has less memory than the plan needs."""
    if limit is not None and plan.total > limit:
        parts = ", ".join(f"{k} {shown(v)}" for k, v in plan._asdict().items())
        raise Refused(
            f"too little memory per device: a step needs {shown(plan.total)} of "
            f"{shown(limit)} ({parts}). {REMEDY}"
        )


def print_plan(plan: Plan, limit: int | None, title: str, console: Console) -> None:
    """The plan as a table."""
    console.print(title)
    table = Table("", "per device")
    table.columns[1].justify = "right"
    for name, value in plan._asdict().items():
        table.add_row(name, shown(value))
    table.add_section()
    table.add_row("together", shown(plan.total))
    if limit is not None:
        table.add_row("there is", shown(limit))
    console.print(table)
