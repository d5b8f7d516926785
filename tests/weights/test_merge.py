"""W0 + s B A, seen through the forward pass of every stack's real layers."""

import gc
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lorapro_jax import LoRAPair, find_pairs, merge_adapters, merge_model
from lorapro_jax.algebra._axes import FactorAxes
from lorapro_jax.algebra._factors import Both, Factor
from lorapro_jax.pairs._leaves import index_leaves
from lorapro_jax.weights._find import Kernel
from lorapro_jax.weights._merge import merged
from lorapro_jax.weights._product import add_product
from tests.support.layers import (
    ALPHA,
    MODELS,
    RANK,
    TOLERANCE,
    QwixModel,
    normal,
    qwix_nnx,
    replaced,
)
from tests.support.layouts import distance, leaves_by_path
from tests.support.meshes import collectives

# What qwix still calls is deprecated in Flax.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:qwix.*"),
    pytest.mark.usefixtures("quick_compiles"),
]


def with_adapters(params, size=0.3):
    """Random factors, none of them 0; all else as it is."""
    leaves = {key.replace(".", "/"): x for key, x in leaves_by_path(params).items()}
    paths = [path for pair in find_pairs(params) for path in pair.paths]
    new = {
        path: size * normal(*leaves[path].shape, seed=i) for i, path in enumerate(paths)
    }
    return replaced(params, new)


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    made = MODELS[request.param]()
    return made._replace(params=with_adapters(made.params), apply=jax.jit(made.apply))


def test_a_merged_model_computes_the_same_with_and_without_its_adapters(model):
    """B is 0, so A does nothing, and every kernel has moved."""
    before = model.apply(model.params)

    new = merge_adapters(model.params, **model.options)

    assert distance(model.apply(new), before) < TOLERANCE
    old, leaves = leaves_by_path(model.params), leaves_by_path(new)
    pairs = find_pairs(new)
    normalized = {path.replace(".", "/"): x for path, x in leaves.items()}
    for pair in pairs:
        assert not np.any(normalized[pair.b])
    off = replaced(new, {pair.a: 9 * normalized[pair.a] for pair in pairs})
    np.testing.assert_array_equal(model.apply(off), model.apply(new))
    # Negative control: the output knows of every one of these sums.
    assert len(pairs) == len(model.kernels)
    for path in model.kernels:
        kept = replaced(new, {path: old[path]})
        assert distance(model.apply(kept), before) > 20 * TOLERANCE, path


def test_nothing_else_in_the_tree_changes(model):
    new = merge_adapters(model.params, **model.options)
    assert jax.tree.structure(new) == jax.tree.structure(model.params)
    old, leaves = leaves_by_path(model.params), leaves_by_path(new)
    due = {*model.kernels, *(pair.b for pair in find_pairs(new))}
    changed = {path for path in old if leaves[path] is not old[path]}
    assert {path.replace(".", "/") for path in changed} == due
    kind = lambda x: (x.shape, x.dtype, x.sharding)
    assert all(kind(leaves[path]) == kind(old[path]) for path in changed)


def test_without_its_factors_it_is_the_tree_of_the_plain_model(model):
    """The leaves that are no factors, and no empty module that held only them."""
    new = merge_adapters(model.params, **model.options)
    bare = merge_adapters(model.params, remove=True, **model.options)
    assert not find_pairs(bare)
    assert type(bare) is type(model.params)
    paths = {path for pair in find_pairs(new) for path in pair.paths}
    due = {
        path: x for path, x in leaves_by_path(new).items()
        if path.replace(".", "/") not in paths
    }  # fmt: skip
    found = leaves_by_path(bare)
    assert found.keys() == due.keys()
    for path, x in due.items():
        np.testing.assert_array_equal(found[path], x)
    assert "lora" not in str(jax.tree.structure(bare)).lower()


