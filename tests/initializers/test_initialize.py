"""Adapters that start as a method says, seen through the model's own forward pass."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lorapro_jax import find_pairs, initialize_adapters, initialize_model
from lorapro_jax.initializers import (
    Initializer,
    gora,
    lora,
    lora_ga,
    lora_one,
    olora,
    pissa,
)
from tests.support.layers import (
    ALPHA,
    MODELS,
    QWIX,
    RANK,
    TOLERANCE,
    WIDTH,
    gradients_of,
    normal,
    of_nnx,
    qwix_nnx,
    replaced,
)
from tests.support.layouts import distance, leaves_by_path

# What qwix still calls is deprecated in Flax.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:qwix.*"),
    pytest.mark.usefixtures("quick_compiles"),
]

KEY = jax.random.key(7)
BFLOAT16 = 2.0**-8  # rounding to its eight places moves a number by up to this much


def asked():
    """A method that makes s B A the given "gradient", up to its rank."""

    def factors(w, g, rank, scale, key):
        u, s, vt = jnp.linalg.svd(g, full_matrices=False)
        return vt[:rank], u[:, :rank] * s[:rank] / scale

    return Initializer("asked", factors, needs_gradient=True)


def of_low_rank(kernels, leaves, seed=3):
    """A kernel-shaped array of rank `RANK` for each kernel, made from its letters."""
    result = {}
    for index, (path, (letters, inputs)) in enumerate(kernels.items()):
        sizes = dict(zip(letters, leaves[path].shape, strict=True)) | {"r": RANK}
        stack = "".join(x for x in letters if x.isupper())
        outputs = "".join(x for x in letters if x not in stack + inputs)
        sides = f"{stack}{inputs}r", f"{stack}r{outputs}"
        a, b = (
            normal(*(sizes[x] for x in side), seed=seed + 2 * index + place)
            for place, side in enumerate(sides)
        )
        result[path] = 0.1 * jnp.einsum(f"{sides[0]},{sides[1]}->{letters}", a, b)
    return result


def without_adapters(params, options):
    leaves = leaves_by_path(params)
    pairs = find_pairs(params, **options)
    return replaced(params, {pair.b: 0 * leaves[pair.b] for pair in pairs})


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    made = MODELS[request.param]()
    return made._replace(
        params=without_adapters(made.params, made.options),
        apply=jax.jit(made.apply),
    )


@pytest.fixture(scope="module")
def small():
    """One layer in every position, with adapters that are still off."""
    made = MODELS["nnx"]()
    return without_adapters(made.params, made.options)


def test_each_layer_gets_the_adapter_that_was_asked_for(model):
    """The model with s B A is the model whose kernels have the asked arrays added."""
    leaves = leaves_by_path(model.params)
    change = of_low_rank(model.kernels, leaves)
    full = lambda change: replaced(
        model.params, {path: leaves[path] + x for path, x in change.items()}
    )
    want = model.apply(full(change))

    new = initialize_adapters(asked(), model.params, change, key=KEY, **model.options)

    assert distance(model.apply(new), want) < TOLERANCE
    assert len(find_pairs(model.params)) == len(change)
    # Negative control: the output knows of every one of the changes, and which way
    # round a square kernel has its axes.
    for path, (letters, _) in model.kernels.items():
        less = full(change | {path: 0 * change[path]})
        assert distance(model.apply(less), want) > 20 * TOLERANCE, path
        *_, x, y = (i for i, letter in enumerate(letters) if letter.islower())
        if change[path].shape[x] == change[path].shape[y]:
            turned = full(change | {path: change[path].swapaxes(x, y)})
            assert distance(model.apply(turned), want) > 20 * TOLERANCE, path


@pytest.mark.parametrize("method", [lora_ga(), pissa(), olora()], ids=lambda x: x.name)
def test_methods_that_change_the_weights_leave_the_model_as_it_was(model, method):
    """B is not 0, the kernels moved, the output did not."""
    gradients = gradients_of(model.params, model.kernels)
    before = model.apply(model.params)

    new = initialize_adapters(method, model.params, gradients, key=KEY, **model.options)

    assert distance(model.apply(new), before) < TOLERANCE
    old, leaves = leaves_by_path(model.params), leaves_by_path(new)
    for path in model.kernels:
        assert distance(leaves[path], old[path]) > 20 * TOLERANCE, path
        # Negative control: without the change of this kernel the model is another.
        kept = replaced(new, {path: old[path]})
        assert distance(model.apply(kept), before) > 20 * TOLERANCE, path


@pytest.mark.parametrize("method", [lora_one(), pissa()], ids=lambda x: x.name)
def test_nothing_else_in_the_tree_changes(model, method):
    """Structure and dtypes stay; all other leaves are the same objects."""
    gradients = gradients_of(model.params, model.kernels)
    new = initialize_adapters(method, model.params, gradients, key=KEY, **model.options)

    assert jax.tree.structure(new) == jax.tree.structure(model.params)
    pairs = find_pairs(model.params)
    due = {path for pair in pairs for path in pair[:2]}
    due |= set(model.kernels) if method.changes_weight else set()
    old, leaves = leaves_by_path(model.params), leaves_by_path(new)
    changed = {path for path in old if leaves[path] is not old[path]}
    assert {path.replace(".", "/") for path in changed} == due
    for path in changed:
        assert (leaves[path].shape, leaves[path].dtype) == (
            old[path].shape,
            old[path].dtype,
        )


def test_layers_of_a_stack_start_as_they_would_alone():
    """A stack of two against two layers, with a method that draws nothing."""
    stack = MODELS["nnx, stacked on axis 1"]()
    gradients = gradients_of(stack.params, stack.kernels)
    new = leaves_by_path(
        initialize_adapters(lora_ga(), stack.params, gradients, key=KEY)
    )
    old = leaves_by_path(stack.params)
    for layer in range(2):
        one = {path: x[:, layer] for path, x in old.items() if x.ndim == 3}
        slope = {path: x[:, layer] for path, x in gradients.items()}
        alone = initialize_adapters(lora_ga(), one, slope, key=KEY)
        for path, x in leaves_by_path(alone).items():
            assert distance(new[path][:, layer], x) < TOLERANCE
    # Negative control: the two layers are not alike.
    assert distance(new["layers/kernel"][:, 0], new["layers/kernel"][:, 1]) > 0.1


def test_initialising_under_jit_gives_the_same():
    made = MODELS["qwix, nnx"]()
    gradients = gradients_of(made.params, made.kernels)
    run = lambda params, gradients, key: initialize_adapters(
        lora_ga(), params, gradients, key=key, **made.options
    )
    plain, jitted = (
        run(made.params, gradients, KEY),
        jax.jit(run)(made.params, gradients, KEY),
    )
    for x, y in zip(jax.tree.leaves(plain), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_allclose(x, y, atol=TOLERANCE)
    shapes = jax.eval_shape(run, made.params, gradients, KEY)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, plain)


def test_a_pair_starts_alike_whatever_else_is_in_the_tree(small):
    """Random numbers come from the path; other paths and layers have others."""
    alone = initialize_adapters(lora(), {"q": small["q"]}, key=KEY)
    both = initialize_adapters(lora(), small, key=KEY)
    a = lambda tree, layer: leaves_by_path(tree)[layer]
    np.testing.assert_array_equal(a(alone, "q/lora/lora_a"), a(both, "q/lora/lora_a"))
    assert distance(a(both, "q/lora/lora_a"), a(both, "mlp/lora_a")) > 0.1
    again = initialize_adapters(lora(), small, key=jax.random.key(8))
    assert distance(a(again, "q/lora/lora_a"), a(both, "q/lora/lora_a")) > 0.1
    stack = initialize_adapters(
        lora(), MODELS["nnx, stacked on axis 0"]().params, key=KEY
    )
    first, second = leaves_by_path(stack)["layers/lora/lora_a"]
    assert distance(first, second) > 0.1


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("traced", [False, True])
def test_shardings_stay_and_values_are_those_of_one_device(kind, traced):
    """Kernels sharded on both features, factors on theirs."""
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind,) * 2)
    specs = {"kernel": ("x", "y"), "lora_a": ("x", None), "lora_b": (None, "y")}
    shapes = {"kernel": (16, 12), "lora_a": (16, RANK), "lora_b": (RANK, 12)}
    host = {name: np.asarray(normal(*shape)) for name, shape in shapes.items()}
    host["lora_b"] = np.zeros_like(host["lora_b"])
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    params = {name: place(x, specs[name]) for name, x in host.items()}
    gradient = np.asarray(normal(16, 12, seed=1))
    run = lambda params: initialize_adapters(
        lora_ga(), params, {"kernel": gradient}, key=KEY
    )

    with jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else mesh:
        new = (jax.jit(run) if traced else run)(params)

    due = run(host)
    for name, x in new.items():
        np.testing.assert_allclose(x, due[name], atol=TOLERANCE)
        if not traced or kind is AxisType.Explicit:
            assert x.sharding.is_equivalent_to(params[name].sharding, x.ndim)


def test_a_stack_on_an_explicit_mesh_keeps_its_layers_apart():
    """Layers sharded, gradients given by the host."""
    mesh = jax.make_mesh((2,), ("layers",), axis_types=(AxisType.Explicit,))
    place = NamedSharding(mesh, PartitionSpec("layers"))
    host = {"kernel": normal(2, 8, 6), "lora_a": normal(2, 8, RANK)}
    host["lora_b"] = jnp.zeros((2, RANK, 6))
    gradients = {"kernel": np.asarray(normal(2, 8, 6, seed=1))}
    with jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else mesh:
        params = jax.device_put(host, place)
        new = initialize_adapters(lora_ga(), params, gradients, key=KEY)
    due = initialize_adapters(lora_ga(), host, gradients, key=KEY)
    for name, x in new.items():
        assert x.sharding == place
        np.testing.assert_allclose(x, due[name], atol=TOLERANCE)


def layer_in(base, factor, size=(24, 16)):
    """One layer with these dtypes, and W0 as it was."""
    kernel = normal(*size).astype(base)
    a, b = jnp.ones((size[0], RANK), factor), jnp.zeros((RANK, size[1]), factor)
    return {"kernel": kernel, "lora_a": a, "lora_b": b}


def started(layer, base, factor, scale=2.0):
    """W0 + s B A after PiSSA, in float64."""
    new = initialize_adapters(pissa(), layer, key=KEY, scale=scale)
    assert {name: x.dtype for name, x in new.items()} == {
        name: x.dtype for name, x in layer.items()
    }
    wide = {
        name: np.asarray(x.astype(jnp.float32), np.float64) for name, x in new.items()
    }
    return wide["kernel"] + scale * wide["lora_a"] @ wide["lora_b"], wide


def test_the_rounding_of_the_factors_goes_into_the_weight():
    """bfloat16 factors on a float32 base: the layer stays to float32's rounding."""
    layer = layer_in(jnp.float32, jnp.bfloat16)
    start, new = started(layer, jnp.float32, jnp.bfloat16)
    assert distance(start, layer["kernel"]) < TOLERANCE
    # Negative control: the change of the factors before they were rounded.
    _, exact = started(layer_in(jnp.float32, jnp.float32), jnp.float32, jnp.float32)
    late = exact["kernel"] + 2.0 * new["lora_a"] @ new["lora_b"]
    assert distance(late, layer["kernel"]) > 20 * TOLERANCE


