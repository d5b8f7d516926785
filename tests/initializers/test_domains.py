"""Options and arrays at the edges of what the formulas take.

What a method promises then holds, against float64 NumPy, or an error names the path
and says why it does not. Starts that an ordinary option cannot spoil are listed: an
error there would be a failure.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorapro_jax import (
    LoRAPair,
    equivalent_gradient,
    estimate_gradients,
    find_pairs,
    initialize_adapters,
)
from lorapro_jax.diagnostics import check_gradients
from lorapro_jax.initializers import (
    Initializer,
    gora,
    lora_ga,
    lora_one,
    pissa,
)
from tests.initializers.test_starts import METHODS, promised

pytestmark = pytest.mark.usefixtures("quick_compiles")

KEY = jax.random.key(0)
M, N, RANK = 6, 9, 2
SCALES = [1.0, -1.0, 100.0, 1e-30, -1e-30, 1e30, -1e30]
SIZES = [0.0, 1e-20, 1.0, 1e20]
# The largest relative error of sums of products whose terms have this rounding.
ROUNDING = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.05}
DTYPES = ["float32", "bfloat16", "float16"]


def layer_of(rank=RANK, size=1.0, base="float32", factor="float32", m=M, n=N):
    """A layer as Flax has it, and its gradient."""
    rng = np.random.default_rng(0)
    w, g = rng.standard_normal((2, n, m)) * size
    layer = {"kernel": jnp.asarray(w, base), "lora_a": jnp.ones((n, rank), factor)}
    return layer | {"lora_b": jnp.zeros((rank, m), factor)}, {"kernel": jnp.asarray(g)}


def paper(*arrays):
    """In float64 and in the paper's layout."""
    return [np.asarray(x, np.float64).T for x in arrays]


def assert_promised(name, layer, new, gradient, scale, dtype):
    """s B A is what the method says, and W0 made up for it if it had to."""
    w, g, kept, a, b = paper(
        layer["kernel"], gradient["kernel"], new["kernel"], new["lora_a"], new["lora_b"]
    )
    product, eps = scale * b @ a, ROUNDING[dtype]
    if METHODS[name].changes_weight:
        # To the rounding of W0 − s B A, once.
        limits = jnp.finfo(new["kernel"].dtype)
        size = max(abs(w).max(), abs(product).max())
        due = 8 * float(limits.eps) * size + float(limits.smallest_subnormal)
        assert abs(kept + product - w).max() <= due
        if w.any():  # and nothing of W0 is lost in it
            largest = max(abs(w).max(), abs(b @ a).max())
            assert abs(kept + product - w).max() <= largest / 16
    else:
        np.testing.assert_array_equal(kept, w)
    read = {"pissa": w, "olora": w, "gora": g, "lora_one": g}
    if name in read and read[name].any():
        want = promised(name, w, g, a, scale)
        assert abs(product - want).max() <= eps * abs(want).max()
    if name == "lora":
        np.testing.assert_array_equal(b, 0)
    # Whatever the method: something can train, in every direction.
    assert np.all(np.linalg.norm(a, axis=1) + np.linalg.norm(b, axis=0) > 0)


def sound(name, scale, size, base, factor):
    """Starts that every dtype holds."""
    plain = abs(scale) == 1 and size in (0.0, 1.0)
    return name == "lora" or plain


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("base", "factor"), [*zip(DTYPES, DTYPES, strict=True), ("float32", "float16")]
)
def test_starts_hold_or_say_why_not(base, factor, name, size):
    """Scales of either sign from 1e-30 to 1e30, on layers and gradients of any size."""
    if base == "float16" and size == 1e20:
        size = 1e3
    layer, gradient = layer_of(size=size, base=base, factor=factor)
    held = []
    for scale in SCALES:
        try:
            new = initialize_adapters(
                METHODS[name], layer, gradient, key=KEY, scale=scale
            )
        except ValueError as error:
            message = str(error)
            assert "`lora_a` at the scale" in message
            assert f"`lora_b` {factor}" in message
            assert "Pass a scale nearer to 1, keep these leaves in a wider" in message
            assert not sound(name, scale, size, base, factor), message
        else:
            held.append(scale)
            assert_promised(name, layer, new, gradient, scale, factor)
    # In float32, a factor of a hundred either way of any size is no reason to refuse.
    if (base, factor) == ("float32", "float32"):
        assert {1.0, -1.0, 100.0} <= set(held)


