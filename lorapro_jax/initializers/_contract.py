"""The contract of the initialisers: what one gets, checks and returns."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from .._checks import is_real_scalar, is_traced
from ..algebra._linalg import matmul

Factors: TypeAlias = tuple[jax.Array, jax.Array]
Matrix: TypeAlias = jax.Array | jax.ShapeDtypeStruct


class Initialized(NamedTuple):
    """The start of one layer, in float32, or float64 if an array it comes from is.

    Attributes:
      a: A, `(r, n)`.
      b: B, `(m, r)`.
      change: What to add to W0, `(m, n)`: −s B A of a method that `changes_weight`,
        else 0. For factors that are stored in another dtype, round them first and
        call `cancel` with what is left of them.
    """

    a: jax.Array
    b: jax.Array
    change: jax.Array


@dataclasses.dataclass(frozen=True)
class Initializer:
    """A function from the arrays of one layer to its `Initialized` factors.

    Works under `jit`, with a static rank, and under `vmap`. If an array that it needs
    is not finite, or a traced scale is 0 or not finite, A and B are NaN, and `change`
    with them; other layers are not touched.

    Attributes:
      name: What messages call it.
      factors: `(weight, gradient, rank, scale, key) -> (A, B)`. Receives what it needs
        in float32 or float64 and finite, and the `jax.ShapeDtypeStruct` of the rest.
      needs_weight: Whether it reads W0.
      needs_gradient: Whether it reads G.
      changes_weight: Whether W0 has to change by −s B A, so that the layer does not.
    """

    name: str
    factors: Callable[..., Factors] = dataclasses.field(repr=False)
    needs_weight: bool = False
    needs_gradient: bool = False
    changes_weight: bool = False

    def __call__(
        self,
        weight: Matrix | None,
        gradient: Matrix | None,
        rank: int,
        scale: ArrayLike,
        key: jax.Array,
    ) -> Initialized:
        """The factors of one layer.

        Args:
          weight: W0, `(m, n)`. Where it is not needed, a `jax.ShapeDtypeStruct` says
            the shape, or the gradient does if this is None.
          gradient: G, `(m, n)`, given in the same way.
          rank: The rank r, static.
          scale: The scale s, a scalar, finite and not 0. It may be negative.
          key: A key of `jax.random`.

        Raises:
          ValueError: What is needed is missing or no matrix of real numbers, the two
            differ in shape, the rank is too large for the layer, or the scale is not
            one number, is 0 or not finite.
        """
        given = {"weight": weight, "gradient": gradient}
        needs = {"weight": self.needs_weight, "gradient": self.needs_gradient}
        shape = self._shape(given)
        if operator.index(rank) < 1:
            raise ValueError(f"`{self.name}` got the rank {rank}; pass at least 1.")
        arrays = {x: self._array(x, given[x]) for x in given if needs[x]}
        wide = any(x.dtype == jnp.float64 for x in arrays.values())
        rest = jax.ShapeDtypeStruct(shape, jnp.float64 if wide else jnp.float32)
        scale = self._scale(scale, rest.dtype)

        # No backend has to survive NaN in its decompositions.
        finite = jnp.array([jnp.isfinite(x).all() for x in arrays.values()]).all()
        finite &= jnp.isfinite(scale) & (scale != 0)
        ready = {
            x: jnp.where(finite, array.astype(rest.dtype), 0)
            for x, array in arrays.items()
        }
        w, g = (ready.get(x, rest) for x in given)
        a, b = (
            jnp.where(finite, x, jnp.nan) for x in self.factors(w, g, rank, scale, key)
        )
        if self.changes_weight:
            return Initialized(a, b, cancel(a, b, scale))
        return Initialized(a, b, jnp.zeros(shape, rest.dtype))

    def _scale(self, scale: ArrayLike, dtype: jnp.dtype) -> jax.Array:
        """The scale in the compute dtype, or a ValueError as far as it is known."""
        if is_traced(scale):
            valid = jnp.shape(scale) == ()
        else:
            number = float(np.asarray(scale)) if is_real_scalar(scale) else math.nan
            limits = jnp.finfo(dtype)
            valid = float(limits.tiny) <= abs(number) <= float(limits.max)
        if not valid:
            raise ValueError(
                f"`{self.name}` got the scale {scale!r}. Pass the one number s of "
                f"W = W0 + s B A that the layer multiplies by: not 0, and in the range "
                f"of {dtype.name}."
            )
        return jnp.asarray(scale, dtype)

    def _shape(self, given: Mapping[str, Matrix | None]) -> tuple[int, int]:
        """The one shape that all given matrices have, or a ValueError."""
        shapes = {tuple(x.shape) for x in given.values() if x is not None}
        if len(shapes) == 1:
            (shape,) = shapes
            if len(shape) == 2 and min(shape) > 0:
                return shape
        found = " and ".join(map(str, sorted(shapes))) or "no array"
        raise ValueError(
            f"`{self.name}` starts one layer and got {found}. Pass the weight, its "
            "gradient or both as matrices of one shape, outputs by inputs; a "
            "`jax.ShapeDtypeStruct` for a weight that is not to be read."
        )

    def _array(self, name: str, given: Matrix | None) -> jax.Array:
        """A matrix of real numbers that the method reads, or a ValueError."""
        if given is None or isinstance(given, jax.ShapeDtypeStruct):
            found = "is missing" if given is None else "is only a shape"
            raise ValueError(
                f"`{self.name}` reads the layer's {name}, which {found}. Pass it, or "
                "choose another method."
            )
        array = jnp.asarray(given)
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"`{self.name}` reads the layer's {name}, which is {array.dtype}. Pass "
                "real numbers; dequantise a quantised weight first."
            )
        return array


def cancel(a: jax.Array, b: jax.Array, scale: ArrayLike) -> jax.Array:
    """−s B A, in float32 or wider: what keeps W0 + s B A as it was.

    Args:
      a: A, `(r, n)`.
      b: B, `(m, r)`.
      scale: The scale s.
    """
    dtype = jnp.float64 if jnp.float64 in (a.dtype, b.dtype) else jnp.float32
    return -jnp.asarray(scale, dtype) * matmul(b.astype(dtype), a.astype(dtype))