def test_a_bfloat16_weight_is_rounded_once():
    """To within 2⁻⁸ of each entry of the new weight, and not exactly."""
    layer = layer_in(jnp.bfloat16, jnp.bfloat16)
    start, new = started(layer, jnp.bfloat16, jnp.bfloat16)
    moved = np.abs(start - np.asarray(layer["kernel"], np.float64))
    assert (moved <= 1.001 * BFLOAT16 * np.abs(new["kernel"]) + TOLERANCE).all()
    assert (moved > 0.25 * BFLOAT16 * np.abs(new["kernel"])).any()  # control


@pytest.mark.usefixtures("x64")
def test_float64_is_used_where_it_is_given():
    kernel = np.random.default_rng(0).standard_normal((9, 7))
    layer = {"kernel": jnp.asarray(kernel), "lora_a": jnp.zeros((9, RANK))}
    layer["lora_b"] = jnp.zeros((RANK, 7), jnp.float32)
    new = initialize_adapters(pissa(), layer, key=KEY)
    assert [new[x].dtype.name for x in layer] == ["float64", "float64", "float32"]
    start = new["kernel"] + new["lora_a"] @ new["lora_b"].astype(jnp.float64)
    assert distance(start, kernel) < 1e-14


def test_an_nnx_model_is_initialised_in_place():
    """Variables keep their identity, random states and inputs as well."""
    model, x = qwix_nnx()
    before, kernel = model(x), model.linear.kernel
    old = kernel[...]
    gradients = gradients_of(nnx.state(model), QWIX)
    assert initialize_model(lora_ga(), model, gradients, key=KEY, alpha=ALPHA) is None
    assert distance(model(x), before) < TOLERANCE
    assert model.linear.kernel is kernel
    assert distance(kernel[...], old) > 0.1
    # The same as on the tree, and a control that the scale matters.
    again, _ = qwix_nnx()
    initialize_model(lora_ga(), again, gradients, key=KEY)
    assert distance(again(x), before) > 20 * TOLERANCE


