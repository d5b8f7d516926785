"""What a step on the adapters of 8B, 70B and 405B models costs a chip, on paper.

    $ python -m benchmarks.scale                    # simulated CPU devices
    $ pip install 'jax[tpu]'
    $ python -m benchmarks.scale --platform tpu     # TPU v5e, which need not be there
    $ python -m benchmarks.scale --report           # the table and the plot

Compiled ahead of time, so that no weight is ever there: the optimizer's update for
meshes of 64 and 256 chips and, on simulated CPU devices, a whole training step. Of each
program: what its compiler says of memory and of bytes moved, what its collectives send
(as on a ring), and what XLA's TPU compiler expects the update to take, where the body
of a loop counts once. Nothing of it is a measured time. Beside it stands the floor: the
passes over the factors that any program of that optimizer has to make.

Every row is written as soon as it is there, and rows that are there are not compiled
again. A TPU program of `lorapro_adamw` compiles for several minutes.
"""

import argparse
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lorapro_jax import lorapro, lorapro_adamw

from . import scale_report
from .compiled import ENVIRONMENT
from .llama import ALPHA, MODELS, Llama, adapters, base_weights, loss, mesh_of, state_of
from .measure import machine, save

RESULTS = Path(__file__).parent / "results"
CONTENDERS = {
    "adamw": lambda: optax.adamw(1e-4),
    "lorapro + adamw": lambda: optax.chain(lorapro(alpha=ALPHA), optax.adamw(1e-4)),
    "lorapro_adamw": lambda: lorapro_adamw(1e-4, alpha=ALPHA),
}
TOPOLOGIES = {64: "v5e:8x8", 256: "v5e:16x16"}
RANKS, LAYERS, CHIPS = (4, 8, 32, 64, 128), (5, 16, 40, 143), (8, 64, 256)
TOKENS = 4096
"""Of one sequence; a device of `fsdp` has one."""
COLLECTIVES = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1, "f16": 2, "f64": 8}


class Case(NamedTuple):
    """One program."""

    model: str
    layers: int
    rank: int
    chips: int
    program: str
    contender: str


def cases(platform: str, *, quick: bool) -> Iterator[Case]:
    """All programs, those first that matter most."""
    if quick:
        for name in CONTENDERS:
            yield Case("8b", 2, 4, 8, "update", name)
        return
    depth = lambda model: MODELS[model].layers
    for chips in CHIPS if platform == "cpu" else TOPOLOGIES:
        for model in ("70b", "8b", "405b"):
            for name in CONTENDERS:
                yield Case(model, depth(model), 16, chips, "update", name)
    if platform != "cpu":
        return
    for name in CONTENDERS:
        for model in MODELS:
            yield Case(model, depth(model), 16, 64, "step", name)
        for rank in RANKS:
            yield Case("70b", depth("70b"), rank, 64, "update", name)
        for layers in LAYERS:
            yield Case("70b", layers, 16, 64, "update", name)


def mesh_for(platform: str, chips: int) -> Mesh:
    """Of chips that need not be there."""
    if platform == "cpu":
        return mesh_of(jax.devices("cpu")[:chips])
    found = topologies.get_topology_desc(TOPOLOGIES[chips], platform="tpu")
    return mesh_of(found.devices)


def lowered(case: Case, mesh: Mesh) -> Any:
    """The program before its compilation."""
    model = MODELS[case.model]._replace(layers=case.layers)
    tx = CONTENDERS[case.contender]()
    params = adapters(model, case.rank, mesh)
    state = state_of(tx, params, mesh)

    def update(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def step(params: Any, state: Any, base: Any, tokens: jax.Array) -> Any:
        grads = jax.grad(loss)(params, base, tokens, model)
        return update(params, state, grads)

    placed = jax.tree.map(lambda x: x.sharding, (params, state))
    with jax.set_mesh(mesh):
        if case.program == "update":
            jitted = jax.jit(update, donate_argnums=(0, 1), out_shardings=placed)
            return jitted.lower(params, state, params)
        jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=placed)
        shape, at = (mesh.shape["fsdp"], TOKENS), NamedSharding(mesh, P("fsdp"))
        tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=at)
        return jitted.lower(params, state, base_weights(model, mesh), tokens)


