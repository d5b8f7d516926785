"""What the compilers of CPU, GPU and TPU make of a step, without the device.

    $ python -m benchmarks.compiled                     # for this CPU, a few minutes
    $ pip install 'jax[tpu]'                            # one of them in an environment
    $ python -m benchmarks.compiled --platform tpu
    $ pip install 'jax[cuda12]'
    $ python -m benchmarks.compiled --platform cuda

For Llama-2-7B's adapters, by the number of layers: seconds to trace and to compile,
the kernels of the program, its temporary memory, and what XLA's TPU compiler expects
it to take. None of it is a measured time. Like pairs are stacked where the package
does so, on GPUs; `stacked` and `one by one` are both shown, and so are `leaves` that
hold all layers, `[layers, n, r]`. Compiled for a TPU v5e and an H100; without a GPU at
hand, the compiler picks no algorithms by trying them. A second table holds
`lorapro_adamw`'s figures against what they should be.
"""

import argparse
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from rich import box
from rich.console import Console
from rich.table import Table

from lorapro_jax import lorapro, lorapro_adamw
from lorapro_jax.transforms import _groups

from . import limits
from .measure import machine, save, tree_bytes
from .trees import SCALE, TREES

RESULTS = Path(__file__).parent / "results"
DEPTHS = (4, 8, 16, 32)
CONTENDERS = {
    "adamw": lambda: optax.adamw(1e-4),
    "lorapro + adamw": lambda: optax.chain(lorapro(scale=SCALE), optax.adamw(1e-4)),
    "lorapro_adamw": lambda: lorapro_adamw(1e-4, scale=SCALE),
}
FORMS = "one by one", "stacked", "leaves"
KERNELS = "fusion|custom-call|copy|transpose|dot|convolution|reduce|concatenate"
# What XLA wants to know of a GPU that it cannot ask.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
GPU_FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"


def device(platform: str) -> Any:
    """One device to compile for, which need not be there."""
    jax.config.update("jax_platforms", "cpu")
    os.environ.update(ENVIRONMENT)
    if platform == "cuda":  # flags that other platforms do not know
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {GPU_FLAGS}"
    if platform == "cpu":
        return jax.devices("cpu")[0]
    if platform == "tpu":
        topology = topologies.get_topology_desc("v5e:2x2", platform="tpu")
    else:
        # JAX looks for "gpu" among the platforms that are present (its issue 23971).
        from jax._src import xla_bridge

        canonical = xla_bridge.canonicalize_platform
        xla_bridge.canonicalize_platform = lambda name: (
            "cuda" if name in ("gpu", "cuda") else canonical(name)
        )
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=H100, topology="1x1x1"
        )
    return topology.devices[0]


def shapes(rank: int, depth: int, *, leaves: bool = False) -> Any:
    """The adapters of this many layers of Llama-2-7B, or leaves that hold them all."""
    layers = (depth,) if leaves else ()
    array = lambda *shape: jax.ShapeDtypeStruct((*layers, *shape), jnp.float32)
    (stack,) = TREES["llama2-7b"].values()
    block = lambda: {
        name: {"lora_a": array(fan_in, rank), "lora_b": array(rank, fan_out)}
        for name, (fan_in, fan_out) in stack.layers.items()
    }
    return block() if leaves else {f"layers_{i}": block() for i in range(depth)}


def kernels(program: str) -> int:
    """Instructions that start a kernel, outside of those that kernels are made of."""
    inside = set(re.findall(r"(?:calls|to_apply)=%([\w.-]+)", program))
    count, counting = 0, False
    for line in program.splitlines():
        if header := re.match(r"(?:ENTRY )?%([\w.-]+) .*\{$", line):
            counting = header[1] not in inside
        elif counting and re.search(rf" = .*? (?:{KERNELS})\(", line):
            count += 1
    return count


def compiled(
    name: str, rank: int, depth: int, at: Any, *, leaves: bool
) -> dict[str, Any]:
    """A row of the table."""
    tx = CONTENDERS[name]()

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = shapes(rank, depth, leaves=leaves)
    args = params, jax.eval_shape(tx.init, params), params
    there = SingleDeviceSharding(at)
    jitted = jax.jit(
        step, donate_argnums=(0, 1), in_shardings=there, out_shardings=there
    )
    start = time.perf_counter()
    lowered = jitted.lower(*args)
    traced = time.perf_counter()
    program = lowered.compile()
    done = time.perf_counter()
    text = program.as_text()
    cycles = map(int, re.findall(r'"estimated_cycles":"(\d+)"', text))
    memory = program.memory_analysis()
    temp = memory.temp_size_in_bytes if memory else math.nan
    return {
        "contender": name,
        "layers": depth,
        "trace_s": traced - start,
        "compile_s": done - traced,
        "kernels": kernels(text),
        "temp_per_factor_bytes": temp / tree_bytes(params),
        "estimated_mcycles": sum(cycles) / 1e6,
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows for people."""
    columns = {
        "layers": lambda row: str(row["layers"]),
        "": lambda row: row["form"],
        "trace": lambda row: f"{row['trace_s']:.1f} s",
        "compile": lambda row: f"{row['compile_s']:.1f} s",
        "kernels": lambda row: f"{row['kernels']:,}",
        "temp/factors": lambda row: f"{row['temp_per_factor_bytes']:.2f}",
        "Mcycles": lambda row: f"{row['estimated_mcycles'] or math.nan:.2f}",
    }
    result = Table("optimizer", box=box.SIMPLE)
    for column in columns:
        result.add_column(column, justify="right")
    for row in rows:
        cells = [cell(row) for cell in columns.values()]
        result.add_row(row["contender"], *cells)
    return result


def main() -> None:
    """Compiles what is asked for, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description="What compilers make of a step.")
    parser.add_argument("--platform", choices=("cpu", "tpu", "cuda"), default="cpu")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--depths", nargs="+", type=int, default=DEPTHS)
    parser.add_argument("--output", type=Path, help="of the JSON")
    args = parser.parse_args()

    jax.config.update("jax_enable_compilation_cache", False)
    at = device(args.platform)
    rows = []
    for depth in args.depths:
        for name in CONTENDERS:
            for form in FORMS:
                if name == "adamw" and form == "stacked":
                    continue
                print(f"{name}, {depth} layers, {form} ...", file=sys.stderr)
                _groups._stacking_pays = lambda form=form: form == "stacked"
                row = compiled(name, args.rank, depth, at, leaves=form == "leaves")
                rows.append(row | {"rank": args.rank, "form": form})
    rows.sort(key=lambda row: (row["contender"], row["form"], row["layers"]))
    found = limits.compiled(rows, args.platform)
    Console(width=110, markup=False).print(table(rows), limits.table(found))
    info = machine() | {"platform": args.platform, "device": at.device_kind}
    output = args.output or RESULTS / f"compiled-{args.platform}.json"
    checks = [check._asdict() for check in found]
    save({"machine": info, "rows": rows, "checks": checks}, output)


if __name__ == "__main__":
    main()
