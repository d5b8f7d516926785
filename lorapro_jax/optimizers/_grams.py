"""All that a step of `FactoredAdam` has to know of its large arrays: r×r matrices.

Each array is read once, and what is sent between devices is these matrices. They are
in units in which the factors and the gradients are about 1, so that no product over- or
underflows.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ..algebra._factors import Both, Factor, PairArrays
from ..algebra._linalg import power_of_two, root
from ..algebra._products import contract, times, units_of
from ..algebra._sharding import replicated
from ..algebra._stack import Stack
from ._moments import unbiased

_SPIKE = 10.0
"""How far ‖E‖ may be above its past; see `Composed.kept`."""

_LARGEST_UNIT = 2.0**60

T = TypeVar("T", bound=tuple[jax.Array, ...])


class Units(NamedTuple):
    """Numbers of one pair that its own arrays give, `(*batch)` each.

    Attributes:
      factors: A power of two; times it the larger factor is about 1.
      gradients: The same for the gradients.
      step: That of the factors by |s|. Of factors in their unit and of steps by this,
        the equivalent gradient is B a + b A, or minus that.
      equivalent: About the size of E.
      past: The sum of V, before this step.
      most: How large ‖E‖ may be; 0 where there is no past.
    """

    factors: jax.Array
    gradients: jax.Array
    step: jax.Array
    equivalent: jax.Array
    past: jax.Array
    most: jax.Array

    @classmethod
    def of(
        cls, pair: PairArrays, nu: Both[Factor], b2: ArrayLike, count: jax.Array
    ) -> "Units":
        """By the factors, the gradients, and the sums of V before this step."""
        return cls(*_units(pair, nu, b2, count))

    @jax.jit
    def clipped(self, factor: jax.Array | None) -> "MomentUnits":
        """Those of the moments, for an E times this number."""
        size = self.equivalent
        if factor is not None:
            size *= factor.astype(size.dtype)
        size = jnp.where(self.most > 0, jnp.minimum(size, self.most), size)
        mean = jnp.maximum(size, self.most)
        mean = jnp.clip(mean, 1 / _LARGEST_UNIT, _LARGEST_UNIT)
        return MomentUnits(*map(power_of_two, jax.lax.stop_gradient((size, mean))))


@jax.jit  # traced once for all pairs that are alike
def _units(
    pair: PairArrays, nu: Both[Factor], b2: ArrayLike, count: jax.Array
) -> tuple[jax.Array, ...]:
    """The fields of `Units`."""
    largest_factor, size = units_of(pair.factors, pair.gradients)
    # Of factors near the limits a less extreme one, so that it may be multiplied.
    largest = 2.0 ** (jnp.finfo(pair.dtype).maxexp - 28)
    factors = 1 / jnp.clip(largest_factor, 1 / largest, largest)
    step = factors / jnp.abs(jnp.asarray(pair.scale, pair.dtype))
    equivalent = jnp.minimum(step * size, 1 / jnp.finfo(pair.dtype).tiny)
    past = replicated(nu.b.array.sum((nu.b.axes.rank, *nu.b.features)))
    most = _SPIKE * root(unbiased(past, b2, jnp.maximum(count - 1, 1)))
    return factors, 1 / size, step, equivalent, past, most


class MomentUnits(NamedTuple):
    """Powers of two of one pair, `(*batch)` each.

    Attributes:
      sums: About the size of what enters V's root.
      mean: At least about that of M.
    """

    sums: jax.Array
    mean: jax.Array


def joined(stack: Stack, units: Sequence[T]) -> T:
    """Those of all pairs and layers, `(1, N, 1, 1)` each, for both sides."""
    each = zip(*units, strict=True)
    return type(units[0])(*(stack.join_scalars(x)[None] for x in each))


class Grams(NamedTuple):
    """Products over the features, `(2, N, R, R)`: on the side of A, then on that of B.

    In units; with F the factor, F⁻ that of the last step, g its gradient and μ its
    mean, which is in the units of E, they are x yᵀ for A and xᵀ y for B.

    Attributes:
      own: Of F with itself.
      moved: Of F - F⁻ with F. As a difference, and not as a product with F⁻, for a
        step may be smaller than a product's rounding error.
      motion: Of F - F⁻ with itself.
      cross: Of g with F.
      squares: Of g with itself.
      mean: Of μ with F.
    """

    own: jax.Array
    moved: jax.Array
    motion: jax.Array
    cross: jax.Array
    squares: jax.Array
    mean: jax.Array

    @classmethod
    def of(
        cls,
        stack: Stack,
        pairs: Sequence[PairArrays],
        units: Sequence[Units],
        means: Sequence[Both[Factor]],
        before: Sequence[Both[Factor]],
    ) -> "Grams":
        """Of all pairs, in their compute dtype, with their μ and F⁻."""
        each = zip(units, pairs, means, before, strict=True)
        blocks = [_blocks_of_both(*x) for x in each]
        together = jnp.moveaxis(stack.join(blocks), 0, 2)
        found = cls(*jnp.moveaxis(together, 1, 0))
        return found._replace(mean=found.mean / joined(stack, units).step)

    def square_of_motion(self) -> jax.Array:
        """‖B A - B⁻ A⁻‖² of each layer, `(N,)`; 0 only where nothing has moved.

        Of B (A - A⁻) + (B - B⁻) A⁻, where no large products cancel.
        """
        own_a, own_b = self.own
        moved_a, moved_b = self.moved
        motion_a, motion_b = self.motion
        old_a = own_a - moved_a - moved_a.mT + motion_a
        parts = own_b * motion_a, motion_b * old_a
        size = sum(x.sum((-2, -1)) for x in parts)
        square = size + 2 * (moved_b.mT * (moved_a - motion_a)).sum((-2, -1))
        # Where the two cancel there is only the rounding error of their Grams.
        return jnp.maximum(square, jnp.finfo(size.dtype).eps * size)


@jax.jit
def _blocks_of_both(
    unit: Units, pair: PairArrays, means: Both[Factor], before: Both[Factor]
) -> jax.Array:
    """The fields of `Grams` for one pair, `(*batch, 2, 6, r, r)`."""
    of = lambda *x: replicated(_blocks(unit, *x))
    sides = pair.factors.map(of, pair.gradients, means, before)
    return jnp.stack(sides, axis=-4)


def _blocks(unit: Units, x: Factor, g: Factor, mu: Factor, old: Factor) -> jax.Array:
    """The fields of `Grams` for one factor, `(*batch, 6, r, r)`."""
    change = x.map(jnp.subtract, old.astype(x.dtype))
    x, change = times(unit.factors, x), times(unit.factors, change)
    g = times(unit.gradients, g)
    products = [
        contract(x, x), contract(change, x), contract(change, change),
        contract(g, x), contract(g, g), contract(mu.astype(x.dtype), x),
    ]  # fmt: skip
    return jnp.stack(products, axis=-3)
