"""Which order the axes of a square kernel have, as far as the tree proves it.

A kernel of unequal sides is read off its sizes. Where inputs and outputs have equal
sizes, both orders fit, and the wrong one makes a layer into its transpose. The name
of a leaf does not tell: `kernel` is `(in, out)` in Flax's Dense and `(out, in)` in the
Conv1D of its GPT-2, `weight` is `(out, in)` in PyTorch's Linear and `(in, out)` in the
Conv1D of its GPT-2. Nor do factors called `kernel_lora_a`: qwix adapts a product,
whichever axis of its kernel it sums over. What does prove it, from near to far:

1. The kernel's own bias, where heads or a window leave only one place for the outputs.
2. A stack that is the only one to name its leaves so and has one order: Keras's
   `lora_kernel_a`, which adds A B to the kernel as it lies; tables of embeddings, whose
   rows are looked up; PEFT's convolutions, laid out like their `lora_A`; and in an NNX
   model the classes of Flax.
3. Other kernels with the same last name, if they agree: those of other pairs whose
   sizes differ, or whose axes are given; those with a bias, adapted or not; those of
   `nnx.LoRALinear`, which is the only layer that keeps `lora/lora_a` beside `kernel`.
   Kernels with as many axes count before the others, so that a convolution does not
   speak for a matrix.

Whatever is left has to be said with `kernels=`. A model whose kernels are all square
and have no witness is refused although most such models are `(in, out)`: for the rest
the start would be another model, and nothing would show it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from ..algebra._axes import Shape
from ..pairs._axes import LayoutError, LoRAPair
from ..pairs._names import parse_factor_name
from ._axes import (
    KernelAxes,
    Order,
    Sizes,
    biased_readings,
    describe_axes,
    fits_bias,
    in_order,
    order_of,
)

_BIASES = ("bias", "b")
_TABLES = frozenset({"embedding", "embeddings"})


class Located(NamedTuple):
    """The base weight of a pair, and what its axes may be.

    Attributes:
      pair: The pair.
      path: The path of the kernel.
      shape: Its shape.
      sizes: What it has to hold.
      readings: At least one.
      given: Whether the user gave the one reading.
    """

    pair: LoRAPair
    path: str
    shape: Shape
    sizes: Sizes
    readings: list[KernelAxes]
    given: bool = False


class Witness(NamedTuple):
    """A kernel whose order is known.

    Attributes:
      path: Its path.
      features: The number of its axes that are not stacked.
      order: Its order.
    """

    path: str
    features: int
    order: Order


def settle(
    located: Sequence[Located],
    shapes: Mapping[str, Shape],
    known: Mapping[str, Order],
) -> Iterator[KernelAxes | LayoutError]:
    """The axes of each kernel, or why they are not clear.

    Args:
      located: The kernels.
      shapes: The shapes of all leaves by their paths.
      known: The orders of kernels whose layers are known, by their paths.
    """
    narrowed = [_narrowed_by_bias(kernel, shapes) for kernel in located]
    fixed = [known.get(x.path) or _stack_order(x, shapes) for x in narrowed]
    unsettled = [
        x for x, order in zip(narrowed, fixed, strict=True) if len(_read(x, order)) > 1
    ]
    witnesses: list[Witness] = []
    if unsettled:
        witnesses += _witnesses(narrowed, known, shapes)
        witnesses += _bystanders({_last(x.path) for x in unsettled}, narrowed, shapes)
    for kernel, order in zip(narrowed, fixed, strict=True):
        readings = _read(kernel, order)
        if len(readings) == 1:
            yield readings[0]
        else:
            yield _settled(kernel, witnesses)


def _settled(kernel: Located, witnesses: Iterable[Witness]) -> KernelAxes | LayoutError:
    """The axes of a kernel as its witnesses have them, or why they are not clear."""
    name = _last(kernel.path)
    like = [x for x in witnesses if _last(x.path) == name]
    nearest = [x for x in like if x.features == _features(kernel)] or like
    by_order = {x.order: x.path for x in nearest}
    options = " or ".join(describe_axes(axes) for axes in kernel.readings)
    if len(by_order) > 1:
        return LayoutError(
            f"its axes can be {options}. Other leaves called `{name}` disagree: inputs "
            f"come first in `{by_order['in,out']}`, outputs in `{by_order['out,in']}`"
        )
    for order, witness in by_order.items():
        found = _read(kernel, order)
        if len(found) == 1:
            return found[0]
        return LayoutError(f"its axes can be {options}, which `{witness}` leaves open")
    return LayoutError(
        f"its axes can be {options}, and no other leaf called `{name}` proves which"
    )


def _read(kernel: Located, order: Order) -> list[KernelAxes]:
    """The readings that an order leaves."""
    return in_order(kernel.shape, kernel.readings, kernel.sizes, order)


def _narrowed_by_bias(kernel: Located, shapes: Mapping[str, Shape]) -> Located:
    """Without the readings that the kernel's bias rules out, if it allows any."""
    bias = _bias_of(kernel.path, shapes)
    if bias is None or kernel.given:
        return kernel
    fits = [axes for axes in kernel.readings if fits_bias(kernel.shape, axes, bias)]
    return kernel._replace(readings=fits or kernel.readings)