def test_the_plain_model_takes_the_tree_without_factors():
    """Of qwix: the factors lie beside the kernels of the layers of Flax."""
    model, x = qwix_nnx()
    state = with_adapters(nnx.state(model))
    nnx.update(model, state)
    plain = QwixModel(nnx.Rngs(3))
    before = plain(x)

    nnx.update(plain, merge_adapters(state, remove=True, alpha=ALPHA))

    assert distance(plain(x), model(x)) < TOLERANCE
    assert distance(before, model(x)) > 20 * TOLERANCE  # negative control


def test_in_bfloat16_the_model_moves_by_the_rounding_of_its_kernels(model):
    """Merged in bfloat16, computed with in float32: nothing else is rounded."""

    def as_dtype(params, dtype):
        leaves = leaves_by_path(params)
        return replaced(params, {x: leaves[x].astype(dtype) for x in model.kernels})

    params = as_dtype(model.params, jnp.bfloat16)
    new = merge_adapters(params, **model.options)

    wide = as_dtype(params, jnp.float32)
    exact = leaves_by_path(merge_adapters(wide, **model.options))
    received = leaves_by_path(new)
    for path in model.kernels:
        assert received[path].dtype == jnp.bfloat16
        due = exact[path].astype(jnp.bfloat16)
        assert np.mean(received[path] != due) < 1e-2  # ties, by one bit of float32
    moved = distance(model.apply(as_dtype(new, jnp.float32)), model.apply(wide))
    assert TOLERANCE < moved < 0.05


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_narrow_weight_is_rounded_once(dtype):
    """Accumulated in float32: half a unit in the last place, entry by entry."""
    layer = {
        "kernel": normal(24, 16).astype(dtype),
        "lora_a": normal(24, 4, seed=1).astype(dtype),
        "lora_b": normal(4, 16, seed=2).astype(dtype),
    }
    wide = {key: np.asarray(x, np.float64) for key, x in layer.items()}
    exact = wide["kernel"] + 0.7 * wide["lora_a"] @ wide["lora_b"]

    new = merge_adapters(layer, scale=0.7)

    assert [x.dtype for x in new.values()] == [dtype] * 3
    half = float(jnp.finfo(dtype).eps) / 2
    error = lambda x: np.abs(np.asarray(x, np.float64) - exact)
    bound = half * np.abs(exact) + TOLERANCE
    assert (error(new["kernel"]) <= bound).all()
    # Negative control: a product in the dtype of the factors is rounded more often.
    product = 0.7 * (layer["lora_a"] @ layer["lora_b"])
    assert (error(layer["kernel"] + product.astype(dtype)) > 1.5 * bound).any()


STACKS = {  # letters of A, B and the kernel; capitals are stacked axes
    "layers": ("Ldr", "Lrf", "Ldf"),
    "layers on axis 1": ("dLr", "rLf", "dLf"),
    "layers of experts": ("LEdr", "LErf", "LEdf"),
    "layers inside": ("Lrd", "Lfr", "fLd"),
}
SIZES = {"L": 3, "E": 2, "d": 7, "f": 5, "r": 2}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", STACKS)
def test_layers_of_a_stack_are_merged_each_with_its_scale(name, dtype):
    """One after the other, and at once under `jit`: the same bits."""
    letters = STACKS[name]
    a, b, kernel = (
        normal(*(SIZES[x] for x in axes), seed=i) for i, axes in enumerate(letters)
    )
    stack = [x for x in letters[0] if x.isupper()]
    scale = 1.0 + np.arange(np.prod([SIZES[x] for x in stack])).reshape(
        [SIZES[x] for x in stack]
    )
    axes = [(x.index("r"), tuple(x.index(c) for c in stack)) for x in letters[:2]]
    pair = LoRAPair("a", "b", *(x[0] for x in axes), *(x[1] for x in axes), scale)
    params = {"a": a, "b": b, "w": kernel.astype(dtype)}
    at = ("w", letters[2].index("d"), letters[2].index("f"))
    run = lambda params: merge_adapters(params, pairs=[pair], kernels={"a": at})

    new = run(params)

    product = np.einsum(
        f"{letters[0]},{letters[1]},{''.join(stack)}->{letters[2]}",
        *(np.asarray(x, np.float64) for x in (a, b, scale)),
    )
    want = np.asarray(params["w"], np.float64) + product
    half = float(jnp.finfo(dtype).eps) / 2
    error = np.abs(np.asarray(new["w"], np.float64) - want)
    assert (error <= 1.01 * half * np.abs(want) + TOLERANCE).all()
    np.testing.assert_array_equal(new["b"], 0)
    if dtype == jnp.float32:
        np.testing.assert_allclose(jax.jit(run)(params)["w"], new["w"], atol=TOLERANCE)
    shapes = jax.eval_shape(run, params)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, new)


