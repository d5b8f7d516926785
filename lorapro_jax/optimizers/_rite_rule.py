"""LoRA-RITE: Adam whose step on the product does not depend on how it is split.

Let B = Q_B S_B^½ with S_B = BᵀB. What A's gradient g_A = s Bᵀ G says of G, without the
size of B, is the *unmagnified* gradient u, and Adam runs on it in the frame Q_B:

    u = S_B^(-½) g_A / s = Q_Bᵀ G                       r×n
    Π = Q_Bᵀ Q_B⁻                                       the frame turns with B
    ρ ← β₂ (ρ + max_i (λ_i(V) - λ_i(Π V Πᵀ)))           what V loses by that
    V ← β₂ Π V Πᵀ + (1-β₂) u uᵀ / n                     r×r
    M ← β₁ Π M + (1-β₁) ((V̂ + ρ̂ I)^½ + ε I)⁻¹ u
    a = S_B^(-½) M̂ / s

B mirrors A (Yen et al., arXiv 2410.20625, algorithm 1, with the averages of the
authors' code, and the polar frame Q_B in place of QR's, which gives the same step).
Where B does not move its frame does not turn.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from ..algebra._factors import (
    Both,
    Factor,
    PairArrays,
    Step,
    in_compute_dtype,
)
from ..algebra._linalg import Eigh, matmul, reciprocal, rounding_level
from ..algebra._products import apply, beside, contract, over
from ..algebra._sharding import replicated
from ..algebra._spectra import decompose, eigh_each, gram_powers
from ..algebra._unmagnified import Unmagnified
from ..transforms._clip import Clip
from ._moments import decayed, unbiased

T = TypeVar("T")


class RiteMoments(NamedTuple):
    """Of one pair; None for what belongs to a factor that does not move.

    Attributes:
      mu: M, like the factor.
      nu: V, `(*batch, r, r)`.
      frames: Q_A and Q_B of the last step; A's moments are in the frame of B. None
        where only one factor moves.
      spectrum: The eigenvalues of V, ascending, `(*batch, r)`. None without escaped
        mass, and where only one factor moves.
      rho: ρ, the escaped mass, `(*batch)`; None likewise.
    """

    mu: Both[Any]
    nu: Both[Any]
    frames: Both[Any]
    spectrum: Both[Any]
    rho: Both[Any]


class _Side(NamedTuple):
    """One factor that moves, with its moments in the present frame of its partner.

    Attributes:
      gradient: LoRA's.
      lift: S^(-½) / s with the S of the partner, `(*batch, r, r)`.
      mu: M.
      nu: V.
      spectrum: The eigenvalues of V as it was in the frame before, or None.
      rho: ρ, or None.
    """

    gradient: Factor
    lift: jax.Array
    mu: Factor
    nu: jax.Array
    spectrum: jax.Array | None
    rho: jax.Array | None


class Rite(NamedTuple):
    """The rule, by its hyperparameters; see `lora_rite`."""

    b1: ArrayLike
    b2: ArrayLike
    eps: ArrayLike
    escape_mass: bool
    mu_dtype: DTypeLike | None

    @property
    def state(self) -> type[RiteMoments]:
        """The class of a pair's moments."""
        return RiteMoments

    def init(self, pair: PairArrays) -> RiteMoments:
        """Zero moments, in no frame yet."""
        wide = in_compute_dtype(pair).factors
        turns = _turns(pair)
        zeros = lambda x: jnp.zeros_like(contract(x, x))  # for its sharding

        def of(function: Callable[[Factor], Any], there: bool = True) -> Both[Any]:
            return wide.map(lambda x: function(x) if there and x.trains else None)

        return RiteMoments(
            mu=of(lambda x: x.map(lambda y: jnp.zeros_like(y, dtype=self.mu_dtype))),
            nu=of(zeros),
            frames=of(lambda x: x.map(jnp.zeros_like), turns),
            spectrum=of(lambda x: zeros(x)[..., 0], turns and self.escape_mass),
            rho=of(lambda x: zeros(x)[..., 0, 0], turns and self.escape_mass),
        )

    def update(
        self,
        pairs: Sequence[PairArrays],
        states: Sequence[RiteMoments],
        count: jax.Array,
        clip: Clip,
    ) -> tuple[list[Step], list[RiteMoments], jax.Array | None]:
        """As `Rule.update`."""
        powers = gram_powers(decompose(pairs), -0.5)
        frames = [
            both.map(apply, pair.factors) if _turns(pair) else Both(None, None)
            for pair, both in zip(pairs, powers, strict=True)
        ]
        each = zip(pairs, powers, states, frames, strict=True)
        sides = [side for of_pair in each for side in _sides(*of_pair)]
        seen = [Unmagnified.of(side.lift, side.gradient) for side in sides]
        factor = clip.factor(x.norm for x in seen)
        u = [x.clipped(factor) for x in seen]

        new = self._averaged(sides, u, count)
        moved = [apply(x.lift, unbiased(x.mu, self.b1, count)) for x in new]
        steps = _placed(moved, pairs, [pair.gradients for pair in pairs])
        places = _placed(new, pairs, [Both(None, None)] * len(pairs))
        moments = [_moments(*x) for x in zip(places, frames, strict=True)]
        return steps, moments, factor

    def _averaged(
        self, sides: Sequence[_Side], u: Sequence[Factor], count: jax.Array
    ) -> list[_Side]:
        """Moments that have seen these unmagnified gradients."""
        nu = [
            decayed(side.nu, contract(x, x) / x.feature_count, self.b2)
            for side, x in zip(sides, u, strict=True)
        ]
        carried = [side.nu for side in sides if side.rho is not None]
        found = eigh_each([*nu, *carried])
        of_nu, of_carried = found[: len(nu)], iter(found[len(nu) :])
        result = []
        for side, x, v, eigh in zip(sides, u, nu, of_nu, strict=True):
            rho = spectrum = None
            if side.rho is not None:
                rho = self._escaped(side, next(of_carried))
                spectrum = beside(eigh.values, x)
            white = apply(self._inverse_root(eigh, rho, count), x)
            result.append(
                side._replace(
                    mu=decayed(side.mu, white, self.b1),
                    nu=v,
                    spectrum=spectrum,
                    rho=None if rho is None else beside(rho, x),
                )
            )
        return result

    def _escaped(self, side: _Side, carried: Eigh) -> jax.Array:
        """ρ after a step, `(*batch)`: what is below rounding has not escaped."""
        before, rho = (replicated(jnp.asarray(x)) for x in (side.spectrum, side.rho))
        lost = jnp.max(before - carried.values - _rounding(before), -1)
        return jnp.asarray(self.b2, rho.dtype) * (rho + jnp.maximum(lost, 0))

    def _inverse_root(
        self, eigh: Eigh, rho: jax.Array | None, count: jax.Array
    ) -> jax.Array:
        """((V̂ + ρ̂ I)^½ + ε I)⁻¹, and 0 where that is 0.

        What of V is below rounding counts as that much, and not as 0: a gradient that
        is small in one direction must not be divided by ε there.
        """
        values = jnp.maximum(eigh.values, _rounding(eigh.values))
        if rho is not None:
            values += rho[..., None]
        root = jnp.sqrt(unbiased(values, self.b2, count))
        inverse = reciprocal(root + jnp.asarray(self.eps, root.dtype))
        return matmul(eigh.vectors * inverse[..., None, :], eigh.vectors.mT)