def test_an_error_leaves_the_model_as_it_was():
    model, x = qwix_nnx()
    before = model(x)
    gradients = gradients_of(nnx.state(model), list(QWIX)[:-1])
    with pytest.raises(ValueError, match=r"`gradients` has none of `moe/kernel`"):
        initialize_model(lora_ga(), model, gradients, key=KEY, alpha=ALPHA)
    np.testing.assert_array_equal(model(x), before)


@pytest.mark.parametrize("qtype", ["nf4", "int8", "float8_e4m3fn"])
def test_a_quantised_base_takes_the_methods_that_do_not_touch_it(qtype):
    """qwix's codes: LoRA-One works from gradients, PiSSA is refused."""
    dense, x = qwix_nnx()
    gradients = gradients_of(nnx.state(dense), QWIX)
    due = of_nnx(dense, x, QWIX)
    due = initialize_adapters(lora_one(), due.params, gradients, key=KEY, alpha=ALPHA)
    module_path = "linear|q|o"  # kernels with whole tiles
    model, _ = qwix_nnx(weight_qtype=qtype, module_path=module_path)

    initialize_model(lora_one(), model, gradients, key=KEY, alpha=ALPHA)

    new, due = leaves_by_path(nnx.state(model)), leaves_by_path(due)
    for layer, name in (("linear", "a"), ("q", "b"), ("o", "a")):
        path = f"{layer}/kernel_lora_{name}"
        assert distance(new[path], due[path]) < TOLERANCE
    for method in (pissa(), lora_ga()):
        with pytest.raises(
            ValueError, match=r"`linear/kernel`.*quantised: {'linear/ke"
        ):
            initialize_model(method, model, gradients, key=KEY, alpha=ALPHA)


