"""What every room says of bad options, regexes and paths: each text once."""

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np


def check_choice(name: str, value: Any, allowed: Any) -> None:
    """Raises ValueError where `value` is not one of a `Literal`."""
    if is_traced(value) or value not in get_args(allowed):
        raise ValueError(f"`{name}={value!r}` has to be one of {get_args(allowed)}.")


def check_number(name: str, value: Any, low: float, high: float) -> None:
    """Raises ValueError where a number is known and not in `[low, high)`."""
    if is_traced(value):
        return  # under `inject_hyperparams`
    if not (is_real_scalar(value) and low <= known(value) < high):
        raise ValueError(
            f"`{name}={value!r}` has to be a number in [{low:g}, {high:g})."
        )


def check_positive(name: str, value: Any, *, finite: bool = True) -> None:
    """Raises ValueError where a number is known and not above 0, or not finite."""
    if is_traced(value):
        return
    high = math.inf if finite else math.nan  # nothing is at least NaN
    if not (is_real_scalar(value) and known(value) > 0 and not known(value) >= high):
        kind = "a finite number" if finite else "a number"
        raise ValueError(f"`{name}={value!r}` has to be {kind} above 0.")


def check_bool(name: str, value: Any) -> None:
    """Raises ValueError where `value` is not True or False."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"`{name}={value!r}` has to be True or False.")


def check_float_dtype(name: str, value: Any) -> None:
    """Raises ValueError where `value` is no dtype of real floating point, or None."""
    if value is None:
        return
    try:
        array = isinstance(value, np.ndarray | jax.Array)
        good = not array and jnp.issubdtype(jnp.dtype(value), jnp.floating)
    except TypeError:
        good = False
    if not good:
        raise ValueError(
            f"`{name}={value!r}` has to be a dtype of real floating point, such as "
            f"`jnp.float32`. Under `optax.inject_hyperparams`, name `{name}` in "
            "`static_args`."
        )


def known(number: Any) -> Any:
    """A number that can be compared: under a trace, even a concrete array cannot."""
    return np.asarray(number) if isinstance(number, jax.Array) else number


def is_traced(number: Any) -> bool:
    """Whether a number has no value yet, as under `optax.inject_hyperparams`."""
    return isinstance(number, jax.core.Tracer)


def is_real_scalar(number: Any) -> bool:
    """Whether a number has a value now: no tracer, no bool, no array with axes."""
    kinds = Real | np.ndarray | jax.Array
    if is_traced(number) or isinstance(number, bool) or not isinstance(number, kinds):
        return False
    array = np.asarray(number)  # bfloat16 is of kind V, a long int of kind O
    return array.ndim == 0 and array.dtype.kind in "iufVO"


def compiled(pattern: Any, option: str) -> re.Pattern[str]:
    """A regex that the user gave for an option.

    Raises:
      ValueError: It is none.
    """
    try:
        found: re.Pattern[str] = re.compile(pattern)
        found.search("")  # a pattern of bytes does not
        return found
    except (re.error, TypeError) as error:
        raise ValueError(
            f"{pattern!r} of `{option}=` is no regular expression: {error}."
        ) from None


def close_to(path: str, paths: Iterable[str]) -> str:
    """Which paths a wrong one may have meant, as a sentence."""
    close = difflib.get_close_matches(path, paths, n=3, cutoff=0.0)
    return f"Close to it: {close}."


def some(things: Iterable[str]) -> str:
    """`['a', 'b', 'c', 'd'] and 7 more`."""
    things = list(things)
    more = f" and {len(things) - 4} more" if len(things) > 4 else ""
    return f"{things[:4]}{more}"


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Rows of cells as lines of text, in columns as wide as their widest cell.

    Args:
      rows: The heading first, all of one length.
      right: The columns that are flush right, as numbers are.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return [line(row) for row in rows]
