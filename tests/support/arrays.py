"""Arrays in the paper's layout, A r×n and B m×r, as the package's pairs."""

from lorapro_jax.algebra._axes import FactorAxes
from lorapro_jax.algebra._factors import Both, Factor, PairArrays


def both(a, b, batch=0):
    """What belongs to A and to B, behind so many stacked axes."""
    stack = tuple(range(batch))
    return Both(
        Factor(a, FactorAxes(batch, stack)), Factor(b, FactorAxes(batch + 1, stack))
    )


def pair_arrays(a, b, grad_a, grad_b, scale=1.0, batch=0):
    """A pair of `(*batch, r, n)` and `(*batch, m, r)`."""
    return PairArrays(*both(a, b, batch), both(grad_a, grad_b, batch), scale)


def plain(step):
    """The arrays of a step."""
    return step.a.array, step.b.array