def test_a_stack_takes_the_memory_of_one_layers_product(full_compiles):
    """Of the compiled program: its temporary arrays, for layers on axis 1."""
    shapes = (256, 8, 192), (256, 8, 2), (2, 8, 192)
    weight, a, b = (jax.ShapeDtypeStruct(x, jnp.float32) for x in shapes)
    factors = Both(Factor(a, FactorAxes(2, (1,))), Factor(b, FactorAxes(0, (1,))))
    layer, spare = 256 * 192 * 4, 3 * (256 + 192) * 8 * 2 * 4  # copies of factors

    def temporary(one_by_one):
        program = add_product.lower(
            weight, factors, 1.0, kernel=Kernel("", (1,), (0,), (2,)), sharding=None,
            one_by_one=one_by_one,
        ).compile()  # fmt: skip
        found = program.memory_analysis()
        assert found is not None
        return found.temp_size_in_bytes

    assert temporary(True) < layer + spare
    assert temporary(False) > 8 * layer  # negative control


MESHES = {  # shapes and shardings of kernel, A and B
    "features": ((64, 48), P("x", "y"), P("x"), P(None, "y")),
    "as in FSDP": ((64, 48), P("x"), P("x"), P()),
    "otherwise than the factors": ((64, 48), P("x", "y"), P("y"), P(None, ("x", "y"))),
    "stack": ((6, 64, 48), P(None, "x", "y"), P(None, "x"), P(None, None, "y")),
    "layers": ((8, 64, 48), P("x", "y"), P("x"), P(None, None, "y")),
}
MESH_RANK = 4


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", MESHES)
def test_on_a_mesh_only_factors_travel(name, kind, monkeypatch):
    """The result stays where the kernel is, and is that of one device."""
    shape, *specs = MESHES[name]
    *stack, inputs, outputs = shape
    shapes = shape, (*stack, inputs, MESH_RANK), (*stack, MESH_RANK, outputs)
    names = "kernel", "lora_a", "lora_b"
    host = {
        key: np.asarray(normal(*x, seed=i))
        for i, (key, x) in enumerate(zip(names, shapes, strict=True))
    }
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
    params = {
        key: jax.device_put(host[key], NamedSharding(mesh, spec))
        for key, spec in zip(names, specs, strict=True)
    }
    programs = []

    def add_and_look(*args, **options):
        programs.append(add_product.lower(*args, **options).compile().as_text())
        return add_product(*args, **options)

    monkeypatch.setattr("lorapro_jax.weights._merge.add_product", add_and_look)
    with jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else mesh:
        new = merge_adapters(params, scale=2.0)

    due = merge_adapters(host, scale=2.0)
    for key, x in new.items():
        np.testing.assert_allclose(x, due[key], atol=TOLERANCE)
        assert x.sharding.is_equivalent_to(params[key].sharding, x.ndim)
    factors = max(np.prod(x) for x in shapes[1:])
    assert factors < np.prod(shape) / 8  # than what a device has of the kernel
    sent = [
        (kind, np.prod([int(n) for n in size.split(",") if n]))
        for kind, size in collectives(programs[0])
    ]
    assert all(size <= factors for _, size in sent), sent


