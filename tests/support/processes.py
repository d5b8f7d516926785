"""Processes that tests start: their environment, their port, and their end."""

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def environment(devices=1):
    """With so many simulated devices, whatever pytest's own process has.

    The processes share its cache of compiled programs, and run for seconds: without
    LLVM's optimizations, and with the flags of XLA of the whole run.
    """
    count = "--xla_force_host_platform_device_count"  # chex has asked for eight
    flags = [x for x in os.environ.get("XLA_FLAGS", "").split() if count not in x]
    return {
        **os.environ,
        "XLA_FLAGS": " ".join([*flags, f"{count}={devices}"]),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }


def start(*arguments, devices=1):
    """Python with these arguments, in a process of its own."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=environment(devices),
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def free_port():
    """One of this machine that nobody listens at, for processes that meet there."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def wait_for(*processes, code=0, seconds=300):
    """What they print; all have to end with this code, and none is left behind."""

    def end(process):
        try:
            return process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            said = "".join(process.communicate())
            pytest.fail(f"not at its end after {seconds} s\n{said[-8000:]}")

    try:
        # All at once: one whose pipe is full would hold up those it works with.
        with ThreadPoolExecutor(len(processes)) as pool:
            outputs = list(pool.map(end, processes))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    codes = [process.returncode for process in processes]
    said = "\n".join(map("".join, outputs))
    assert codes == [code] * len(processes), f"{codes}\n{said[-8000:]}"
    return [out for out, _ in outputs]