@pytest.mark.parametrize("name", METHODS)
def test_the_remedies_of_such_an_error_work(name):
    """A wider dtype, or a scale nearer to 1."""
    layer, gradient = layer_of(size=1e20, factor="float16")
    if name in (
        "lora",
        "lora_ga",
        "lora_one",
    ):  # their factors have a size of their own
        initialize_adapters(METHODS[name], layer, gradient, key=KEY)
        return
    with pytest.raises(ValueError, match="are too large for the dtype of their leaf"):
        initialize_adapters(METHODS[name], layer, gradient, key=KEY)
    wide, _ = layer_of(size=1e20)
    new = initialize_adapters(METHODS[name], wide, gradient, key=KEY)
    assert_promised(name, wide, new, gradient, 1.0, "float32")
    layer, gradient = layer_of(size=1.0, factor="float16")
    initialize_adapters(METHODS[name], layer, gradient, key=KEY, scale=1.0)


def test_the_direction_of_a_step_downhill_does_not_depend_on_the_sign_of_the_scale():
    """LoRA-One and GoRA move the layer against its gradient; PiSSA is no longer NaN."""
    layer, gradient = layer_of()
    for method in (METHODS["lora_one"], METHODS["gora"]):
        for scale in (0.5, -0.5):
            new = initialize_adapters(method, layer, gradient, key=KEY, scale=scale)
            moved = scale * new["lora_a"] @ new["lora_b"]
            assert jnp.vdot(moved, gradient["kernel"]) < 0
    new = initialize_adapters(METHODS["pissa"], layer, key=KEY, scale=-2.0)
    start = new["kernel"] - 2.0 * new["lora_a"] @ new["lora_b"]
    np.testing.assert_allclose(start, layer["kernel"], atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "scale", [0, 0.0, np.nan, np.inf, 1e-45, 1e39, np.ones(2), "1", True, 1j, None]
)
def test_a_scale_that_is_none_is_an_error_of_the_method(name, scale):
    w = jnp.ones((M, N))
    with pytest.raises(ValueError, match=f"`{name}` got the scale .*not 0"):
        METHODS[name](w, w, RANK, scale, KEY)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("scale", [0.0, np.nan, np.inf])
def test_a_traced_scale_that_is_none_spoils_its_layer_only(name, scale):
    rng = np.random.default_rng(0)
    w, g = rng.standard_normal((2, 2, M, N)).astype(np.float32)
    scales = jnp.array([scale, 2.0])
    run = jax.vmap(METHODS[name], (0, 0, None, 0, None))
    found = run(w, g, RANK, scales, KEY)
    assert np.isnan(found.a[0]).all()
    assert np.isnan(found.b[0]).all()
    assert all(np.isfinite(x[1]).all() for x in found)


def test_a_start_that_cannot_be_held_is_nan_under_jit_and_an_error_without():
    """In its own layer; the message counts from 0."""
    rng = np.random.default_rng(0)
    layer = {"kernel": rng.standard_normal((3, N, M)).astype(np.float32)}
    layer |= {"lora_a": np.ones((3, N, RANK), np.float32)}
    layer |= {"lora_b": np.zeros((3, RANK, M), np.float32)}
    scales = jnp.array([1.0, 1e30, -2.0])
    run = lambda layer: initialize_adapters(
        METHODS["olora"], layer, key=KEY, scale=lambda pair: scales
    )
    with pytest.raises(
        ValueError, match=r"`lora_a` at the scale 1e\+30 cannot be held in layer 1 "
    ):
        run(layer)
    new = jax.jit(run)(layer)
    for x in new.values():
        assert np.isnan(x[1]).all()
        assert np.isfinite(x[::2]).all()


