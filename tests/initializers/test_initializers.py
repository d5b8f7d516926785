"""The identities that define each initializer, against float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from lorapro_jax import initializers
from lorapro_jax.algebra._adjust import adjust, equivalent
from tests.support import oracle
from tests.support.arrays import pair_arrays

SHAPES = [(9, 6, 3), (6, 11, 3), (8, 8, 4), (7, 5, 1)]
SCALES = [0.5, 2.0]
ROUNDING = {"float64": 1e-12, "float32": 1e-5}  # condition numbers below 1e2
KEY = jax.random.key(0)
# On a GPU starts ask for the QR iterations, which TPUs do not have.
ON_GPU = jax.default_backend() == "gpu"
PLATFORMS = ("cpu", "cuda") if ON_GPU else ("cpu", "cuda", "tpu")

pytestmark = pytest.mark.usefixtures("quick_compiles")


def layer(seed, m, n, dtype=np.float64):
    """W0 and G with singular values from 1 down to 1/10, rounded to `dtype`."""
    rng = np.random.default_rng(seed)

    def matrix():
        k = min(m, n)
        u, v = (np.linalg.qr(rng.standard_normal((x, k)))[0] for x in (m, n))
        return (u * np.geomspace(1, 0.1, k) @ v.T).astype(dtype)

    return matrix(), matrix()


def start(method, w, g, rank, scale=2.0, key=KEY):
    """A, B and the change of W0, under jit, in float64 NumPy."""
    jitted = jax.jit(method, static_argnums=2)
    return [np.asarray(x, np.float64) for x in jitted(w, g, rank, scale, key)]


def truncated(x, rank):
    """The best approximation of this rank."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vt[:rank]


def assert_close(got, want, atol=ROUNDING["float64"]):
    np.testing.assert_allclose(got, want, atol=atol, rtol=0)


# The definitions: what A and B have to be, up to the signs of singular vectors.


def is_lora(w, g, a, b, s, atol):
    assert np.all(np.abs(a) <= a.shape[1] ** -0.5)
    np.testing.assert_array_equal(b, 0)


def is_lora_ga(directions, size, w, g, a, b, s, atol):
    """A = c V_Iᵀ and B = c U_J, row by row and column by column."""
    u, _, vt = np.linalg.svd(g)
    rows, columns = directions(len(a))
    c = size(len(g), s)
    assert_close(np.abs(a), c * np.abs(vt[rows]), c * atol)
    assert_close(np.abs(b), c * np.abs(u[:, columns]), c * atol)


def is_gora(w, g, a, b, s, atol):
    """s B A = −γ √(n/r) G P_A: what is left of the gradient, A cannot say."""
    is_lora(w, g, a, 0 * b, s, atol)
    aim = -0.05 * (a.shape[1] / len(a)) ** 0.5 * g
    assert_close((s * b @ a - aim) @ a.T, 0, atol)
    assert_close(s * b @ a, aim @ np.linalg.pinv(a) @ a, atol)


def is_lora_one(w, g, a, b, s, atol):
    """B A = −G_r/(γ S_1), in equal parts."""
    assert_close(b @ a, -truncated(g, len(a)) / np.linalg.norm(g, 2) / 128, atol)
    assert_close(a @ a.T, b.T @ b, atol)


def is_pissa(w, g, a, b, s, atol):
    """s B A is the best approximation of W0, in equal parts."""
    assert_close(s * b @ a, truncated(w, len(a)), atol)
    assert_close(a @ a.T, b.T @ b, atol)


def is_olora(w, g, a, b, s, atol):
    """The first rows of R and columns of Q of W0 = Q R."""
    q, r = np.linalg.qr(w)
    assert_close(b @ a, q[:, : len(a)] @ r[: len(a)], atol)
    assert_close(np.abs(a), np.abs(r[: len(a)]), atol)
    assert_close(np.abs(b), np.abs(q[:, : len(a)]), atol)


