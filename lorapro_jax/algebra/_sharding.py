"""Explicit meshes: where the result of a product lies has to be said there.

A contraction over a sharded axis must say how its result is sharded on a mesh with
explicit axes, and may not say it elsewhere; so everything here is nothing elsewhere.
"""

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def sharding_of(x: jax.Array, axes: tuple[int, ...]) -> NamedSharding | None:
    """The sharding of these axes of `x` on an explicit mesh; None without one."""
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    spec = (*sharding.spec, *[None] * (x.ndim - len(sharding.spec)))
    return NamedSharding(sharding.mesh, PartitionSpec(*(spec[axis] for axis in axes)))


def resharded(x: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    """`x` with a sharding of `sharding_of`."""
    return jax.sharding.reshard(x, sharding) if sharding else x


def replicated(x: jax.Array) -> jax.Array:
    """The scalars or small matrices of all layers, on every device.

    Said only to an explicit mesh, which demands it. On an automatic one, the
    compiler would carry the demand back to the factors and gather those.
    """
    return resharded(x, sharding_of(x, ()))


def of_product(
    x: NamedSharding | None, y: NamedSharding | None
) -> NamedSharding | None:
    """The sharding of an outer product, `(*axes of x, *axes of y)`.

    One mesh axis cannot shard two axes of the result; the first has it.
    """
    if x is None or y is None:
        return None
    used = set(jax.tree.leaves(tuple(x.spec)))
    free = (None if used & set(jax.tree.leaves(axis)) else axis for axis in y.spec)
    return NamedSharding(x.mesh, PartitionSpec(*x.spec, *free))
