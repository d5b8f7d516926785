"""`step_metrics` against the definitions of its numbers, on dense float64 matrices."""

import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from lorapro_jax import lorapro, lorapro_adamw
from lorapro_jax.diagnostics import step_metrics
from tests.support import meshes, oracle

pytestmark = pytest.mark.usefixtures("quick_compiles")

M, N, R = 12, 15, 3
CONDITION = 10.0
# Roundings of float32, amplified by the inverse of a Gram matrix.
RTOL = 8 * CONDITION**2 * float(jnp.finfo(jnp.float32).eps)
# Each from the paper's A (r×n), B (m×r) and W (m×n), batched: the leaves of its tree,
# and what it takes to find W.
LAYOUTS = {
    "flax": (lambda a, b, w: (a.mT, b.mT, w.mT), {}),
    "torch": (lambda a, b, w: (a, b, w), {}),
    "heads": (
        lambda a, b, w: (a.mT, b.mT.reshape(R, 4, 3), w.mT.reshape(N, 4, 3)), {},
    ),
    "convolution": (
        lambda a, b, w: (
            a.mT.reshape(1, 3, 5, R), b.mT.reshape(1, 1, R, M), w.mT.reshape(1, 3, 5, M)
        ),
        {},
    ),
    "torch's convolution": (
        lambda a, b, w: (
            a.reshape(R, 5, 3, 1), b.reshape(M, R, 1, 1), w.reshape(M, 5, 3, 1)
        ),
        {},
    ),
    "layers": (lambda a, b, w: (a.mT, b.mT, w.mT), {}),
    "layers on axis 1": (
        lambda a, b, w: tuple(jnp.moveaxis(x.mT, 0, 1) for x in (a, b, w)),
        {"stack_axis": 1},
    ),
}  # fmt: skip
STACKS = {"layers": 3, "layers on axis 1": 3}
TORCH = ("lora_A/weight", "lora_B/weight", "weight")
NAMES = {"torch": TORCH, "torch's convolution": TORCH}


def problem(seed, count=1, b_scale=1.0):
    """Layers (A, B, G, dA, dB, W0) as lists of arrays in float64."""
    layers = []
    for i in range(count):
        a, b, g = oracle.factors(
            seed + i, M, N, R, cond=CONDITION, b_scale=b_scale, dtype=np.float32
        )
        rng = np.random.default_rng(seed + 100 + i)
        da, db = (0.05 * rng.standard_normal(x.shape) for x in (a, b))
        layers.append((a, b, g, da, db, rng.standard_normal((M, N))))
    return layers


def expected(layers, scales, damping=0.1, before=None):
    """The numbers from their definitions, of all these layers together."""
    sums = dict.fromkeys(
        ["E", "L", "EL", "damped", "W", "old", "new", "W0", "A", "B"], 0
    )
    ranks = []
    for i, ((a, b, g, da, db, w0), s) in enumerate(zip(layers, scales, strict=True)):
        grads = oracle.lora_gradients(a, b, g, s)
        e = oracle.projection(a, b, g)
        plain = oracle.equivalent(a, b, *grads, s)
        if before is not None:
            damping = oracle.damping_by_motion(a, b, before[i], 1.0)
        kept = oracle.equivalent(a, b, *oracle.adjust(a, b, *grads, s, damping), s)
        change = s * ((b + db) @ (a + da) - b @ a)
        square = lambda x: np.sum(x**2)
        values = [
            square(e), square(plain), np.sum(e * plain), np.sum(kept * e),
            square(change), square(s * b @ a), square(s * (b + db) @ (a + da)),
            square(w0), square(a), square(b),
        ]  # fmt: skip
        sums = {key: x + y for (key, x), y in zip(sums.items(), values, strict=True)}
        sigma = np.linalg.svd(b @ a, compute_uv=False)
        ranks.append(np.sum(sigma**2) ** 2 / np.sum(sigma**4) if sigma.any() else 0)
    return {
        "closest_norm": np.sqrt(sums["E"]),
        "lora_norm": np.sqrt(sums["L"]),
        "cosine": sums["EL"] / np.sqrt(sums["E"] * sums["L"]),
        "damped_share": 1 - sums["damped"] / sums["E"],
        "update_norm": np.sqrt(sums["W"]),
        "update_to_adapter": np.sqrt(sums["W"] / max(sums["old"], sums["new"])),
        "balance": sums["B"] / (sums["A"] + sums["B"]),
        "effective_rank": np.mean(ranks),
        "update_to_base": np.sqrt(sums["W"] / sums["W0"]),
    }