DIRECTIONS = {
    "ArB2r": lambda r: (range(r), range(r, 2 * r)),
    "A2rBr": lambda r: (range(r, 2 * r), range(r)),
    "ArBr": lambda r: (range(1, 2 * r, 2), range(0, 2 * r, 2)),
}
SIZES = {"stable": lambda m, s: m**0.25 / 4, "gd": lambda m, s: 1 / s}
METHODS = {
    "lora": (initializers.lora(), is_lora),
    **{
        f"lora_ga-{direction}-{scaling}": (
            initializers.lora_ga(direction, scaling),
            functools.partial(is_lora_ga, which, size),
        )
        for direction, which in DIRECTIONS.items()
        for scaling, size in SIZES.items()
    },
    "gora": (initializers.gora(), is_gora),
    "lora_one": (initializers.lora_one(), is_lora_one),
    "pissa": (initializers.pissa(), is_pissa),
    "olora": (initializers.olora(), is_olora),
}
ALL = list(METHODS)
CHANGING = [name for name in ALL if METHODS[name][0].changes_weight]
READING_G = [name for name in ALL if METHODS[name][0].needs_gradient]
READING_W = [name for name in ALL if METHODS[name][0].needs_weight]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ALL)
def test_method_is_its_definition(name, shape, scale, dtype, x64):
    method, is_so = METHODS[name]
    *size, rank = shape
    w, g = layer(0, *size, dtype)

    a, b, _ = start(method, w, g, rank, scale)

    assert (a.shape, b.shape) == ((rank, size[1]), (size[0], rank))
    w, g = w.astype(np.float64), g.astype(np.float64)
    is_so(w, g, a, b, scale, ROUNDING[dtype])
    # Negative control: another layer's factors are not this one's.
    other_w, other_g = layer(1, *size)
    if name != "lora":
        with pytest.raises(AssertionError):
            is_so(other_w, other_g, a, b, scale, ROUNDING[dtype])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ALL)
def test_small_dtypes_are_computed_in_float32(name, dtype):
    """As accurate for the rounded arrays as for any."""
    method, is_so = METHODS[name]
    w, g = (jnp.asarray(x, dtype) for x in layer(2, 9, 6))

    a, b, _ = start(method, w, g, 3)

    exact_w, exact_g = (np.asarray(x, np.float64) for x in (w, g))
    is_so(exact_w, exact_g, a, b, 2.0, ROUNDING["float32"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", ALL)
def test_results_are_float32_or_float64(name, dtype, x64):
    method, _ = METHODS[name]
    w, g = (jnp.asarray(x, dtype) for x in layer(2, 9, 6))
    wide = dtype == "float64" and name != "lora"
    dtypes = {x.dtype for x in method(w, g, 3, 2.0, KEY)}
    assert dtypes == {jnp.dtype(jnp.float64 if wide else jnp.float32)}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CHANGING)
def test_layer_stays_where_w0_changes(name, shape, scale):
    """(W0 + change) + s B A = W0."""
    *size, rank = shape
    w, g = layer(0, *size)
    a, b, change = start(METHODS[name][0], w, g, rank, scale)
    assert_close(w + change + scale * b @ a, w)
    # Negative control: there is something to cancel.
    assert np.linalg.norm(change, 2) > 0.05


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [x for x in ALL if x not in CHANGING])
def test_other_methods_leave_w0_alone(name, shape):
    *size, rank = shape
    a, b, change = start(METHODS[name][0], *layer(0, *size), rank)
    np.testing.assert_array_equal(change, np.zeros(size))
    assert np.any(b @ a) == (name != "lora")


def test_cancel_of_rounded_factors_cancels_what_they_have_become():
    w, g = layer(3, 9, 6, np.float32)
    a, b, change = initializers.pissa()(w, g, 3, 2.0, KEY)
    a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    product = 2.0 * np.asarray(b, np.float64) @ np.asarray(a, np.float64)

    anew = np.asarray(initializers.cancel(a, b, 2.0), np.float64)

    assert anew.dtype != a.dtype
    assert_close(anew + product, 0, 1e-6)
    # Negative control: the change of the factors before rounding does not.
    assert np.abs(change + product).max() > 1e-4