def test_factors_alone_are_enough_for_methods_that_read_no_weight(small):
    """`nnx.LoRAParam`s without their kernels, as an optimizer holds them."""
    made = MODELS["nnx"]()
    gradients = gradients_of(made.params, made.kernels)
    paths = {path for pair in find_pairs(small) for path in pair[:2]}
    alone = {path: x for path, x in leaves_by_path(small).items() if path in paths}
    assert len(alone) == 4
    for method in (lora(), gora(), lora_one()):
        whole = leaves_by_path(initialize_adapters(method, small, gradients, key=KEY))
        for path, x in initialize_adapters(method, alone, gradients, key=KEY).items():
            np.testing.assert_array_equal(x, whole[path])
    with pytest.raises(ValueError, match=r"No base weight of `mlp/lora_a`"):
        initialize_adapters(pissa(), alone, key=KEY)
    with pytest.raises(ValueError, match=r"`mlp/base_mo.* which `params` has not"):
        initialize_adapters(lora_ga(), alone, gradients, key=KEY)


def test_gradients_may_be_a_tree_like_the_parameters(small):
    """As `jax.grad` returns them, or NumPy arrays by path: the same start."""
    made = MODELS["nnx"]()
    by_path = gradients_of(small, made.kernels)
    tree = replaced(jax.tree.map(jnp.zeros_like, small), by_path)
    host = {path: np.asarray(x) for path, x in by_path.items()}
    starts = [
        initialize_adapters(gora(), small, x, key=KEY) for x in (by_path, tree, host)
    ]
    for other in starts[1:]:
        for x, y in zip(*map(jax.tree.leaves, (starts[0], other)), strict=True):
            np.testing.assert_array_equal(x, y)


def test_only_the_given_pairs_are_initialised(small):
    new = initialize_adapters(
        pissa(), small, key=KEY, pairs=[("q/lora/lora_a", "q/lora/lora_b")]
    )
    old, new = leaves_by_path(small), leaves_by_path(new)
    changed = {path for path in old if new[path] is not old[path]}
    assert changed == {"q/kernel", "q/lora/lora_a", "q/lora/lora_b"}


def test_two_adapters_of_one_weight_may_not_both_change_it():
    """PEFT's named adapters; methods that leave W0 alone may start both."""
    layer = {"q.base_layer.weight": normal(8, 6)}
    for name in ("first", "second"):
        layer[f"q.lora_A.{name}.weight"] = normal(RANK, 6)
        layer[f"q.lora_B.{name}.weight"] = jnp.zeros((8, RANK))
    gradients = {"q/base_layer/weight": normal(8, 6, seed=1)}
    with pytest.raises(ValueError, match=r"lora_A/first.*one base weight.*pairs="):
        initialize_adapters(pissa(), layer, key=KEY)
    new = initialize_adapters(lora_one(), layer, gradients, key=KEY)
    assert all((new[f"q.lora_B.{x}.weight"] != 0).any() for x in ("first", "second"))
    pairs = [("q/lora_A/first/weight", "q/lora_B/first/weight")]
    new = initialize_adapters(pissa(), layer, key=KEY, pairs=pairs)
    assert (new["q.lora_B.second.weight"] == 0).all()


