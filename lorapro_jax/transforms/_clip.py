"""Clipping by a norm over the whole tree, of pairs and of other leaves together."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ..algebra._linalg import Norm
from ..algebra._sharding import replicated


class Clip(NamedTuple):
    """One number for all gradients of a tree, so that their norm is at most a bound.

    Attributes:
      max_norm: The bound; None for no clipping.
      rest: The gradients of the leaves that are no factors, a tree.
    """

    max_norm: ArrayLike | None
    rest: Any

    def factor(self, norms: Iterable[Norm]) -> jax.Array | None:
        """The number, a scalar, or None without a bound.

        What is not finite does not count, or it would reach all leaves through the
        norm: of a stack its layers do not, of other leaves the whole leaf. Where the
        norm itself overflows, it is still the right one up to rounding.

        Args:
          norms: Those of the layers of each pair, as the optimizer sees them; not read
            without a bound.
        """
        if self.max_norm is None:
            return None
        found = [*norms, *map(Norm.of, jax.tree.leaves(self.rest))]
        if not found:
            return None
        widest = max((x.value.dtype for x in found), key=lambda x: x.itemsize)
        units, values = (
            jnp.concatenate([replicated(x).reshape(-1).astype(widest) for x in part])
            for part in zip(*found, strict=True)
        )
        counts = jnp.isfinite(values) & jnp.isfinite(units)
        unit = jnp.max(jnp.where(counts, units, 0))
        shares = units / jnp.where(unit > 0, unit, 1)
        total = Norm.of(jnp.where(counts, values * shares, 0))
        bound = self.max_norm / unit
        norm = total.unit * total.value
        return jnp.where(norm > bound, bound / norm, 1)


def scaled(factor: jax.Array | None, tree: Any) -> Any:
    """Every array times a clip's number, in its own dtype."""
    if factor is None:
        return tree
    return jax.tree.map(lambda x: factor.astype(x.dtype) * x, tree)
