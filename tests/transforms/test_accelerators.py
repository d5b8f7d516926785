"""Every public transform exports for CPU, CUDA and TPU, on a machine without them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export
from jax.sharding import AxisType

from lorapro_jax import lora_rite, lorapro, lorapro_adamw, scale_by_lorapro_adam
from tests.support.meshes import LAYOUTS, put, random_tree

PLATFORMS = ("cpu", "cuda", "tpu")
TRANSFORMS = {
    "lorapro": lorapro,
    "lorapro, a chain": lambda: optax.chain(lorapro(), optax.adamw(1e-3)),
    "scale_by_lorapro_adam": scale_by_lorapro_adam,
    "lorapro_adamw": lambda: lorapro_adamw(1e-3, weight_decay=0.1, max_grad_norm=1.0),
    "lorapro_adamw, dense": lambda: lorapro_adamw(1e-3, moments="dense"),
    "lora_rite": lambda: lora_rite(1e-3, weight_decay=0.1),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_update_exports_for_every_platform(name, quick_compiles):
    """With calls of libraries that `jax.export` promises to keep."""
    params, grads = random_tree(0), random_tree(1)
    params["bias"] = grads["bias"] = jnp.ones(3)
    tx = TRANSFORMS[name]()
    state = tx.init(params)
    update = jax.jit(tx.update)

    exported = export.export(update, platforms=PLATFORMS)(grads, state, params)

    assert exported.platforms == PLATFORMS
    chex.assert_trees_all_close(
        exported.call(grads, state, params),
        update(grads, state, params),
        rtol=1e-3,  # compiled twice
        atol=1e-5,
    )


@pytest.mark.parametrize("name", ["lorapro", "lorapro_adamw"])
def test_sharded_update_exports_for_every_platform(name):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    params, grads = (put(random_tree(i), mesh, LAYOUTS["features"]) for i in (0, 1))
    tx = TRANSFORMS[name]()
    with jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else mesh:
        state = tx.init(params)
        update = jax.jit(tx.update)
        exported = export.export(update, platforms=PLATFORMS)(grads, state, params)
    assert (exported.platforms, exported.nr_devices) == (PLATFORMS, 8)


def test_control_a_schur_decomposition_does_not_export_for_accelerators():
    """What solvers of the paper's Sylvester equation use."""
    schur, matrix = jax.jit(jax.scipy.linalg.schur), np.eye(3, dtype=np.float32)
    export.export(schur, platforms=["cpu"])(matrix)
    with pytest.raises(NotImplementedError):
        export.export(schur, platforms=["tpu"])(matrix)
