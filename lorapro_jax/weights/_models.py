"""NNX models: what they tell of their kernels, and merging in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from ..pairs._find import PairsSpec
from ..pairs._names import normalize_path
from ..pairs._scale import ScaleSpec
from ._axes import Order
from ._given import KernelsSpec
from ._merge import merged, plan_merge
from ._shared import check_unshared


def merge_model(
    model: Any,
    *,
    scale: ScaleSpec = 1.0,
    alpha: ScaleSpec | None = None,
    rslora: bool = False,
    pairs: PairsSpec | None = None,
    stack_axis: int | Sequence[int] | None = None,
    kernels: KernelsSpec | None = None,
) -> None:
    """`merge_adapters` on an NNX model, in place.

    Pair by pair: beside the model there is one new base weight at a time. The model
    tells more than its state does: the kernels of Flax's `Linear`, `LinearGeneral` and
    `Conv` have their inputs first, even where they are square; and a weight that a
    layer without the adapter uses too is an error. To get rid of the
    adapters too, give the state to a model without them:
    `nnx.update(plain, merge_adapters(nnx.state(model), remove=True))`.

    Args:
      model: An `nnx.Module`.
      scale: See `merge_adapters`, as for everything below.
      alpha: The numerator of s = alpha / r, instead of `scale`.
      rslora: Whether s is alpha / sqrt(r).
      pairs: Explicit pairs instead of those found by name.
      stack_axis: The axes along which layers are stacked.
      kernels: Where base weights are that cannot be found by name.

    Raises:
      ValueError: As `merge_adapters`; the model computes what it did. Where a sum is
        not finite, pairs before that one are merged already.
      TypeError: The model is no `nnx.Module`.

    Examples:
      >>> from flax import nnx
      >>> from lorapro_jax import merge_model
      >>> model = nnx.LoRALinear(6, 5, lora_rank=2, rngs=nnx.Rngs(0))
      >>> model.lora.lora_b[...] += 1.0
      >>> before = model(jax.numpy.ones((1, 6)))
      >>> merge_model(model)
      >>> bool(abs(model(jax.numpy.ones((1, 6))) - before).max() < 1e-5)
      True
      >>> bool((model.lora.lora_b[...] == 0).all())
      True
    """
    from flax import nnx

    check_module(model)
    options: dict[str, Any] = {"scale": scale, "alpha": alpha, "rslora": rslora}
    options |= {"pairs": pairs, "stack_axis": stack_axis}
    todo = plan_merge(nnx.state(model), kernels, options, known_orders(model))
    places = _places(model)
    at = {path: place for path, (place, _) in places.items()}
    check_unshared(model, at, [merge.paths for merge in todo])
    for merge in todo:
        arrays = {path: jax.tree.leaves(places[path][1])[0] for path in merge.paths}
        new = merged(merge, arrays)
        del arrays  # or the old weight would stay until the next is made
        flat = []
        for path, x in new.items():
            at, leaf = places[path]
            places[path] = at, jax.tree.map(lambda _, x=x: x, leaf)
            flat.append(places[path])
        nnx.update(model, nnx.from_flat_state(flat))


def _places(model: Any) -> dict[str, tuple[Any, Any]]:
    """The key path and the Variable, or bare array, of each leaf of a model's state."""
    from flax import nnx

    flat = nnx.to_flat_state(nnx.state(model))
    return {normalize_path(tuple(map(str, path))): (path, x) for path, x in flat}


def check_module(model: Any) -> None:
    """Raises TypeError for what is no NNX model."""
    from flax import nnx

    if not isinstance(model, nnx.Module):
        raise TypeError(f"`model` is a {type(model).__name__}, not an `nnx.Module`.")


def known_orders(model: Any) -> dict[str, Order]:
    """The orders of the kernels of Flax's own layers, by their paths."""
    from flax import nnx

    layers = nnx.Linear, nnx.LinearGeneral, nnx.Conv
    return {
        normalize_path((*map(str, path), "kernel")): "in,out"
        for path, module in nnx.iter_graph(model)
        if isinstance(module, layers)
    }
