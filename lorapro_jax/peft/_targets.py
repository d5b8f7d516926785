"""The pairs of a tree, and what PyTorch calls their layers."""

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import numpy as np
from jax.typing import ArrayLike

from ..algebra._axes import Shape
from ..pairs._axes import LoRAPair
from ..pairs._find import find_pairs
from ..pairs._leaves import index_leaves
from ..pairs._messages import no_pairs_message
from ._names import Index, NamesSpec, name_modules


class Target(NamedTuple):
    """A pair of the tree that has entries of its own in a file.

    Attributes:
      pair: What `find_pairs` returns.
      a: The shape of A.
      b: The shape of B.
      names: The PyTorch module of each layer, by its index on the stacked axes.
    """

    pair: LoRAPair
    a: Shape
    b: Shape
    names: Mapping[Index, str]

    @property
    def stack(self) -> Shape:
        """The sizes of the stacked axes; `()` where it is one layer."""
        return tuple(self.a[axis] for axis in self.pair.a_batch_axes)

    @property
    def scales(self) -> Mapping[Index, float]:
        """The scale of each layer, by its index on the stacked axes."""
        scales = np.asarray(cast(ArrayLike, self.pair.scale), np.float64)
        each = np.broadcast_to(scales, self.stack)
        return {index: float(each[index]) for index in self.names}


def find_targets(tree: Any, names: NamesSpec, **options: Any) -> list[Target]:
    """The pairs of a tree, with their shapes and PyTorch's names of their layers.

    Args:
      tree: The tree with the factors.
      names: See `NamesSpec`.
      **options: Those of `find_pairs`.

    Raises:
      ValueError: No pair, or what `find_pairs` and `name_modules` raise.
    """
    found = find_pairs(tree, **options)
    if not found:
        remedy = "Pass a tree with the factors, as `nnx.state(model, nnx.LoRAParam)`."
        raise ValueError(no_pairs_message(tree, remedy))
    leaves = index_leaves(tree)
    nameless = [
        Target(pair, leaves[pair.a].shape, leaves[pair.b].shape, {}) for pair in found
    ]
    modules = name_modules(found, [target.stack for target in nameless], names)
    return [
        target._replace(names=layers)
        for target, layers in zip(nameless, modules, strict=True)
    ]
