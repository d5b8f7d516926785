"""Damping by how far the last step went: the same for every scale of the forward pass.

Undamped, the step on A for a direction D of W is a = B⁺ D / s. Where B is as small as
its first step has made it, that is as large as A itself, so something has to hold it
back; as B grows it should let go. A singular direction of B (or of A) can be trusted as
far as it is larger than what one step changes of it. Near B = 0 that change is about
‖W - W⁻‖ / (s ‖A‖), with W⁻ the weight one step ago, so the damping's root is that:

    e = damping · ‖W - W⁻‖² / (s² (‖A‖² + ‖B‖²))

Scaling s by c and B by 1/c, as another convention for s does, leaves W alone and scales
e as BᵀB is scaled: the steps of W stay the same. Damping in units of the Grams would
not, because AAᵀ does not shrink with BᵀB.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ..algebra._factors import Both, Factor, PairArrays
from ..algebra._linalg import reciprocal
from ..algebra._products import times
from ..algebra._spectra import Spectra
from ..algebra._thin import motion

_AT_REST = 0.01
"""Of (‖A‖² + ‖B‖²) / r, where nothing has moved and so nothing is known of a step."""


def damping_by_motion(
    damping: ArrayLike,
    spectra: Spectra,
    pairs: Sequence[PairArrays],
    before: Sequence[Both[Factor]],
) -> jax.Array:
    """The e of each pair and layer, `(N,)`, in the units of `spectra`.

    Args:
      damping: The number in the formula, at least 0.
      spectra: The `decompose` of the pairs.
      pairs: With today's factors.
      before: The factors of each one step ago.
    """
    moved = []
    for pair, old, unit in zip(pairs, before, spectra.units, strict=True):
        in_units = functools.partial(_times, unit, pair.dtype)
        size = motion(pair.factors.map(in_units), old.map(in_units))
        moved.append(size.unit * size.value)
    square = spectra.stack.join_scalars(moved)[:, 0, 0] ** 2
    return damping_of_square(damping, spectra, square)


def damping_of_square(
    damping: ArrayLike, spectra: Spectra, square: jax.Array
) -> jax.Array:
    """The same by ‖B A - B⁻ A⁻‖², `(N,)` in the units of `spectra`."""
    e = square * reciprocal(spectra.squares)
    return jnp.asarray(damping, e.dtype) * jnp.where(
        square > 0, e, spectra.damping(_AT_REST)
    )


def _times(unit: jax.Array, dtype: jnp.dtype, x: Factor) -> Factor:
    return times(unit, x.astype(dtype))
