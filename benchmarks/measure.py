"""Timing compiled programs side by side, and the facts about the machine."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PACKAGES = ("jax", "jaxlib", "flax", "optax", "lorapro_jax")


@dataclasses.dataclass
class Contender:
    """A compiled `step(carry, grads)`; with `donate` its result is the next carry."""

    name: str
    step: Callable[[Any, Any], Any]
    carry: Any
    grads: Any
    donate: bool = False
    count: int = 1  # the time counts this often: the extrapolation of `literal`
    x_temp: float = 1.0  # its memory, times that of another
    times: list[float] = dataclasses.field(default_factory=list)
    cpu_times: list[float] = dataclasses.field(default_factory=list)

    def compile(self) -> "Contender":
        """Traces and compiles, timing both."""
        start = time.perf_counter()
        jitted = jax.jit(self.step, donate_argnums=(0,) if self.donate else ())
        lowered = jitted.lower(self.carry, self.grads)
        self.trace_s = time.perf_counter() - start
        self.compiled = lowered.compile()
        self.compile_s = time.perf_counter() - start - self.trace_s
        memory = self.compiled.memory_analysis()
        self.temp_bytes = memory.temp_size_in_bytes if memory else 0
        # What is donated is read and written; the steps of `lorapro` and `literal`
        # are as large as the gradients.
        written = self.carry if self.donate else self.grads
        self.moved = tree_bytes((self.carry, self.grads, written))
        return self

    def run(self) -> Any:
        """One step, to its end: dispatch is asynchronous."""
        result = jax.block_until_ready(self.compiled(self.carry, self.grads))
        if self.donate:
            self.carry = result
        return result

    def time(self) -> None:
        """One more entry in `times` and one in `cpu_times`, in seconds.

        The latter are of all threads: on a shared machine they say more.
        """
        start, cpu_start = time.perf_counter(), time.process_time()
        self.run()
        self.times.append(self.count * (time.perf_counter() - start))
        self.cpu_times.append(self.count * (time.process_time() - cpu_start))


def on_device(contender: Contender, steps: int = 5) -> dict[str, float]:
    """What a GPU itself did in a step, by its own clock; empty without one.

    Steps of which the device does little wait for Python, which hands them their
    arrays: in training that is hidden behind the model.
    """
    if jax.default_backend() != "gpu":
        return {}
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                contender.run()
        (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
    events = [
        (event.name, event.duration_ns)
        for plane in data.planes
        if plane.name.startswith("/device:GPU")
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]
    busy = sum(duration for _, duration in events)
    return {"device_ms": busy / steps / 1e6, "launches": len(events) / steps}


def copy_bandwidth(repeat: int = 10, size: int = 2**28) -> dict[str, float]:
    """GB/s of `x + 1`, read and write, into the same memory and into new memory.

    On a CPU new memory is much slower, because the system has to map its pages.
    """
    speeds = {}
    for name, donate in (("in_place", True), ("new_memory", False)):
        x = jnp.zeros(size // 4, jnp.float32)
        copy = Contender(name, lambda x, _: x + 1, x, None, donate).compile()
        copy.run()
        for _ in range(repeat):
            copy.time()
        speeds[name] = 2 * size / min(copy.times) / 1e9
    return speeds


def machine() -> dict[str, Any]:
    """Device and versions, to compare results by."""
    device = jax.devices()[0]
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [x.split(":")[1].strip() for x in lines if x.startswith("model name")]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "cpu": models[0] if models else platform.machine(),
        "cpu_count": os.cpu_count(),
        # LAPACK's own threads compete with XLA's: at rank 64 they cost several times.
        "openblas_num_threads": os.environ.get("OPENBLAS_NUM_THREADS", "default"),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def save(report: dict[str, Any], output: pathlib.Path) -> None:
    """Prints the machine of a report, and writes all of it as JSON."""
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {output}", file=sys.stderr)


def fingerprint(tree: Any) -> str:
    """Another one for other bits."""
    values = (jax.device_get(x).tobytes() for x in jax.tree.leaves(tree))
    return hashlib.sha256(b"".join(values)).hexdigest()[:12]


def tree_bytes(tree: Any) -> int:
    """The bytes of all leaves."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
