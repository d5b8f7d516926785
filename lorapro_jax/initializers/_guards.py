"""What is refused: a start that would not be what the method promises."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from .._placement import to_host
from ..pairs._axes import LoRAPair
from ..pairs._leaves import Leaf
from ..weights._find import Kernel
from ._layer import Fault

_REASONS = {
    Fault.OUT_OF_RANGE: "entries of A, B, B A or the base weight leave the range of "
    "float32",
    Fault.TOO_LARGE: "entries are too large for the dtype of their leaf",
    Fault.TOO_SMALL: "all entries of a factor are too small for the dtype of its leaf",
    Fault.ROUNDED_AWAY: "beside s B A the base weight would be rounded away, and the "
    "layer would not be as it was",
}


def check_distinct(found: Sequence[LoRAPair], kernels: Sequence[Kernel]) -> None:
    """Raises ValueError where two pairs would both change one kernel."""
    path, count = Counter(kernel.path for kernel in kernels).most_common(1)[0]
    if count > 1:
        owners = [x.a for x, y in zip(found, kernels, strict=True) if y.path == path]
        raise ValueError(
            f"{owners} adapt one base weight, `{path}`, and each would change it. "
            "Initialise one of them so, with `pairs=[...]`, and the others with a "
            "method that leaves W0 as it is."
        )


def check_untrained(found: Sequence[LoRAPair], leaves: Mapping[str, Leaf]) -> None:
    """Raises ValueError where a B is known not to be 0: s B A would be lost."""
    for pair in found:
        b = leaves[pair.b].value
        if not isinstance(b, jax.core.Tracer) and jnp.any(b != 0):
            raise ValueError(
                f"`{pair.b}` is not 0, so the model would lose what its adapters hold. "
                "Was it initialised before? Begin with the original base weights, and "
                "with B = 0."
            )


def check_faults(
    pair: LoRAPair, kernel: Kernel | None, leaves: Mapping[str, Leaf], faults: jax.Array
) -> None:
    """Raises ValueError for a layer that has a `Fault`, as far as that is known.

    Args:
      pair: The pair, with its scale.
      kernel: Its base kernel, if the method uses one.
      leaves: The leaves of the parameters by their paths.
      faults: The `Fault` of each layer.
    """
    if isinstance(faults, jax.core.Tracer):
        return
    codes = to_host(faults)
    if not codes.any():
        return
    layer = int(np.flatnonzero(codes)[0])
    kinds = [
        f"`{path}` {leaves[path].value.dtype}"
        for path in (*pair.paths, kernel.path if kernel else "")
        if path in leaves
    ]
    reason = _REASONS[Fault(int(codes[layer]))]
    scale = np.broadcast_to(np.ravel(cast(Any, pair.scale)), codes.shape)[layer]
    where = f" in layer {layer} (counted from 0)" if codes.size > 1 else ""
    raise ValueError(
        f"The start of `{pair.a}` at the scale {scale:.3g} cannot be held{where}: "
        f"{reason} ({', '.join(kinds)}). Pass a scale nearer to 1, keep these leaves "
        "in a wider dtype, or choose another method."
    )
