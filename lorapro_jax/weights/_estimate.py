"""The mean gradient of the base weights, over a few batches."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence, Sized
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from .._checks import some
from .._placement import to_host
from ..pairs._find import PairsSpec
from ..pairs._leaves import Leaf, index_leaves
from ._select import KernelChoice, select_kernels

Group: TypeAlias = tuple[str, ...]
"""Paths of kernels, in the order of the tree."""


def estimate_gradients(
    loss_fn: Callable[[Any, Any], jax.Array],
    params: Any,
    batches: Iterable[Any],
    *,
    kernels: KernelChoice | None = None,
    pairs: PairsSpec | None = None,
    stack_axis: int | Sequence[int] | None = None,
    at_once: int | None = None,
    offload: bool = True,
    progress: bool = True,
) -> dict[str, np.ndarray | jax.Array]:
    """The mean gradient of the base weights that carry, or shall carry, adapters.

    It is taken at W0 + s B A, which is W0 as long as B = 0. A few examples are enough
    (LoRA-One's paper: 8 to 64).

    Memory of the device, beside `params`, one batch, and what forward and backward
    pass need: the gradients of `at_once` kernels, each in its kernel's dtype and
    sharded like it. A bfloat16 kernel so takes two bytes an entry, and one rounding a
    batch, which is far less than what the choice of batches makes; the sums are in
    float32. On the host: the sums, and one gradient. Smaller groups cost time: each is
    a program to compile, and a forward and backward pass a batch. Stacked layers are
    one kernel.

    Args:
      loss_fn: `(params, batch)` to the mean loss of the batch, a scalar; jitted or
        not. It gets a tree like `params`.
      params: Any tree of arrays with the kernels in it, such as Linen's `params`, an
        `nnx.State` or an NNX model. Nothing in it changes.
      batches: Trees of arrays; read once. All count the same, whatever their size.
      kernels: Which leaves. By default the base kernels of the LoRA pairs in
        `params`; a mapping says where those are that cannot be found, see
        `initialize_adapters`. Without adapters: a list of paths; or a regex to be
        searched in the paths, or a function of the path to a bool, which choose
        among the floating point leaves with two axes or more.
      pairs: See `lorapro`; not used where `kernels` chooses the leaves.
      stack_axis: See `lorapro`; not used where `kernels` chooses the leaves.
      at_once: How many kernels' gradients a program makes; None for all in one.
      offload: Whether sums are kept by the host, as NumPy arrays. Otherwise they
        stay on the device, sharded like the kernels, four bytes an entry. Where a
        mesh spans several processes, each of them gets all of every gradient, and
        its devices hold one unsharded gradient at a time.
      progress: Whether to show a bar, if rich is installed.

    Returns:
      The gradients by the paths of the kernels, in the kernels' own shapes and in
      float32 (float64 for float64 kernels).

    Raises:
      ValueError: No batch or a single one, no kernel, a path that is none, a kernel
        that is not real floating point, a loss that is no real scalar, a loss or
        gradient that is not finite or that float16 cannot hold, gradients that are all
        zero, or a bad `at_once`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from lorapro_jax import estimate_gradients
      >>> params = {"up": {"kernel": jnp.ones((2, 1)), "bias": jnp.ones(1)}}
      >>> loss = lambda params, x: jnp.mean(x @ params["up"]["kernel"])
      >>> batches = [jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 6.0]])]
      >>> estimate_gradients(loss, params, batches, kernels="kernel$", progress=False)
      {'up/kernel': array([[2.],
             [4.]], dtype=float32)}
    """
    if isinstance(batches, Mapping | tuple | str | jax.Array | np.ndarray):
        raise ValueError(
            f"`batches` is a {type(batches).__name__}, as one batch may be. Pass a "
            "list or another iterable of batches: `[batch]` if this is one."
        )
    leaves = index_leaves(params)
    paths = select_kernels(params, kernels, pairs=pairs, stack_axis=stack_axis)
    groups = _split(paths, at_once)
    programs = {group: _program(loss_fn, params, leaves, group) for group in groups}
    sums = {path: _zeros(leaves[path].value, offload) for path in paths}

    count = 0
    with contextlib.closing(_steps(batches, groups, progress)) as steps:
        for index, batch, group in steps:
            count = index + 1
            _add(sums, index, group, programs[group](batch), offload)
    if not count:
        raise ValueError(
            "`batches` is empty, so there is no gradient. A generator can be read only "
            "once; pass a new one, or a list."
        )
    if not any(total.any() for total in sums.values()):
        raise ValueError(
            f"The gradients of {some(paths)} are zero in all {count} batches. Look "
            "for a `stop_gradient` on the base weights; `loss_fn` has to compute with "
            "the `params` that it is given."
        )
    for path in paths:
        sums[path] /= count  # in place on the host
    return sums


def _program(
    loss_fn: Callable[[Any, Any], jax.Array],
    params: Any,
    leaves: Mapping[str, Leaf],
    group: Group,
) -> functools.partial[Any]:
    """One program, from a batch to the loss and the gradients of a group.

    It also says how large each gradient is. All arrays are its arguments: as constants
    they would be copied into it. Only the group's own are differentiated, so no other
    gradient is ever made.
    """
    flat, treedef = jax.tree.flatten(params)
    is_array = lambda x: isinstance(x, jax.Array | np.ndarray)
    static = {i: x for i, x in enumerate(flat) if not is_array(x)}
    chosen = {leaves[path].position: leaves[path].value for path in group}
    others = {i: x for i, x in enumerate(flat) if i not in static | chosen}

    def loss_of(chosen: Any, others: Any, batch: Any) -> jax.Array:
        merged = static | others | chosen
        tree = jax.tree.unflatten(treedef, [merged[i] for i in sorted(merged)])
        loss = loss_fn(tree, batch)
        found = jax.tree.map(jnp.shape, loss)
        if found == ():
            found = jnp.result_type(loss)
        if not (isinstance(found, np.dtype) and jnp.issubdtype(found, jnp.floating)):
            raise ValueError(
                f"`loss_fn` returned {found} where one real number is needed. Return "
                "the mean loss alone, in floating point."
            )
        return loss

    def run(*args: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_of)(*args)
        return loss, grads, {i: _largest(x) for i, x in grads.items()}

    # Left to itself the compiler may replicate the gradient of a sharded kernel.
    shardings = {i: _sharding(x) for i, x in chosen.items()}
    program = jax.jit(run, out_shardings=(None, shardings, None))
    return functools.partial(program, chosen, others)


def _add(
    sums: dict[str, Any], index: int, group: Group, result: Any, offload: bool
) -> None:
    """Adds one batch's gradients; they are freed when this returns."""
    loss, grads, largest = result
    if not np.isfinite(float(loss)):
        raise ValueError(
            f"The loss of batch {index} (counted from 0) is {loss}. Look at this batch "
            "and at the parameters."
        )
    for path, position in zip(group, sorted(grads), strict=True):
        size, dtype = float(largest[position]), grads[position].dtype
        faint = dtype == jnp.float16 and 0 < size < float(jnp.finfo(dtype).tiny)
        if faint or not np.isfinite(size):
            kind = f"too small for float16 ({size:.3g})" if faint else "not finite"
            raise ValueError(
                f"The gradient of `{path}` is {kind} in batch {index} (counted from "
                f"0), where the loss is {loss}. In float16, take parameters in float32 "
                "or bfloat16."
            )
        if offload:
            sums[path] += to_host(grads[position])
        else:
            sums[path] = _accumulate(sums[path], grads[position])


