"""On CPU no decomposition waits for the threads that run the program.

A batched LAPACK call of JAX divides its work among XLA's threads and blocks its own.
Two of them can block each other for ever, on machines with few cores nearly always.
"""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import export

from lorapro_jax import lorapro

SHARED_BY_ALL = """
import sys
import jax, jax.numpy as jnp, optax
from lorapro_jax import lorapro

a, b = jax.random.normal(jax.random.key(0), (40, 32)), jnp.ones((32, 8))
tree = {f"layers_{i}": {"lora_a": a, "lora_b": b} for i in range(48)}
tx = lorapro()
update = lambda x: tx.update(x, optax.EmptyState(), x)[0]
if sys.argv[1] == "mesh":
    from jax.sharding import NamedSharding, PartitionSpec
    mesh = jax.make_mesh((8,), ("x",))
    tree = jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
    both = jax.jit(update)
else:
    both = jax.jit(lambda x: (update(x), update(jax.tree.map(jnp.sin, x))))
for _ in range(30):
    jax.block_until_ready(both(tree))
"""


@pytest.mark.parametrize("program", ["two transforms", "mesh"])
def test_decompositions_side_by_side_end(program):
    """Two in a program; one on each of eight simulated devices. It takes seconds."""
    flags = "--xla_force_host_platform_device_count=8"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    env.pop("OPENBLAS_NUM_THREADS", None)  # as users have it
    subprocess.run(
        [sys.executable, "-c", SHARED_BY_ALL, program],
        check=True,
        timeout=200,
        env=env,
    )


def _decomposed(platform):
    """The shapes of what the library's decomposition is given on a platform."""
    params = {"lora_a": jnp.ones((6, 5, 3)), "lora_b": jnp.ones((6, 3, 4))}
    update = jax.jit(lambda x: lorapro().update(x, optax.EmptyState(), x)[0])
    program = export.export(update, platforms=[platform])(params).mlir_module()
    calls = re.findall(r"@\w*syevd_ffi\(.*?: \(tensor<([\dx]+)xf32>\)", program)
    assert calls
    return calls


def test_cpu_decomposes_one_matrix_at_a_time_and_gpu_all_at_once():
    assert _decomposed("cpu") == ["3x3"]
    assert _decomposed("cuda") == ["12x3x3"]
