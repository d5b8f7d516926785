"""Eight simulated CPU devices for the mesh tests; float64 on demand."""

import chex
import jax
import pytest

chex.set_n_cpu_devices(8)


@pytest.fixture
def x64():
    """float64 in JAX, for the identities that hold to 1e-9."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)
