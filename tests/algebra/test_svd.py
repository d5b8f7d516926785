"""The truncated SVD on matrices of known spectra, exact and randomised."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorapro_jax.algebra import _svd
from lorapro_jax.algebra._svd import truncated_svd

SMALL = [(60, 40), (40, 60), (50, 50)]  # decomposed exactly
LARGE = [(400, 300), (300, 400), (300, 300)]  # from a random subspace
RANK = 8
SKETCH = 18
EPS = {"float32": 2.0**-23, "float64": 2.0**-52}

pytestmark = pytest.mark.usefixtures("quick_compiles")

KEY = jax.random.key(0)
jitted = jax.jit(truncated_svd, static_argnums=1)


def with_spectrum(sigma, shape, seed=0, dtype=np.float32):
    """U, σ and Vᵀ in float64, and their product rounded to `dtype`."""
    rng = np.random.default_rng(seed)
    k = min(shape)
    u, v = (np.linalg.qr(rng.standard_normal((size, k)))[0] for size in shape)
    sigma = np.pad(np.asarray(sigma, np.float64), (0, k - len(sigma)))
    return u, sigma, v.T, jnp.asarray((u * sigma @ v.T).astype(dtype))


def outside(basis, x):
    """The largest sine of an angle between the columns of x and a column space."""
    return np.linalg.norm(x - basis @ (basis.T @ x), 2)


def received(x, rank=RANK, key=KEY):
    return [np.asarray(part, np.float64) for part in jitted(x, rank, key)]


def geometric(shape):
    return 0.7 ** np.arange(min(shape))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", SMALL + LARGE)
def test_singular_values_that_fall_are_found_to_rounding_error(shape, dtype, x64):
    """(σ_18/σ_8)⁹ = 1e-14 for subspaces, and its square for values."""
    _, sigma, _, x = with_spectrum(geometric(shape), shape, dtype=dtype)

    _, s, _ = received(x)

    np.testing.assert_allclose(s, sigma[:RANK], atol=20 * EPS[dtype])


@pytest.mark.parametrize("shape", SMALL + LARGE)
def test_singular_vectors_span_the_right_spaces(shape):
    u, sigma, vt, x = with_spectrum(geometric(shape), shape)

    got_u, s, got_vt = received(x)

    # Wedin: rounding errors of 20 eps, amplified by the gap below the last one kept.
    bound = 20 * EPS["float32"] / (sigma[RANK - 1] - sigma[RANK])
    assert outside(u[:, :RANK], got_u) < bound
    assert outside(vt[:RANK].T, got_vt.T) < bound
    # u and vt belong together, vector by vector.
    best = u[:, :RANK] * sigma[:RANK] @ vt[:RANK]
    np.testing.assert_allclose(got_u * s @ got_vt, best, atol=bound)
    # Negative control: one vector too many is another space.
    assert outside(u[:, : RANK - 1], got_u) > 0.9


@pytest.mark.parametrize("rank", [1, RANK, 30])
@pytest.mark.parametrize("shape", SMALL + LARGE)
def test_vectors_are_orthonormal(shape, rank):
    _, _, _, x = with_spectrum(geometric(shape), shape)
    u, _, vt = received(x, rank)
    np.testing.assert_allclose(u.T @ u, np.eye(rank), atol=20 * EPS["float32"])
    np.testing.assert_allclose(vt @ vt.T, np.eye(rank), atol=20 * EPS["float32"])


@pytest.mark.parametrize("shape", [SMALL[0], LARGE[1]])
def test_signs_do_not_depend_on_who_decomposes(shape):
    """The largest entry of each left vector is positive; those of x and -x agree."""
    *_, x = with_spectrum(geometric(shape), shape)
    (u, _, vt), (same_u, _, other_vt) = received(x), received(-x)
    assert (u[np.abs(u).argmax(0), range(RANK)] > 0).all()
    np.testing.assert_allclose(same_u, u, atol=1e-3)
    np.testing.assert_allclose(other_vt, -vt, atol=1e-3)


@pytest.mark.parametrize("shape", SMALL + LARGE)
@pytest.mark.parametrize("true_rank", [0, 3])
def test_rank_deficient_matrices_are_exact_and_keep_orthonormal_vectors(
    shape, true_rank
):
    _, sigma, _, x = with_spectrum(geometric(shape)[:true_rank], shape)

    u, s, vt = received(x)

    np.testing.assert_allclose(s, sigma[:RANK], atol=20 * EPS["float32"])
    np.testing.assert_allclose(u * s @ vt, x, atol=20 * EPS["float32"])
    np.testing.assert_allclose(u.T @ u, np.eye(RANK), atol=20 * EPS["float32"])
    np.testing.assert_allclose(vt @ vt.T, np.eye(RANK), atol=20 * EPS["float32"])


@pytest.mark.parametrize("shape", LARGE)
def test_flat_tail_keeps_what_stands_out_and_fits_the_rest_nearly_as_well(shape):
    """4 directions of size 1 above a flat tail of 0.2, which has no first 4."""
    tail = np.full(min(shape) - 4, 0.2)
    u, sigma, _, x = with_spectrum(np.concatenate([np.ones(4), tail]), shape)

    got_u, s, got_vt = received(x)

    assert outside(got_u, u[:, :4]) < 1e-5
    np.testing.assert_allclose(s[:4], 1, atol=1e-5)
    best = np.linalg.norm(sigma[RANK:])
    error = np.linalg.norm(got_u * s @ got_vt - np.asarray(x, np.float64))
    assert best * (1 - 1e-5) < error < best * 1.01


@pytest.mark.parametrize("shape", LARGE)
def test_slow_decay_costs_one_percent_and_needs_the_power_iterations(
    shape, monkeypatch
):
    """σ_j = j^-½, as slow as the gradients of a large batch."""
    sigma = np.arange(1, min(shape) + 1) ** -0.5
    *_, x = with_spectrum(sigma, shape)

    _, s, _ = received(x)

    np.testing.assert_allclose(s, sigma[:RANK], rtol=1e-2)
    # Negative control: a random subspace alone misses far more.
    monkeypatch.setattr(_svd, "_POWER_ITERATIONS", 0)
    _, alone, _ = truncated_svd(x, RANK, KEY)
    assert np.abs(alone / sigma[:RANK] - 1).max() > 0.1


@pytest.mark.parametrize(("shape", "random"), [(SMALL[0], False), (LARGE[0], True)])
def test_only_large_matrices_are_sampled(shape, random):
    *_, x = with_spectrum(np.ones(min(shape)), shape)
    others = (truncated_svd(x, RANK, jax.random.key(seed)) for seed in (0, 1))
    u, v = (other.u for other in others)
    assert bool(jnp.any(jnp.abs(u - v) > 1e-2)) == random


def test_rank_near_the_size_of_a_large_matrix_is_exact():
    *_, x = with_spectrum(np.linspace(1, 2, 300), LARGE[0])
    expected = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
    _, s, _ = truncated_svd(x, 100, KEY)
    np.testing.assert_allclose(s, expected[:100], rtol=20 * EPS["float32"])


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize("shape", [SMALL[0], LARGE[0]])
def test_units_do_not_matter(shape, size):
    _, sigma, _, x = with_spectrum(geometric(shape), shape)
    u, s, vt = received(x * jnp.float32(size))
    np.testing.assert_allclose(s / size, sigma[:RANK], atol=30 * EPS["float32"])
    np.testing.assert_allclose(u.T @ u, np.eye(RANK), atol=20 * EPS["float32"])
    np.testing.assert_allclose(vt @ vt.T, np.eye(RANK), atol=20 * EPS["float32"])


@pytest.mark.parametrize("shape", [SMALL[0], LARGE[0]])
def test_stacked_matrices_equal_each_alone(shape):
    layers = [with_spectrum(geometric(shape), shape, seed)[3] for seed in range(3)]
    layers.append(jnp.zeros(shape))
    keys = jax.random.split(KEY, len(layers))

    u, s, vt = jax.vmap(truncated_svd, (0, None, 0))(jnp.stack(layers), RANK, keys)

    product = np.asarray((u * s[:, None]) @ vt)
    for k, layer in enumerate(layers):
        alone = truncated_svd(layer, RANK, keys[k])
        np.testing.assert_allclose(s[k], alone.s, atol=20 * EPS["float32"])
        np.testing.assert_allclose(
            product[k], (alone.u * alone.s) @ alone.vt, atol=1e-5
        )
