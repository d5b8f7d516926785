"""Adapters of changed base weights, as adapters of the weights before the change.

A method such as PiSSA makes W0 to W0 - s B0 A0, and the trained model computes
W0 - s B0 A0 + s B A, which is W0 + s [B, -B0] [A; A0]: a pair of twice the rank.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .._checks import some
from ..pairs._leaves import index_leaves
from ._arrays import on_host


def initial_factors(
    initial: Any, trained: Mapping[str, np.ndarray], paths_of_b: Sequence[str]
) -> dict[str, np.ndarray]:
    """The factors A0 and B0 that training started from, by their paths.

    Args:
      initial: A tree with these factors.
      trained: The factors after training, by their paths.
      paths_of_b: The paths of the Bs among them.

    Raises:
      ValueError: A factor is missing or has another shape, none has changed, or every
        B0 is 0, so that nothing was initialised yet.
    """
    leaves = index_leaves(initial)
    if lacking := [path for path in trained if path not in leaves]:
        raise ValueError(
            f"`initial` has no {some(lacking)}, which `params` has; its leaves are "
            f"{some(leaves)}. Pass the same tree as it was after initialisation."
        )
    found = {path: on_host(path, leaves[path].value) for path in trained}
    for path, x in trained.items():
        if found[path].shape != x.shape:
            raise ValueError(
                f"`{path}` has shape {found[path].shape} in `initial` and {x.shape} in "
                "`params`. Pass the same tree as it was after initialisation."
            )
    if all(np.array_equal(x, found[path]) for path, x in trained.items()):
        raise ValueError(
            "`initial` has the same values as `params`, so the adapter would do "
            "nothing. Before training, keep a copy, `jax.device_get(params)`: a state "
            "of NNX changes with its model."
        )
    if not any(found[path].any() for path in paths_of_b):
        raise ValueError(
            "B is 0 everywhere in `initial`, so it was taken before the adapters were "
            "initialised. Take it afterwards; if the base weights did not change, pass "
            "None."
        )
    return found


def append_initial(
    trained: np.ndarray, initial: np.ndarray, *, is_a: bool, stack: int
) -> np.ndarray:
    """`[A; A0]` or `[B, -B0]`, of layers with their rank first.

    Args:
      trained: A or B, `(*stack, r, ...)`, as `to_layers` returns it.
      initial: A0 or B0, of the same shape.
      is_a: Whether it is A.
      stack: The number of stacked axes.
    """
    return np.concatenate([trained, initial if is_a else -initial], axis=stack)
