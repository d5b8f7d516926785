"""Kernels and factors to the paper's layout, outputs by inputs, and back."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from ..algebra._axes import FactorAxes, Shape
from ._find import Kernel


def as_matrix(kernel: Kernel, x: Any) -> jax.Array:
    """A kernel or its gradient as `(*batch, m, n)`, the paper's layout."""
    batch, m, n = (
        tuple(x.shape[axis] for axis in axes)
        for axes in (kernel.batch, kernel.outputs, kernel.inputs)
    )
    moved = jnp.transpose(x, _matrix_order(kernel))
    return moved.reshape(*batch, math.prod(m), math.prod(n))


def as_kernel(kernel: Kernel, matrix: jax.Array, shape: Shape) -> jax.Array:
    """The inverse of `as_matrix`, for a kernel of this shape."""
    return _laid_out(matrix, _matrix_order(kernel), shape)


def as_factor(matrix: jax.Array, axes: FactorAxes, shape: Shape) -> jax.Array:
    """`(*batch, r, features)`, that is A or Bᵀ, as a leaf of this shape and axes."""
    return _laid_out(matrix, axes.rank_first(len(shape)), shape)


def _matrix_order(kernel: Kernel) -> tuple[int, ...]:
    """The axes of a kernel as the paper orders them."""
    return *kernel.batch, *kernel.outputs, *kernel.inputs


def _laid_out(x: jax.Array, order: tuple[int, ...], shape: Shape) -> jax.Array:
    """An array of this shape, from one with its axes in this order, some merged."""
    split = x.reshape([shape[axis] for axis in order])
    return jnp.moveaxis(split, range(len(order)), order)