def _largest(x: jax.Array) -> jax.Array:
    """The size of the largest entry, without an array of the size of `x`.

    Where an entry is NaN, so are the maximum and the minimum.
    """
    return jnp.maximum(jnp.max(x), -jnp.min(x))


@functools.partial(jax.jit, donate_argnums=0)
def _accumulate(total: jax.Array, x: jax.Array) -> jax.Array:
    return total + x.astype(total.dtype)


def _zeros(kernel: Any, offload: bool) -> Any:
    """What a kernel's gradients are added to, on the host or where the kernel is."""
    dtype = jnp.promote_types(kernel.dtype, jnp.float32)
    if offload:
        return np.zeros(kernel.shape, dtype)
    return jnp.zeros_like(kernel, dtype, device=_sharding(kernel))


def _sharding(x: Any) -> NamedSharding | None:
    """The sharding of an array on a mesh; others may move to where the rest is."""
    sharding = getattr(x, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def _split(paths: Group, at_once: int | None) -> list[Group]:
    """The kernels in groups of at most `at_once`, one program each."""
    size = len(paths) if at_once is None else at_once
    whole = isinstance(size, int | np.integer) and not isinstance(size, bool)
    if not whole or size < 1:
        raise ValueError(f"`at_once={at_once!r}` has to be None or at least 1.")
    return [paths[i : i + size] for i in range(0, len(paths), size)]


def _steps(
    batches: Iterable[Any], groups: Sequence[Group], progress: bool
) -> Generator[tuple[int, Any, Group], None, None]:
    """Every batch for every group, behind a bar if wanted and possible."""
    steps: Iterable[tuple[int, Any, Group]] = (
        (i, batch, group) for i, batch in enumerate(batches) for group in groups
    )
    if progress and jax.process_index() == 0:
        with contextlib.suppress(ImportError):
            from rich.progress import track

            total = len(batches) * len(groups) if isinstance(batches, Sized) else None
            steps = track(steps, "gradients", total=total)
    yield from steps
