"""LoRA-Pro's gradients, as functions of arrays.

Notation of the paper: W = W0 + s B A with B: m×r and A: r×n. LoRA's gradients are
g_A = s Bᵀ G and g_B = s G Aᵀ for the full gradient G, which is never formed. A
step (a, b) on (A, B) moves W by the *equivalent gradient* J(a, b) = s (B a + b A).
The gradients whose equivalent gradient is closest to G come from four r×r matrices a
pair (`_coefficients`), and from products of those with the factors.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ._coefficients import Coefficients, Gauge, coefficients
from ._factors import (
    Both,
    Factor,
    PairArrays,
    Step,
    in_compute_dtype,
)
from ._products import (
    apply,
    contract,
    inner,
    outer,
    over,
    times,
)
from ._spectra import Spectra, decompose


def adjust(
    pairs: Sequence[PairArrays], *, damping: ArrayLike, gauge: Gauge
) -> list[Step]:
    """The adjusted gradients of many pairs, with one eigendecomposition.

    **The gradients of a pair must come from one G**, so that g_A Aᵀ = Bᵀ g_B;
    this is not checked. Arrays that are not finite spoil their own pair only.

    Args:
      pairs: Any mix of ranks, shapes, batch axes and dtypes.
      damping: e in units of (tr BᵀB + tr AAᵀ) / r, pair by pair.
      gauge: Which of the minimisers; see `coefficients`.

    Returns:
      a and b of each pair, laid out like A and B, in float64 if one of the pair's
      arrays is, else in float32.
    """
    pairs = [in_compute_dtype(pair) for pair in pairs]
    gradients = [pair.gradients for pair in pairs]
    spectra = decompose(pairs)
    return project(spectra, pairs, gradients, e=spectra.damping(damping), gauge=gauge)


def project(
    spectra: Spectra,
    pairs: Sequence[PairArrays],
    gradients: Sequence[Step],
    *,
    e: jax.Array,
    gauge: Gauge = "sylvester",
) -> list[Step]:
    """The steps (a, b) whose equivalent gradients are closest to matrices X.

    Args:
      spectra: The `decompose` of these factors.
      pairs: In their compute dtype; their own gradients are not used.
      gradients: LoRA's gradients (s Bᵀ X, s X Aᵀ) of each pair's X.
      e: The damping of each matrix, `(N,)`, in the units of `spectra`.
      gauge: Which of the closest steps, as in `adjust`.

    A factor that does not train has a step of 0, and its partner the closest step
    that there is without it: b = g_B (AAᵀ + eI)⁻¹/s², as in LoRA-FA (arXiv
    2308.03303), or a = (BᵀB + eI)⁻¹ g_A/s².
    """
    each = list(zip(pairs, gradients, spectra.units, strict=True))
    crosses = [_cross(pair, gradient, unit) for pair, gradient, unit in each]
    # A gradient's own unit is s times that of its factors.
    weights = [unit / pair.scale for pair, _, unit in each]
    found = coefficients(spectra, crosses, weights, e, gauge)
    return [
        _step(pair, gradient, c).map(functools.partial(times, weight))
        for (pair, gradient, _), weight, c in zip(each, weights, found, strict=True)
    ]


def _cross(pair: PairArrays, gradient: Step, unit: jax.Array) -> jax.Array:
    """The X in common, g_A Aᵀ = Bᵀ g_B; nothing is in common with what is fixed."""
    if pair.a.trains and pair.b.trains:
        return contract(gradient.a, times(unit, pair.a))
    return jnp.zeros_like(contract(pair.a, pair.a))


def _step(pair: PairArrays, gradient: Step, c: Coefficients) -> Step:
    """The formula's last line for one pair, but for the weight."""

    def of(x: Factor, g: Factor, on_gradient: jax.Array, on_factor: jax.Array) -> Any:
        if not x.trains:
            return x.map(jnp.zeros_like)
        return apply(on_gradient, g) + apply(on_factor, x)

    return pair.factors.map(of, gradient, c.on_gradient, c.on_factor)


def equivalent(pair: PairArrays, step: Step) -> jax.Array:
    """J(a, b) = s (B a + b A): `(*batch, *features of B, *features of A)`."""
    moved = outer(pair.b, step.a) + outer(step.b, pair.a)
    return over(jnp.asarray(pair.scale, moved.dtype), moved) * moved


def lora_gradients(pair: PairArrays, x: jax.Array) -> Step:
    """Jᵀ X = (s Bᵀ X, s X Aᵀ), laid out like A and B, for an X like `equivalent`'s."""
    first = len(pair.batch)
    middle = first + len(pair.b.features)
    rows, columns = tuple(range(first, middle)), tuple(range(middle, x.ndim))
    scale = jnp.asarray(pair.scale, x.dtype)
    grad_a = inner(pair.b, x, rows, like=pair.a)
    grad_b = inner(pair.a, x, columns, like=pair.b)
    return Both(times(scale, grad_a), times(scale, grad_b))