def spoiled(array, value):
    return array.at[(0,) * array.ndim].set(value)


ERRORS = {
    "no gradients": (lora_ga(), lambda p, g: (p, None), "`gradients` is None"),
    "a gradient is missing": (
        lora_ga(),
        lambda p, g: (p, {"q/kernel": g["q/kernel"]}),
        r"none of `mlp/base_module/kernel`, the base weight of `mlp/lora_a`.*has 1",
    ),
    "a gradient of another shape": (
        gora(),
        lambda p, g: (p, g | {"q/kernel": g["q/kernel"][:, :-1]}),
        r"`q/kernel` has shape \(12, 11\), the base weight \(12, 12\)",
    ),
    "a gradient that is not finite": (
        gora(),
        lambda p, g: (p, g | {"q/kernel": spoiled(g["q/kernel"], jnp.nan)}),
        r"gradient of `q/kernel` has entries that are not finite",
    ),
    "a gradient of integers": (
        gora(),
        lambda p, g: (p, g | {"q/kernel": g["q/kernel"].astype(int)}),
        r"gradient of `q/kernel` is int32",
    ),
    "a weight that is not finite": (
        pissa(),
        lambda p, g: (
            replaced(p, {"q/kernel": spoiled(leaves_by_path(p)["q/kernel"], np.inf)}),
            None,
        ),
        r"base weight `q/kernel` has entries that are not finite",
    ),
    "a weight of integers": (
        pissa(),
        lambda p, g: (
            replaced(p, {"q/kernel": leaves_by_path(p)["q/kernel"].astype(jnp.int8)}),
            None,
        ),
        r"`q/kernel`, the base weight of `q/lora/lora_a`, which is quantised: .*int8",
    ),
    "shapes": (
        pissa(),
        lambda p, g: (jax.eval_shape(lambda x: x, p), None),
        r"a shape without values.*eval_shape",
    ),
    "no pairs": (lora(), lambda p, g: ({"kernel": normal(3, 4)}, None), "No LoRA pair"),
    "a rank that is too large": (
        lora_ga(),
        lambda p, g: (
            {"kernel": normal(3, 9), "lora_a": normal(3, 2), "lora_b": normal(2, 9)},
            {"kernel": normal(3, 9)},
        ),
        r"`lora_a`: .*rank",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_path_and_the_remedy(small, name):
    method, spoil, message = ERRORS[name]
    good = gradients_of(small, MODELS["nnx"]().kernels)
    params, gradients = spoil(small, good)
    with pytest.raises(ValueError, match=message):
        initialize_adapters(method, params, gradients, key=KEY)
    initialize_adapters(method, small, good, key=KEY)  # control: unspoiled it works


@pytest.mark.parametrize("width", [1, WIDTH])
def test_degenerate_gradients_stay_finite(width):
    """Zero gradients, and layers with a single output."""
    layer = {"kernel": normal(WIDTH, width), "lora_a": normal(WIDTH, 1)}
    layer["lora_b"] = jnp.zeros((1, width))
    gradients, at = {"kernel": jnp.zeros((WIDTH, width))}, ("kernel", 0, 1)
    for method in (gora(), lora_one(), pissa(), olora()):
        new = initialize_adapters(
            method, layer, gradients, key=KEY, kernels={"lora_a": at}
        )
        assert all(bool(jnp.isfinite(x).all()) for x in new.values()), method.name
        assert distance(
            new["kernel"] + new["lora_a"] @ new["lora_b"], layer["kernel"]
        ) < (TOLERANCE), method.name


def test_a_second_start_and_other_misuse_are_errors():
    """Each would lose what the adapters hold, or fail far from its cause."""
    model = nnx.LoRALinear(6, 5, lora_rank=2, rngs=nnx.Rngs(0))
    before = nnx.state(model)["kernel"][...]
    initialize_model(pissa(), model, key=KEY)
    once = nnx.state(model)["kernel"][...]
    assert not np.allclose(once, before)  # what a second start would change again

    with pytest.raises(ValueError, match="`lora/lora_b` is not 0"):
        initialize_model(pissa(), model, key=KEY)
    chex.assert_trees_all_equal(nnx.state(model)["kernel"][...], once)
    with pytest.raises(TypeError, match="Pass an initialiser first, called"):
        initialize_model(pissa, model, key=KEY)
    with pytest.raises(TypeError, match=r"not an `nnx\.Module`"):
        initialize_model(model, pissa(), key=KEY)
    with pytest.raises(ValueError, match="'typo' in `kernels` matches no factor"):
        initialize_model(pissa(), model, key=KEY, kernels={"typo": "kernel"})