def test_control_a_kernel_that_is_gathered_would_be_seen():
    """Reshaping what is sharded gathers it."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    kernel = jax.device_put(normal(64, 48), NamedSharding(mesh, P("x", "y")))
    program = jax.jit(lambda x: x.reshape(48, 64) + 1.0).lower(kernel).compile()
    sizes = [x for _, x in collectives(program.as_text())]
    assert any(np.prod(list(map(int, x.split(",")))) > 64 * 4 for x in sizes)


def test_an_nnx_model_is_merged_in_place():
    """Variables keep their identity; with the wrong scale it is another model."""
    model, x = qwix_nnx()
    nnx.update(model, with_adapters(nnx.state(model)))
    before, kernel, b = model(x), model.linear.kernel, model.linear.kernel_lora_b
    state = jax.tree.map(jnp.copy, nnx.state(model))

    assert merge_model(model, alpha=ALPHA) is None

    assert distance(model(x), before) < TOLERANCE
    assert model.linear.kernel is kernel
    assert model.linear.kernel_lora_b is b
    assert not np.any(b[...])
    due = merge_adapters(state, alpha=ALPHA)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), due)
    nnx.update(model, state)
    merge_model(model, alpha=2 * ALPHA)
    assert distance(model(x), before) > 20 * TOLERANCE


class Square(nnx.Module):
    """Nothing in its state tells which side of these kernels is which."""

    def __init__(self, count):
        rngs = nnx.Rngs(0)
        self.layers = nnx.Sequential(*(self.adapted(rngs) for _ in range(count)))

    @staticmethod
    def adapted(rngs):
        base = nnx.Linear(64, 64, use_bias=False, rngs=rngs)
        return nnx.LoRA(64, 2, 64, base_module=base, rngs=rngs)

    def __call__(self, x):
        return self.layers(x)


def test_the_classes_of_a_model_tell_the_order_of_square_kernels():
    model, x = Square(2), normal(3, 64)
    nnx.update(model, with_adapters(nnx.state(model)))
    before = model(x)
    with pytest.raises(ValueError, match="Say it with `kernels="):
        merge_adapters(nnx.state(model))
    merge_model(model)
    assert distance(model(x), before) < TOLERANCE


def test_in_place_there_is_one_new_kernel_at_a_time(monkeypatch):
    """Arrays as large as a kernel, whenever a pair has been merged."""
    model, seen = Square(6), []
    large = lambda: sum(x.shape == (64, 64) for x in jax.live_arrays())
    gc.collect()
    others = large() - 6

    def count(*args):
        result = merged(*args)
        seen.append(large() - others)
        return result

    monkeypatch.setattr("lorapro_jax.weights._models.merged", count)
    merge_model(model)
    assert seen == [7] * 6
    # Negative control: a new tree has all of them.
    state, seen[:] = nnx.state(model), []
    monkeypatch.setattr("lorapro_jax.weights._merge.merged", count)
    at = {r"(.*)/lora_a": (r"\1/base_module/kernel", 0, 1)}
    new = merge_adapters(state, kernels=at)
    assert seen == [7, 8, 9, 10, 11, 12]
    del new


class QwixLinen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, name="down")(jnp.tanh(nn.Dense(8, name="up")(x)))


def qwix_linen():
    """A Linen model with codes for weights: its parameters, and its output."""
    qwix = pytest.importorskip("qwix")
    rule = {"module_path": ".*", "rank": RANK, "alpha": ALPHA, "weight_qtype": "int8"}
    x = normal(6, 12, seed=1)
    model = qwix.apply_lora_to_model(QwixLinen(), qwix.LoraProvider(**rule))
    params = model.init(jax.random.key(0), x)["params"]
    return with_adapters(params), lambda params: model.apply({"params": params}, x)


def test_a_quantised_base_is_refused_and_the_remedy_of_the_message_works():
    """With the code of the message: what it dequantises is merged, and is the same."""
    qwix = pytest.importorskip("qwix")
    model, x = qwix_nnx(weight_qtype="int8", module_path="linear|q|o")
    nnx.update(model, with_adapters(nnx.state(model)))
    params, apply = qwix_linen()

    with pytest.raises(ValueError, match="`linear/kernel`, the base weight of ") as e:
        merge_model(model, alpha=ALPHA)
    with pytest.raises(ValueError, match=r"is quantised: .*qvalue': 'int8'"):
        merge_adapters(params, alpha=ALPHA)
    code, other = str(e.value).split("`")[5:8:2]
    assert code.startswith("jax.tree.map(")
    assert other == "nnx.Param(qwix.dequantize(x))"
    names = {"jax": jax, "nnx": nnx, "qwix": qwix}
    dequantised = lambda tree, code: eval(code, {**names, "tree": tree})

    of_nnx = code.replace("qwix.dequantize(x)", other)
    before, after = model(x), dequantised(model, of_nnx)
    merge_model(after, alpha=ALPHA)
    assert distance(after(x), before) < TOLERANCE
    assert not np.any(after.linear.kernel_lora_b[...])
    new = merge_adapters(dequantised(params, code), alpha=ALPHA)
    assert distance(apply(new), apply(params)) < TOLERANCE
    # Negative control: without their adapters they are other models.
    assert distance(apply(with_adapters(params, 0.0)), apply(params)) > 20 * TOLERANCE


def layer(kernel=jnp.float32, value=1.0):
    """A layer whose sum is 4 `value`."""
    a, b = jnp.full((6, 1), value), jnp.full((1, 5), 3.0)
    return {"kernel": jnp.full((6, 5), value, kernel), "lora_a": a, "lora_b": b}


A = jnp.ones((6, 1))
PEFT = {
    "q.lora_A.one.weight": A.T, "q.lora_B.one.weight": jnp.ones((5, 1)),
    "q.lora_A.two.weight": A.T, "q.lora_B.two.weight": jnp.ones((5, 1)),
    "q.weight": jnp.ones((5, 6)),
}  # fmt: skip
WRONG = {
    "no pair": ({"w": A}, {}, "No LoRA pair among the 1 leaves.*merged already"),
    "no kernel": ({"lora_a": A, "lora_b": A.T}, {}, "No base weight of `lora_a`"),
    "two adapters": (PEFT, {}, "adapters on one weight. Which of them the model adds"),
    "integers": (layer(jnp.int32), {}, "`kernel`.*is quantised: {'kernel': 'int32'}"),
    "complex": (layer(jnp.complex64), {}, "is complex64, not real floating point"),
    "NaN": (layer(value=jnp.nan), {}, "`kernel` float32 plus s B A of `lora_a` is not"),
    "overflow": (layer(jnp.float16, 3e4), {}, "cast it to a wider one first"),
    "a list": (
        [A, A.T, jnp.ones((6, 6))],
        {"pairs": [("0", "1")], "kernels": {"0": ("2", 0, 1)}, "remove": True},
        "`0` cannot be removed: it is in a list",
    ),
    "shapes": (jax.eval_shape(layer), {}, "`kernel` is a shape without values"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_error_names_the_leaf_and_says_what_to_do(case):
    params, options, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        merge_adapters(params, **options)


def test_what_the_messages_propose_is_merged():
    new = merge_adapters(layer(value=3e4))  # float16 could not hold 12e4
    np.testing.assert_array_equal(new["kernel"], 12e4)
    one, two = (
        (f"q.lora_A.{x}.weight", f"q.lora_B.{x}.weight") for x in ("one", "two")
    )
    both = merge_adapters(PEFT, pairs=[one, two], scale=2.0)
    np.testing.assert_array_equal(both["q.weight"], 5.0)
    first = merge_adapters(PEFT, pairs=[one], scale=2.0, remove=True)
    np.testing.assert_array_equal(first["q.weight"], 3.0)
    assert first.keys() == PEFT.keys() - set(one)


def test_an_nnx_model_is_needed_for_merging_in_place():
    with pytest.raises(TypeError, match=r"`model` is a dict, not an `nnx.Module`"):
        merge_model(layer())


# --- Several adapters on one weight, several layers with one ---


def two_adapters(first, second):
    """A layer with two pairs under these names, and s B A of each."""
    kernel, a, b = (normal(*shape, seed=9) for shape in ((6, 5), (6, 2), (2, 5)))
    pair = lambda size: {"lora_a": size * a, "lora_b": b}
    tree = {"q": {"kernel": kernel}}
    for name, size in ((first, 1.0), (second, 2.0)):
        node = tree["q"]
        if name:
            node = node.setdefault(name, {})
        node.update(pair(size))
    return tree, kernel, a @ b


@pytest.mark.parametrize(
    "names",
    [("adapter_en", "adapter_fr"), ("lora", "lora_1"), ("", "lora_fr"), ("l0", "l1")],
)
def test_two_adapters_on_one_weight_are_an_error_whose_remedy_works(names):
    """Whatever they are called: the base weight that was found is one."""
    tree, kernel, product = two_adapters(*names)
    options = {"kernels": {".*": "q/kernel"}} if names[0] == "l0" else {}
    with pytest.raises(ValueError, match=r"adapters on one weight.*name those, with"):
        merge_adapters(tree, **options)
    path = lambda name, x: "/".join(part for part in ("q", name, x) if part)
    one, two = ((path(x, "lora_a"), path(x, "lora_b")) for x in names)
    for pairs, size in (([one], 1.0), ([two], 2.0), ([one, two], 3.0)):
        new = merge_adapters(tree, pairs=pairs, **options)["q"]["kernel"]
        np.testing.assert_allclose(new, kernel + size * product, rtol=1e-5, atol=1e-5)


def test_a_pattern_of_kernels_for_several_pairs_is_an_error_whose_remedy_works():
    """Both layers of a tree would go into the weight of one."""
    weights = {name: normal(6, 6, seed=i) for i, name in enumerate("qk")}
    pair = lambda seed: {
        "lora_a": normal(6, 2, seed=seed), "lora_b": normal(2, 6, seed=seed + 1)
    }  # fmt: skip
    tree = {name: {"kernel": w} for name, w in weights.items()}
    tree["lora"] = {"q": pair(3), "k": pair(5)}
    with pytest.raises(ValueError, match=r"one weight, `q/kernel`.*give each pair an"):
        merge_adapters(tree, kernels={".*": ("q/kernel", 0, 1)})
    each = {f"lora/{x}/lora_a": (f"{x}/kernel", 0, 1) for x in "qk"}
    new = merge_adapters(tree, kernels=each)
    for name, w in weights.items():
        want = w + tree["lora"][name]["lora_a"] @ tree["lora"][name]["lora_b"]
        np.testing.assert_allclose(new[name]["kernel"], want, rtol=1e-5, atol=1e-5)


class Uses(nnx.Module):
    """One adapted layer, and what else uses a part of it."""

    def __init__(self, kind):
        rngs = nnx.Rngs(0)
        self.a: Any
        self.b: Any
        if kind in ("base", "twice"):
            base = nnx.Linear(6, 6, use_bias=False, rngs=rngs)
            self.a = nnx.LoRA(6, 2, 6, base_module=base, rngs=rngs)
        else:
            self.a = nnx.LoRALinear(6, 6, lora_rank=2, rngs=rngs)
        if kind == "kernel":
            self.b = nnx.Linear(6, 6, rngs=rngs)
            self.b.kernel = self.a.kernel
        elif kind == "adapter":
            self.b = nnx.LoRALinear(6, 6, lora_rank=2, rngs=rngs)
            self.b.lora = self.a.lora
        elif kind == "base":
            self.b = nnx.LoRA(6, 2, 6, base_module=self.a.base_module, rngs=rngs)
        elif kind == "layer":
            self.b = self.a
        elif kind == "twice":
            self.a = nnx.LoRA(6, 2, 6, base_module=self.a, rngs=rngs)
            self.b = jnp.tanh

    def __call__(self, x):
        return self.b(jnp.tanh(self.a(x)))


def moved(model):
    """Factors of which none is 0."""
    adapters = nnx.state(model, nnx.LoRAParam)
    nnx.update(model, jax.tree.map(lambda x: x + 0.3, adapters))


COPIES = {
    "kernel": lambda model: setattr(model.b, "kernel", nnx.clone(model.b.kernel)),
    "adapter": lambda model: setattr(model.b, "lora", nnx.clone(model.b.lora)),
    "base": lambda model: setattr(
        model.b, "base_module", nnx.clone(model.b.base_module)
    ),
}


@pytest.mark.parametrize("kind", COPIES)
def test_what_a_layer_without_the_adapter_uses_is_an_error_whose_remedy_works(kind):
    """The graph of a model shows it: with a copy it merges, and computes the same."""
    model, x = Uses(kind), normal(3, 6)
    moved(model)
    before = model(x)
    owner, shared = {
        "kernel": ("a/lora", "a/kernel"), "adapter": ("a/lora", "a/lora"),
        "base": ("a", "a/base_module"),
    }[kind]  # fmt: skip
    pairs = [(f"{owner}/lora_a", f"{owner}/lora_b")]
    match = rf"`{shared}` is in several places.*module\.x = nnx\.clone\(module\.x\)"
    with pytest.raises(ValueError, match=match):
        merge_model(model, pairs=pairs)
    assert distance(model(x), before) == 0

    COPIES[kind](model)

    merge_model(model)
    assert distance(model(x), before) < TOLERANCE
    left = [pair.b for pair in find_pairs(nnx.state(model))]
    assert len(left) == (1 if kind == "kernel" else 2)
    leaves = index_leaves(nnx.state(model))
    assert not any(np.any(leaves[path].value) for path in left)


@pytest.mark.parametrize("kind", ["layer", "twice"])
def test_a_layer_that_is_used_twice_with_its_adapter_is_merged(kind):
    """And an adapter around an adapter, by `pairs=` as the message has it."""
    model, x = Uses(kind), normal(3, 6)
    moved(model)
    before, pairs = model(x), None
    if kind == "twice":
        with pytest.raises(ValueError, match="name those, with"):
            merge_model(model)
        pairs = [(pair.a, pair.b) for pair in find_pairs(nnx.state(model))]
        assert len(pairs) == 2
    merge_model(model, pairs=pairs)
    assert distance(model(x), before) < TOLERANCE
    moved(model)  # control: the adapters are still there
    assert distance(model(x), before) > 20 * TOLERANCE


def test_64_bits_of_numpy_are_kept_or_refused(x64):
    """The dtypes of the result are those of the tree."""
    tree = jax.tree.map(np.float64, jax.device_get(layer()))
    new = merge_adapters(tree)
    assert {x.dtype for x in jax.tree.leaves(new)} == {np.dtype(np.float64)}
    np.testing.assert_array_equal(new["kernel"], 4.0)


@pytest.mark.parametrize("name", ["kernel", "lora_a", "lora_b"])
def test_64_bits_that_jax_would_cut_are_an_error_whose_remedy_works(name):
    tree = jax.device_get(layer())
    tree[name] = tree[name].astype(np.float64)
    with pytest.raises(ValueError, match=f"`{name}` is float64, .* cast the tree to"):
        merge_adapters(tree)
    new = merge_adapters(jax.tree.map(np.float32, tree))
    np.testing.assert_array_equal(new["kernel"], 4.0)
