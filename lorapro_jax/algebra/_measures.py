"""How large steps and gradients are, layer by layer, from r×r matrices alone.

In the eigenbases of `_coefficients`, with H_A = g_A g_Aᵀ and H_B = g_Bᵀ g_B, the damped
step (a, b) lowers the loss, to first order, at the rate ⟨a, g_A⟩ + ⟨b, g_B⟩ =

    (1/s²) { Σ_i [Uᵀ H_A U]_ii / (λ_i+e)  +  Σ_j [Vᵀ H_B V]_jj / (μ_j+e)
             −  Σ_ij K_ij² (1 + e/d_ij) / ((λ_i+e)(μ_j+e)) }

which at e = 0 is ‖E‖², the square of the projection of G. For the equivalent gradient
L = s (B g_A + g_B A) of LoRA's own gradients, ⟨E, L⟩ = ⟨G, L⟩ = ‖g_A‖² + ‖g_B‖².
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ._factors import Both, Factor, PairArrays
from ._linalg import Norm, matmul, reciprocal, root
from ._products import contract, times, unit_of
from ._sharding import replicated
from ._spectra import Spectra, damped_inverse
from ._stack import Stack
from ._thin import motion, norm


class Descents(NamedTuple):
    """What the gradients of N layers promise, `(N,)` each.

    Attributes:
      closest: ‖E‖.
      damped: The root of the rate above, at some e.
      plain: ‖L‖.
      own: √(‖g_A‖² + ‖g_B‖²).
    """

    closest: Norm
    damped: Norm
    plain: Norm
    own: Norm


class Products(NamedTuple):
    """What the factors of N layers are, and how far they move, `(N,)` each.

    Attributes:
      update: The norm of the change of s B A.
      adapter: That of s B A, before the change or after it, whichever is larger.
      sides: ‖A‖ and ‖B‖ before.
      effective_rank: (Σσ²)²/Σσ⁴ of the singular values of B A before.
    """

    update: Norm
    adapter: Norm
    sides: Both[Norm]
    effective_rank: jax.Array


def in_units(pair: PairArrays) -> tuple[PairArrays, jax.Array, jax.Array]:
    """The pair with s = 1 and entries up to 2, and the units of factors and gradients.

    Squares of its entries neither over- nor underflow. Its E is the true one times s
    and the first unit, divided by the second one.
    """
    unit, size = unit_of(pair.factors), unit_of(pair.gradients)
    a, b = (times(1 / unit, x) for x in pair.factors)
    gradients = pair.gradients.map(lambda x: times(1 / size, x))
    return PairArrays(a, b, gradients), unit, size


def descents(
    spectra: Spectra,
    pairs: Sequence[PairArrays],
    units: Sequence[tuple[jax.Array, jax.Array, jax.Array]],
    e: jax.Array,
) -> Descents:
    """What the gradients of all pairs promise.

    Args:
      spectra: The `decompose` of the pairs.
      pairs: As `in_units` returns them.
      units: |s| and the two units of each.
      e: The damping of each layer, `(N,)`.
    """
    stack = spectra.stack
    gradients = [pair.gradients for pair in pairs]
    own = Both(
        *([contract(x, x) for x in side] for side in zip(*gradients, strict=True))
    )
    h = own.map(stack.join)
    cross = stack.join([_cross(pair) for pair in pairs])
    s, unit, size = (of_layers(stack, x) for x in zip(*units, strict=True))
    plain = [norm(pair.factors, pair.gradients) for pair in pairs]
    plain_unit, plain_value = (of_layers(stack, x) for x in zip(*plain, strict=True))
    rate = lambda e: Norm(size / (s * unit), root(_rate(spectra, h, cross, e)))
    return Descents(
        rate(jnp.zeros_like(e)),
        rate(e),
        Norm(s * unit * size * plain_unit, plain_value),
        Norm(size, root(_trace(h.a) + _trace(h.b))),
    )


def _cross(pair: PairArrays) -> jax.Array:
    """g_A Aᵀ; nothing is in common with what is fixed."""
    cross = contract(pair.gradients.a, pair.a)
    return cross if pair.a.trains and pair.b.trains else jnp.zeros_like(cross)


def _rate(
    spectra: Spectra, h: Both[jax.Array], cross: jax.Array, e: jax.Array
) -> jax.Array:
    """The formula at the top, for s = 1: `(N,)`."""
    (lam, u), (mu, v) = spectra.b, spectra.a
    e, sizes = e[:, None], spectra.stack.sizes
    p_b, p_a = damped_inverse(lam, e, sizes), damped_inverse(mu, e, sizes)
    along = lambda vectors, x: jnp.sum(vectors * matmul(x, vectors), -2)
    each = jnp.sum(p_b * along(u, h.a) + p_a * along(v, h.b), -1)
    k = matmul(matmul(u.mT, cross), v)
    damped = e[..., None] * reciprocal(lam[:, :, None] + mu[:, None, :] + e[..., None])
    common = k**2 * (1 + damped) * p_b[:, :, None] * p_a[:, None, :]
    return jnp.maximum(each - jnp.sum(common, (-2, -1)), 0)


def products(
    stack: Stack, pairs: Sequence[PairArrays], after: Sequence[Both[Factor]]
) -> Products:
    """What the factors of all pairs are, and how far they move.

    Args:
      stack: That of the pairs.
      pairs: With the factors before, in their compute dtype.
      after: The factors after, like them.
    """
    each = [_products(*x) for x in zip(pairs, after, strict=True)]
    norms = [
        Norm(of_layers(stack, units), of_layers(stack, values))
        for units, values in (
            zip(*column, strict=True)
            for column in zip(*(x[:4] for x in each), strict=True)
        )
    ]
    update, adapter, a, b = norms
    rank = of_layers(stack, [x[4] for x in each])
    return Products(update, adapter, Both(a, b), rank)


def _products(
    pair: PairArrays, after: Both[Factor]
) -> tuple[Norm, Norm, Norm, Norm, jax.Array]:
    """The same of one pair: update, adapter, A, B and the effective rank."""
    # A and B each in units of their own, because one may be tiny beside the other.
    units = pair.factors.map(_larger, after)
    old, new = (
        both.map(lambda x, unit: times(1 / unit, x), units)
        for both in (pair.factors, after)
    )
    both_units = jnp.abs(jnp.asarray(pair.scale, pair.dtype)) * units.a * units.b
    moved = motion(new, old)
    grams, grams_after = (
        both.map(lambda x: replicated(contract(x, x))) for both in (old, new)
    )
    squares = [jnp.sum(x.a * x.b, (-2, -1)) for x in (grams, grams_after)]
    sizes = units.map(lambda unit, x: Norm(unit, root(_trace(x))), grams)
    update = Norm(both_units * moved.unit, moved.value)
    adapter = Norm(both_units, root(jnp.maximum(jnp.maximum(*squares), 0)))
    return update, adapter, sizes.a, sizes.b, _effective_rank(grams)


def _effective_rank(grams: Both[jax.Array]) -> jax.Array:
    """(tr M)²/tr M² of M = BᵀB AAᵀ, whose eigenvalues are the squares σ² of B A."""
    m = matmul(grams.b, grams.a)
    unit = jnp.abs(m).max((-2, -1), keepdims=True)
    m = m * reciprocal(unit)
    fourth = jnp.sum(m * m.mT, (-2, -1))
    return _trace(m) ** 2 * reciprocal(fourth)


def _larger(x: Factor, y: Factor) -> jax.Array:
    """The unit of two like factors, `(*batch)`."""
    return unit_of(Both(x, y))


def _trace(x: jax.Array) -> jax.Array:
    return jnp.trace(x, axis1=-2, axis2=-1)


def of_layers(stack: Stack, values: Sequence[jax.Array]) -> jax.Array:
    """A scalar, or one for each layer, of every pair: `(N,)`."""
    each = zip(values, stack.batches, strict=True)
    full = [jnp.broadcast_to(replicated(jnp.asarray(x)), batch) for x, batch in each]
    return stack.join_scalars(full)[:, 0, 0]
