"""Gram matrices BᵀB and AAᵀ of all pairs, and other matrices, in their eigenbases."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ._factors import Both, PairArrays
from ._linalg import (
    Eigh,
    eigh_psd,
    matmul,
    not_through,
    reciprocal,
    rounding_level,
)
from ._products import contract, times, unit_of
from ._sharding import replicated
from ._stack import Stack, split_batches, stack_square


class Sizes(NamedTuple):
    """In place of a `Stack` where only a part of it is known.

    Attributes:
      sizes: The rank of each matrix, `(N,)`.
    """

    sizes: jax.Array | np.ndarray


class Spectra(NamedTuple):
    """The Gram matrices of N pairs and layers in their eigenbases, as one stack.

    Attributes:
      stack: A `Stack`: which pair's matrices are where, static; or `Sizes`.
      units: `(*batch)` of each pair, the power of two that its factors were
        multiplied with.
      b: The decompositions BᵀB = U diag(λ) Uᵀ, `(N, R)` and `(N, R, R)`.
      a: The same of AAᵀ = V diag(μ) Vᵀ.
      grams: BᵀB of all, then AAᵀ of all, `(2, N, R, R)`, zero-padded. Derivatives go
        through these: those of eigenvectors do not exist where eigenvalues agree, as
        all do at B = 0, while those of the results do.
    """

    stack: Any
    units: Sequence[jax.Array]
    b: Eigh
    a: Eigh
    grams: jax.Array

    @classmethod
    def of(cls, stack: Any, units: Sequence[jax.Array], grams: jax.Array) -> "Spectra":
        """From the Gram matrices in these units, with one `eigh`."""
        both = jax.lax.stop_gradient(grams).reshape(-1, *grams.shape[2:])
        values, vectors = eigh_psd(both, jnp.tile(stack.sizes, 2))
        (lam, mu), (u, v) = jnp.split(values, 2), jnp.split(vectors, 2)
        return cls(stack, units, Eigh(lam, u), Eigh(mu, v), grams)

    @property
    def squares(self) -> jax.Array:
        """‖A‖² + ‖B‖² = tr BᵀB + tr AAᵀ of each pair and layer, `(N,)`."""
        return jnp.trace(self.grams, axis1=-2, axis2=-1).sum(0)

    def damping(self, relative: ArrayLike) -> jax.Array:
        """The e = damping · (tr BᵀB + tr AAᵀ) / r of each matrix, `(N,)`."""
        mean = self.squares / jnp.asarray(self.stack.sizes, self.grams.dtype)
        return jnp.asarray(relative, mean.dtype) * mean


def decompose(pairs: Sequence[PairArrays]) -> Spectra:
    """The eigendecompositions that serve every gradient at the same factors: one call.

    Args:
      pairs: In their compute dtype; any mix of ranks, shapes, batches and dtypes.
    """
    stack = Stack.of(pairs)
    # In units of its larger factor no Gram matrix over- or underflows.
    units = [1 / unit_of(pair.factors) for pair in pairs]
    grams_a, grams_b = [], []
    for pair, unit in zip(pairs, units, strict=True):
        a, b = times(unit, pair.a), times(unit, pair.b)
        grams_a.append(contract(a, a))
        grams_b.append(contract(b, b))
    grams = jnp.concatenate([stack.join(grams_b), stack.join(grams_a)])
    return Spectra.of(stack, units, grams.reshape(2, -1, *grams.shape[1:]))


def damped_inverse(
    values: jax.Array, e: jax.Array, sizes: np.ndarray | jax.Array
) -> jax.Array:
    """1/(λ+e), and 0 for a lost direction that e is too small to bring back.

    There e is itself below the rounding noise of the Gram matrix and of what the
    result is multiplied with, and 1/e would amplify that noise.
    """
    lost = (values == 0) & (e < rounding_level(values, sizes))
    return jnp.where(lost, 0, reciprocal(values + e))


def gram_powers(
    spectra: Spectra, power: float, damping: ArrayLike = 0.0
) -> list[Both[jax.Array]]:
    """(AAᵀ + eI)^p and (BᵀB + eI)^p of each pair, `(*batch, r, r)`, for p < 0.

    0 in the directions that a factor lacks.

    Args:
      spectra: The `decompose` of the pairs.
      power: p.
      damping: e in units of (tr BᵀB + tr AAᵀ) / r.
    """
    stack, e = spectra.stack, spectra.damping(damping)[:, None]
    known = not_through(
        "A power of a Gram matrix", (spectra.a, spectra.b), spectra.grams
    )
    # The Grams are in units of their factors: their powers are too.
    size = stack.join_scalars(spectra.units) ** (-2 * power)

    def power_of(eig: Eigh) -> list[jax.Array]:
        root = damped_inverse(eig.values, e, stack.sizes) ** -power
        whole = matmul(eig.vectors * root[:, None, :], eig.vectors.mT)
        parts = stack.split(size * whole)
        return [
            x.astype(unit.dtype) for x, unit in zip(parts, spectra.units, strict=True)
        ]

    return [Both(*x) for x in zip(*map(power_of, known), strict=True)]


def eigh_each(matrices: Sequence[jax.Array]) -> list[Eigh]:
    """Eigendecompositions of positive semi-definite matrices, with one `eigh`.

    Args:
      matrices: `(*batch, r, r)` each, of any sizes and dtypes.

    Returns:
      Values `(*batch, r)` and vectors `(*batch, r, r)` of each, in its dtype and on
      every device. A matrix that is not finite has values of NaN.
    """
    batches = [x.shape[:-2] for x in matrices]
    ranks = [x.shape[-1] for x in matrices]
    sizes = np.repeat(ranks, [math.prod(batch) for batch in batches])
    stack = stack_square([replicated(x) for x in matrices])
    found = eigh_psd(jax.lax.stop_gradient(stack), sizes)
    values, vectors = not_through("An inverse root of a moment", found, stack)
    parts = zip(*(split_batches(x, batches) for x in (values, vectors)), strict=True)
    return [
        # Of the padding the values come first, and the rows last.
        Eigh(value[..., -r:].astype(x.dtype), vector[..., :r, -r:].astype(x.dtype))
        for (value, vector), r, x in zip(parts, ranks, matrices, strict=True)
    ]
