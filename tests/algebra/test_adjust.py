"""The identities that define the adjustment, in float64, to 1e-9 or better."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from lorapro_jax.algebra._adjust import adjust, equivalent
from tests.support import oracle
from tests.support.arrays import both, pair_arrays, plain

pytestmark = pytest.mark.usefixtures("x64", "quick_compiles")

SHAPES = [(7, 5, 1), (9, 6, 3), (6, 11, 4), (5, 5, 5)]
GAUGES = ["sylvester", "symmetric", "zero"]
TOLERANCE = 1e-9  # condition number 10 squared, twice, leaves 1e-12 of float64


def adjusted(a, b, grad_a, grad_b, scale=1.0, damping=0.0, gauge="sylvester"):
    """The package on one pair in the paper's layout, under jit."""
    arrays = [jnp.asarray(x) for x in (a, b, grad_a, grad_b, scale, damping)]
    return tuple(map(np.asarray, _adjusted(*arrays, gauge)))


@functools.partial(jax.jit, static_argnames="gauge")
def _adjusted(a, b, grad_a, grad_b, scale, damping, gauge):
    pair = pair_arrays(a, b, grad_a, grad_b, scale)
    return plain(*adjust([pair], damping=damping, gauge=gauge))


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("scale", [0.5, 2.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_residual_is_invisible_to_both_factors(shape, scale, gauge):
    """Bᵀ(E - G) = 0 and (E - G)Aᵀ = 0: no first-order step comes closer to G."""
    a, b, full = oracle.factors(0, *shape)
    grads = oracle.lora_gradients(a, b, full, scale)

    step = adjusted(a, b, *grads, scale, gauge=gauge)

    residual = oracle.equivalent(a, b, *step, scale) - full
    np.testing.assert_allclose(b.T @ residual, 0, atol=TOLERANCE)
    np.testing.assert_allclose(residual @ a.T, 0, atol=TOLERANCE)
    # Negative control: LoRA's own gradients leave something to gain.
    plain = oracle.equivalent(a, b, *grads, scale) - full
    assert np.abs(b.T @ plain).max() > 1e6 * TOLERANCE


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_falls_by_the_square_of_the_equivalent_gradient(shape, gauge):
    """⟨a, g_A⟩ + ⟨b, g_B⟩ = ‖E‖² (Theorem 2.2)."""
    scale = 1.5
    a, b, full = oracle.factors(1, *shape)
    grads = oracle.lora_gradients(a, b, full, scale)

    step = adjusted(a, b, *grads, scale, gauge=gauge)

    descent = sum(np.vdot(x, g) for x, g in zip(step, grads, strict=True))
    energy = np.sum(oracle.equivalent(a, b, *step, scale) ** 2)
    np.testing.assert_allclose(descent, energy, rtol=TOLERANCE)


@pytest.mark.parametrize("damping", [0.0, 1e-2])
@pytest.mark.parametrize("gauge", ["symmetric", "zero"])
def test_gauge_moves_the_factors_but_not_the_weight(gauge, damping):
    """E does not depend on X, damped or not."""
    a, b, full = oracle.factors(2, 9, 6, 3)
    grads = oracle.lora_gradients(a, b, full, 1.0)

    reference = adjusted(a, b, *grads, damping=damping)
    other = adjusted(a, b, *grads, damping=damping, gauge=gauge)

    np.testing.assert_allclose(
        oracle.equivalent(a, b, *other, 1.0),
        oracle.equivalent(a, b, *reference, 1.0),
        atol=TOLERANCE,
    )
    assert np.abs(other[0] - reference[0]).max() > 1e-2


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equivalent_gradient_ignores_how_the_product_is_split(seed):
    """(A, B) → (Q⁻¹A, BQ) is the same W, and the same E."""
    a, b, full = oracle.factors(seed, 9, 6, 3)
    q = np.eye(3) + 0.3 * np.random.default_rng(seed).standard_normal((3, 3))
    other_a, other_b = np.linalg.inv(q) @ a, b @ q

    step = adjusted(a, b, *oracle.lora_gradients(a, b, full, 1.0))
    grads = oracle.lora_gradients(other_a, other_b, full, 1.0)
    other = adjusted(other_a, other_b, *grads)

    np.testing.assert_allclose(
        oracle.equivalent(other_a, other_b, *other, 1.0),
        oracle.equivalent(a, b, *step, 1.0),
        atol=TOLERANCE,
    )
    # Negative control: LoRA's own step does depend on the split.
    plain = oracle.equivalent(a, b, *oracle.lora_gradients(a, b, full, 1.0), 1.0)
    assert np.abs(oracle.equivalent(other_a, other_b, *grads, 1.0) - plain).max() > 1e-2


@pytest.mark.parametrize("shape", SHAPES)
def test_equivalent_gradient_is_the_projection_on_the_tangent_space(shape):
    """E = P_B G + (I - P_B) G P_A (Theorem 2.1)."""
    a, b, full = oracle.factors(3, *shape)

    step = adjusted(a, b, *oracle.lora_gradients(a, b, full, 2.0), 2.0)

    expected = oracle.projection(a, b, full)
    np.testing.assert_allclose(
        oracle.equivalent(a, b, *step, 2.0), expected, atol=TOLERANCE
    )


@pytest.mark.parametrize("scale", [0.5, 2.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_undamped_sylvester_is_the_minimum_norm_solution(shape, scale):
    """(a, b) = J⁺ G for the dense Jacobian J."""
    a, b, full = oracle.factors(4, *shape)

    step = adjusted(a, b, *oracle.lora_gradients(a, b, full, scale), scale)

    expected = np.linalg.pinv(oracle.jacobian(a, b, scale), rcond=1e-10) @ full.ravel()
    received = np.concatenate([x.ravel() for x in step])
    np.testing.assert_allclose(received, expected, atol=TOLERANCE)


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("damping", [0.0, 1e-6, 1e-3, 0.1, 10.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_damped_step_solves_the_damped_least_squares_problem(shape, damping, gauge):
    """(JᵀJ + s²e I)⁻¹ JᵀG, e relative to the pair, against dense algebra."""
    scale = 2.0
    a, b, full = oracle.factors(5, *shape)
    grads = oracle.lora_gradients(a, b, full, scale)

    step = adjusted(a, b, *grads, scale, damping, gauge)

    expected = oracle.adjust(a, b, *grads, scale, damping, gauge)
    for received, want in zip(step, expected, strict=True):
        np.testing.assert_allclose(received, want, atol=TOLERANCE)


def test_sylvester_is_closest_to_the_gradients_of_lora():
    """No other X is nearer to (g_A, g_B) than Theorem 2.3's."""
    a, b, full = oracle.factors(6, 9, 6, 3)
    grads = oracle.lora_gradients(a, b, full, 1.0)
    step_a, step_b = adjusted(a, b, *grads)
    distance = lambda x, y: np.sum((x - grads[0]) ** 2) + np.sum((y - grads[1]) ** 2)

    best = distance(step_a, step_b)

    rng = np.random.default_rng(6)
    for size in (1e-3, 1e-1, 10.0):
        x = size * rng.standard_normal((3, 3))
        assert distance(step_a + x @ a, step_b - b @ x) > best


@pytest.mark.parametrize("shape", SHAPES)
def test_gauge_matrix_solves_the_sylvester_equation(shape):
    """BᵀB X + X AAᵀ = -(1/s²)(BᵀB)⁻¹ g_A Aᵀ, as SciPy and JAX solve it."""
    scale = 0.7
    a, b, full = oracle.factors(7, *shape)
    grads = oracle.lora_gradients(a, b, full, scale)
    gram_a, gram_b = a @ a.T, b.T @ b
    free_a = np.linalg.solve(gram_b, grads[0]) / scale**2
    rhs = -free_a @ a.T

    step_a, _ = adjusted(a, b, *grads, scale)
    x = (step_a - free_a) @ np.linalg.pinv(a)

    np.testing.assert_allclose(gram_b @ x + x @ gram_a, rhs, atol=TOLERANCE)
    scipy_x = scipy.linalg.solve_sylvester(gram_b, gram_a, rhs)
    np.testing.assert_allclose(x, scipy_x, atol=1e-8)
    if not hasattr(jax.scipy.linalg, "solve_sylvester"):
        pytest.skip("this JAX has no solve_sylvester; SciPy's agrees")
    with jax.default_device(jax.devices("cpu")[0]):  # GPUs have no Schur form
        whole = map(jnp.asarray, (gram_b, gram_a, rhs))
        jax_x = jax.scipy.linalg.solve_sylvester(*whole)
    np.testing.assert_allclose(x, jax_x, atol=1e-8)


@pytest.mark.parametrize("size", [1, 4])
def test_full_rank_square_factors_recover_full_fine_tuning(size):
    """r = m = n and invertible: E = G."""
    a, b, full = oracle.factors(8, size, size, size)

    step = adjusted(a, b, *oracle.lora_gradients(a, b, full, 2.0), 2.0)

    np.testing.assert_allclose(
        oracle.equivalent(a, b, *step, 2.0), full, atol=TOLERANCE
    )


@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_first_step_from_zero_b_moves_b_only(damping):
    """B = 0 gives a = 0 and b = (1/s²) g_B (AAᵀ + eI)⁻¹, the paper's first step."""
    scale = 2.0
    a, b, full = oracle.factors(9, 9, 6, 3, b_scale=0.0)
    grad_a, grad_b = oracle.lora_gradients(a, b, full, scale)

    step_a, step_b = adjusted(a, b, grad_a, grad_b, scale, damping)

    e = oracle.relative_damping(a, b, damping)
    expected = grad_b @ np.linalg.inv(a @ a.T + e * np.eye(3)) / scale**2
    np.testing.assert_array_equal(step_a, 0)
    np.testing.assert_allclose(step_b, expected, atol=TOLERANCE)


def test_heavy_damping_is_plain_lora_times_a_constant():
    """e → ∞: (a, b) → (g_A, g_B) / (s²e)."""
    scale, damping = 2.0, 1e8
    a, b, full = oracle.factors(10, 9, 6, 3)
    grads = oracle.lora_gradients(a, b, full, scale)

    step = adjusted(a, b, *grads, scale, damping)

    constant = scale**2 * oracle.relative_damping(a, b, damping)
    for received, grad in zip(step, grads, strict=True):
        np.testing.assert_allclose(constant * received, grad, atol=1e-6)


def test_many_pairs_of_mixed_rank_and_batch_equal_each_pair_alone():
    """One stacked eigendecomposition changes nothing: (4, 2) layers, ranks 1 to 5."""
    singles, stacked = [], []
    for seed, (m, n, r) in enumerate(SHAPES):
        group = []
        for k in range(8):
            a, b, full = oracle.factors(100 * seed + k, m, n, r)
            grad_a, grad_b = oracle.lora_gradients(a, b, full, 1.0 + seed)
            group.append((a, b, grad_a, grad_b, 1.0 + seed))
        singles += group
        arrays = [
            jnp.stack(xs).reshape(4, 2, *xs[0].shape)
            for xs in list(zip(*group, strict=True))[:4]
        ]
        stacked.append(pair_arrays(*arrays, 1.0 + seed, batch=2))

    received = jax.jit(lambda x: adjust(x, damping=1e-3, gauge="sylvester"))(stacked)

    flat = [
        (a.reshape(8, *a.shape[2:])[k], b.reshape(8, *b.shape[2:])[k])
        for a, b in map(plain, received)
        for k in range(8)
    ]
    for pair, step in zip(singles, flat, strict=True):
        expected = oracle.adjust(*pair, 1e-3)
        np.testing.assert_allclose(step[0], expected[0], atol=TOLERANCE)
        np.testing.assert_allclose(step[1], expected[1], atol=TOLERANCE)


def test_equivalent_is_the_derivative_of_the_weight():
    """J(a, b) = d/dt s (B + t b)(A + t a) at t = 0."""
    a, b, _ = oracle.factors(11, 9, 6, 3)
    step_a, step_b, _ = oracle.factors(12, 9, 6, 3)
    weight = lambda t: 2.0 * (b + t * step_b) @ (a + t * step_a)

    _, expected = jax.jvp(weight, (0.0,), (1.0,))

    arrays = map(jnp.asarray, (a, b, a, b))
    step = both(jnp.asarray(step_a), jnp.asarray(step_b))
    received = equivalent(pair_arrays(*arrays, 2.0), step)
    np.testing.assert_allclose(received, expected, atol=1e-12)
