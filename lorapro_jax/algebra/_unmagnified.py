"""What LoRA's gradient of one factor says of G, without the size of the other factor.

With S = BᵀB and B = Q S^½ that is Qᵀ G = S^(-½) g_A / s. It may be far larger than g_A,
and so may its square.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ._factors import Factor
from ._linalg import Norm, power_of_two
from ._products import apply, beside, over, times

_ROOM = 2.0**20
"""More than any rank, so that no sum of products overflows."""


class Unmagnified(NamedTuple):
    """An unmagnified gradient, of gradients up to the largest number.

    Attributes:
      array: In a unit of its own for each layer.
      unit: At least the size of the largest entry of that, up to a factor, `(*batch)`.
      norm: That of the gradient itself in each layer.
    """

    array: Factor
    unit: jax.Array
    norm: Norm

    @classmethod
    def of(cls, lift: jax.Array, gradient: Factor) -> "Unmagnified":
        """That of one factor.

        Args:
          lift: S^(-½) / s with the S of the other factor, `(*batch, r, r)`.
          gradient: LoRA's.
        """
        unit = _ROOM * power_of_two(jnp.abs(lift).max((-2, -1)))
        x = apply(lift / over(unit, lift), gradient)
        norm = Norm.of(x.array, (x.axes.rank, *x.features))
        return cls(x, norm.unit, norm.times(beside(unit, x)))

    def clipped(self, factor: jax.Array | None) -> Factor:
        """The gradient, times `factor`.

        A layer whose squares would overflow is made so small that they do not, nor
        sums of a few hundred of them: then only its direction counts.
        """
        unit, value = self.norm
        if factor is not None:
            unit *= factor.astype(unit.dtype)
        largest = 2.0 ** (jnp.finfo(unit.dtype).maxexp // 2 - 8)
        most = largest / jnp.maximum(value, 1)
        return times(jnp.minimum(unit, most) / self.unit, self.array)