@pytest.mark.parametrize("name", METHODS)
def test_ranks_up_to_the_largest_hold_and_beyond_name_the_path(name):
    """Rank 1, the largest, and one more; a layer with one output."""
    most = {"lora_ga": M // 2, "gora": N, "lora": N}.get(name, M)
    for rank in (1, most):
        layer, gradient = layer_of(rank)
        new = initialize_adapters(METHODS[name], layer, gradient, key=KEY, scale=3.0)
        if name != "lora_ga":
            assert_promised(name, layer, new, gradient, 3.0, "float32")
    if name != "lora":
        layer, gradient = layer_of(most + 1)
        pairs = [LoRAPair("lora_a", "lora_b", 1, 0)]
        with pytest.raises(ValueError, match=rf"`lora_a`: .*up to {most}, not at"):
            initialize_adapters(METHODS[name], layer, gradient, key=KEY, pairs=pairs)
    layer, gradient = layer_of(1, m=1)
    if name == "lora_ga":  # no rank is small enough, so that is no remedy
        with pytest.raises(
            ValueError, match=r"cannot start a layer of 1 outputs .*gora"
        ):
            initialize_adapters(METHODS[name], layer, gradient, key=KEY)
    else:
        new = initialize_adapters(METHODS[name], layer, gradient, key=KEY)
        assert_promised(name, layer, new, gradient, 1.0, "float32")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("bad", ["nan", "inf", "int32", "complex64", "bool"])
def test_arrays_that_are_no_finite_reals_name_their_path(name, bad):
    """Those that a method reads; it takes others as they are."""
    layer, gradient = layer_of()
    method = METHODS[name]
    spoil = lambda x: (
        x.at[0, 0].set(float(bad)) if bad in ("nan", "inf") else x.astype(bad)
    )
    reads_w = method.needs_weight or method.changes_weight
    if reads_w:
        with pytest.raises(ValueError, match="`kernel`"):
            initialize_adapters(
                method, layer | {"kernel": spoil(layer["kernel"])}, gradient, key=KEY
            )
    if method.needs_gradient:
        with pytest.raises(ValueError, match="gradient of `kernel`"):
            initialize_adapters(
                method, layer, {"kernel": spoil(gradient["kernel"])}, key=KEY
            )
    if not (reads_w or method.needs_gradient):
        spoiled = layer | {"kernel": spoil(layer["kernel"])}
        new = initialize_adapters(method, spoiled, key=KEY)
        assert new["kernel"] is spoiled["kernel"]
    for factor in ("lora_a", "lora_b"):
        if bad in ("int32", "complex64", "bool"):
            spoiled = layer | {factor: layer[factor].astype(bad)}
            with pytest.raises(ValueError, match=f"`{factor}` has dtype {bad}"):
                initialize_adapters(method, spoiled, gradient, key=KEY)


@pytest.mark.parametrize(
    "make", [lora_ga, gora, lora_one], ids=["lora_ga", "gora", "lora_one"]
)
@pytest.mark.parametrize("gamma", [0, -1.0, np.nan, np.inf, 1e-45, 1e39, "1", True])
def test_a_gamma_that_float32_does_not_hold_is_an_error(make, gamma):
    with pytest.raises(ValueError, match="`gamma="):
        make(gamma=gamma)


@pytest.mark.parametrize("gamma", [1e-30, 1e30])
def test_any_other_gamma_does_what_it_says(gamma):
    w, g = np.random.default_rng(0).standard_normal((2, M, N)).astype(np.float32)
    found = lora_one(gamma)(w, g, RANK, 1.0, KEY)
    a, b = (np.asarray(x, np.float64) for x in (found.a, found.b))
    assert np.linalg.norm(b @ a, 2) == pytest.approx(1 / gamma, rel=1e-5)


def test_methods_of_ones_own_may_leave_b_at_zero():
    """Whatever they read: a start of A alone is none that was lost."""
    factors = lambda w, g, rank, scale, key: (g[:rank], jnp.zeros((len(g), rank)))
    method = Initializer("eva", factors, needs_gradient=True)
    layer, gradient = layer_of()
    new = initialize_adapters(method, layer, gradient, key=KEY)
    np.testing.assert_array_equal(new["lora_a"], gradient["kernel"].T[:RANK].T)


def test_spectra_at_the_ends_of_float32_are_split_in_two_roots():
    """σ/s leaves the range, √σ/√|s| does not."""
    w = 1e-25 * np.random.default_rng(0).standard_normal((M, N)).astype(np.float32)
    for scale in (1e15, -1e15):
        found = pissa()(w, None, RANK, scale, KEY)
        a, b = (np.asarray(x, np.float64) for x in (found.a, found.b))
        w64 = np.asarray(w, np.float64)
        u, s, vt = np.linalg.svd(w64)
        want = u[:, :RANK] * s[:RANK] @ vt[:RANK]
        assert abs(scale * b @ a - want).max() < 1e-5 * abs(want).max()


# The gradients that starts are made of.


def estimate(x, dtype, loss=None, **options):
    params = {"up": {"kernel": jnp.ones((3, 2), dtype)}}
    loss = loss or (lambda p, x: jnp.mean(x @ p["up"]["kernel"]))
    options = {"kernels": "kernel$", "progress": False} | options
    return estimate_gradients(loss, params, [jnp.full((1, 3), x, dtype)], **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x", [1.0, -1.0, 1e-30, 1e-6, 6e4, 1e30, 0.0, np.nan])
def test_estimates_hold_or_say_why_not(x, dtype):
    """x/2 in every entry, to one rounding of the kernel's dtype."""
    if dtype == "float16" and abs(x) > 7e4:
        return
    try:
        (found,) = estimate(x, dtype).values()
    except ValueError as error:
        assert not 1e-4 < abs(x) < 1e4
        assert "up/kernel" in str(error) or "loss of batch 0" in str(error)
    else:
        assert found.dtype == np.float32
        assert abs(found - x / 2).max() <= float(jnp.finfo(dtype).eps) * abs(x)


@pytest.mark.parametrize("kind", [int, complex, None])
def test_a_loss_that_is_no_real_number_is_an_error(kind):
    loss = lambda p, x: kind and jnp.sum(p["up"]["kernel"]).astype(kind)
    with pytest.raises(ValueError, match=r"`loss_fn` returned .* one real number"):
        estimate(1.0, "float32", loss)


def test_what_has_no_gradient_is_an_error():
    params = {
        "up": {"kernel": jnp.ones((3, 0))},
        "down": {"kernel": jnp.ones((3, 2), int)},
    }
    for path in ("up/kernel", "down/kernel"):
        with pytest.raises(ValueError, match=f"`{path}` .*cannot be differentiated"):
            estimate_gradients(
                lambda p, x: jnp.float32(1), params, [0], kernels=[path], progress=False
            )
    with pytest.raises(ValueError, match="`batches` is a str"):
        estimate_gradients(
            lambda p, x: jnp.float32(1), params, "batch", kernels="kernel"
        )
    # Of another integer type, `at_once` is as good.
    assert estimate(1.0, "float32", at_once=np.int64(1)).keys() == {"up/kernel"}


# What a step does.


def steps(dtype="float32", batch=(), rank=RANK):
    rng = np.random.default_rng(0)
    shapes = [(*batch, N, rank), (*batch, rank, M)] * 2
    return [jnp.asarray(4 * rng.standard_normal(x), dtype) for x in shapes]


@pytest.mark.parametrize("dtype", [*DTYPES, "int32"])
@pytest.mark.parametrize("scale", [*SCALES, 0.0, np.float16(2), jnp.bfloat16(2), 3])
@pytest.mark.parametrize("rank", [1, M])
def test_equivalent_gradients_of_any_scale_and_dtype(scale, dtype, rank):
    arrays = steps(dtype, rank=rank)
    a, b, da, db = (np.asarray(x, np.float64) for x in arrays)
    want = float(scale) * (da @ b + a @ db)
    pair = LoRAPair("", "", 1, 0)
    found = equivalent_gradient(*arrays, scale, pair=pair)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, want, atol=1e-5 * abs(want).max(), rtol=0)


def test_equivalent_gradients_of_layers_with_scales_of_their_own():
    arrays, scales = steps(batch=(3,)), np.array([2.0, -0.5, 1e-30])
    (pair,) = find_pairs({"lora_a": arrays[0], "lora_b": arrays[1]})
    a, b, da, db = (np.asarray(x, np.float64) for x in arrays)
    want = scales[:, None, None] * (da @ b + a @ db)
    for scale in (scales, jnp.asarray(scales)):
        found = equivalent_gradient(*arrays, scale, pair=pair)
        np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4 * abs(want).min())
    run = jax.jit(lambda s: equivalent_gradient(*arrays, s, pair=pair))
    np.testing.assert_allclose(run(jnp.asarray(scales)), found)
    with pytest.raises(
        ValueError, match=r"shape \(2,\). Pass .* array of shape \(3,\)"
    ):
        equivalent_gradient(*arrays, np.ones(2), pair=pair)


