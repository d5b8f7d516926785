"""W0 + s B A in the layout of W0, as a function of arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.typing import ArrayLike

from ..algebra._axes import Shape
from ..algebra._factors import Both, Factor
from ..algebra._products import times
from ..algebra._sharding import replicated, sharding_of
from ._axes import KernelAxes, order_of
from ._find import Kernel


@functools.partial(jax.jit, static_argnames=("kernel", "sharding", "one_by_one"))
def add_product(
    weight: jax.Array,
    factors: Both[Factor],
    scale: ArrayLike,
    *,
    kernel: Kernel,
    sharding: NamedSharding | None,
    one_by_one: bool,
) -> tuple[jax.Array, jax.Array]:
    """The sum in the dtype of the weight, and whether all of it is finite.

    No array of the weight's size is reshaped, which would gather a sharded one: the
    factors get the axes of the weight instead.

    Args:
      weight: W0.
      factors: A and B.
      scale: s, or one for each layer, in the shape of the stacked axes.
      kernel: The axes of the weight.
      sharding: Where the result shall be; None where the compiler is not to be told.
      one_by_one: Whether to compute the layers of a stack one after the other.
    """
    dtypes = [weight.dtype, *(x.dtype for x in factors)]
    wide = jnp.float64 if jnp.float64 in dtypes else jnp.float32
    a, b = (x.astype(wide) for x in factors)
    b = times(jnp.asarray(scale, wide), b)
    rows = _laid_out(a, weight.shape, kernel.inputs)
    columns = _laid_out(b, weight.shape, kernel.outputs)
    add = _layer_by_layer if one_by_one and kernel.batch else _sum
    new = add(weight, rows, columns, kernel)
    if sharding:
        new = jax.lax.with_sharding_constraint(new, sharding)
    # Not `isfinite` of all, which would be an array as large as the weight.
    return new, jnp.isfinite(new.max()) & jnp.isfinite(new.min())


def _laid_out(x: Factor, shape: Shape, at: Shape) -> jax.Array:
    """A factor as `(*batch, r, *axes of the kernel)`, on all devices of a mesh."""
    order = x.axes.rank_first(len(x.shape))
    rows = replicated(x.array).transpose(order)
    front = rows.shape[: len(x.axes.batch) + 1]
    return rows.reshape(*front, *(shape[axis] for axis in at))


def _sum(weight: jax.Array, a: jax.Array, b: jax.Array, kernel: Kernel) -> jax.Array:
    """W0 + B A from `(*batch, r, *inputs)` and `(*batch, r, *outputs)`."""
    first, second = (a, kernel.inputs), (b, kernel.outputs)
    if order_of(weight.shape, KernelAxes(*kernel[1:])) == "out,in":
        first, second = second, first
    order = (*kernel.batch, *first[1], *second[1])
    depth = len(kernel.batch)
    batch = tuple(range(depth))
    product = jax.lax.dot_general(
        first[0],
        second[0],
        (((depth,), (depth,)), (batch, batch)),
        precision=jax.lax.Precision.HIGHEST,
        out_sharding=sharding_of(weight, order),
    )
    change = product.transpose(np.argsort(order))
    return (weight.astype(change.dtype) + change).astype(weight.dtype)


def _layer_by_layer(
    weight: jax.Array, a: jax.Array, b: jax.Array, kernel: Kernel
) -> jax.Array:
    """The same with one layer's product at a time."""
    sizes = tuple(weight.shape[axis] for axis in kernel.batch)
    depth = len(sizes)
    a, b = (x.reshape(-1, *(1,) * depth, *x.shape[depth:]) for x in (a, b))
    one = [1 if i in kernel.batch else size for i, size in enumerate(weight.shape)]
    # On CPUs XLA would convert all layers to float32 and back for each of them.
    converts = weight.dtype == jnp.bfloat16 and jax.default_backend() == "cpu"
    held = jnp.uint16 if converts else weight.dtype
    as_held, as_weight = (
        functools.partial(jax.lax.bitcast_convert_type, new_dtype=dtype)
        for dtype in (held, weight.dtype)
    )

    def add(i: jax.Array, new: jax.Array) -> jax.Array:
        place = dict(zip(kernel.batch, jnp.unravel_index(i, sizes), strict=True))
        starts = [place.get(axis, 0) for axis in range(weight.ndim)]
        layer = as_weight(jax.lax.dynamic_slice(new, starts, one))
        layer = as_held(_sum(layer, a[i], b[i], kernel))
        return jax.lax.dynamic_update_slice(new, layer, starts)

    return as_weight(jax.lax.fori_loop(0, len(a), add, as_held(weight)))
