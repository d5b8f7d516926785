"""A table of the pairs in a tree, for people."""

from __future__ import annotations

import itertools
from typing import Any, TypeAlias, cast

import numpy as np

from .._checks import is_traced, table
from ..algebra._axes import FactorAxes, Shape
from ._axes import LoRAPair
from ._find import find_pairs
from ._leaves import index_leaves
from ._messages import shared_weights

_SHOWN = 40  # other leaves by name; where there are more, it is a whole model

Row: TypeAlias = tuple[str, ...]


def describe_pairs(tree: Any, **options: Any) -> str:
    """A table of what `find_pairs` finds, to look at once before training.

    Args:
      tree: Parameters or gradients.
      **options: Those of `find_pairs`.

    Returns:
      One line a pair: path, shapes, layout, stacked axes, rank, scale (from the least
      to the largest where each layer has its own). Then how many other leaves there
      are, and which of them have "lora" in their path; with `pairs=`, which it leaves
      out. Or that there is no pair.

    Raises:
      ValueError: As `find_pairs`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from lorapro_jax import describe_pairs
      >>> tree = {"mlp": {"lora_a": jnp.ones((64, 4)), "lora_b": jnp.ones((4, 32))}}
      >>> print(describe_pairs(tree, alpha=8.0))
      pair            A        B        layout      stacked  rank  scale
      mlp/lora_{a,b}  (64, 4)  (4, 32)  in·r r·out  -        4     2
    """
    pairs = find_pairs(tree, **options)
    leaves = index_leaves(tree)
    if not pairs:
        return f"no LoRA pair among {len(leaves)} leaves"
    rows: list[Row] = [("pair", "A", "B", "layout", "stacked", "rank", "scale")]
    rows += [_row(pair, leaves[pair.a].shape, leaves[pair.b].shape) for pair in pairs]
    lines = table(rows)
    for paths in shared_weights(pairs):
        lines.append(f"on one weight: {', '.join(paths)}")
    paired = {path for pair in pairs for path in pair.paths}
    others = [path for path in leaves if path not in paired]
    if others:
        lines.append(
            f"other leaves: {len(others)}, passed on as they are by lorapro, plain "
            "AdamW in lorapro_adamw"
        )
    if options.get("pairs") is None:
        others = [path for path in others if "lora" in path.lower()]
    if others:
        more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
        lines.append(f"not in a pair: {', '.join(others[:_SHOWN])}{more}")
    return "\n".join(lines)


def _row(pair: LoRAPair, a: Shape, b: Shape) -> Row:
    axes_a, axes_b = pair.factor_axes
    layouts = _letters(a, axes_a, "in"), _letters(b, axes_b, "out")
    return (
        _joint_path(pair.a, pair.b),
        str(a),
        str(b),
        " ".join(layouts),
        ",".join(map(str, pair.a_batch_axes)) or "-",
        str(pair.rank),
        _scale(pair),
    )


def _scale(pair: LoRAPair) -> str:
    """A number, or from the least to the largest of a stack."""
    if is_traced(pair.scale):
        return "traced"
    ends = {float(end(cast(Any, pair.scale))) for end in (np.min, np.max)}
    return " to ".join(f"{x:.6g}" for x in sorted(ends))


def _letters(shape: Shape, axes: FactorAxes, feature: str) -> str:
    """What each axis is: `L·in·r` for a stacked A."""
    names = {axes.rank: "r", **dict.fromkeys(axes.batch, "L")}
    return "·".join(names.get(axis, feature) for axis in range(len(shape)))


def _joint_path(a: str, b: str) -> str:
    """`q/lora_{a,b}` for `q/lora_a` and `q/lora_b`."""
    head = _common_start(a, b)
    while head and a[head - 1].isdigit():  # 12 and 13 are not 1{2,3}
        head -= 1
    start, a, b = a[:head], a[head:], b[head:]
    tail = _common_start(a[::-1], b[::-1])
    inner = f"{a[: len(a) - tail]},{b[: len(b) - tail]}"
    return f"{start}{{{inner}}}{a[len(a) - tail :]}"


def _common_start(a: str, b: str) -> int:
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
    return len(list(same))
