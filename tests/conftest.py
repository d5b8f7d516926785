"""Eight simulated CPU devices for the mesh tests; float64 on demand."""

import chex
import jax
import pytest

chex.set_n_cpu_devices(8)


@pytest.fixture
def x64():
    """float64 in JAX, for the identities that hold to 1e-9."""
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else _legacy_x64():
        yield


def _legacy_x64():
    from jax.experimental import enable_x64

    return enable_x64()