# LoRA-GA and the step that comes next.


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [x for x in ALL if x.startswith("lora_ga")])
def test_first_step_of_lora_pro_after_lora_ga_is_the_best_of_rank_2r(
    name, shape, scale
):
    """E = G_2r, and no step of any LoRA of rank r comes closer to G."""
    *size, rank = shape
    w, g = layer(4, *size)
    a, b, _ = start(METHODS[name][0], w, g, rank, scale)

    received = lora_pro_step(a, b, g, scale)

    assert_close(received, truncated(g, 2 * rank), 1e-11)
    # Negative control: from the factors of another gradient it is further away.
    a, b, _ = start(METHODS[name][0], w, layer(5, *size)[1], rank, scale)
    best = np.linalg.norm(truncated(g, 2 * rank) - g)
    assert np.linalg.norm(lora_pro_step(a, b, g, scale) - g) > best + 1e-2


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", SHAPES)
def test_first_step_of_plain_lora_after_lora_ga_gd_is_of_the_right_size(shape, scale):
    """s (B g_A + g_B A) = G_2r (Theorem 3.1), for `"gd"` and no other size."""
    *size, rank = shape
    w, g = layer(4, *size)
    expected = truncated(g, 2 * rank)

    a, b, _ = start(initializers.lora_ga(scaling="gd"), w, g, rank, scale)

    grads = oracle.lora_gradients(a, b, g, scale)
    assert_close(oracle.equivalent(a, b, *grads, scale), expected)
    a, b, _ = start(initializers.lora_ga(), w, g, rank, scale)
    grads = oracle.lora_gradients(a, b, g, scale)
    assert np.abs(oracle.equivalent(a, b, *grads, scale) - expected).max() > 1e-2


def lora_pro_step(a, b, g, scale):
    """The equivalent gradient of the first adjusted step, undamped."""
    arrays = map(jnp.asarray, (a, b, *oracle.lora_gradients(a, b, g, scale), scale))
    return np.asarray(_lora_pro_step(pair_arrays(*arrays)))


@jax.jit
def _lora_pro_step(pair):
    (step,) = adjust([pair], damping=0.0, gauge="sylvester")
    return equivalent(pair, step)


def test_sampled_directions_of_a_large_layer_serve_lora_ga_as_well():
    """More than 256 inputs and outputs: a randomised SVD, in float32."""
    rng = np.random.default_rng(6)
    m, n, rank = 320, 300, 4
    u, v = (np.linalg.qr(rng.standard_normal((x, n)))[0] for x in (m, n))
    sigma = np.arange(1, n + 1) ** -1.0
    g = (u * sigma @ v.T).astype(np.float32)

    a, b, _ = start(initializers.lora_ga(), None, g, rank)

    distance = np.linalg.norm(oracle.projection(a, b, g) - g)
    best = np.linalg.norm(sigma[2 * rank :])
    assert best * (1 - 1e-5) < distance < best * (1 + 1e-4)
    # Negative control: three directions for each factor instead of four.
    fewer = np.linalg.norm(oracle.projection(a[:3], b[:, :3], g) - g)
    assert fewer > best * (1 + 1e-2)


# Sizes and directions of the others.


def test_lora_is_uniform_with_the_variance_of_kaiming():
    """1/(3n), as `torch.nn.init.kaiming_uniform_(a=sqrt(5))`; another per key."""
    a, _, _ = start(initializers.lora(), np.zeros((5, 400)), None, 64)
    assert np.abs(a).max() == pytest.approx(400**-0.5, rel=1e-3)
    # 25600 samples: the variance is known to 0.9 / sqrt(25600) = 0.6 %.
    assert a.var() == pytest.approx(1 / 1200, rel=0.03)
    assert abs(a.mean()) < 4 * (1200 * a.size) ** -0.5
    other, *_ = start(
        initializers.lora(), np.zeros((5, 400)), None, 64, key=jax.random.key(1)
    )
    assert np.abs(np.corrcoef(a.ravel(), other.ravel())[0, 1]) < 0.03


@pytest.mark.parametrize("scale", SCALES)
def test_gora_moves_the_weight_about_as_far_as_a_step_of_descent(scale):
    """‖s B A‖ ≈ γ ‖G‖ for a random A, at any rank, and downhill."""
    g = np.random.default_rng(7).standard_normal((50, 400)).astype(np.float32)
    for rank in (4, 16, 64):
        a, b, _ = start(initializers.gora(0.2), None, g, rank, scale)
        moved = scale * b @ a
        # ‖G P_A‖²/‖G‖² is r/n up to sqrt(2/(50 r)), 10 % at rank 4.
        assert np.linalg.norm(moved) == pytest.approx(0.2 * np.linalg.norm(g), rel=0.1)
        assert np.vdot(moved, g) < 0


