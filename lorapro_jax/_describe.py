"""A table of the pairs in a tree, for people."""

import itertools
from typing import Any, TypeAlias

from ._layout import FactorAxes, LoRAPair, Shape, factor_axes
from ._leaves import index_leaves
from ._pairs import find_pairs

Row: TypeAlias = tuple[str, ...]


def describe_pairs(tree: Any, **options: Any) -> str:
    """A table of what `find_pairs` finds, to look at once before training.

    Args:
      tree: Parameters or gradients.
      **options: Those of `find_pairs`.

    Returns:
      One line a pair: path, shapes, layout, stacked axes, rank, scale; and the other
      leaves with "lora" in their path, if there are any. Or that there is none.

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
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    paired = {path for pair in pairs for path in pair[:2]}
    others = [path for path in leaves if "lora" in path.lower() and path not in paired]
    if others:
        lines.append(f"not in a pair: {', '.join(others)}")
    return "\n".join(line.rstrip() for line in lines)


def _row(pair: LoRAPair, a: Shape, b: Shape) -> Row:
    axes_a, axes_b = factor_axes(pair)
    layouts = _letters(a, axes_a, "in"), _letters(b, axes_b, "out")
    return (
        _joint_path(pair.a, pair.b),
        str(a),
        str(b),
        " ".join(layouts),
        ",".join(map(str, pair.a_batch_axes)) or "-",
        str(pair.rank),
        f"{pair.scale:.6g}" if isinstance(pair.scale, float) else "traced",
    )


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
