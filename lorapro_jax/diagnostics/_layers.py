"""Numbers of each layer from arrays, and of pairs and of all layers from those."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ..algebra._factors import Both, Factor, PairArrays, in_compute_dtype
from ..algebra._linalg import Norm
from ..algebra._measures import (
    Descents,
    Products,
    descents,
    in_units,
    of_layers,
    products,
)
from ..algebra._products import times
from ..algebra._spectra import decompose
from ..algebra._stack import Stack
from ..optimizers._damping import damping_by_motion
from ..optimizers._lorapro import DEFAULT_DAMPING
from ..pairs._axes import LoRAPair


class Layers(NamedTuple):
    """What is known of all N layers of all pairs.

    Attributes:
      stack: Which pair's they are.
      descents: Of the gradients.
      products: Of the factors and the step.
      weights: Of the base weights, `(N,)`, if these are given.
    """

    stack: Stack
    descents: Descents
    products: Products
    weights: Norm | None


def measure(
    factors: Mapping[str, Sequence[Both[Factor]]],
    scales: Sequence[Any],
    damping: ArrayLike | None,
    weights: Sequence[Norm] | None,
) -> Layers:
    """From what `_factors_of` returns."""
    pairs = [
        in_compute_dtype(PairArrays(*x, gradients, s))
        for x, gradients, s in zip(
            factors["params"], factors["grads"], scales, strict=True
        )
    ]
    after = [
        _as_wide(pair, x.map(_moved, step))
        for pair, x, step in zip(
            pairs, factors["params"], factors["updates"], strict=True
        )
    ]
    small, *units = zip(*map(in_units, pairs), strict=True)
    spectra = decompose(small)
    if "before" in factors:
        e = damping_by_motion(
            1.0 if damping is None else damping,
            spectra,
            small,
            [
                _as_wide(pair, x).map(functools.partial(times, 1 / unit))
                for pair, x, unit in zip(
                    pairs, factors["before"], units[0], strict=True
                )
            ],
        )
    else:
        e = spectra.damping(DEFAULT_DAMPING if damping is None else damping)
    sizes = [jnp.abs(pair.scale) for pair in pairs]
    norms = None
    if weights is not None:
        columns = zip(*weights, strict=True)
        norms = Norm(*(of_layers(spectra.stack, x) for x in columns))
    return Layers(
        spectra.stack,
        descents(spectra, small, list(zip(sizes, *units, strict=True)), e),
        products(spectra.stack, pairs, after),
        norms,
    )


def _moved(x: Factor, step: Factor) -> Factor:
    """A factor after the step, as `optax.apply_updates` has it."""
    return x.map(lambda y, z: (y + z).astype(y.dtype), step)


def _as_wide(pair: PairArrays, both: Both[Factor]) -> Both[Factor]:
    return both.map(lambda x: x.astype(pair.dtype))


def table(
    found: Sequence[LoRAPair], layers: Layers, by_layer: bool
) -> dict[str, dict[str, jax.Array]]:
    """The numbers of each pair or layer, and of all."""
    places, start = {}, 0
    for pair, batch in zip(found, layers.stack.batches, strict=True):
        for i, index in enumerate(np.ndindex(*batch) if by_layer and batch else ()):
            name = ",".join(map(str, index))
            places[f"{pair.a}[{name}]"] = slice(start + i, start + i + 1)
        if not (by_layer and batch):
            places[pair.a] = slice(start, start + math.prod(batch))
        start += math.prod(batch)
    places["total"] = slice(None)
    return {path: _numbers(layers, place) for path, place in places.items()}


def _numbers(layers: Layers, place: slice) -> dict[str, jax.Array]:
    """Those of some layers together."""
    of = lambda norm: Norm(*(x[place] for x in norm)).together()
    closest, damped, plain, own = map(of, layers.descents)
    update, adapter = of(layers.products.update), of(layers.products.adapter)
    a, b = map(of, layers.products.sides)
    kept = damped.over(closest) ** 2
    both = Norm(*map(jnp.stack, zip(a, b, strict=True))).together()
    numbers = {
        "closest_norm": closest.number,
        "lora_norm": plain.number,
        "cosine": jnp.minimum(own.over(closest) * own.over(plain), 1),
        "damped_share": jnp.where(closest.value == 0, 0, jnp.clip(1 - kept, 0, 1)),
        "update_norm": update.number,
        "update_to_adapter": update.over(adapter),
        "balance": b.over(both) ** 2,
        "effective_rank": layers.products.effective_rank[place].mean(),
    }
    if layers.weights is not None:
        numbers["update_to_base"] = update.over(of(layers.weights))
    return numbers
