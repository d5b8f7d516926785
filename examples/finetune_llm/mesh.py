"""Processes, devices, and the mesh that model and batches are divided on."""

import math
import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh

from examples.finetune_llm.errors import Refused
from examples.finetune_llm.options import Options

AXES = {"fsdp": "fsdp", "tensor": "tp"}  # of the option, in tunix
FORM = "--mesh has the form fsdp=8,tensor=4"


def join_processes(options: Options) -> None:
    """Connects to the other processes, if the command line says that there are any."""
    if options.cpu_devices or options.topology:  # for which nothing is run
        jax.config.update("jax_platforms", "cpu")
    if options.cpu_devices:
        jax.config.update("jax_num_cpu_devices", options.cpu_devices)
    if options.coordinator:
        jax.distributed.initialize(
            options.coordinator, options.processes, options.process
        )
    elif options.cluster:
        jax.distributed.initialize()


def read_sizes(text: str, count: int) -> dict[str, int]:
    """The size of each of tunix's axes, for so many devices.

    Args:
      text: What `--mesh` says; an axis that is not named has the size 1. Without any,
        all devices are on `fsdp`.
      count: Devices that there are.

    Raises:
      Refused: Another form, another axis, or another number of devices.
    """
    sizes = {"fsdp": 1, "tp": 1} if text else {"fsdp": count, "tp": 1}
    for part in filter(None, text.split(",")):
        name, _, size = (x.strip() for x in part.partition("="))
        if name not in AXES:
            raise Refused(f"{FORM}; {part!r} is none of {' and '.join(AXES)}.")
        if not size.isdecimal() or int(size) < 1:
            raise Refused(f"{FORM}; {part!r} has no positive size.")
        sizes[AXES[name]] = int(size)
    if math.prod(sizes.values()) != count:
        factors = " × ".join(map(str, sizes.values()))
        raise Refused(f"--mesh {text} is for {factors} devices; there are {count}.")
    return sizes


def check_batch(options: Options, sizes: dict[str, int], processes: int = 1) -> None:
    """Refuses a batch that cannot be divided among the mesh and the processes."""
    rows = options.batch // options.accumulate
    if rows % sizes["fsdp"] or options.batch % processes:
        parts = f" in {options.accumulate} parts" if options.accumulate > 1 else ""
        raise Refused(
            f"--batch {options.batch}{parts} cannot be divided among fsdp="
            f"{sizes['fsdp']} and {processes} processes: each part of the batch has to "
            f"be a multiple of {math.lcm(sizes['fsdp'], processes)}."
        )


def make_mesh(options: Options) -> Mesh:
    """The mesh that the options name, of real devices or of a topology's."""
    if options.topology:
        devices: Sequence[jax.Device] = topology_devices(options.topology)
    else:
        devices = jax.devices()
    sizes = read_sizes(options.mesh, len(devices))
    processes = 1 if options.topology else jax.process_count()
    check_batch(options, sizes, processes)
    shape = tuple(sizes.values())
    if devices[0].platform == "cpu":
        placed = np.array(devices).reshape(shape)
    else:
        # One axis of the mesh may be a part of one of the hardware.
        placed = mesh_utils.create_device_mesh(
            shape, list(devices), allow_split_physical_axes=True
        )
    return Mesh(placed, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def topology_devices(name: str) -> list[jax.Device]:
    """Devices to compile for, without their hardware.

    Raises:
      Refused: This JAX cannot, for want of libtpu, or there is no such topology.
    """
    # What libtpu would else ask a metadata server for, in vain.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", name.replace(":", "-"))
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing is run
    try:
        return topologies.get_topology_desc(name, "tpu").devices
    except Exception as error:  # libtpu's own, RuntimeError of JAX, …
        why = str(error).strip().split("\n")[0]
        raise Refused(
            f"--topology {name}: {why} (TPUs such as v5e:8x8 need `pip install "
            "libtpu`; for others leave --topology out and run --plan there.)"
        ) from error
