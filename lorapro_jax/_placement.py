"""A value made like a leaf: in its dtype, with its sharding; or on the host."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType


def cast_to(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`x` in a leaf's dtype; what is finite stays finite (float16 ends at 65504)."""
    if not jnp.issubdtype(dtype, jnp.floating):
        return x.astype(dtype)
    limit = float(jnp.finfo(dtype).max)
    if limit < float(jnp.finfo(x.dtype).max):
        x = jnp.where(jnp.isfinite(x), jnp.clip(x, -limit, limit), x)
    return x.astype(dtype)


def stored_as(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`cast_to` of what is read again in the same program, with its rounding.

    On GPUs XLA leaves out a rounding that is only a conversion there and back.
    """
    stored: jax.Array = jax.lax.optimization_barrier(cast_to(x, dtype))
    return stored


def placed_like(x: Any, leaf: Any) -> Any:
    """`x` with the sharding of a leaf, where the leaf has one to keep."""
    if isinstance(leaf, jax.core.Tracer):
        sharding = jax.typeof(leaf).sharding
        explicit = AxisType.Explicit in sharding.mesh.axis_types
        return jax.sharding.reshard(x, sharding) if explicit else x
    if isinstance(leaf, jax.Array) and leaf.committed:
        return jax.device_put(x, leaf.sharding)
    return x


def from_host(path: str, x: np.ndarray, leaf: Any) -> Any:
    """An array of the host in the dtype and with the sharding of a leaf.

    Every process gives all of `x`, and places its part of it.

    Raises:
      ValueError: An entry overflows the leaf's dtype.
    """
    with np.errstate(over="ignore"):
        cast = x.astype(leaf.dtype)
    if np.isfinite(x).all() and not np.isfinite(cast).all():
        raise ValueError(
            f"`{path}` does not fit {leaf.dtype}: the file has entries of up to "
            f"{np.abs(x).max():.3g}, brought to the model's scale. Use a wider dtype."
        )
    if isinstance(leaf, np.ndarray):
        return cast
    sharding = getattr(leaf, "sharding", None)
    if sharding is None or not getattr(leaf, "committed", True):
        return jnp.asarray(cast)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: cast[index])


def to_host(x: Any) -> np.ndarray:
    """An array in NumPy; from a mesh of several processes, all of it in each."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)