def _stack_order(kernel: Located, shapes: Mapping[str, Shape]) -> Order:
    """The order that names prove which only one stack gives its leaves."""
    pair, name = kernel.pair, parse_factor_name(kernel.pair.a)
    kind = name.kind if name else ""
    if kind or _last(kernel.path) in _TABLES:  # `lora_kernel_a`, `lora_embedding_A`
        return "in,out"
    at_a, at_b = pair.factor_axes
    window = shapes[pair.b][at_b.rank + 1 :]  # PEFT's B of a convolution: (out, r, 1)
    torch = at_a.rank < at_b.rank and _last(kernel.path) == "weight"
    return "out,in" if torch and window and set(window) == {1} else None


def _witnesses(
    located: Iterable[Located], known: Mapping[str, Order], shapes: Mapping[str, Shape]
) -> Iterator[Witness]:
    """The kernels of pairs whose order is that of others of their name."""
    for kernel in located:
        if _stack_order(kernel, shapes):
            continue  # tables and PyTorch's convolutions are like no other `weight`
        order = known.get(kernel.path)
        if len(kernel.readings) == 1:
            order = order_of(kernel.shape, kernel.readings[0])
        elif _is_lora_linear(kernel):
            order = "in,out"
        if order:
            yield Witness(kernel.path, _features(kernel), order)


def _bystanders(
    names: set[str], located: Sequence[Located], shapes: Mapping[str, Shape]
) -> Iterator[Witness]:
    """The kernels of these names whose bias shows which axes are their outputs."""
    adapted = {path for x in located for path in (x.path, *x.pair.paths)}
    stacks = {_stack(x) for x in located} | {()}
    for path, shape in shapes.items():
        bias = _bias_of(path, shapes) if _last(path) in names else None
        if bias is None or path in adapted or parse_factor_name(path):
            continue
        for stack in sorted(stacks, key=len, reverse=True):
            if any(axis >= len(shape) or shape[axis] != size for axis, size in stack):
                continue
            batch = tuple(axis for axis, _ in stack)
            readings = biased_readings(shape, bias, batch)
            orders = {order_of(shape, axes) for axes in readings}
            if len(orders) == 1 and (order := orders.pop()):
                yield Witness(path, len(shape) - len(batch), order)
            if readings:
                break


def _is_lora_linear(kernel: Located) -> bool:
    """Whether a kernel lies where `nnx.LoRALinear` has it."""
    parent = kernel.path.removesuffix("kernel")
    return kernel.path != parent and kernel.pair.a == f"{parent}lora/lora_a"


def _bias_of(path: str, shapes: Mapping[str, Shape]) -> Shape | None:
    """The shape of the bias beside a kernel."""
    parent, slash, _ = path.rpartition("/")
    for name in _BIASES:
        if (bias := f"{parent}{slash}{name}") in shapes and bias != path:
            return None if parse_factor_name(bias) else shapes[bias]
    return None


def _stack(kernel: Located) -> tuple[tuple[int, int], ...]:
    """The stacked axes of a kernel with their sizes."""
    return tuple((axis, kernel.shape[axis]) for axis in kernel.readings[0].batch)


def _features(kernel: Located) -> int:
    return len(kernel.shape) - len(kernel.sizes.batch)


def _last(path: str) -> str:
    return path.rpartition("/")[2]