def sent(program: str) -> tuple[dict[str, int], float]:
    """How many collectives of each kind, and the bytes that a chip sends by them.

    Those of an update; what is in a loop counts once.
    """
    counts: dict[str, int] = {}
    total = 0.0
    for line in program.splitlines():
        found = re.search(rf" = (.*?) ({COLLECTIVES})(?:-start)?\(", line)
        if not found:
            continue
        shapes, kind = found.groups()
        size = sum(
            BYTES.get(dtype, 4) * math.prod(map(int, filter(None, dims.split(","))))
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        )
        group = _group(line)
        share = (group - 1) / group
        # Of the result, on a ring; only a shard is the result of a reduce-scatter.
        passes = {"all-reduce": 2 * share, "reduce-scatter": group - 1}
        counts[kind] = counts.get(kind, 0) + 1
        total += passes.get(kind, share) * size
    return counts, total


def _group(line: str) -> int:
    """How many devices a collective joins."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(found[1])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return found[1].count(",") + 1
    return 2


def factor_bytes(case: Case, mesh: Mesh) -> int:
    """Of A and B of all pairs on one chip."""
    model: Llama = MODELS[case.model]._replace(layers=case.layers)
    of = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return sum(map(of, jax.tree.leaves(adapters(model, case.rank, mesh))))


def row(case: Case, platform: str) -> dict[str, Any]:
    """What the compiler makes of a program."""
    mesh = mesh_for(platform, case.chips)
    start = time.process_time()
    program = lowered(case, mesh).compile()
    used = time.process_time() - start
    text, memory = program.as_text(), program.memory_analysis()
    cost = program.cost_analysis()
    counts, total = sent(text)
    # A kernel that XLA does not estimate has the largest number.
    cycles = [int(x) for x in re.findall(r'"estimated_cycles":"(\d+)"', text)]
    return {
        **case._asdict(),
        "platform": platform,
        "pairs": case.layers * len(MODELS[case.model].weights),
        "factor_bytes": factor_bytes(case, mesh),
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "moved_bytes": cost["bytes accessed"],
        "flops": cost["flops"],
        "collectives": counts,
        "sent_bytes": total,
        "estimated_mcycles": sum(x for x in cycles if x < 2**50) / 1e6 or None,
        "compile_cpu_s": used,
    }


def ready(platform: str, *, quick: bool) -> str | None:
    """Prepares JAX; why this platform cannot be compiled for, if it cannot."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    if platform == "cpu":
        jax.config.update("jax_num_cpu_devices", 8 if quick else max(CHIPS))
        return None
    os.environ.update(ENVIRONMENT, ALLOW_MULTIPLE_LIBTPU_LOAD="1")  # nothing runs
    try:
        topologies.get_topology_desc(TOPOLOGIES[64], platform="tpu")
    except Exception as error:
        return f"nothing for TPUs: {error}"
    return None


def main() -> None:
    """Compiles what is missing, then prints the table."""
    parser = argparse.ArgumentParser(description="What a step costs at scale.")
    parser.add_argument("--platform", choices=("cpu", "tpu"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--report", action="store_true", help="compile nothing")
    parser.add_argument("--limit", type=int, help="of programs, in this run")
    parser.add_argument("--output", type=Path, help="of the JSON")
    args = parser.parse_args()

    name = "scale-quick" if args.quick else f"scale-{args.platform}"
    output = args.output or RESULTS / f"{name}.json"
    rows = json.loads(output.read_text())["rows"] if output.exists() else []
    done = {Case(*(x[key] for key in Case._fields)) for x in rows}
    left = [x for x in cases(args.platform, quick=args.quick) if x not in done]
    missing = None if args.report else ready(args.platform, quick=args.quick)
    if missing:
        print(missing, file=sys.stderr)
    for case in [] if args.report or missing else left[: args.limit]:
        print(*case, "...", file=sys.stderr)
        rows.append(row(case, args.platform))
        save({"machine": machine(), "rows": rows}, output)
    if not args.quick:
        paths = [RESULTS / f"scale-{x}.json" for x in ("cpu", "tpu")]
        there = [json.loads(x.read_text())["rows"] for x in paths if x.exists()]
        rows = [row for found in there for row in found]
        scale_report.plot(rows, RESULTS / "scale.png")
    scale_report.show(rows)


if __name__ == "__main__":
    main()
