"""Powers of Gram matrices and eigendecompositions against dense NumPy, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorapro_jax.algebra._linalg import eigh_psd
from lorapro_jax.algebra._spectra import decompose, eigh_each, gram_powers
from lorapro_jax.algebra._stack import split_batches, stack_square
from tests.support import oracle
from tests.support.arrays import pair_arrays

pytestmark = pytest.mark.usefixtures("quick_compiles")

# Condition numbers of 10 make 1e2 of a Gram matrix, and 1e4 of its inverse square:
# 1e-12 of float64. In units of the largest entry.
TOLERANCE = 1e-9
SHAPES = [(7, 5, 1), (9, 6, 3), (6, 11, 4), (5, 5, 5)]
POWERS = [-0.25, -0.5, -1.0, -2.0]

powers_of = jax.jit(
    lambda pairs, power, damping: gram_powers(decompose(pairs), power, damping),
    static_argnums=1,
)
each = jax.jit(eigh_each)


def assert_close(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want)
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE * np.abs(want).max())


def power_of(gram, power, floor=0.0):
    """(X + floor I)^p by a dense eigendecomposition, on what is not lost."""
    values, vectors = np.linalg.eigh(gram)
    lost = (values < 1e-12 * values[-1]) & (floor == 0)
    values = np.where(lost, np.inf, values + floor)
    return (vectors * values**power) @ vectors.T


def factors(seed, shape, lost=0, size=1.0):
    """A and B, the last singular values of which may be 0."""
    found = []
    for x in oracle.factors(seed, *shape)[:2]:
        u, sigma, vt = np.linalg.svd(x, full_matrices=False)
        sigma[len(sigma) - lost :] = 0
        found.append(size * (u * sigma) @ vt)
    return found


def pair_of(a, b):
    return pair_arrays(*map(jnp.asarray, (a, b, a, b)))


@pytest.mark.parametrize("damping", [0.0, 1e-3, 0.1])
@pytest.mark.parametrize("power", POWERS)
def test_gram_powers_of_mixed_ranks_are_those_of_each(power, damping, x64):
    """(AAᵀ + eI)^p and (BᵀB + eI)^p, e = damping · (tr BᵀB + tr AAᵀ)/r."""
    pairs = [factors(k, shape, size=10.0**k) for k, shape in enumerate(SHAPES)]

    received = powers_of([pair_of(*x) for x in pairs], power, damping)

    for (a, b), both in zip(pairs, received, strict=True):
        e = oracle.relative_damping(a, b, damping)
        assert_close(both.a, power_of(a @ a.T, power, e))
        assert_close(both.b, power_of(b.T @ b, power, e))


@pytest.mark.parametrize("power", POWERS)
def test_gram_powers_leave_out_the_directions_that_a_factor_lacks(power, x64):
    """Undamped: the pseudo-inverse and its roots; 0 of a factor that is 0."""
    cases = [((9, 6, 3), 1), ((6, 11, 4), 3), ((9, 6, 3), 0)]
    lacking = [factors(k, *case) for k, case in enumerate(cases)]
    lacking.append([lacking[-1][0], 0 * lacking[-1][1]])

    received = powers_of([pair_of(*x) for x in lacking], power, 0.0)

    for (a, b), both in zip(lacking, received, strict=True):
        assert_close(both.a, power_of(a @ a.T, power))
        if b.any():
            assert_close(both.b, power_of(b.T @ b, power))
        else:
            np.testing.assert_array_equal(both.b, 0)


def test_gram_powers_of_stacked_layers_are_those_of_each(x64):
    pairs = [factors(seed, (9, 6, 3)) for seed in range(4)]
    a, b = (jnp.stack(x).reshape(2, 2, *x[0].shape) for x in zip(*pairs, strict=True))

    (received,) = powers_of([pair_arrays(a, b, a, b, batch=2)], -0.5, 0.0)

    assert received.a.shape == received.b.shape == (2, 2, 3, 3)
    for k, (x, y) in enumerate(pairs):
        assert_close(received.a[divmod(k, 2)], power_of(x @ x.T, -0.5))
        assert_close(received.b[divmod(k, 2)], power_of(y.T @ y, -0.5))


def test_gram_powers_of_a_factor_that_is_not_finite_stay_alone(x64):
    """The other factor of its pair is in its units; other pairs do not see it."""
    pairs = [factors(k, shape) for k, shape in enumerate(SHAPES)]
    clean = powers_of([pair_of(*x) for x in pairs], -0.5, 0.0)
    pairs[1][0][1, 2] = np.nan

    received = powers_of([pair_of(*x) for x in pairs], -0.5, 0.0)

    assert np.isnan(received[1].a).all()
    for k in (0, 2, 3):
        for got, want in zip(received[k], clean[k], strict=True):
            np.testing.assert_array_equal(got, want)


def squares(seed, batch, size, rank):
    """Positive semi-definite matrices of a rank, with eigenvalues from 1 to 1e-2."""
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.standard_normal((*batch, size, size)))[0]
    values = np.where(np.arange(size) < rank, np.geomspace(1, 1e-2, size), 0)
    return (q * values) @ q.mT


def test_eigendecompositions_of_mixed_sizes_and_ranks_are_those_of_each(x64):
    """Null spaces are exactly 0, and the padding leaves no trace."""
    matrices = [
        squares(0, (), 5, 5), squares(1, (2, 3), 3, 3), squares(2, (), 1, 1),
        squares(3, (2,), 4, 2), squares(4, (), 3, 0),
    ]  # fmt: skip

    received = each([jnp.asarray(x) for x in matrices])

    for x, (values, vectors), rank in zip(
        matrices, received, (5, 3, 1, 2, 0), strict=True
    ):
        assert values.shape == x.shape[:-1]
        assert vectors.shape == x.shape
        np.testing.assert_allclose(values, np.linalg.eigvalsh(x), atol=TOLERANCE)
        np.testing.assert_array_equal(np.count_nonzero(values, -1), rank)
        eye = np.broadcast_to(np.eye(x.shape[-1]), x.shape)
        np.testing.assert_allclose(vectors.mT @ vectors, eye, atol=TOLERANCE)
        rebuilt = (vectors * values[..., None, :]) @ vectors.mT
        np.testing.assert_allclose(rebuilt, x, atol=TOLERANCE)
    # Negative control: values in another order are another matrix's.
    values, vectors = received[0]
    with pytest.raises(AssertionError):
        assert_close((vectors * values[::-1]) @ vectors.mT, matrices[0])


def test_eigendecomposition_of_a_matrix_that_is_not_finite_stays_alone(x64):
    matrices = [squares(k, (3,), size, size) for k, size in enumerate((2, 4, 3))]
    clean = each([jnp.asarray(x) for x in matrices])
    matrices[1][1, 0, 2] = np.nan

    received = each([jnp.asarray(x) for x in matrices])

    assert np.isnan(received[1].values[1]).all()
    for got, want in zip(received[1], clean[1], strict=True):
        np.testing.assert_array_equal(got[::2], want[::2])
    for k in (0, 2):
        for got, want in zip(received[k], clean[k], strict=True):
            np.testing.assert_array_equal(got, want)


def test_results_are_in_the_dtype_of_each_pair(x64):
    """One float64 pair does not widen its neighbours."""
    wide = pair_of(*factors(0, (9, 6, 3)))
    narrow = pair_of(*map(np.float32, factors(1, (7, 5, 2))))
    received = powers_of([wide, narrow], -0.5, 0.0)
    assert [x.a.dtype for x in received] == [jnp.float64, jnp.float32]
    found = each([jnp.eye(2, dtype=jnp.float32), jnp.eye(3)])
    assert [x.vectors.dtype for x in found] == [jnp.float32, jnp.float64]


def test_stacked_eigendecomposition_of_mixed_sizes_reconstructs_each_matrix():
    """Padding shows as eigenvalue 0 and cannot mix with a null space."""
    rng = np.random.default_rng(12)
    factors = [rng.standard_normal((4, r, r - 1)) for r in (2, 3, 6)]  # deficient
    grams = [jnp.asarray(x @ x.swapaxes(-1, -2), jnp.float32) for x in factors]
    sizes = np.repeat([2, 3, 6], 4)

    decomposed = jax.jit(lambda x: eigh_psd(stack_square(x), sizes))
    values, vectors = map(np.asarray, decomposed(grams))

    rebuilt = (vectors * values[:, None, :]) @ vectors.mT
    parts = split_batches(rebuilt, [(2, 2)] * 3)
    for gram, part in zip(grams, parts, strict=True):
        r = gram.shape[-1]
        cropped = part[..., :r, :r].reshape(gram.shape)
        rounding = 16 * 2.0**-23 * np.abs(gram).max()
        np.testing.assert_allclose(cropped, gram, atol=rounding)
    for r, value, vector in zip(sizes, values, vectors, strict=True):
        assert np.count_nonzero(value) == r - 1
        inside = vector[:r, 6 - r :]
        np.testing.assert_allclose(inside.T @ inside, np.eye(r), atol=1e-5)
