"""A table of the pairs in a tree, for people."""

import os
from typing import Any

from ._layout import LoRAPair, Shape
from ._leaves import index_leaves
from ._pairs import find_pairs


def describe_pairs(tree: Any, **options: Any) -> str:
    """A table of what `find_pairs` finds, to look at once before training.

    Args:
      tree: Parameters or gradients.
      **options: Those of `find_pairs`.

    Returns:
      One line a pair: path, shapes, layout, stacked axes, rank, scale.

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
    rows = [("pair", "A", "B", "layout", "stacked", "rank", "scale")]
    rows += [_row(pair, leaves[pair.a].shape, leaves[pair.b].shape) for pair in pairs]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _row(pair: LoRAPair, a: Shape, b: Shape) -> tuple[str, ...]:
    def letters(shape, rank_axis, batch_axes, feature):
        name = {rank_axis: "r", **dict.fromkeys(batch_axes, "L")}
        return "·".join(name.get(axis, feature) for axis in range(len(shape)))

    head = os.path.commonprefix([pair.a, pair.b])
    tail = os.path.commonprefix([pair.a[len(head) :][::-1], pair.b[len(head) :][::-1]])
    ends = [path[len(head) : len(path) - len(tail)] for path in (pair.a, pair.b)]
    scale = f"{pair.scale:.6g}" if isinstance(pair.scale, float) else "traced"
    return (
        f"{head}{{{ends[0]},{ends[1]}}}{tail[::-1]}",
        str(a),
        str(b),
        letters(a, pair.a_rank_axis, pair.a_batch_axes, "in")
        + " "
        + letters(b, pair.b_rank_axis, pair.b_batch_axes, "out"),
        ",".join(map(str, pair.a_batch_axes)) or "-",
        str(pair.rank),
        scale,
    )