def _turns(pair: PairArrays) -> bool:
    """Whether the frames turn, which they need not where one factor stays."""
    return pair.a.trains and pair.b.trains


def _sides(
    pair: PairArrays, powers: Both[jax.Array], old: RiteMoments, frames: Both[Any]
) -> list[_Side]:
    """The factors of a pair that move, and their moments turned to these frames."""
    old = jax.tree.map(lambda x: x.astype(pair.dtype), old)
    result = []
    for k, factor in enumerate(pair.factors):
        if not factor.trains:
            continue
        power, frame = powers[1 - k], frames[1 - k]
        lift = over(1 / jnp.asarray(pair.scale), power) * power
        mu, nu = old.mu[k], old.nu[k]
        if frame is not None:
            turn = beside(contract(frame, old.frames[1 - k]), factor)
            mu, nu = apply(turn, mu), matmul(matmul(turn, nu), turn.mT)
        of_v = old.spectrum[k], old.rho[k]
        result.append(_Side(pair.gradients[k], lift, mu, nu, *of_v))
    return result


def _rounding(values: jax.Array) -> jax.Array:
    """`rounding_level` of the eigenvalues of each layer, `(*batch, 1)`."""
    return rounding_level(values, np.full(values.shape[:-1], values.shape[-1]))


def _placed(
    values: Sequence[T], pairs: Sequence[PairArrays], others: Sequence[Both[Any]]
) -> list[Both[Any]]:
    """Values of the factors that move at their places, and others at the rest."""
    left = iter(values)
    return [
        pair.factors.map(lambda x, y: next(left) if x.trains else y, other)
        for pair, other in zip(pairs, others, strict=True)
    ]


def _moments(sides: Both[_Side | None], frames: Both[Any]) -> RiteMoments:
    """The state of a pair."""
    of = lambda name: sides.map(lambda x: None if x is None else getattr(x, name))
    return RiteMoments(of("mu"), of("nu"), frames, of("spectrum"), of("rho"))
