"""The mean gradient of base weights, against derivatives taken at once."""

import functools
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lorapro_jax.weights import _estimate
from lorapro_jax.weights._estimate import estimate_gradients
from tests.support.layouts import leaves_by_path
from tests.support.processes import free_port, start, wait_for

estimate = functools.partial(estimate_gradients, progress=False)


def normal(seed, *shape):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def lora_params(seed=0):
    """Two layers with adapters whose B is not 0, and a head without one."""
    shapes = {
        "up": {"kernel": (6, 9), "bias": (9,), "lora_a": (6, 2), "lora_b": (2, 9)},
        "down": {"kernel": (9, 5), "lora_a": (9, 3), "lora_b": (3, 5)},
        "head": {"kernel": (5, 2)},
    }
    is_shape = lambda x: isinstance(x, tuple)
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=is_shape)
    arrays = [normal(seed + i, *x) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(treedef, arrays)


def forward(params, x):
    for name in ("up", "down"):
        layer = params[name]
        y = x @ layer["kernel"] + x @ layer["lora_a"] @ layer["lora_b"]
        x = jnp.tanh(y + layer.get("bias", 0.0))
    return x @ params["head"]["kernel"]


def loss_fn(params, batch):
    x, y = batch
    return jnp.mean((forward(params, x) - y) ** 2)


BATCHES = [(normal(i, 7, 6), normal(50 + i, 7, 2)) for i in range(3)]


def assert_mean_gradient(received, loss, params, batches, paths, rtol=1e-5):
    """Equal to the derivative of the mean loss in one piece, for these paths only."""
    mean = lambda params: sum(loss(params, x) for x in batches) / len(batches)
    expected = leaves_by_path(jax.jit(jax.grad(mean))(params))
    first = leaves_by_path(jax.jit(jax.grad(loss))(params, batches[0]))
    assert list(received) == list(paths)
    for path, gradient in received.items():
        want = np.asarray(expected[path])
        scale = np.abs(want).max()
        assert gradient.dtype == np.float32
        np.testing.assert_allclose(gradient, want, atol=rtol * scale, rtol=0)
        # Negative control: one batch has another gradient.
        assert np.abs(first[path] - want).max() > 100 * rtol * scale


@pytest.mark.parametrize("offload", [True, False])
@pytest.mark.parametrize("at_once", [None, 1, 2])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_it_is_the_derivative_of_the_mean_loss(wrap, at_once, offload, quick_compiles):
    """Of the kernels under adapters, at W0 + s B A; the head's is left out."""
    params = lora_params()
    received = estimate(
        wrap(loss_fn), params, BATCHES, at_once=at_once, offload=offload
    )
    paths = ["down/kernel", "up/kernel"]
    assert_mean_gradient(received, loss_fn, params, BATCHES, paths)
    kind = np.ndarray if offload else jax.Array
    assert all(isinstance(x, kind) for x in received.values())


def test_control_with_b_zero_the_gradient_is_another():
    params = lora_params()
    at_zero = jax.tree.map(lambda x: x, params)
    for name in ("up", "down"):
        at_zero[name]["lora_b"] *= 0
    both = [estimate(loss_fn, x, BATCHES)["up/kernel"] for x in (params, at_zero)]
    assert np.abs(both[0] - both[1]).max() > 0.1 * np.abs(both[0]).max()


CHOICES = {
    "regex": r"(up|head)/kernel$",
    "paths": ["head/kernel", "['up']['kernel']"],
    "function": lambda path: path in ("up/kernel", "head/kernel"),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_kernels_of_a_model_without_adapters_are_chosen_by_path(choice):
    params = lora_params()
    frozen = {k: {"kernel": v["kernel"]} for k, v in params.items()}

    def loss(tree, batch):
        merged = {k: params[k] | tree[k] for k in params}
        return loss_fn(merged, batch)

    received = estimate(loss, frozen, BATCHES, kernels=CHOICES[choice])
    paths = ["head/kernel", "up/kernel"]
    assert_mean_gradient(received, loss, frozen, BATCHES, paths)


def test_a_mapping_says_which_kernel_a_pair_has():
    params = lora_params()
    params["up"]["table"] = params["up"].pop("kernel")
    renamed = lambda tree: {**tree, "up": tree["up"] | {"kernel": tree["up"]["table"]}}
    loss = lambda params, batch: loss_fn(renamed(params), batch)
    received = estimate(loss, params, BATCHES, kernels={"up/lora_a": "up/table"})
    paths = ["down/kernel", "up/table"]
    assert_mean_gradient(received, loss, params, BATCHES, paths)


def linear_loss(params, batch):
    x, y = batch
    error = x @ params["kernel"] - y
    return jnp.sum((error * error).astype(jnp.float32))


def linear_oracle(kernel, batches):
    """2 Xᵀ(XW − Y), averaged in float64."""
    kernel = np.asarray(kernel, np.float64)
    pairs = [[np.asarray(x, np.float64) for x in batch] for batch in batches]
    return np.mean([2 * x.T @ (x @ kernel - y) for x, y in pairs], axis=0)


def test_sums_of_many_batches_are_exact_to_float32():
    """Each gradient has an error of a few roundings, and each addition one more."""
    batches = [(normal(i, 4, 5), normal(i + 999, 4, 3)) for i in range(200)]
    kernel = normal(7, 5, 3)
    received = estimate(linear_loss, {"kernel": kernel}, batches, kernels="kernel")
    single = [linear_oracle(kernel, [x]) for x in batches]
    size = np.mean(np.abs(single), axis=0).max()
    expected = linear_oracle(kernel, batches)
    limit = 200 * float(jnp.finfo(jnp.float32).eps) * size
    assert np.abs(received["kernel"] - expected).max() < limit
    # Negative control: an accumulator in bfloat16 stalls.
    add = lambda total, x: total + jnp.asarray(x, total.dtype)
    total = functools.reduce(add, single, jnp.zeros((5, 3), jnp.bfloat16))
    assert np.abs(np.float64(total) / 200 - expected).max() > 100 * limit


@pytest.mark.parametrize("offload", [True, False])
def test_bfloat16_weights_get_float32_sums_of_their_gradients(offload):
    """One rounding to eight bits a batch and not one more."""
    to = functools.partial(jnp.asarray, dtype=jnp.bfloat16)
    batches = [(normal(i, 1, 5), normal(i + 999, 1, 3)) for i in range(64)]
    kernel = to(normal(7, 5, 3))

    def loss(params, batch):  # all in float32 but the weight itself
        return linear_loss({"kernel": params["kernel"].astype(jnp.float32)}, batch)

    received = estimate(
        loss, {"kernel": kernel}, batches, kernels="kernel", offload=offload
    )["kernel"]

    assert received.dtype == np.float32
    single = [linear_oracle(kernel, [x]) for x in batches]
    rounded = np.mean([np.float64(to(x)) for x in single], axis=0)
    size = np.abs(single).max()
    # Now and then the oracle's value rounds to the other neighbour.
    assert np.abs(received - rounded).max() < 2 * 2.0**-8 * size / len(batches)
    total = functools.reduce(lambda t, x: t + to(x), single, jnp.zeros_like(kernel))
    assert np.abs(np.float64(total) / 64 - rounded).max() > 2.0**-8 * size / 4


def test_float64_kernels_keep_their_precision(x64):
    batches = [
        tuple(np.asarray(x, np.float64) + 1e-9 for x in batch)
        for batch in [(normal(1, 4, 5), normal(2, 4, 3))]
    ]
    kernel = np.random.default_rng(0).standard_normal((5, 3))
    loss = lambda params, batch: jnp.sum((batch[0] @ params["kernel"] - batch[1]) ** 2)
    received = estimate(loss, {"kernel": jnp.asarray(kernel)}, batches, kernels="k")
    expected = linear_oracle(kernel, batches)
    np.testing.assert_allclose(received["kernel"], expected, rtol=1e-12)


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.LoRALinear(6, 9, lora_rank=2, rngs=rngs)
        self.down = nnx.LoRA(
            9, 2, 2, base_module=nnx.Linear(9, 2, rngs=rngs), rngs=rngs
        )

    def __call__(self, x):
        return self.down(nnx.tanh(self.up(x)))


@pytest.mark.parametrize("split", [True, False])
def test_nnx_models_are_given_as_their_state_or_as_they_are(split):
    model = Mlp(nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    error = lambda model, batch: jnp.mean((model(batch[0]) - batch[1]) ** 2)
    of_state = lambda state, batch: error(nnx.merge(graphdef, state), batch)
    params, loss = (state, of_state) if split else (model, error)

    received = estimate(loss, params, BATCHES, at_once=1)

    paths = ["down/base_module/kernel", "up/kernel"]
    assert_mean_gradient(received, of_state, state, BATCHES, paths)


class Layer(nn.Module):
    """Linen, adapted by hand; as a scan's body it has a carry."""

    @nn.compact
    def __call__(self, x, _=None):
        init = nn.initializers.normal(0.5)
        a, b = self.param("lora_a", init, (6, 2)), self.param("lora_b", init, (2, 6))
        return nn.tanh(nn.Dense(6, name="dense")(x) + x @ a @ b), None


@pytest.mark.parametrize("axis", [0, 1])
def test_stacked_layers_are_one_kernel(axis, quick_compiles):
    model = nn.scan(
        Layer, variable_axes={"params": axis}, split_rngs={"params": True}, length=4
    )()
    params = model.init(jax.random.key(0), jnp.ones((7, 6)), None)["params"]
    error = lambda x, y: jnp.mean((x[:, :2] - y) ** 2)
    loss = lambda params, batch: error(
        model.apply({"params": params}, batch[0], None)[0], batch[1]
    )
    received = estimate(loss, params, BATCHES, kernels={"lora_a": "dense/kernel"})
    assert received["dense/kernel"].shape == ((4, 6, 6), (6, 4, 6))[axis]
    assert_mean_gradient(received, loss, params, BATCHES, ["dense/kernel"])


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("offload", [True, False])
def test_on_a_mesh_it_is_the_same_and_stays_sharded(offload, axis_type, quick_compiles):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(axis_type,))
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    width = {"up": normal(0, 6, 16), "down": normal(1, 16, 2)}
    params = {
        "up": {"kernel": put(width["up"], None, "x")},
        "down": {"kernel": put(width["down"], "x", None)},
    }
    out_sharding = NamedSharding(mesh, P()) if axis_type is AxisType.Explicit else None
    contract = functools.partial(jnp.einsum, "bh,ho->bo", out_sharding=out_sharding)

    def loss(params, batch):
        x, y = batch
        hidden = jnp.tanh(x @ params["up"]["kernel"])
        return jnp.mean((contract(hidden, params["down"]["kernel"]) - y) ** 2)

    batches = [tuple(put(x) for x in batch) for batch in BATCHES]
    with jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else mesh:
        received = estimate(
            loss, params, batches, kernels="kernel", offload=offload, at_once=1
        )
        paths = ["down/kernel", "up/kernel"]
        assert_mean_gradient(received, loss, params, batches, paths)
    if not offload:
        for name in ("down", "up"):
            sharding = params[name]["kernel"].sharding
            gradient = received[f"{name}/kernel"]
            assert isinstance(gradient, jax.Array)
            assert gradient.sharding.is_equivalent_to(sharding, 2)


PROCESS = """
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lorapro_jax.weights._estimate import estimate_gradients

jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, int(sys.argv[1]))
mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
sharding = NamedSharding(mesh, P("x"))
put = lambda x: jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])
rng = np.random.default_rng(0)
w, x = (rng.standard_normal(shape).astype("f") for shape in ((8, 6), (4, 8)))
loss = lambda params, x: jnp.mean((x @ params["kernel"]) ** 2)
expected = 2 * x.T @ (x @ w) / 24
for offload in (True, False):
    gradient = estimate_gradients(
        loss, {"kernel": put(w)}, [put(x)], kernels="k", offload=offload, progress=False
    )["kernel"]
    if offload:
        shards = [(gradient, expected)]
    else:
        shards = [(x.data, expected[x.index]) for x in gradient.addressable_shards]
        assert not gradient.is_fully_addressable
    for got, want in shards:
        np.testing.assert_allclose(got, want, atol=1e-5)
        assert np.abs(got + want).max() > 1e-2
print("the same", len(shards))
"""


def test_every_process_gets_all_of_a_gradient_or_its_shards():
    """Two processes with two devices each, and a kernel on all four."""
    port = free_port()
    processes = [start("-c", PROCESS, i, port, devices=2) for i in range(2)]
    for out in wait_for(*processes, seconds=120):
        assert out.splitlines()[-1:] == ["the same 2"]


# Peak memory


WIDTHS = {"a": (256, 512), "b": (512, 128), "c": (128, 256), "d": (256, 64)}
KIB, ROWS = 1024, 2


def deep_params():
    return {k: {"kernel": normal(0, *v) / v[0] ** 0.5} for k, v in WIDTHS.items()}


def deep_loss(params, x):
    for layer in params.values():
        x = jnp.tanh(x @ layer["kernel"])
    return jnp.mean(x**2)


@pytest.fixture
def programs(monkeypatch):
    """The programs that are made, each with all its arguments but the batch."""
    made, make = [], _estimate._program

    def record(*args):
        made.append(make(*args))
        return made[-1]

    monkeypatch.setattr(_estimate, "_program", record)
    return made


def test_one_at_once_holds_one_gradient_beyond_the_passes(programs):
    """XLA's own count of each program: temporaries and results.

    What the passes need is measured by the gradient of the input.
    """

    def needs(compiled, *args):
        memory = compiled.lower(*args).compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes

    params, x = deep_params(), normal(1, ROWS, 256)
    estimate(deep_loss, params, [x], kernels="kernel", at_once=1)
    estimate(deep_loss, params, [x], kernels="kernel")

    passes = needs(jax.jit(jax.value_and_grad(deep_loss, argnums=1)), params, x)
    *single, together = (needs(f.func, *f.args, x) - passes for f in programs)
    sizes = [4 * m * n for m, n in WIDTHS.values()]
    assert len(single) == len(sizes)
    # The compiler copies and frees activations in another order.
    activations = 4 * ROWS * (256 + sum(n for _, n in WIDTHS.values()))
    assert max(single) <= max(sizes) + 2 * activations
    # Negative control: all gradients at once are seen by this count.
    assert together > 0.9 * sum(sizes) > 1.5 * max(sizes)


@pytest.mark.parametrize("at_once", [1, None])
def test_gradients_are_freed_before_the_next_are_made(at_once):
    """All live arrays, counted by the host while each program runs."""
    params, seen = deep_params(), []
    live = lambda: sum(x.nbytes for x in jax.live_arrays())

    def loss(params, x):
        jax.debug.callback(lambda: seen.append(live()))
        return deep_loss(params, x)

    batches = [normal(i, 16, 256) for i in range(3)]
    before = live()
    sums = estimate(loss, params, batches, kernels="kernel", at_once=at_once)
    jax.effects_barrier()
    assert len(seen) == len(batches) * (4 if at_once else 1)
    # The program's own results may be counted, those of an earlier one must not be.
    own = [4 * m * n for m, n in WIDTHS.values()]
    assert max(seen) - before <= (max(own) if at_once else sum(own)) + 2 * KIB
    assert live() - before <= 2 * KIB
    assert sum(x.nbytes for x in sums.values()) == sum(own)


def test_control_the_count_sees_gradients_that_are_kept():
    params, x = deep_params(), normal(1, 16, 256)
    live = lambda: sum(x.nbytes for x in jax.live_arrays())
    before = live()
    sums = estimate(deep_loss, params, [x], kernels="kernel", offload=False)
    assert live() - before >= sum(x.nbytes for x in sums.values())


# Batches, programs, the bar


@pytest.mark.parametrize("at_once", [1, None])
def test_every_group_is_traced_once_and_a_generator_read_once(at_once):
    traces = []

    def loss(params, batch):
        traces.append(1)
        return loss_fn(params, batch)

    received = estimate(loss, lora_params(), iter(BATCHES), at_once=at_once)
    assert len(traces) == (2 if at_once else 1)
    want = estimate(loss_fn, lora_params(), BATCHES)
    for path in want:
        np.testing.assert_array_equal(received[path], want[path])


def test_parameters_stay_as_they_are():
    params = lora_params()
    before = jax.tree.map(np.array, params)
    estimate(loss_fn, params, BATCHES, offload=False)
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_leaves_that_are_no_arrays_stay_what_they_are():
    params = {"kernel": normal(0, 3, 2), "act": jnp.tanh, "power": 2, "none": None}

    def loss(params, x):
        assert isinstance(params["power"], int)
        return jnp.mean(params["act"](x @ params["kernel"]) ** params["power"])

    assert estimate(loss, params, [jnp.ones((1, 3))], kernels="k")["kernel"].any()


def test_the_bar_is_shown_unless_silenced(capsys):
    pytest.importorskip("rich")
    estimate_gradients(loss_fn, lora_params(), BATCHES)
    assert "gradients" in capsys.readouterr().out
    estimate_gradients(loss_fn, lora_params(), BATCHES, progress=False)
    assert capsys.readouterr().out == ""


def test_without_rich_there_is_no_bar_and_no_error(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    received = estimate_gradients(loss_fn, lora_params(), BATCHES)
    assert received["up/kernel"].any()
    assert capsys.readouterr().out == ""


# Errors


def spoiled(batch):
    x, y = BATCHES[batch]
    return [*BATCHES[:batch], (x.at[0, 0].set(jnp.nan), y), *BATCHES[batch + 1 :]]


@jax.custom_vjp
def overflowing(kernel):
    return kernel


overflowing.defvjp(lambda x: (x, None), lambda _, g: (g.at[0, 0].set(jnp.inf),))


def overflow_loss(params, batch):
    up = params["up"]
    return loss_fn({**params, "up": up | {"kernel": overflowing(up["kernel"])}}, batch)


def stopped_loss(params, batch):
    stop = lambda x: {**x, "kernel": jax.lax.stop_gradient(x["kernel"])}
    return loss_fn({k: stop(v) for k, v in params.items()}, batch)


def quantized(params):
    kernel = {"qvalue": jnp.ones((6, 9), jnp.int8), "scale": jnp.ones((1, 9))}
    return {**params, "up": params["up"] | {"kernel": {"array": kernel}}}


PARAMS = lora_params()
ERRORS = {
    "no batch": (loss_fn, PARAMS, [], {}, "`batches` is empty"),
    "loss": (loss_fn, PARAMS, spoiled(1), {}, "The loss of batch 1 .* is nan"),
    "gradient": (
        overflow_loss, PARAMS, BATCHES, {}, "`up/kernel` is not finite in batch 0",
    ),
    "vector": (
        lambda p, x: jnp.ones(3) * loss_fn(p, x), PARAMS, BATCHES, {},
        r"returned \(3,\)",
    ),
    "auxiliary": (
        lambda p, x: (loss_fn(p, x), 1.0), PARAMS, BATCHES, {}, "Return the mean loss"
    ),
    "stopped": (stopped_loss, PARAMS, BATCHES, {}, "zero in all 3 .*stop_gradient"),
    "path": (loss_fn, PARAMS, BATCHES, {"kernels": ["up"]}, "`up` .several leaves"),
    "unknown": (loss_fn, PARAMS, BATCHES, {"kernels": ["x"]}, "`x` of `kernels=`"),
    "bias": (loss_fn, PARAMS, BATCHES, {"kernels": ["up/bias"]}, r"float32 \(9,\)"),
    "nothing": (loss_fn, PARAMS, BATCHES, {"kernels": "weight"}, "No kernel .* 4 more"),
    "no pair": (
        loss_fn, {"kernel": jnp.ones((2, 2))}, BATCHES, {}, "choose with `kernels=`"
    ),
    "quantized": (loss_fn, quantized(PARAMS), BATCHES, {}, "on the unquantised model"),
    "at once": (loss_fn, PARAMS, BATCHES, {"at_once": 0}, "`at_once=0` has to be"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_kernel_or_the_batch(name):
    loss, params, batches, options, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        estimate(loss, params, batches, **options)


def test_under_jit_it_says_so():
    with pytest.raises(ValueError, match="outside of `jit`"):
        jax.jit(lambda params: estimate(loss_fn, params, BATCHES))(lora_params())


@pytest.mark.parametrize(
    "batch", [{"x": np.ones(3)}, (np.ones(3), np.ones(3)), np.ones(3)]
)
def test_one_batch_instead_of_several_is_an_error(batch):
    """Its parts or rows would count as batches."""
    params = {"kernel": np.ones((3, 3), np.float32)}
    loss = lambda params, batch: params["kernel"].sum()
    with pytest.raises(ValueError, match=r"Pass a list .*`\[batch\]`"):
        estimate_gradients(loss, params, batch, kernels="kernel", progress=False)
    estimate_gradients(loss, params, [batch], kernels="kernel", progress=False)
    with pytest.raises(ValueError, match="no regular expression"):
        estimate_gradients(loss, params, [batch], kernels="((", progress=False)
