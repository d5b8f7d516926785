"""The scale s of W = W0 + s B A, pair by pair.

No LoRA stack keeps it in the parameter tree, so it is an argument: `scale`, or
`alpha` with the rank taken from the shapes. A stack of layers may have one for each.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias, TypeVar, cast

import jax
import numpy as np
from jax.typing import ArrayLike

from .._checks import close_to, compiled, is_real_scalar, is_traced, known
from ..algebra._axes import Shape
from ._axes import LoRAPair

T = TypeVar("T")

ScaleSpec: TypeAlias = (
    ArrayLike | Mapping[str, ArrayLike] | Callable[[LoRAPair], ArrayLike]
)
"""One number for all pairs, `{regex: number}`, or a function of the pair. In place of a
number there may be an array with one for each layer of a stack."""

_FLOAT32 = np.finfo(np.float32)


def resolve_scale(
    pair: LoRAPair,
    batch: Shape,
    scale: ScaleSpec,
    alpha: ScaleSpec | None,
    rslora: bool,
) -> ArrayLike:
    """The scale of one pair: its own, `scale`, `alpha / r` or `alpha / sqrt(r)`.

    Args:
      pair: The pair, with its rank; its own scale goes first if it has one.
      batch: The sizes of its stacked axes.
      scale: See `ScaleSpec`. Patterns are searched in the paths of both factors,
        in order; the first that occurs in either counts.
      alpha: A number, mapping or function like `scale`, to be divided by the rank.
      rslora: Divide alpha by the square root of the rank (rsLoRA, arXiv
        2312.03732).

    Returns:
      A float; a NumPy array of the batch's shape where each layer has its own; or a
      tracer of either shape.

    Raises:
      ValueError: No pattern matches, the shape is neither `()` nor the batch's, or a
        number is 0 or out of float32's range.
      TypeError: Not a number.
    """
    if pair.scale is not None:
        return _checked(pair.scale, pair, "scale", batch)
    if alpha is None:
        return _checked(_look_up(scale, pair, "scale"), pair, "scale", batch)
    rank = cast(int, pair.rank)
    divisor = math.sqrt(rank) if rslora else rank
    return _checked(_look_up(alpha, pair, "alpha"), pair, "alpha", batch) / divisor


def check_scale_options(scale: ScaleSpec, alpha: ScaleSpec | None, rslora: Any) -> None:
    """Raises ValueError where the three arguments contradict each other."""
    if not isinstance(rslora, bool | np.bool_):
        raise ValueError(
            f"`rslora={rslora!r}` has to be True or False. The number goes to `alpha=`."
        )
    # Under jit, `inject_hyperparams` has turned even the default into a tracer.
    default = is_traced(scale) or (is_real_scalar(scale) and known(scale) == 1)
    if alpha is not None and not default:
        raise ValueError(
            f"Both `scale={scale!r}` and `alpha={alpha!r}` are given. Pass the scale "
            "itself, or `alpha` to have it divided by each pair's rank."
        )
    if rslora and alpha is None:
        raise ValueError(
            "`rslora=True` divides `alpha` by the square root of the rank, and no "
            "`alpha` is given. Pass `alpha=`, or put the square root into `scale=`."
        )


def check_patterns(name: str, spec: Any, paths: Iterable[str]) -> None:
    """Raises ValueError for a pattern that is of no use.

    Args:
      name: The option, such as `"scale"`.
      spec: The argument; what is no mapping has no patterns.
      paths: Those of all factors, also of masked ones.
    """
    if not isinstance(spec, Mapping):
        return
    paths = list(paths)
    for pattern in spec:
        if not any(map(compiled(pattern, name).search, paths)):
            raise ValueError(
                f"The pattern {pattern!r} of `{name}={dict(spec)!r}` occurs in no path "
                f"of a LoRA factor. {close_to(pattern, paths)} Correct it, or take it "
                "out."
            )


def first_match(spec: Mapping[str, T], pair: LoRAPair, name: str) -> T:
    """The value of the first pattern that occurs in a path of the pair.

    Raises:
      ValueError: None does.
    """
    for pattern, value in spec.items():
        if any(map(compiled(pattern, name).search, pair.paths)):
            return value
    raise ValueError(
        f"No pattern of `{name}={dict(spec)!r}` occurs in `{pair.a}` or `{pair.b}`. "
        "Add one that does, or '.*' at the end for all other pairs."
    )


def _look_up(spec: ScaleSpec, pair: LoRAPair, name: str) -> Any:
    if callable(spec):
        return spec(pair)
    return first_match(spec, pair, name) if isinstance(spec, Mapping) else spec


def _checked(
    number: Any, pair: LoRAPair, name: str, batch: Shape
) -> jax.Array | np.ndarray | float:
    if not (is_traced(number) or is_real_scalar(number) or _is_real_array(number)):
        raise TypeError(
            f"The {name} of `{pair.a}` is {number!r}; it has to be one real number, or "
            "for stacked layers an array with one for each, such as `np.array([...])`."
        )
    shape = np.shape(number)
    if shape not in ((), batch):
        due = f" or {batch}, one number for each layer of its stack" if batch else ""
        raise ValueError(
            f"The {name} of `{pair.a}` has shape {shape}; due is (){due}. Where pairs "
            f"differ, pass `{name}={{regex: number or array}}`."
        )
    if is_traced(number):
        return cast(jax.Array, number)  # its value cannot be looked at
    values = known(number)
    smallest, largest = (float(x) for x in (_FLOAT32.tiny, _FLOAT32.max))
    if not np.all((smallest <= abs(values)) & (abs(values) <= largest)):  # also NaN
        raise ValueError(
            f"The {name} of `{pair.a}` is {number}. LoRA's s in W0 + s·B·A has to be a "
            "number other than 0 that float32 can hold: adjusting divides by it."
        )
    return np.asarray(values, np.float64) if shape else float(values)


def _is_real_array(number: Any) -> bool:
    """Whether there are axes, and real numbers along them."""
    return (
        isinstance(number, np.ndarray | jax.Array)
        and number.ndim > 0
        and np.asarray(number).dtype.kind in "iufV"
    )
