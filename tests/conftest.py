"""Eight simulated CPU devices; float64 and quick compilation on demand."""

import gc

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


@pytest.fixture
def quick_compiles():
    """For programs that run for an instant: without LLVM's optimizations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_are_freed():
    """Each is mapped memory, of which Linux gives a process 65,530 pieces.

    When they run out, XLA's compiler ends the process.
    """
    yield
    jax.clear_caches()
    gc.collect()
