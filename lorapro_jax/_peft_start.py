"""Adapters of changed base weights, as adapters of the weights before the change.

A method such as PiSSA makes W0 to W0 - s B0 A0, and the trained model computes
W0 - s B0 A0 + s B A, which is W0 + s [B, -B0] [A; A0]: a pair of twice the rank.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ._leaves import index_leaves
from ._peft_arrays import on_host


def read_start(
    initial: Any, trained: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The factors that training started from, by their paths.

    Args:
      initial: A tree with these factors.
      trained: The factors after training.

    Raises:
      ValueError: A factor is missing or has another shape, or none has changed.
    """
    leaves = index_leaves(initial)
    if lacking := [path for path in trained if path not in leaves]:
        raise ValueError(
            f"`initial` has no {lacking[:4]}, which `params` has; its leaves are "
            f"{list(leaves)[:4]}. Pass the same tree as it was after initialisation."
        )
    start = {path: on_host(path, leaves[path].value) for path in trained}
    for path, x in trained.items():
        if start[path].shape != x.shape:
            raise ValueError(
                f"`{path}` has shape {start[path].shape} in `initial` and {x.shape} in "
                "`params`. Pass the same tree as it was after initialisation."
            )
    if all(np.array_equal(x, start[path]) for path, x in trained.items()):
        raise ValueError(
            "`initial` has the same values as `params`, so the adapter would do "
            "nothing. Before training, keep a copy, `jax.device_get(params)`: a state "
            "of NNX changes with its model."
        )
    return start


def check_begun(start: Mapping[str, np.ndarray], factors_b: list[str]) -> None:
    """Raises ValueError where every B0 is 0: then nothing was initialised yet."""
    if not any(start[path].any() for path in factors_b):
        raise ValueError(
            "B is 0 everywhere in `initial`, so it was taken before the adapters were "
            "initialised. Take it afterwards; if the base weights did not change, pass "
            "None."
        )


def join_start(
    trained: np.ndarray, start: np.ndarray, *, is_a: bool, stack: int
) -> np.ndarray:
    """`[A; A0]` or `[B, -B0]`, of factors as PEFT has them.

    Args:
      trained: A or B, `(*stack, ...)`, as `to_peft` returns it.
      start: A0 or B0, likewise.
      is_a: Whether it is A.
      stack: The number of stacked axes.
    """
    if is_a:
        return np.concatenate([trained, start], axis=stack)
    return np.concatenate([trained, -start], axis=stack + 1)