@functools.cache
def program(**options):
    return jax.jit(functools.partial(step_metrics, **options))


def see(*trees, base=None, before=None, **options):
    """All numbers, by one program for the same shapes and options."""
    given = {"base": base, "before": before}
    given = {name: x for name, x in given.items() if x is not None}
    return program(**options)(*trees, **given)


def trees(layout, layers, scales):
    """Parameters with W0, gradients and updates of one module `x`, in float32."""
    lay_out, options = LAYOUTS[layout]
    stacked = [np.stack(x) for x in zip(*layers, strict=True)]
    s = np.array(scales)[:, None, None]
    if layout not in STACKS:
        stacked, s = [x[0] for x in stacked], s[0]
    a, b, g, da, db, w0 = (jnp.asarray(x, jnp.float32) for x in stacked)
    names = NAMES.get(layout, ("lora_a", "lora_b", "kernel"))

    def tree(*arrays):
        named = zip(names, lay_out(*arrays), strict=True)
        return {f"x/{name}": x for name, x in named}

    full = {"x/other": jnp.ones(3)}
    params, updates = full | tree(a, b, w0), full | tree(da, db, w0)
    grads = full | tree(s * (b.mT @ g), s * (g @ a.mT), w0)
    scale = np.array(scales) if layout in STACKS else scales[0]
    return params, grads, updates, {"scale": scale, **options}


