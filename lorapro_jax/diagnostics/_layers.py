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
from ..optimizers._adamw import DEFAULT_ADAM_DAMPING
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
            DEFAULT_ADAM_DAMPING if damping is None else damping,
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
    """A factor after the step, as `optax.apply_updates` stores it."""
    info = jnp.finfo(x.dtype)

    def moved(x: jax.Array, step: jax.Array) -> jax.Array:
        # XLA may leave out a rounding that is only a conversion there and back.
        stored = jax.lax.reduce_precision(x + step, info.nexp, info.nmant)
        return stored.astype(x.dtype)

    return x.map(moved, step)


def _as_wide(pair: PairArrays, both: Both[Factor]) -> Both[Factor]:
    return both.map(lambda x: x.astype(pair.dtype))


def table(
    found: Sequence[LoRAPair], layers: Layers, by_layer: bool
) -> dict[str, dict[str, jax.Array]]:
    """The numbers of each pair or layer, and of all."""
    paths: list[str] = []
    owners: list[int] = []
    for pair, batch in zip(found, layers.stack.batches, strict=True):
        if by_layer and batch:
            names = [",".join(map(str, index)) for index in np.ndindex(*batch)]
            owners += range(len(paths), len(paths) + len(names))
            paths += [f"{pair.a}[{name}]" for name in names]
        else:
            owners += [len(paths)] * math.prod(batch)
            paths.append(pair.a)
    # All at once, because a tree may have hundreds of pairs.
    every = [0] * len(owners)
    each, total = (_numbers(layers, np.array(x)) for x in (owners, every))
    rows = {path: {k: x[i] for k, x in each.items()} for i, path in enumerate(paths)}
    return rows | {"total": {k: x[0] for k, x in total.items()}}


def _numbers(layers: Layers, owners: np.ndarray) -> dict[str, jax.Array]:
    """Those of the layers with one owner together, for each owner, `(owners,)`.

    Args:
      layers: N of them.
      owners: `(N,)` integers from 0.
    """
    of = lambda norm: norm.together(owners)
    closest, damped, plain, own = map(of, layers.descents)
    update, adapter = of(layers.products.update), of(layers.products.adapter)
    a, b = layers.products.sides
    sides = Norm(*map(jnp.concatenate, zip(a, b, strict=True)))
    kept = damped.over(closest) ** 2
    counts = np.bincount(owners)
    ranks = jax.ops.segment_sum(layers.products.effective_rank, owners, len(counts))
    numbers = {
        "closest_norm": closest.number,
        "lora_norm": plain.number,
        "cosine": jnp.minimum(own.over(closest) * own.over(plain), 1),
        "damped_share": jnp.where(closest.value == 0, 0, jnp.clip(1 - kept, 0, 1)),
        "update_norm": update.number,
        "update_to_adapter": update.over(adapter),
        "balance": of(b).over(sides.together(np.tile(owners, 2))) ** 2,
        "effective_rank": ranks / counts.astype(ranks.dtype),
    }
    if layers.weights is not None:
        numbers["update_to_base"] = update.over(of(layers.weights))
    return numbers
