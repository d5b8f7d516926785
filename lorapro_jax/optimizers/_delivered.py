"""Matrices of the stack of all pairs, pair by pair: what arrays are multiplied with."""

from typing import Any, NamedTuple, TypeVar

import jax

from ..algebra._factors import Both, Factor
from ..algebra._linalg import matmul
from ..algebra._stack import Stack

T = TypeVar("T")


class Product(NamedTuple):
    """A matrix of all pairs as the product that it is, `(2, N, R, R)` each.

    Attributes:
      basis: Eigenvectors.
      turned: The matrix with its rows in that basis.
    """

    basis: jax.Array
    turned: jax.Array


def multiplied(terms: T) -> T:
    """The matrices that `Product`s are, `(2, N, R, R)`."""
    result: T = jax.tree.map(lambda x: matmul(*x), terms, is_leaf=_is_product)
    return result


def delivered(stack: Stack, terms: T) -> list[T]:
    """The matrices of each pair, `(2, *batch, R, R)`, padded; see `of_sides`.

    One product for each of them, and not one for all: then XLA has one program for the
    slices of all; see `Stack.products`.
    """
    leaves, treedef = jax.tree.flatten(terms, is_leaf=_is_product)
    of = lambda x: stack.products(*x) if _is_product(x) else stack.split_sides(x)
    found = zip(*map(of, leaves), strict=True)
    return [jax.tree.unflatten(treedef, each) for each in found]


def _is_product(x: Any) -> bool:
    return isinstance(x, Product)


def of_sides(terms: T, pair: Both[Factor]) -> Both[T]:
    """Those of A and of B, `(*batch, r, r)`, in the dtype of the factors."""
    rank = pair.a.rank

    def of(side: int) -> T:
        cut = lambda x: x[side, ..., :rank, :rank].astype(pair.a.dtype)
        result: T = jax.tree.map(cut, terms)
        return result

    return Both(of(0), of(1))