@pytest.mark.usefixtures("x64")
def test_gora_of_full_rank_is_a_step_of_descent():
    w, g = layer(8, 9, 6)
    a, b, _ = start(initializers.gora(0.2), w, g, 6, 0.5)
    assert_close(0.5 * b @ a, -0.2 * g)


def test_gora_and_lora_share_a():
    w, g = layer(8, 9, 6)
    a, *_ = start(initializers.gora(), w, g, 3)
    assert_close(a, start(initializers.lora(), w, g, 3)[0], 1e-6)


@pytest.mark.parametrize("gamma", [16.0, 128.0])
def test_lora_one_is_normalised_and_goes_downhill(gamma):
    """‖B A‖ = 1/γ whatever the size of the gradient."""
    w, g = layer(9, 9, 6, np.float32)
    method = initializers.lora_one(gamma)
    for size in (1e-20, 1.0, 1e20):
        a, b, _ = start(method, w, g * np.float32(size), 3)
        assert np.linalg.norm(b @ a, 2) == pytest.approx(1 / gamma, rel=1e-5)
        assert np.vdot(b @ a, g) < 0


# Where it runs.


@pytest.mark.parametrize("shape", [(9, 6), (320, 300)])
@pytest.mark.parametrize("name", ALL)
def test_methods_export_for_every_platform(name, shape):
    """Exact and sampled, for stacked layers as well, on a machine without them."""
    method, _ = METHODS[name]
    one = functools.partial(lambda method, w, g, k: method(w, g, 3, 2.0, k), method)
    x, key = jax.ShapeDtypeStruct(shape, jnp.float32), jax.eval_shape(lambda: KEY)
    stacked = [jax.ShapeDtypeStruct((2, *y.shape), y.dtype) for y in (x, x, key)]
    for function, arrays in ((one, [x, x, key]), (jax.vmap(one), stacked)):
        exported = export.export(jax.jit(function), platforms=PLATFORMS)(*arrays)
        assert exported.platforms == PLATFORMS


# What can go wrong.


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ALL)
def test_layer_without_signal_stays_and_can_still_train(name, shape):
    """W0 = G = 0: finite, unmoved, and no direction of A and B that are both 0."""
    *size, rank = shape
    zero = np.zeros(size, np.float32)

    a, b, change = start(METHODS[name][0], zero, zero, rank)

    assert np.isfinite([*a.ravel(), *b.ravel(), *change.ravel()]).all()
    assert_close(change + 2.0 * b @ a, 0, 1e-6)
    assert np.all(np.linalg.norm(a, axis=1) + np.linalg.norm(b, axis=0) > 1e-2)


@pytest.mark.parametrize("shape", [(9, 6), (400, 300)])
@pytest.mark.parametrize("name", ["lora_one", "pissa"])
def test_directions_that_a_matrix_lacks_can_still_train(name, shape):
    """Rank 2 of 4, exact and sampled: B is 0 there, and A is not."""
    rng = np.random.default_rng(10)
    u, v = (rng.standard_normal((size, 2)) for size in shape)
    x = (u @ v.T).astype(np.float32)

    a, b, _ = start(METHODS[name][0], x, x, 4)

    np.testing.assert_array_equal(b[:, 2:], 0)
    largest = np.linalg.norm(a[0])
    assert_close(np.linalg.norm(a, axis=1)[2:], largest, 1e-5 * largest)
    part = -x / np.linalg.norm(x, 2) / 128 if name == "lora_one" else x / 2.0
    assert_close(b @ a, part, 1e-5 * np.abs(part).max())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", READING_G + READING_W)
def test_non_finite_layer_spoils_itself_only(name, bad):
    method, _ = METHODS[name]
    layers = [layer(seed, 9, 6, np.float32) for seed in range(3)]
    w, g = (np.stack(x) for x in zip(*layers, strict=True))
    spoiled = w if name in READING_W else g
    spoiled[1, 2, 3] = bad
    keys = jax.random.split(KEY, 3)

    received = jax.vmap(method, (0, 0, None, None, 0))(w, g, 3, 2.0, keys)

    assert np.isnan(received.a[1]).all()
    assert np.isnan(received.b[1]).all()
    assert np.isnan(received.change[1]).all() == (name in CHANGING)
    for k in (0, 2):
        for got, want in zip(
            received, method(w[k], g[k], 3, 2.0, keys[k]), strict=True
        ):
            assert_close(got[k], want, 1e-5)


