"""Eight simulated CPU devices, quick compilation, float64 on demand.

They run on a GPU too, where JAX has one: what needs eight devices is skipped there, and
products in the tests themselves are as exact as on a CPU. Those of the package say by
themselves how exact they have to be (`test_products`).

Nearly all of the time of a run is compilation, so there are four means against it:

* Programs are compiled once a run, in a cache on the disk that the workers of
  pytest-xdist and the processes that tests start have in common. A
  `JAX_COMPILATION_CACHE_DIR` of one's own is used, and kept for the next run.
* XLA generates code for fused operations as it did before 2025, in a third of the
  time. Which operations are fused, and what travels between devices, is the same.
  `XLA_FLAGS=--xla_cpu_use_fusion_emitters=true` asks for what users have, as `.ci/run`
  does with the oldest versions.
* LLVM gets each program in one piece, not in up to 32 for as many threads: on two cores
  that took a fifth to two fifths of the time of a compilation.
* `quick_compiles` leaves LLVM's optimizations out.
"""

import contextlib
import gc
import os
import shutil
import subprocess
import sys
import tempfile

import pytest

EMITTERS = "--xla_cpu_use_fusion_emitters"
PIECES = "--xla_cpu_parallel_codegen_split_count"


def is_known(flags):
    """Whether this XLA has these flags: it ends a process that gives it another."""
    code = "import jax; jax.devices()"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True)
    return done.returncode == 0


CACHE = None
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit all of it
    # Two workers with two BLAS threads each would wait for each other on two cores.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        CACHE = tempfile.mkdtemp(prefix="lorapro_jax_tests_")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    flags = os.environ.get("XLA_FLAGS", "")
    wanted = {EMITTERS: "false", PIECES: "1"}
    ours = " ".join(f"{x}={value}" for x, value in wanted.items() if x not in flags)
    if ours and is_known(ours):
        os.environ["XLA_FLAGS"] = f"{flags} {ours}".strip()

import chex  # noqa: E402
import jax  # noqa: E402

chex.set_n_cpu_devices(8)
if jax.default_backend() != "cpu":
    jax.config.update("jax_default_matmul_precision", "highest")
pytest.register_assert_rewrite("tests.support")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    """Skips what needs more devices than there are."""
    try:
        return (yield)
    except ValueError as error:
        if "Number of devices" in str(error) and jax.default_backend() != "cpu":
            pytest.skip(str(error))
        raise


def pytest_unconfigure(config):
    """Takes away the cache of this run."""
    if CACHE is not None:
        shutil.rmtree(CACHE, ignore_errors=True)


SETTINGS: dict[str, bool] = {}


@contextlib.contextmanager
def setting(name, value):
    """A setting of JAX for a while; all of them are off at the beginning."""
    before = SETTINGS.get(name, False)
    SETTINGS[name] = value
    jax.config.update(name, value)
    try:
        yield
    finally:
        SETTINGS[name] = before
        jax.config.update(name, before)


@pytest.fixture
def x64():
    """float64 in JAX, for the identities that hold to 1e-9."""
    with setting("jax_enable_x64", True):
        yield


@pytest.fixture
def quick_compiles():
    """For programs that run for an instant: without LLVM's optimizations."""
    with setting("jax_disable_most_optimizations", True):
        yield


@pytest.fixture
def full_compiles():
    """As users have it, for claims about rounding in a module of `quick_compiles`."""
    jax.clear_caches()  # whose keys do not have this setting
    with setting("jax_disable_most_optimizations", False):
        yield
    jax.clear_caches()


def is_quick(module):
    """Whether all of a module has `quick_compiles`."""
    marks = getattr(module, "pytestmark", [])
    marks = marks if isinstance(marks, list) else [marks]
    return any("quick_compiles" in x.args for x in marks if x.name == "usefixtures")


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_are_freed(request):
    """Each is mapped memory, of which Linux gives a process 65,530 pieces.

    When they run out, XLA's compiler ends the process. Also what is made once for all
    of a module has its `quick_compiles`.
    """
    with setting("jax_disable_most_optimizations", is_quick(request.module)):
        yield
    jax.clear_caches()
    gc.collect()