def check(received, wanted, rtol=RTOL):
    """All numbers of one entry; shares and cosines up to roundings of 1."""
    assert received.keys() <= wanted.keys()
    for name, x in received.items():
        assert x.shape == ()
        np.testing.assert_allclose(x, wanted[name], rtol=rtol, atol=rtol, err_msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_numbers_are_those_of_dense_matrices(layout):
    count = STACKS.get(layout, 1)
    layers, scales = problem(0, count), [2.0, 0.5, -1.0][:count]
    params, grads, updates, options = trees(layout, layers, scales)

    @jax.jit
    def both(*trees):
        of = lambda **more: step_metrics(*trees, base=trees[0], **options, **more)
        return of(), of(by_layer=True)

    received, by_layer = both(params, grads, updates)

    path = next(x for x in params if x.split("/")[1].lower() == "lora_a")
    assert received.keys() == {path, "total"}
    check(received[path], expected(layers, scales))
    check(received["total"], expected(layers, scales))
    # Negative control: each number is another one of another problem.
    other = expected(problem(7, count, b_scale=0.5), [0.9 * x for x in scales])
    for name, x in received["total"].items():
        assert abs(x / other[name] - 1) > 10 * RTOL, name
    if count > 1:
        assert by_layer.keys() == {*(f"{path}[{i}]" for i in range(count)), "total"}
        for i in range(count):
            check(by_layer[f"{path}[{i}]"], expected(layers[i : i + 1], [scales[i]]))


def test_total_is_that_of_all_layers_of_all_pairs():
    layers, scales = problem(3, 3), [2.0, 2.0, 2.0]
    parts = [trees("flax", [layer], [2.0])[:3] for layer in layers]
    params, grads, updates = (
        {f"{i}/{k}": x for i, part in enumerate(column) for k, x in part.items()}
        for column in zip(*parts, strict=True)
    )
    received = see(params, grads, updates, base=params, scale=2.0)
    assert len(received) == 4
    check(received["total"], expected(layers, scales))
    check(received["1/x/lora_a"], expected(layers[1:2], [2.0]))


def test_with_the_step_before_the_share_is_that_of_damping_by_motion():
    layers = problem(0)
    ((a, b, *_),) = layers
    rng = np.random.default_rng(5)
    old = a - 0.3 * rng.standard_normal(a.shape), b - 0.3 * rng.standard_normal(b.shape)
    params, grads, updates, options = trees("flax", layers, [2.0])
    before = {"x/lora_a": old[0].T, "x/lora_b": old[1].T}
    received = see(params, grads, updates, before=before, **options)
    wanted = expected(layers, [2.0], before=[old])
    check(received["total"], wanted)
    assert abs(wanted["damped_share"] / expected(layers, [2.0])["damped_share"] - 1) > 1


def test_the_share_is_that_of_the_step_of_lorapro():
    layers = problem(1)
    params, grads, updates, options = trees("flax", layers, [2.0])
    inner = lambda x, y: sum(jnp.vdot(x[k], y[k]) for k in ("x/lora_a", "x/lora_b"))
    rates = []
    for damping in (0.0, 0.5):
        tx = lorapro(scale=2.0, damping=damping)
        step, _ = jax.jit(tx.update)(grads, tx.init(params), params)
        rates.append(inner(step, grads))
    received = see(params, grads, updates, damping=0.5, **options)["total"]
    np.testing.assert_allclose(received["closest_norm"] ** 2, rates[0], rtol=RTOL)
    np.testing.assert_allclose(
        received["damped_share"], 1 - rates[1] / rates[0], atol=RTOL
    )
    undamped = see(params, grads, updates, damping=0.0, **options)["total"]
    assert undamped["damped_share"] < RTOL < received["damped_share"]


def test_at_b_of_zero_all_numbers_are_finite_and_say_so():
    ((a, b, *rest),) = problem(0)
    layers = [(a, 0 * b, *rest)]
    params, grads, updates, options = trees("flax", layers, [2.0])
    received = see(params, grads, updates, **options)["total"]
    check(received, expected(layers, [2.0]))
    np.testing.assert_allclose(received["update_to_adapter"], 1, rtol=1e-6)
    assert received["balance"] == received["effective_rank"] == 0
    nothing = jax.tree.map(jnp.zeros_like, grads)
    still = see(nothing, nothing, nothing, base=nothing, **options)["total"]
    assert all(x == 0 for x in still.values())


def test_one_factor_that_trains_has_the_step_of_lora_fa():
    ((a, b, g, _, db, _),) = layers = problem(0)
    params, grads, updates, options = trees("flax", layers, [2.0])
    for tree in (grads, updates):
        del tree["x/lora_a"]  # as where only B is differentiated
    received = see(params, grads, updates, wrt="b", **options)["total"]
    closest = g @ np.linalg.pinv(a) @ a
    plain = 4.0 * g @ a.T @ a
    np.testing.assert_allclose(
        received["closest_norm"], np.linalg.norm(closest), rtol=RTOL
    )
    np.testing.assert_allclose(received["lora_norm"], np.linalg.norm(plain), rtol=RTOL)
    np.testing.assert_allclose(
        received["update_norm"], np.linalg.norm(2.0 * db @ a), rtol=RTOL
    )
    e = oracle.relative_damping(a, b, 0.1)
    kept = g @ a.T @ np.linalg.inv(a @ a.T + e * np.eye(R)) @ a
    share = 1 - np.vdot(kept, closest) / np.sum(closest**2)
    np.testing.assert_allclose(received["damped_share"], share, atol=RTOL)


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_squares_of_tiny_and_huge_factors_neither_under_nor_overflow(size):
    """Of W = W0 + s B A in other units: those of B A are squares of the factors'."""
    params, grads, updates, options = trees("flax", problem(0), [2.0])
    received = see(params, grads, updates, **options)["total"]
    scaled = [jax.tree.map(lambda x: size * x, x) for x in (params, grads, updates)]
    other = see(*scaled, **options)["total"]
    for name, x in received.items():
        unit = size**2 if name in ("lora_norm", "update_norm") else 1
        np.testing.assert_allclose(other[name] / unit, x, rtol=RTOL, err_msg=name)


def test_what_is_not_finite_stays_in_its_layer():
    params, grads, updates, options = trees("layers", problem(0, 3), [2.0, 0.5, -1.0])
    of = jax.jit(lambda *trees: step_metrics(*trees, by_layer=True, **options))
    sound = of(params, grads, updates)
    broken = of(
        params, {**grads, "x/lora_a": grads["x/lora_a"].at[1].set(jnp.nan)}, updates
    )
    for i in (0, 2):
        assert broken[f"x/lora_a[{i}]"] == sound[f"x/lora_a[{i}]"]
    assert jnp.isnan(broken["x/lora_a[1]"]["closest_norm"])
    assert jnp.isnan(broken["total"]["closest_norm"])


def test_no_array_has_the_size_of_a_weight():
    shapes = {"lora_a": (256, R), "lora_b": (R, 256)}
    tree = {k: jax.ShapeDtypeStruct(x, jnp.float32) for k, x in shapes.items()}

    def largest(function):
        text = jax.jit(function).lower(tree, tree, tree).as_text()
        shapes = set(re.findall(r"tensor<((?:\d+x)+)[a-z]", text))
        return max(math.prod(map(int, x.split("x")[:-1])) for x in shapes)

    assert largest(step_metrics) <= 2 * 256 * R
    # Negative control: the product is seen.
    assert largest(lambda x, *_: x["lora_a"] @ x["lora_b"]) == 256**2


def test_an_update_that_bfloat16_rounds_away_counts_as_none():
    params, grads, updates, options = trees("flax", problem(0), [2.0])
    narrow = {k: x.astype(jnp.bfloat16) for k, x in params.items()}
    small = {k: 1e-3 * narrow[k] for k in updates}  # less than half of 2⁻⁸
    received = see(narrow, grads, small, **options)["total"]
    assert received["update_norm"] == 0
    wide = {k: x.astype(jnp.float32) for k, x in narrow.items()}
    assert see(wide, grads, small, **options)["total"]["update_norm"] > 0


def test_base_may_be_a_model_beside_its_factors_or_an_explicit_path():
    model = nnx.LoRALinear(16, 16, lora_rank=2, rngs=nnx.Rngs(0))  # square: no matter
    factors = nnx.state(model, nnx.LoRAParam)
    rest = nnx.state(model, nnx.Not(nnx.LoRAParam))
    norm = float(jnp.linalg.norm(model.kernel[...]))
    for base in (nnx.state(model), rest):
        received = see(factors, factors, factors, base=base)["total"]
        want = received["update_norm"] / norm
        np.testing.assert_allclose(received["update_to_base"], want, rtol=1e-6)
    elsewhere = {"weights": model.kernel[...].astype(jnp.bfloat16)}
    by_path = functools.partial(step_metrics, kernels={".*": "weights"})
    received = jax.jit(by_path)(factors, factors, factors, base=elsewhere)["total"]
    np.testing.assert_allclose(received["update_to_base"], want, rtol=2**-8)


@pytest.mark.parametrize(
    ("layout", "kind"), [("features", AxisType.Auto), ("layers", AxisType.Explicit)]
)
def test_sharded_trees_have_the_numbers_of_one_device(layout, kind):
    trees = [meshes.random_tree(seed) for seed in range(3)]
    shapes = {"kernel": (16, 24), "layers/kernel": (6, 64, 24), "heads/w": (8, 16, 32)}
    base = {
        k: jnp.arange(math.prod(x), dtype=float).reshape(x) for k, x in shapes.items()
    }
    specs = P("x", "y"), P(None, "x", "y"), P("y", "x")
    of = jax.jit(lambda base, *trees: step_metrics(*trees, base=base))
    wanted = of(base, *trees)
    mesh = jax.make_mesh((2, 2), ("x", "y"), (kind, kind))
    base = meshes.put(base, mesh, dict(zip(base, specs, strict=True)))
    on_mesh = [meshes.put(x, mesh, meshes.LAYOUTS[layout]) for x in trees]
    with jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else mesh:
        received = of(base, *on_mesh)
    chex.assert_trees_all_close(received, wanted, rtol=RTOL, atol=RTOL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"updates": lambda x: {"lora_a": x["lora_a"]}},
            r"`lora_b` has shape \(2, 4\) in `params`, and `updates` has no such leaf",
        ),
        (
            {"grads": lambda x: {**x, "lora_b": jnp.ones((2, 5))}},
            r"`lora_b` has shape \(2, 4\) in `params`, and `grads` has \(2, 5\)",
        ),
        ({"params": lambda x: {"x": x["lora_a"]}}, "No LoRA pair"),
        ({"base": lambda x: x}, "No base weight"),
        (
            {"base": lambda x: {"kernel": jnp.ones((8, 4), jnp.int8)}},
            "`kernel`, the base weight of `lora_a`, is quantised.*leave `base` out",
        ),
    ],
)
def test_trees_that_do_not_belong_together_are_errors(change, message):
    tree = {"lora_a": jnp.ones((8, 2)), "lora_b": jnp.ones((2, 4))}
    given = {"params": tree, "grads": tree, "updates": tree}
    given |= {name: function(tree) for name, function in change.items()}
    with pytest.raises(ValueError, match=message):
        step_metrics(**given)


def test_it_follows_a_run_of_lorapro_adamw():
    """Updates may be differences of parameters, and the state knows the step before."""
    params, grads, _, options = trees("flax", problem(0), [2.0])
    tx = lorapro_adamw(1e-2, **options)
    state, old = tx.init(params), params
    update = jax.jit(tx.update)
    for _ in range(2):
        updates, state = update(grads, state, params)
        before, old, params = old, params, optax.apply_updates(params, updates)
    differences = jax.tree.map(jnp.subtract, params, old)
    of = lambda step: see(old, grads, step, before=before, **options)["total"]
    received, same = of(updates), of(differences)
    np.testing.assert_allclose(received["update_norm"], same["update_norm"], rtol=1e-4)
    assert 0 < received["damped_share"] < 1