@pytest.mark.parametrize("scale", ["1", True, 1j, None, np.ones(2)])
def test_a_scale_that_is_no_number_is_an_error_of_the_diagnostic(scale):
    with pytest.raises(ValueError, match="Pass one real number"):
        equivalent_gradient(*steps(), scale)


def test_a_gradient_that_is_not_finite_shows_where_it_acts():
    a, b, da, db = steps()
    found = equivalent_gradient(a, b, da.at[0, 0].set(jnp.nan), db)
    assert jnp.isnan(found[0]).all()
    assert jnp.isfinite(found[1:]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_the_check_of_gradients_knows_no_size(size, dtype):
    """Of one G: rounding. Of two: far from it. Of none: 0."""
    if dtype == "float16" and size not in (0.0, 1.0):
        return
    rng = np.random.default_rng(0)
    a, b, g = (rng.standard_normal(x) for x in ((N, RANK), (RANK, M), (N, M)))
    cast = lambda **x: {k: jnp.asarray(v, dtype) for k, v in x.items()}
    params = cast(lora_a=a, lora_b=b)
    grads = cast(lora_a=size * (g @ b.T), lora_b=size * (a.T @ g))
    (found,) = check_gradients(grads, params).values()
    assert found < {"float32": 1e-5, "bfloat16": 0.02, "float16": 0.01}[dtype]
    other = grads | cast(lora_b=size * (a.T @ g[::-1]))
    (found,) = check_gradients(other, params).values()
    assert found > 0.1 or not size
