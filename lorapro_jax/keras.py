"""LoRA pairs of Keras 3 models, whose optimizers see a list of nameless arrays.

    model.get_layer("dense").enable_lora(8, lora_alpha=16)
    tx = lorapro_adamw(1e-3, pairs=keras_pairs(model))
    state = tx.init([variable.value for variable in model.trainable_variables])

Nothing here imports Keras.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax

from .pairs._axes import LoRAPair
from .pairs._find import find_pairs
from .pairs._names import normalize_path, parse_factor_name

__all__ = ["keras_pairs"]


def keras_pairs(
    model: Any, variables: Iterable[Any] | None = None
) -> tuple[LoRAPair, ...]:
    """The LoRA pairs of a Keras model, by their places in its list of variables.

    Keras multiplies A B by `lora_alpha / lora_rank`, numbers that live on the layer.
    Pairs and scales are those of now: call it after the last `enable_lora`.

    Args:
      model: A built `keras.Model` or layer, at any depth of which layers have had
        `enable_lora` called. A layer of your own counts if it has the attributes
        that Keras's own then have: `lora_enabled`, `lora_alpha` and `lora_rank`.
      variables: The variables whose values the optimizer gets, in this order, if
        they are not `model.trainable_variables`.

    Returns:
      The pairs for `pairs=`, in the order of their A, with axes, rank and scale;
      their paths are indices such as `"4"`.

    Raises:
      ValueError: No factor among the variables, a factor without its partner, one
        that is there twice, or one whose layer does not say its scale.
      TypeError: Arrays instead of variables.
    """
    # The only way to every layer: the public `model.layers` ends at the first level.
    layers = list(model._flatten_layers())
    owners = {
        id(variable): number
        for number, layer in enumerate(layers)
        if getattr(layer, "lora_enabled", False)
        for variable in layer.trainable_variables
    }
    given = list(model.trainable_variables if variables is None else variables)
    shapes: dict[str, jax.ShapeDtypeStruct] = {}
    places: dict[str, str] = {}
    for place, variable in enumerate(given):
        path = _path(variable)
        if id(variable) not in owners:
            if parse_factor_name(path):
                raise ValueError(_no_owner_message(path))
            continue
        # Two submodels may both have a `dense/lora_kernel_a`.
        path = f"{owners[id(variable)]}/{path}"
        if path in places:
            raise ValueError(
                f"`{variable.path}` is variable {places[path]} and variable {place} of "
                "the given list. Pass every variable once."
            )
        shapes[path] = jax.ShapeDtypeStruct(variable.shape, variable.dtype)
        places[path] = str(place)

    def scale(pair: LoRAPair) -> float:
        layer = layers[int(pair.a.split("/")[0])]
        return float(layer.lora_alpha / layer.lora_rank)

    found = find_pairs(shapes, scale=scale)
    if not found:
        raise ValueError(_no_pairs_message(model, given, bool(owners)))
    placed = (pair._replace(a=places[pair.a], b=places[pair.b]) for pair in found)
    return tuple(sorted(placed, key=lambda pair: int(pair.a)))


def _path(variable: Any) -> str:
    """The path of a variable, as this package writes paths."""
    if not isinstance(path := getattr(variable, "path", None), str):
        raise TypeError(
            f"`variables` contains objects without `path`: {type(variable).__name__}. "
            "Pass Keras's variables, not their values."
        )
    return normalize_path(path)


def _no_owner_message(path: str) -> str:
    return (
        f"`{path}` is named like a LoRA factor, but no layer of this model with "
        "`lora_enabled` owns it, so its scale is unknown. Pass the model that it "
        "belongs to, or give its layer the attributes `lora_enabled = True`, "
        "`lora_alpha` and `lora_rank`."
    )


def _no_pairs_message(model: Any, given: list[Any], enabled: bool) -> str:
    if not enabled:
        return (
            f"No layer of `{model.name}` has trainable LoRA factors. Call "
            "`layer.enable_lora(rank, lora_alpha=...)` on its built layers before "
            "`keras_pairs`, and leave them trainable."
        )
    names = [variable.path for variable in given[:5]]
    return (
        f"None of the {len(given)} given variables ({names}, ...) is a LoRA factor of "
        f"`{model.name}`. Leave `variables` out, or pass the list whose values the "
        "optimizer gets."
    )
