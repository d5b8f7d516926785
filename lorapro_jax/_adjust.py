"""LoRA-Pro's gradients, as functions of arrays.

Notation of the paper: W = W0 + s B A with B: m×r and A: r×n. LoRA's gradients are
g_A = s Bᵀ G and g_B = s G Aᵀ for the full gradient G, which is never formed. A
step (a, b) on (A, B) moves W by the *equivalent gradient* J(a, b) = s (B a + b A).
The gradients whose equivalent gradient is closest to G come from four r×r matrices a
pair (`_coefficients`), and from products of those with the factors.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ._coefficients import Gauge, coefficients
from ._factors import (
    PairArrays,
    apply,
    contract,
    in_compute_dtype,
    inner,
    largest_entry,
    outer,
    replicated,
    times,
)
from ._layout import FactorAxes
from ._linalg import (
    Eigh,
    eigh_psd,
    matmul,
    power_of_two,
    split_batches,
    stack_square,
)

Step: TypeAlias = tuple[jax.Array, jax.Array]
"""A step or gradient of A and of B, laid out like them."""

_CHUNK = 16
"""Of pairs; see `_products`."""


class Spectra(NamedTuple):
    """The Gram matrices of N pairs in their eigenbases, as one stack.

    Attributes:
      units: `(*batch)` of each pair, the power of two that its factors were
        multiplied with.
      b: Of BᵀB, `(N, R)` and `(N, R, R)`.
      a: Of AAᵀ, likewise.
    """

    units: Sequence[jax.Array]
    b: Eigh
    a: Eigh


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
    return solve(decompose(pairs), pairs, damping=damping, gauge=gauge)


def decompose(pairs: Sequence[PairArrays]) -> Spectra:
    """The eigendecompositions that serve every gradient at the same factors."""
    # In units of its larger factor no Gram matrix over- or underflows; in powers of
    # two that costs no accuracy.
    units = [1 / power_of_two(largest_entry(pair)) for pair in pairs]
    grams_a, grams_b = [], []
    for pair, unit in zip(pairs, units, strict=True):
        a, b = times(unit, pair.a, pair.a_axes), times(unit, pair.b, pair.b_axes)
        grams_a.append(contract(a, a, pair.a_axes))
        grams_b.append(contract(b, b, pair.b_axes))
    sizes = np.tile(_ranks(pairs), 2)
    values, vectors = eigh_psd(_stack_square(grams_b + grams_a), sizes)
    (lam, mu), (u, v) = jnp.split(values, 2), jnp.split(vectors, 2)
    return Spectra(units, Eigh(lam, u), Eigh(mu, v))


def solve(
    spectra: Spectra,
    pairs: Sequence[PairArrays],
    *,
    damping: ArrayLike,
    gauge: Gauge,
) -> list[Step]:
    """As `adjust`, with the `decompose` of pairs that have the same factors."""
    units = spectra.units
    # A gradient's own unit is s times the factors'.
    weights = [unit / pair.scale for pair, unit in zip(pairs, units, strict=True)]
    crosses = [
        contract(pair.grad_a, times(unit, pair.a, pair.a_axes), pair.a_axes)
        for pair, unit in zip(pairs, units, strict=True)
    ]
    # From here to the coefficients all pairs are one stack of small matrices.
    on_factor, on_grad = (_stack(x)[:, None, None] for x in (units, weights))
    bases, blocks = coefficients(
        spectra.b,
        spectra.a,
        on_grad * _stack_square(crosses),
        _ranks(pairs),
        damping,
        gauge,
    )
    # Half of the scale before the skinny product, half behind: weight² may overflow.
    size = blocks.shape[-2]
    halves = jnp.where(np.arange(2 * size) < size, on_grad, on_factor)
    products = _products(bases, halves[:, None] * blocks, [x.batch for x in pairs])
    return [
        _apply(pair, product, weight)
        for pair, product, weight in zip(pairs, products, weights, strict=True)
    ]


def equivalent(pair: PairArrays, step_a: jax.Array, step_b: jax.Array) -> jax.Array:
    """J(a, b) = s (B a + b A): `(*batch, *features of b, *features of a)`."""
    axes = pair.b_axes, pair.a_axes
    moved = outer(pair.b, step_a, *axes) + outer(step_b, pair.a, *axes)
    return jnp.asarray(pair.scale, moved.dtype) * moved


def lora_gradients(pair: PairArrays, x: jax.Array) -> Step:
    """Jᵀ X = (s Bᵀ X, s X Aᵀ), laid out like A and B, for an X like `equivalent`'s."""
    first = len(pair.batch)
    middle = first + len(pair.b_axes.features(pair.b.ndim))
    rows, columns = tuple(range(first, middle)), tuple(range(middle, x.ndim))
    grad_a = inner(pair.b, x, pair.b_axes, rows, pair.a, pair.a_axes)
    grad_b = inner(pair.a, x, pair.a_axes, columns, pair.b, pair.b_axes)
    scale = jnp.asarray(pair.scale, x.dtype)
    return scale * grad_a, scale * grad_b


def _products(
    bases: jax.Array, blocks: jax.Array, batches: Sequence[tuple[int, ...]]
) -> list[jax.Array]:
    """`bases @ blocks` of all pairs, divided among them: `(*batch, 2, R, 2 R)` each.

    In chunks of pairs, because XLA compiles equal programs once, and programs that
    read different places of an array differ. Those at one place of several arrays of
    a shape are equal, so a few dozen slices serve hundreds of pairs.
    """
    counts = [math.prod(batch) for batch in batches]
    products, start = [], 0
    for i in range(0, len(batches), _CHUNK):
        stop = start + sum(counts[i : i + _CHUNK])
        product = matmul(bases[start:stop], blocks[start:stop])
        products += split_batches(product, batches[i : i + _CHUNK])
        start = stop
    return products


def _apply(pair: PairArrays, product: jax.Array, weight: jax.Array) -> Step:
    """The adjusted gradients of one pair from its four coefficients."""
    product = product.astype(pair.a.dtype)
    r, size = pair.rank, product.shape[-2]
    on_grad, on_factor = product[..., :r, :r], product[..., :r, size : size + r]

    def combined(i: int, grad: jax.Array, x: jax.Array, axes: FactorAxes) -> jax.Array:
        of_grad = apply(on_grad[..., i, :, :], grad, axes)
        step = of_grad + apply(on_factor[..., i, :, :], x, axes)
        return times(weight, step, axes)

    return (
        combined(0, pair.grad_a, pair.a, pair.a_axes),
        combined(1, pair.grad_b, pair.b, pair.b_axes),
    )


def _ranks(pairs: Sequence[PairArrays]) -> np.ndarray:
    """The rank of each matrix in the stack of all pairs, `(N,)`."""
    counts = [int(np.prod(pair.batch)) for pair in pairs]
    return np.repeat([pair.rank for pair in pairs], counts)


def _stack(scalars: Sequence[jax.Array]) -> jax.Array:
    """`(*batch_i)` of all pairs as one `(N,)`, in the widest dtype."""
    widest = max((x.dtype for x in scalars), key=lambda dtype: dtype.itemsize)
    return jnp.concatenate([replicated(x).reshape(-1).astype(widest) for x in scalars])


def _stack_square(matrices: Sequence[jax.Array]) -> jax.Array:
    """As `stack_square`: all pairs and layers on every device, for the one `eigh`."""
    return stack_square([replicated(x) for x in matrices])