@pytest.mark.parametrize("name", ALL)
def test_array_that_is_not_read_may_be_anything(name):
    """A shape, None, or full of NaN."""
    method, _ = METHODS[name]
    w, g = layer(1, 9, 6, np.float32)
    expected = method(w, g, 3, 2.0, KEY)
    quantised = jax.ShapeDtypeStruct((9, 6), jnp.int8)
    others = {"weight": [np.nan * w, quantised], "gradient": [np.nan * g, None]}
    for i in range(2):
        received = method(
            w if name in READING_W else others["weight"][i],
            g if name in READING_G else others["gradient"][i],
            3, 2.0, KEY,
        )  # fmt: skip
        for got, want in zip(received, expected, strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", ALL)
def test_stacked_layers_equal_each_alone(name):
    """vmap over weights, gradients, scales and keys."""
    method, is_so = METHODS[name]
    layers = [layer(seed, 9, 6, np.float32) for seed in range(3)]
    w, g = (np.stack(x) for x in zip(*layers, strict=True))
    scales, keys = jnp.array([0.5, 1.0, 2.0]), jax.random.split(KEY, 3)

    a, b, change = jax.vmap(method, (0, 0, None, 0, 0))(w, g, 3, scales, keys)

    for k, (one_w, one_g) in enumerate(layers):
        factors = (np.asarray(x[k], np.float64) for x in (a, b))
        is_so(one_w, one_g, *factors, float(scales[k]), ROUNDING["float32"])
        alone = method(one_w, one_g, 3, scales[k], keys[k])
        assert_close(change[k], alone.change, 1e-5)
        assert_close(a[k], alone.a, 1e-5)


@pytest.mark.parametrize(
    ("name", "most"),
    [
        *[(name, 3) for name in ALL if name.startswith("lora_ga")],
        *[("gora", 8), ("lora_one", 6), ("pissa", 6), ("olora", 6)],
    ],
)
def test_rank_that_does_not_fit_is_an_error_with_the_largest_that_does(name, most):
    w, g = layer(11, 6, 8, np.float32)
    method, _ = METHODS[name]
    a, *_ = start(method, w, g, most)
    assert np.isfinite(a).all()
    with pytest.raises(ValueError, match=rf"6 outputs and 8 inputs.*up to {most}, not"):
        method(w, g, most + 1, 2.0, KEY)


def test_lora_itself_takes_any_rank():
    a, b, _ = start(initializers.lora(), np.zeros((2, 8)), None, 16)
    assert (a.shape, b.shape) == ((16, 8), (2, 16))


MATRIX = np.ones((6, 8), np.float32)


@pytest.mark.parametrize(
    ("weight", "gradient", "rank", "match"),
    [
        (MATRIX, None, 2, "gradient, which is missing"),
        (MATRIX, jax.ShapeDtypeStruct((6, 8), "float32"), 2, "only a shape"),
        (None, MATRIX.astype(np.int8), 2, "int8.*dequantise"),
        (None, 1j * MATRIX, 2, "complex64.*real"),
        (MATRIX, MATRIX.T, 2, r"\(6, 8\) and \(8, 6\)"),
        (None, np.ones((2, 6, 8)), 2, r"\(2, 6, 8\).*as matrices"),
        (None, np.ones((0, 8)), 2, r"\(0, 8\)"),
        (None, None, 2, "got no array"),
        (None, MATRIX, 0, "rank 0"),
    ],
)
def test_what_cannot_be_read_is_an_error(weight, gradient, rank, match):
    with pytest.raises(ValueError, match=match):
        initializers.lora_one()(weight, gradient, rank, 2.0, KEY)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: initializers.lora_ga("ArB"), "direction='ArB'.*ArB2r.*A2rBr.*ArBr"),
        (lambda: initializers.lora_ga(scaling="unit"), "scaling='unit'.*stable.*gd"),
        (lambda: initializers.lora_ga(gamma=0), "gamma=0"),
        (lambda: initializers.gora(-1.0), "gamma=-1.0"),
        (lambda: initializers.lora_one(float("nan")), "gamma=nan"),
    ],
)
def test_option_that_does_not_exist_is_an_error(make, match):
    with pytest.raises(ValueError, match=match):
        make()
