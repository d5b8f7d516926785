"""Which axis of a factor is what, from the shapes of the two.

A is `(*in, r)` and B is `(r, *out)`, or PyTorch's transposes; on top of that both
may carry stacked axes, one slice a layer: in front (`nn.scan`, `nnx.vmap`,
experts) or at axis 1 (MaxText). Everything that is neither rank nor stacked is a
feature axis: heads, kernel windows.
"""

from collections.abc import Iterator, Sequence
from typing import get_args

from ..algebra._axes import Shape
from ._axes import Axes, LayoutError, as_axes
from ._names import Layout

_NOT_OF_ONE_LAYER = (
    "They are not the two factors of one layer. Name all pairs of the tree with "
    "`pairs=[(path of A, path of B), ...]`: what is not among them counts as any other "
    "leaf."
)


def infer_axes(
    a: Shape,
    b: Shape,
    layouts: Sequence[Layout],
    stack_axis: int | Sequence[int] | None = None,
    *,
    rank_leads: bool = False,
) -> Axes:
    """Reads the axes off the shapes of A and B.

    Two factors of three axes or more count as stacked where that is possible:
    no known LoRA layer has two such factors unstacked with a common axis. A rank
    above the smaller feature size is accepted only where nothing else fits.

    A factor with more axes than its partner may be one of several, with an axis
    of experts before its rank, that share their partner. Where its shape allows both,
    the axes are not clear.

    Args:
      a: Shape of A.
      b: Shape of B.
      layouts: The layouts to consider.
      stack_axis: The stacked axis or axes, where shapes cannot settle it; `()`
        for none. Factors of two axes are never stacked.
      rank_leads: Whether B is known to have its rank in front of all features.

    Raises:
      LayoutError: No reading, or more than one.
    """
    _check_sizes(a, b)
    readings = [axes for layout in layouts for axes in _readings(a, b, layout)]
    if "jax" in layouts:
        readings += _of_windows(a, b)
    if not readings:
        raise LayoutError(
            "they share no rank (the last axis of A and the first of B behind stacked "
            "axes; in PyTorch's layout the first of A and the second of B)",
            remedy="" if set(a) & set(b) else _NOT_OF_ONE_LAYER,
        )
    if stack_axis is not None and min(len(a), len(b)) > 2:
        fitting = _with_stack(readings, stack_axis)
    else:
        fitting = _preferred(a, b, readings)
    if not fitting:
        reason = f"`stack_axis={stack_axis!r}` does not fit them"
        raise LayoutError(reason, readings=readings)

    found = [axes for axes in fitting if _rank_is_low(a, b, axes)]
    if not found:  # more rank than features: rare, but possible on a small head
        others = [x for layout in get_args(Layout) for x in _readings(a, b, layout)]
        found = fitting + [axes for axes in others if _rank_is_low(a, b, axes)]
    if not rank_leads:
        settled = None if stack_axis is None else as_axes(stack_axis)
        unsettled = [axes for axes in found if axes.a_batch != settled]
        found += [other for axes in unsettled for other in _shared(a, b, axes)]
    found = list(dict.fromkeys(found))
    if len(found) > 1:
        options = " or ".join(_describe(a, axes) for axes in found)
        raise LayoutError(f"they can be read as {options}", readings=found)
    return found[0]


def _check_sizes(a: Shape, b: Shape) -> None:
    """Raises LayoutError where a factor is no matrix."""
    reason = ""
    if min(len(a), len(b)) < 2:
        reason = "a factor has a rank axis and at least one feature axis"
    elif 0 in (*a, *b):
        reason = "a factor has no elements"
    if reason:
        raise LayoutError(reason, remedy=_NOT_OF_ONE_LAYER)


def _readings(a: Shape, b: Shape, layout: Layout) -> Iterator[Axes]:
    """Every way to read the shapes as a pair: unstacked, in front, at axis 1."""
    depth = min(len(a), len(b)) - 2  # two axes must remain
    stacks: list[Shape] = [tuple(range(n)) for n in range(depth + 1)]
    if depth and layout == "jax":
        stacks.append((1,))
    for stack in stacks:
        rest_a, rest_b = _without(stack, a), _without(stack, b)
        a_rank = rest_a[-1] if layout == "jax" else rest_a[0]
        b_rank = rest_b[0] if layout == "jax" else rest_b[1]
        same_stack = all(a[axis] == b[axis] for axis in stack)
        if same_stack and a[a_rank] == b[b_rank]:
            yield Axes(a_rank, b_rank, stack, stack)


def _of_windows(a: Shape, b: Shape) -> Iterator[Axes]:
    """A convolution whose B is one too, `(1, ..., 1, r, out)`: unstacked, or in front.

    The first that fits: another would differ by axes of size 1 only.
    """
    rank = b[-2]
    if len(a) != len(b) or rank == 1 or a[-1] != rank:
        return
    for depth in range(len(a) - 2):
        stack, of_a, of_b = tuple(range(depth)), a[depth:-2], b[depth:-2]
        # Windows of size 1 in A too: one layer or expert, but for a 1×1 convolution.
        is_window = of_a != of_b or (not depth and len(of_a) > 1)
        if a[:depth] == b[:depth] and set(of_b) == {1} and is_window:
            yield Axes(len(a) - 1, len(b) - 2, stack, stack)
            return


def _preferred(a: Shape, b: Shape, readings: list[Axes]) -> list[Axes]:
    """The stacked readings, if there are any; but a 1×1 window is no stack of one."""
    if len(a) > 3 and set(a[:-2]) == set(b[:-2]) == {1}:
        return [axes for axes in readings if not axes.a_batch] or readings
    return [axes for axes in readings if axes.a_batch] or readings


def _shared(a: Shape, b: Shape, axes: Axes) -> Iterator[Axes]:
    """The same with experts before the rank of one factor, which share the other.

    Beside `(in, r)`, `(r, heads, size)` may also be `(experts, r, out)`; in PyTorch's
    layout, beside `(r, in)`, it is `(experts, out, r)`; or the experts are A's.
    """
    rest_a, rest_b = _without(axes.a_batch, a), _without(axes.b_batch, b)
    rank = a[axes.a_rank]
    if rank == 1 or len(rest_a) == len(rest_b):
        return
    is_jax = (axes.a_rank, axes.b_rank) == (rest_a[-1], rest_b[0])
    if len(rest_b) > len(rest_a):
        other = rest_b[1] if is_jax else rest_b[2]
        if other != axes.b_rank and b[other] == rank:
            yield axes._replace(b_rank=other)
    elif not is_jax and a[rest_a[1]] == rank:
        yield axes._replace(a_rank=rest_a[1])


def _with_stack(readings: list[Axes], wanted: int | Sequence[int]) -> list[Axes]:
    """The readings stacked exactly as `wanted`, else those that also stack more."""
    axes = as_axes(wanted)
    exact = [x for x in readings if x.a_batch == axes]
    return exact or [x for x in readings if axes and set(axes) <= set(x.a_batch)]


def _rank_is_low(a: Shape, b: Shape, axes: Axes) -> bool:
    at_a, at_b = axes.factor_axes
    return a[axes.a_rank] <= min(at_a.feature_count(a), at_b.feature_count(b))


def _without(stack: Shape, shape: Shape) -> list[int]:
    return [axis for axis in range(len(shape)) if axis not in stack]


def _describe(a: Shape, axes: Axes) -> str:
    stacked = f"stacked on {axes.a_batch}" if axes.a_batch else "unstacked"
    return f"rank {a[axes.a_rank]} on axes {axes.a_rank} and {axes.b_rank}, {stacked}"
