"""The values of base weights and of their gradients, checked before they are used."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._checks import some
from .._placement import placed_like
from ..pairs._leaves import Leaf


def weight_of(owner: str, path: str, leaves: Mapping[str, Leaf]) -> Any:
    """The values of the base kernel at a path.

    Args:
      owner: The path of its A, for messages.
      path: The path of the `Kernel`.
      leaves: The leaves of the parameters by their paths.

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

    Args:
      owner: The path of the kernel's A, for messages.
      path: The path of the `Kernel`.
      gradients: The gradients by the paths of their kernels.
      leaves: The leaves of the parameters, which may lack this kernel.

    Raises:
      ValueError: It is missing, of another shape than the kernel, no array of real
        floats, or not finite.
    """
    if path not in gradients:
        raise ValueError(
            f"`gradients` has none of `{path}`, the base weight of `{owner}`. It has "
            f"{len(gradients)}: {some(gradients)}."
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


def is_quantized(x: Any) -> bool:
    """Whether the values of an array are codes: integers, or floats of 8 bits."""
    dtype = getattr(x, "dtype", None)
    if dtype is None or jax.dtypes.issubdtype(dtype, jax.dtypes.extended):
        return False
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.finfo(dtype).bits <= 8
    return bool(jnp.issubdtype(dtype, jnp.integer))


def _checked(path: str, x: Any, what: str) -> Any:
    """An array that is one of finite real floats, as far as that is known now."""
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
