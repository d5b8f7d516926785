"""The scale s of W = W0 + s B A, pair by pair.

No LoRA stack keeps it in the parameter tree, so it is an argument: `scale`, or
`alpha` with the rank taken from the shapes.
"""

import math
import re
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, TypeAlias, cast

import jax
import numpy as np
from jax.typing import ArrayLike

from ._layout import LoRAPair

ScaleSpec: TypeAlias = (
    ArrayLike | Mapping[str, ArrayLike] | Callable[[LoRAPair], ArrayLike]
)
"""One number for all pairs, `{regex: number}`, or a function of the pair."""


def resolve_scale(
    pair: LoRAPair, scale: ScaleSpec, alpha: ScaleSpec | None, rslora: bool
) -> ArrayLike:
    """The scale of one pair: its own, `scale`, `alpha / r` or `alpha / sqrt(r)`.

    Args:
      pair: The pair, with its rank; its own scale goes first if it has one.
      scale: See `ScaleSpec`. Patterns are searched in the paths of both factors,
        in order; the first that occurs in either counts.
      alpha: The same, to be divided by the rank.
      rslora: Divide alpha by the square root of the rank (rsLoRA, arXiv
        2312.03732).

    Raises:
      ValueError: No pattern matches, or the number is 0 or not finite.
      TypeError: Not a number.
    """
    if pair.scale is not None:
        return _checked(pair.scale, pair, "scale")
    if alpha is None:
        return _checked(_look_up(scale, pair, "scale"), pair, "scale")
    rank = cast(int, pair.rank)
    divisor = math.sqrt(rank) if rslora else rank
    return _checked(_look_up(alpha, pair, "alpha"), pair, "alpha") / divisor


def check_scale_options(scale: ScaleSpec, alpha: ScaleSpec | None, rslora: Any) -> None:
    """Raises ValueError where the three arguments contradict each other."""
    # `inject_hyperparams` turns the default into an array: not the user's choice.
    chosen = not isinstance(scale, jax.Array) and scale != 1.0
    if alpha is not None and chosen:
        raise ValueError(
            f"Both `scale={scale!r}` and `alpha={alpha!r}` are given. Pass the scale "
            "itself, or `alpha` to have it divided by each pair's rank."
        )
    if rslora and alpha is None:
        raise ValueError(
            "`rslora=True` divides `alpha` by the square root of the rank, and no "
            "`alpha` is given. Pass `alpha=`, or put the square root into `scale=`."
        )


def _look_up(spec: ScaleSpec, pair: LoRAPair, name: str) -> Any:
    if callable(spec):
        return spec(pair)
    if not isinstance(spec, Mapping):
        return spec
    for pattern, number in spec.items():
        if re.search(pattern, pair.a) or re.search(pattern, pair.b):
            return number
    raise ValueError(
        f"No pattern of `{name}={dict(spec)!r}` occurs in `{pair.a}` or `{pair.b}`. "
        "Add one that does, or '.*' at the end for all other pairs."
    )


def _checked(number: Any, pair: LoRAPair, name: str) -> jax.Array | float:
    is_number = isinstance(number, Real | np.ndarray) and not isinstance(number, bool)
    if isinstance(number, jax.Array) and number.shape == ():
        return number  # perhaps traced: its value cannot be looked at
    if is_number and np.ndim(number) == 0:
        value = float(number)
        if value == 0 or not math.isfinite(value):
            raise ValueError(
                f"The {name} of `{pair.a}` is {value}. LoRA's s in W0 + s·B·A has to "
                "be finite and other than 0: adjusting divides by it."
            )
        return value
    raise TypeError(
        f"The {name} of `{pair.a}` is {number!r}; it has to be one real number."
    )
