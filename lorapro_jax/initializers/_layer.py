"""The factors and the base kernel of one LoRA pair, as an initialiser starts them."""

import enum
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._placement import cast_to, stored_as
from ..algebra._axes import FactorAxes
from ..algebra._sharding import replicated
from ..weights._find import Kernel
from ..weights._layout import as_factor, as_kernel, as_matrix
from ._contract import Initializer, cancel


class Side(NamedTuple):
    """What one factor has to be: its shape, dtype and axes; static."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: FactorAxes


class Fault(enum.IntEnum):
    """Why the start of a layer is not what its method promises."""

    NONE = 0
    OUT_OF_RANGE = 1  # of the dtype of the computation
    TOO_LARGE = 2  # for the dtype of a leaf
    TOO_SMALL = 3
    ROUNDED_AWAY = 4  # the base weight beside s B A


class Started(NamedTuple):
    """What `initialize_pair` returns.

    Attributes:
      a: A in the layout of its leaf.
      b: B in the layout of its leaf.
      weight: The base kernel; None if it stays.
      faults: The `Fault` of each layer; its A, B and weight are NaN if there is one.
    """

    a: jax.Array
    b: jax.Array
    weight: jax.Array | None
    faults: jax.Array


@functools.partial(jax.jit, static_argnames=("method", "rank", "kernel", "a", "b"))
def initialize_pair(
    weight: jax.Array | None,
    gradient: jax.Array | None,
    scale: jax.Array,
    key: jax.Array,
    *,
    method: Initializer,
    rank: int,
    kernel: Kernel | None,
    a: Side,
    b: Side,
) -> Started:
    """A, B and the base kernel in the layouts of their leaves.

    Pairs that agree in all static arguments share one program.

    Args:
      weight: The base kernel, where the method needs or changes it.
      gradient: The kernel's gradient, where the method needs it.
      scale: The scale s, or one for each layer, in the shape of the stacked axes.
      key: The key of this pair.
      method: The initialiser.
      rank: The rank r.
      kernel: The axes of `weight` and `gradient`, where there is one.
      a: What A has to be.
      b: What B has to be.
    """
    batch = tuple(a.shape[axis] for axis in a.axes.batch)
    layers = math.prod(batch)
    shape = b.axes.feature_count(b.shape), a.axes.feature_count(a.shape)
    dtypes = [a.dtype, b.dtype, *(x.dtype for x in (weight, gradient) if x is not None)]
    wide = jnp.float64 if jnp.float64 in dtypes else jnp.float32

    def matrices(x: jax.Array | None) -> jax.Array | None:
        if x is None or kernel is None:
            return None
        return as_matrix(kernel, replicated(x)).reshape(layers, *shape)

    def initialize_layer(layer: Any) -> Any:
        weight, gradient, scale, key = layer
        w, g = (None if x is None else x.astype(wide) for x in (weight, gradient))
        of_w = jax.ShapeDtypeStruct(shape, wide) if w is None else w
        found = method(of_w, g, rank, scale, key)
        new = [stored_as(x, y.dtype) for x, y in ((found.a, a), (found.b, b))]
        faults = [_fault(found.a, new[0]), _fault(found.b, new[1])]
        faults.append(_product_fault(found.a, found.b))
        if w is not None and method.changes_weight:
            # Of the rounded factors, so that only the rounding of the weight remains.
            change = cancel(new[0].astype(wide), new[1].astype(wide), scale)
            new.append(cast_to(w + change, weight.dtype))
            faults.append(_weight_fault(w, change, scale, weight.dtype))
        fault = functools.reduce(lambda x, y: jnp.where(x > 0, x, y), faults)
        marked = [jnp.where(fault > 0, jnp.asarray(jnp.nan, x.dtype), x) for x in new]
        return (*marked, *(None for _ in range(3 - len(marked))), fault)

    # Not `vmap`: one layer at a time needs the memory of one in float32.
    scales = jnp.broadcast_to(jnp.asarray(scale, wide), batch).reshape(layers)
    keys = jax.random.split(key, layers)
    arrays = matrices(weight), matrices(gradient), scales, keys
    new_a, new_b, base, faults = jax.lax.map(initialize_layer, arrays)
    if base is not None and kernel is not None and weight is not None:
        base = as_kernel(kernel, base, weight.shape)
    leaf_a = as_factor(new_a, a.axes, a.shape)
    leaf_b = as_factor(new_b.swapaxes(-1, -2), b.axes, b.shape)
    return Started(leaf_a, leaf_b, base, faults)


def _fault(x: jax.Array, cast: jax.Array) -> jax.Array:
    """What became of a factor in the dtype of its leaf."""
    limits, largest = jnp.finfo(cast.dtype), jnp.abs(x).max()
    small = (largest > 0) & (largest < float(limits.tiny))
    return _first(
        (~jnp.isfinite(largest), Fault.OUT_OF_RANGE),
        (largest > float(limits.max), Fault.TOO_LARGE),
        (small, Fault.TOO_SMALL),
    )


def _product_fault(a: jax.Array, b: jax.Array) -> jax.Array:
    """What becomes of B A, which a layer computes before it multiplies by s."""
    largest_a, largest_b = jnp.abs(a).max(), jnp.abs(b).max()
    product = largest_a * largest_b
    small = (product < jnp.finfo(a.dtype).tiny) & (largest_a > 0) & (largest_b > 0)
    return _first((~jnp.isfinite(product) | small, Fault.OUT_OF_RANGE))


def _weight_fault(
    w: jax.Array, change: jax.Array, scale: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """What becomes of W0 − s B A in the dtype of W0.

    It is rounded to eps/2 of its size. Where that is more than 1/16 of the largest
    entries of W0 and of B A, the layer would not be as it was.
    """
    limits = jnp.finfo(dtype)
    size = jnp.abs(w + change).max()
    entries = jnp.maximum(jnp.abs(w).max(), jnp.abs(change / scale).max())
    return _first(
        (~jnp.isfinite(size), Fault.OUT_OF_RANGE),
        (size > float(limits.max), Fault.TOO_LARGE),
        (float(limits.eps) / 2 * size > entries / 16, Fault.ROUNDED_AWAY),
    )


def _first(*cases: tuple[jax.Array, Fault]) -> jax.Array:
    """The first fault whose condition holds."""
    conditions, faults = zip(*cases, strict=True)
    found = [jnp.int32(fault.value) for fault in faults]
    return jnp.select(conditions, found, jnp.int32(Fault.NONE.value))
