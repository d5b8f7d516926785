"""The arrays of one LoRA pair and its base kernel: read, started, laid out again."""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from ._factors import replicated
from ._initializer import Initializer, cancel
from ._kernels import Kernel, as_factor, as_kernel, as_matrix, is_quantized
from ._layout import FactorAxes
from ._leaves import Leaf
from ._trees import cast_to


class Side(NamedTuple):
    """One factor: its shape, dtype and axes; static."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: FactorAxes


@functools.partial(jax.jit, static_argnames=("method", "rank", "kernel", "a", "b"))
def start(
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
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """A, B and the base kernel (None if it stays) in the layouts of their leaves.

    Pairs that agree in all static arguments share one program.

    Args:
      weight: The base kernel, where the method needs or changes it.
      gradient: Its gradient, where the method needs it.
      scale: s.
      key: Of the pair.
      method: The initialiser.
      rank: r.
      kernel: The axes of `weight` and `gradient`, where there is one.
      a: What A has to be.
      b: What B has to be.
    """
    layers = math.prod(a.shape[axis] for axis in a.axes.batch)
    shape = b.axes.feature_count(b.shape), a.axes.feature_count(a.shape)
    dtypes = [a.dtype, b.dtype, *(x.dtype for x in (weight, gradient) if x is not None)]
    wide = jnp.float64 if jnp.float64 in dtypes else jnp.float32

    def matrices(x: jax.Array | None) -> jax.Array | None:
        if x is None or kernel is None:
            return None
        return as_matrix(kernel, replicated(x)).reshape(layers, *shape)

    def start_layer(layer: Any) -> Any:
        weight, gradient, key = layer
        w, g = (None if x is None else x.astype(wide) for x in (weight, gradient))
        of_w = jax.ShapeDtypeStruct(shape, wide) if w is None else w
        begun = method(of_w, g, rank, jnp.asarray(scale, wide), key)
        new_a, new_b = cast_to(begun.a, a.dtype), cast_to(begun.b, b.dtype)
        if w is None or not method.changes_weight:
            return new_a, new_b, None
        # Of the rounded factors, so that only the rounding of the weight remains.
        change = cancel(new_a.astype(wide), new_b.astype(wide), scale)
        return new_a, new_b, cast_to(w + change, weight.dtype)

    # Not `vmap`: one layer at a time needs the memory of one in float32.
    keys = jax.random.split(key, layers)
    arrays = matrices(weight), matrices(gradient), keys
    new_a, new_b, base = jax.lax.map(start_layer, arrays)
    if base is not None and kernel is not None and weight is not None:
        base = as_kernel(kernel, base, weight.shape)
    leaf_a = as_factor(new_a, a.axes, a.shape)
    return leaf_a, as_factor(new_b.swapaxes(-1, -2), b.axes, b.shape), base


def weight_of(owner: str, path: str, leaves: Mapping[str, Leaf]) -> Any:
    """The values of the base kernel at a path.

    Args:
      owner: The path of its A, for messages.
      path: That of a `Kernel`.
      leaves: The parameters.

    Raises:
      ValueError: It is not there, quantised, no array of real floats or not finite.
    """
    if path not in leaves or is_quantized(leaves[path].value):
        parts = [x for x in leaves if x == path or x.startswith(f"{path}/")]
        kinds = {x: str(leaves[x].value.dtype) for x in parts}
        found = f"which is quantised: {kinds}" if parts else "which `params` has not"
        raise ValueError(
            f"The method needs the values of `{path}`, the base weight of `{owner}`, "
            f"{found}. Start from the floating point weights and quantise afterwards, "
            "or choose a method that does without: `lora_one()`, `gora()`, `lora()`."
        )
    if not leaves[path].unique:
        raise ValueError(f"Two leaves have the path `{path}`. Rename one of them.")
    return _checked(path, leaves[path].value, "base weight")


def gradient_of(
    owner: str, path: str, gradients: Mapping[str, Any], leaves: Mapping[str, Leaf]
) -> Any:
    """The gradient of the base kernel at a path, on the kernel's devices.

    Raises:
      ValueError: It is missing, of another shape than the kernel, no array of real
        floats, or not finite.
    """
    if path not in gradients:
        raise ValueError(
            f"`gradients` has none of `{path}`, the base weight of `{owner}`. It has "
            f"{len(gradients)}, such as {list(gradients)[:4]}."
        )
    gradient = _checked(path, gradients[path], "gradient of")
    if path not in leaves:
        return gradient
    kernel = leaves[path].value
    if tuple(kernel.shape) != tuple(gradient.shape):
        raise ValueError(
            f"The gradient of `{path}` has shape {gradient.shape}, the base weight "
            f"{kernel.shape}. Pass the gradients of these parameters."
        )
    return placed_like(gradient, kernel)


def placed_like(x: Any, leaf: Any) -> Any:
    """`x` with the sharding of a leaf, where the leaf has one to keep."""
    if isinstance(leaf, jax.core.Tracer):
        sharding = jax.typeof(leaf).sharding
        explicit = AxisType.Explicit in sharding.mesh.axis_types
        return jax.sharding.reshard(x, sharding) if explicit else x
    if isinstance(leaf, jax.Array) and leaf.committed:
        return jax.device_put(x, leaf.sharding)
    return x


def _checked(path: str, x: Any, what: str) -> Any:
    if not (hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)):
        kind = getattr(x, "dtype", type(x).__name__)
        raise ValueError(f"The {what} `{path}` is {kind}, not an array of real floats.")
    if isinstance(x, jax.ShapeDtypeStruct):
        raise ValueError(
            f"The {what} `{path}` is a shape without values. For a tree of shapes, "
            "call `initialize_adapters` under `jax.eval_shape`."
        )
    finite = jnp.isfinite(x).all()  # unknown under a trace; then NaN comes out
    if not isinstance(finite, jax.core.Tracer) and not finite:
        raise ValueError(f"The {what} `{path}` has entries that are not finite.")
    return x
