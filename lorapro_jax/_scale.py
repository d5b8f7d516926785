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

_FLOAT32 = np.finfo(np.float32)


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
      ValueError: No pattern matches, or the number is 0 or out of float32's range.
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
    # Under jit, `inject_hyperparams` has turned even the default into a tracer.
    chosen = not isinstance(scale, jax.core.Tracer) and scale != 1.0
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
        try:
            if re.search(pattern, pair.a) or re.search(pattern, pair.b):
                return number
        except (re.error, TypeError) as error:
            raise ValueError(
                f"{pattern!r} of `{name}=` is no regular expression: {error}."
            ) from None
    raise ValueError(
        f"No pattern of `{name}={dict(spec)!r}` occurs in `{pair.a}` or `{pair.b}`. "
        "Add one that does, or '.*' at the end for all other pairs."
    )


def _checked(number: Any, pair: LoRAPair, name: str) -> jax.Array | float:
    if isinstance(number, jax.core.Tracer) and number.shape == ():
        return number  # its value cannot be looked at
    if not is_real_scalar(number):
        raise TypeError(
            f"The {name} of `{pair.a}` is {number!r}; it has to be one real number."
        )
    smallest, largest = (float(x) for x in (_FLOAT32.tiny, _FLOAT32.max))
    # In NumPy, because under a trace even a concrete array compares to a tracer.
    known = np.asarray(number) if isinstance(number, jax.Array) else number
    if not smallest <= abs(known) <= largest:  # also when it is NaN
        raise ValueError(
            f"The {name} of `{pair.a}` is {number}. LoRA's s in W0 + s·B·A has to be a "
            "number other than 0 that float32 can hold: adjusting divides by it."
        )
    return float(number)


def is_real_scalar(number: Any) -> bool:
    """Whether a number has a value now: no tracer, no bool, no array with axes."""
    kinds = Real | np.ndarray | jax.Array
    if isinstance(number, jax.core.Tracer | bool) or not isinstance(number, kinds):
        return False
    array = np.asarray(number)  # bfloat16 is of kind V, a long int of kind O
    return array.ndim == 0 and array.dtype.kind in "iufVO"
