"""The pairs of a tree, what PyTorch calls their layers, and how they lie in a file."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from jax.typing import ArrayLike

from ..algebra._axes import FactorAxes, Shape
from ..pairs._axes import LayoutError, LoRAPair, as_axes
from ..pairs._find import find_pairs
from ..pairs._leaves import index_leaves
from ..pairs._messages import no_pairs_message
from ._arrays import from_layers, sides, to_layers
from ._matrices import Layer
from ._names import NamesSpec, Naming, name_modules
from ._parameters import Parameters, check_used
from ._templates import Index


class Split(NamedTuple):
    """Several modules that lie side by side along an axis.

    Attributes:
      side: The factor that has the axis, 0 for A and 1 for B; the other is shared.
      axis: The axis.
      parts: The number of modules.
    """

    side: int
    axis: int
    parts: int


class Target(NamedTuple):
    """A pair of the tree that has entries of its own in a file.

    Attributes:
      pair: What `find_pairs` returns.
      shapes: The shapes of A and of B.
      naming: The modules of each layer.
      split: Where several modules lie; None for one.
    """

    pair: LoRAPair
    shapes: tuple[Shape, Shape]
    naming: Naming
    split: Split | None = None

    @property
    def names(self) -> Iterator[str]:
        """All modules."""
        return (name for layer in self.naming.modules.values() for name in layer)

    @property
    def stack(self) -> Shape:
        """The sizes of the stacked axes; `()` where it is one layer."""
        return tuple(self.shapes[0][axis] for axis in self.pair.a_batch_axes)

    @property
    def experts(self) -> int | None:
        """How many experts share a parameter; None where it is none of experts."""
        at = self.naming.experts
        return None if at is None else self.stack[at]

    @property
    def scales(self) -> Mapping[Index, np.ndarray]:
        """The scale of each layer, or those of its experts, `(experts,)`."""
        scales = np.asarray(cast(ArrayLike, self.pair.scale), np.float64)
        each = self._experts_last(np.broadcast_to(scales, self.stack))
        return {index: each[index] for index in self.naming.modules}

    def piece_shapes(self) -> tuple[Shape, Shape]:
        """The shapes of A and B of one of several modules."""
        shapes = [list(shape) for shape in self.shapes]
        if self.split:
            shapes[self.split.side][self.split.axis] //= self.split.parts
        return tuple(shapes[0]), tuple(shapes[1])

    def take(
        self, factors: Mapping[str, np.ndarray], window: int = 0
    ) -> Iterator[list[np.ndarray]]:
        """A and B of the pair, `(*stack, r, features)`, for each of several modules.

        The experts are the last of the stacked axes.

        Args:
          factors: The arrays of the tree by path.
          window: The window axes of A, where it is a convolution's.
        """
        for part in range(self.split.parts if self.split else 1):
            both = []
            for side, (path, axes) in enumerate(sides(self.pair)):
                x = factors[path]
                if self.split and self.split.side == side:
                    x = np.split(x, self.split.parts, self.split.axis)[part]
                layers = to_layers(x, axes, window=0 if side else window)
                both.append(self._experts_last(layers))
            yield both

    def put(self, layers: Mapping[Index, Sequence[Layer]]) -> list[np.ndarray]:
        """The inverse of `take`: A and B in the axes of the tree.

        Args:
          layers: Of each layer one for each of several modules, which share a factor.
        """
        rest = [n for i, n in enumerate(self.stack) if i != self.naming.experts]
        both = []
        for side, (_, axes) in enumerate(sides(self.pair)):
            shape, pieces = self.piece_shapes()[side], []
            count = self.split.parts if self.split and self.split.side == side else 1
            for part in range(count):
                each = [layer[part][side] for layer in layers.values()]
                stacked = np.stack(each).reshape(*rest, *each[0].shape)
                pieces.append(from_layers(self._experts_back(stacked), shape, axes))
            both.append(
                np.concatenate(pieces, cast(Split, self.split).axis)
                if count > 1
                else pieces[0]
            )
        return both

    def _experts_last(self, x: np.ndarray) -> np.ndarray:
        at = self.naming.experts
        return x if at is None else np.moveaxis(x, at, len(self.stack) - 1)

    def _experts_back(self, x: np.ndarray) -> np.ndarray:
        at = self.naming.experts
        return x if at is None else np.moveaxis(x, len(self.stack) - 1, at)


def find_targets(
    tree: Any, names: NamesSpec, parameters: Parameters, **options: Any
) -> list[Target]:
    """The pairs of a tree, with their shapes and PyTorch's names of their layers.

    Args:
      tree: The tree with the factors.
      names: See `NamesSpec`.
      parameters: Which names are parameters.
      **options: Those of `find_pairs`.

    Raises:
      ValueError: No pair, or what `find_pairs` and `name_modules` raise; an axis along
        which several modules cannot lie.
    """
    found = find_pairs(tree, **options)
    if not found:
        remedy = "Pass a tree with the factors, as `nnx.state(model, nnx.LoRAParam)`."
        raise ValueError(no_pairs_message(tree, remedy))
    leaves = index_leaves(tree)
    stacks = [
        tuple(leaves[pair.a].shape[axis] for axis in pair.a_batch_axes)
        for pair in found
    ]
    targets = []
    for pair, naming in zip(
        found, name_modules(found, stacks, names, parameters), strict=True
    ):
        shapes = leaves[pair.a].shape, leaves[pair.b].shape
        targets.append(Target(pair, shapes, naming, _split(pair, shapes, naming)))
    check_used(parameters, [name for target in targets for name in target.names])
    return targets


def wrapped_modules(targets: Sequence[Target]) -> Iterator[str]:
    """The modules that PEFT wraps, each as often as it does."""
    for target in targets:
        for name in target.names:
            yield name.rpartition(".")[0] if target.naming.is_parameter else name


def _split(pair: LoRAPair, shapes: tuple[Shape, Shape], naming: Naming) -> Split | None:
    """Where several modules lie, checked."""
    if naming.given is None:
        return None
    given, factor = naming.given
    side = "ab".index(factor)
    path, shape, axes = pair.paths[side], shapes[side], pair.factor_axes[side]
    count = len(next(iter(naming.modules.values())))
    axis = _feature_axis(given, shape, axes)
    if axis is None or shape[axis] % count:
        raise ValueError(
            f"`module_names=` says that {count} modules lie along axis {given!r} of "
            f"`{path}` {shape}. That has to be one of its feature axes, "
            f"{axes.features(len(shape))}, of a size that {count} divides."
        )
    return Split(side, axis, count)


def _feature_axis(given: Any, shape: Shape, axes: FactorAxes) -> int | None:
    """The user's axis, non-negative, if it is one of features."""
    try:
        (axis,) = as_axes(given)
    except (LayoutError, ValueError):
        return None
    axis += len(shape) if axis < 0 else 0
    return axis if axis in axes.features(len(shape)) else None
