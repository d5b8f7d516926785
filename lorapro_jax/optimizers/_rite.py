"""LoRA-RITE: Adam whose step on the product does not depend on how it is split.

Let B = Q_B S_B^½ with S_B = BᵀB. What A's gradient g_A = s Bᵀ G says of G, without the
size of B, is the *unmagnified* gradient u, and Adam runs on it in the frame Q_B:

    u = S_B^(-½) g_A / s = Q_Bᵀ G                       r×n
    Π = Q_Bᵀ Q_B⁻                                       the frame turns with B
    V ← β₂ Π V Πᵀ + (1-β₂) u uᵀ / n                     r×r
    M ← β₁ Π M + (1-β₁) (V̂ + ε² I)^(-½) u
    a = S_B^(-½) M̂ / s

B mirrors A (Yen et al., arXiv 2410.20625, algorithm 1, with the polar frame Q_B in
place of QR's, which gives the same step).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ..algebra._factors import (
    Both,
    Factor,
    PairArrays,
    Step,
    in_compute_dtype,
)
from ..algebra._linalg import Norm, matmul
from ..algebra._products import apply, contract, over
from ..algebra._spectra import decompose, gram_powers, inverse_roots
from ..transforms._clip import Clip, scaled
from ._moments import decayed, unbiased


class RiteMoments(NamedTuple):
    """Of one pair.

    Attributes:
      mu: M, like the factor.
      nu: V, `(*batch, r, r)`.
      frames: Q_A and Q_B of the last step; A's moments are in the frame of B.
    """

    mu: Both[Factor]
    nu: Both[jax.Array]
    frames: Both[Factor]


class Rite(NamedTuple):
    """The rule, by its hyperparameters: those of Adam."""

    b1: ArrayLike = 0.9
    b2: ArrayLike = 0.999
    eps: ArrayLike = 1e-8

    @property
    def state(self) -> type[RiteMoments]:
        """The class of a pair's moments."""
        return RiteMoments

    def init(self, pair: PairArrays) -> RiteMoments:
        """Zero moments, in no frame yet."""
        wide = in_compute_dtype(pair).factors
        zeros = lambda: jax.tree.map(jnp.zeros_like, wide)  # arrays of their own each
        return RiteMoments(zeros(), wide.map(_zeros), zeros())

    def update(
        self,
        pairs: Sequence[PairArrays],
        states: Sequence[RiteMoments],
        count: jax.Array,
        clip: Clip,
    ) -> tuple[list[Step], list[RiteMoments], jax.Array | None]:
        """As `Rule.update`."""
        powers = gram_powers(decompose(pairs), -0.5)
        roots = [_unscaled(pair, x)
                 for pair, x in zip(pairs, powers, strict=True)]  # fmt: skip
        u = [root.map(apply, x.gradients) for x, root in zip(pairs, roots, strict=True)]
        factor = clip.factor(_norm(x) for both in u for x in both)
        u = scaled(factor, u)

        frames = [
            x.map(apply, pair.factors) for pair, x in zip(pairs, powers, strict=True)
        ]
        turned = [_turned(*x) for x in zip(states, frames, strict=True)]
        nu = [decayed(old.nu, x.map(_second), self.b2)
              for old, x in zip(turned, u, strict=True)]  # fmt: skip
        flat = [x for both in unbiased(nu, self.b2, count) for x in both]
        found = inverse_roots(flat, jnp.asarray(self.eps) ** 2)

        steps, new = [], []
        for k, (old, x) in enumerate(zip(turned, u, strict=True)):
            whitened = Both(*found[2 * k : 2 * k + 2]).map(apply, x)
            mu = decayed(old.mu, whitened, self.b1)
            steps.append(roots[k].map(apply, unbiased(mu, self.b1, count)))
            new.append(RiteMoments(mu, nu[k], frames[k]))
        return steps, new, factor


def _turned(old: RiteMoments, frames: Both[Factor]) -> RiteMoments:
    """The moments of the last step in the frames of this one."""
    of_a, of_b = frames.map(contract, old.frames)
    turns = Both(of_b, of_a)  # A's moments are in the frame of B
    squares = turns.map(lambda p, v: matmul(matmul(p, v), p.mT), old.nu)
    return RiteMoments(turns.map(apply, old.mu), squares, frames)


def _second(u: Factor) -> jax.Array:
    """The second moment of one unmagnified gradient, u uᵀ / n."""
    return contract(u, u) / u.feature_count


def _unscaled(pair: PairArrays, powers: Both[jax.Array]) -> Both[jax.Array]:
    """What unmagnifies A is of B, and the reverse, by s."""
    inverse = 1 / jnp.asarray(pair.scale)
    return Both(powers.b, powers.a).map(lambda x: over(inverse, x) * x)


def _zeros(x: Factor) -> jax.Array:
    """A zero for every entry of a Gram matrix, with its sharding."""
    return jnp.zeros_like(contract(x, x))


def _norm(u: Factor) -> Norm:
    """The norm of each layer."""
    return Norm.of(u.array, (u.axes.rank, *u.features))
