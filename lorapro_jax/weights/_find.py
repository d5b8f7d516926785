"""The base weight that a LoRA pair adapts: which leaf, and which of its axes are what.

Static Python over paths and shapes, like `find_pairs`. In every stack the kernel lies
near its factors: beside them (Linen, qwix, Keras), one level up (`nnx.LoRALinear`,
gemma), or in a module that the adapter wraps (`nnx.LoRA`, PEFT).
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .._checks import close_to
from ..algebra._axes import Shape
from ..pairs._axes import LayoutError, LoRAPair
from ..pairs._leaves import Leaf, index_leaves
from ..pairs._names import parse_factor_name
from ._axes import Order, Sizes, check_kernel_axes, kernel_readings
from ._given import KernelsSpec, check_matches, key_for, look_up
from ._orders import Located, settle
from ._values import is_quantized

_NAMES = ("kernel", "_kernel", "w", "weight", "weights", "embedding", "embeddings")
# What an adapter wraps, in NNX, PEFT, Levanter and AXLearn.
_MODULES = ("base_module", "base_layer", "wrapped", "layer")


class Kernel(NamedTuple):
    """The base weight of a LoRA pair, static.

    Attributes:
      path: The path of the leaf, like those of a `LoRAPair`. A quantised weight that
        is kept in several leaves has what their paths have in common.
      batch: The stacked axes, in the order of the pair's.
      inputs: The axes that are A's features, in A's order.
      outputs: The axes that are B's features, in B's order.
    """

    path: str
    batch: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def find_kernels(
    params: Any,
    pairs: Sequence[LoRAPair],
    kernels: KernelsSpec | None = None,
    known: Mapping[str, Order] | None = None,
) -> list[Kernel]:
    r"""The base kernel of each pair, by the names and shapes of the leaves.

    Args:
      params: The tree with factors and kernels; only paths, shapes and dtypes count.
      pairs: As `find_pairs` returns them.
      kernels: Where a kernel is that has another name, or which of its axes are
        what: `{regex: path}` or `{regex: (path, input axes, output axes)}`. The regex
        has to match all of the path of A or B, and the path may refer to its groups
        (`r"\1/gate"`). The first that matches counts; other pairs are searched for.
      known: The orders of kernels whose layers are known, by their paths.

    Raises:
      ValueError: No kernel, or one whose axes neither its sizes nor the rest of the
        tree prove (`_orders`). The message names the pair and what to do.
    """
    shapes = _shapes(params)
    located = _locate_all(shapes, pairs, kernels)
    found = []
    for kernel, axes in zip(located, settle(located, shapes, known or {}), strict=True):
        if isinstance(axes, LayoutError):
            raise ValueError(_unclear_message(kernel, shapes, axes))
        found.append(Kernel(kernel.path, *axes))
    return found


def find_kernel_paths(
    params: Any, pairs: Sequence[LoRAPair], kernels: KernelsSpec | None = None
) -> list[str]:
    """The path of each pair's base kernel, for whom its axes are of no concern.

    Args:
      params: See `find_kernels`.
      pairs: See `find_kernels`.
      kernels: See `find_kernels`.

    Raises:
      ValueError: As `find_kernels`, except for axes that are not clear.
    """
    return [x.path for x in _locate_all(_shapes(params), pairs, kernels)]


def find_kernel_stacks(
    params: Any, pairs: Sequence[LoRAPair], kernels: KernelsSpec | None = None
) -> list[tuple[str, Shape]]:
    """The path and the stacked axes of each pair's base kernel.

    Args:
      params: See `find_kernels`.
      pairs: See `find_kernels`.
      kernels: See `find_kernels`.

    Raises:
      ValueError: As `find_kernels`, except for other axes that are not clear.
    """
    located = _locate_all(_shapes(params), pairs, kernels)
    stacks = [{axes.batch for axes in kernel.readings} for kernel in located]
    if any(len(stack) > 1 for stack in stacks):
        return [(x.path, x.batch) for x in find_kernels(params, pairs, kernels)]
    return [(x.path, stack.pop()) for x, stack in zip(located, stacks, strict=True)]


def _locate_all(
    shapes: Mapping[str, Shape], pairs: Sequence[LoRAPair], kernels: KernelsSpec | None
) -> list[Located]:
    for pattern in kernels or {}:
        check_matches(pattern, pairs)
    return [_locate(pair, shapes, kernels or {}) for pair in pairs]


def _shapes(params: Any) -> dict[str, Shape]:
    """The shapes of all arrays by their paths."""
    leaves = index_leaves(params)
    return _quantized(leaves) | {
        path: leaf.shape
        for path, leaf in leaves.items()
        if hasattr(leaf.value, "shape")
    }


def _locate(
    pair: LoRAPair, shapes: Mapping[str, Shape], kernels: KernelsSpec
) -> Located:
    """The one leaf that fits a pair: where the user says, else the nearest."""
    at_a, at_b = pair.factor_axes
    sizes = Sizes.of(shapes[pair.a], shapes[pair.b], at_a, at_b)
    given = look_up(pair, kernels)
    if given and given.path not in shapes:
        raise ValueError(_unknown_message(pair, given.path, shapes))
    nearby = [(given.path,)] if given else list(_candidates(pair))

    misfits = []
    for paths in nearby:
        found = []
        for path in (x for x in paths if x in shapes and x not in pair.paths):
            shape = shapes[path]
            try:
                if given and given.axes:
                    readings = [check_kernel_axes(shape, sizes, *given.axes)]
                else:
                    readings = kernel_readings(shape, sizes, at_a.batch)
            except LayoutError as error:
                misfits.append(f"`{path}` {shape}: {error}")
            else:
                told = bool(given and given.axes)
                found.append(Located(pair, path, shape, sizes, readings, told))
        if len(found) > 1:
            misfits = [f"`{kernel.path}` fits" for kernel in found]
            break
        if found:
            return found[0]
    raise ValueError(_no_kernel_message(pair, shapes, misfits, nearby))


def _candidates(pair: LoRAPair) -> Iterator[tuple[str, ...]]:
    """Where the kernel may be, from near to far."""
    name = parse_factor_name(pair.a)
    if name is None:
        return
    place = name.owner.split("/") if name.owner else []
    if stem := name.stem.rstrip("_"):  # `kernel_lora_a` is beside `kernel`
        place = [*place, stem]
        yield ("/".join(place),)
    while True:
        modules = [place, *([*place, module] for module in _MODULES)]
        yield tuple("/".join((*module, x)) for module in modules for x in _NAMES)
        # `nnx.LoRA` around `nnx.LoRA`: one wraps what the other does.
        twice = [[*place, module, module] for module in _MODULES]
        yield tuple("/".join((*module, x)) for module in twice for x in _NAMES)
        # `q/lora/lora_a` is of `q/kernel`, `q/_LoRAEinsum_0/lora/a` of `q/w`.
        if not (place and re.search("lora|adapter", place[-1], re.IGNORECASE)):
            return
        place = place[:-1]


def _quantized(leaves: Mapping[str, Leaf]) -> dict[str, Shape]:
    """The shapes of weights kept as integers and scales: `kernel/array/qvalue`."""
    shapes: dict[str, Shape] = {}
    for path, leaf in leaves.items():
        if is_quantized(leaf.value):
            parent, _, _ = path.rpartition("/")
            for owner in (parent, parent.rpartition("/")[0]):
                shapes.setdefault(owner, leaf.shape)
    return shapes


def _unknown_message(pair: LoRAPair, path: str, shapes: Iterable[str]) -> str:
    return (
        f"`kernels` says that `{path}` is the base weight of `{pair.a}`, but there is "
        f"no such leaf. {close_to(path, shapes)}"
    )


def _unclear_message(
    kernel: Located, shapes: Mapping[str, Shape], reason: LayoutError
) -> str:
    pair = kernel.pair
    a, b = (f"`{path}` {shapes[path]}" for path in pair.paths)
    options = [(kernel.path, x.inputs, x.outputs) for x in kernel.readings]
    return (
        f"The base weight of {a} and {b} is not clear. `{kernel.path}` {kernel.shape}: "
        f"{reason}. What the layer computes tells: {' or '.join(map(str, options))}. "
        "Said of one layer, it counts for all leaves of this name that nothing else "
        f"proves. Say it with `kernels={{{key_for(pair.a)!r}: (path, input axes, "
        "output axes)}`."
    )


def _no_kernel_message(
    pair: LoRAPair,
    shapes: Mapping[str, Shape],
    misfits: list[str],
    nearby: Sequence[Sequence[str]],
) -> str:
    a, b = (f"`{path}` {shapes[path]}" for path in pair.paths)
    if misfits:
        return (
            f"The base weight of {a} and {b} is not clear. {'; '.join(misfits)}. Say "
            f"which it is and its axes: `kernels={{{key_for(pair.a)!r}: (path, input "
            "axes, output axes)}`."
        )
    tried = [path for paths in nearby for path in paths][:8]
    looked = f"looked for {tried} and the like" if tried else "its name is no help"
    return (
        f"No base weight of {a} and {b} among {len(shapes)} arrays; {looked}. Pass the "
        "whole parameters, frozen ones too (in NNX `nnx.state(model)`), or say where "
        f"it is: `kernels={{{key_for(pair.a)!r}: path}}`."
    )
