"""Environments of the processes that tests start."""

import os


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
