"""What each method promises of W0 and s B A, as the layer itself computes it.

The oracle is float64 NumPy on matrices in the paper's layout, outputs by inputs, which
the tests take off the kernels by what they know of each model. Nothing here uses the
package's own reading of kernels.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorapro_jax import LoRAPair, find_pairs, initialize_adapters, initialize_model
from lorapro_jax.initializers import gora, lora, lora_ga, lora_one, olora, pissa
from tests.support.layers import (
    MODELS,
    RANK,
    TOLERANCE,
    Layers,
    gradients_of,
    normal,
    of_linen,
    of_nnx,
    replaced,
)
from tests.support.layouts import distance, leaves_by_path

# What qwix still calls is deprecated in Flax.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:qwix.*"),
    pytest.mark.usefixtures("quick_compiles"),
]

KEY = jax.random.key(3)
WIDTH = 6
METHODS = {x.name: x for x in (lora(), lora_ga(), gora(), lora_one(), pissa(), olora())}
ORDERS = ["in,out", "out,in"]


# The promises: s B A as each method has it, and whether W0 gives it away.


def truncated(x, rank):
    u, s, vt = np.linalg.svd(x)
    return u[:, :rank] * s[:rank] @ vt[:rank]


def promised(name, w, g, a, scale):
    """s B A, from W0, G and A: m×n, m×n and r×n. None where signs are free."""
    rank, inputs = a.shape
    if name == "lora":
        return 0 * w
    if name == "gora":
        return -0.05 * (inputs / rank) ** 0.5 * g @ np.linalg.pinv(a) @ a
    if name == "lora_one":
        return -abs(scale) * truncated(g, rank) / np.linalg.norm(g, 2) / 128
    if name == "pissa":
        return truncated(w, rank)
    q = np.linalg.qr(w)[0][:, :rank]
    return scale * q @ q.T @ w if name == "olora" else None


def assert_promised(name, product, w, g, a, scale):
    """The product s B A of one layer is what the method says."""
    want = promised(name, w, g, a, scale)
    if want is None:  # LoRA-GA: A = c V_Iᵀ and B = c U_J, each up to its signs
        u, _, vt = np.linalg.svd(g)
        size = scale * len(g) ** 0.5 / 16
        inner = u[:, RANK : 2 * RANK].T @ product @ vt[:RANK].T / size
        np.testing.assert_allclose(abs(inner), np.eye(RANK), atol=TOLERANCE)
        want = size * u[:, RANK : 2 * RANK] @ inner @ vt[:RANK]
    size = max(abs(want).max(), 1e-3)
    np.testing.assert_allclose(product, want, atol=TOLERANCE * size)


# Models whose kernels are stored in either order: GPT-2's Conv1D, and Dense.


class Projection(nn.Module):
    """A linear layer with its adapter, as users write it after FlaxConv1D or Dense."""

    features: int
    order: str
    scale: float

    @nn.compact
    def __call__(self, x):
        sides = (x.shape[-1], self.features)
        shape = sides if self.order == "in,out" else sides[::-1]
        kernel = self.param("kernel", nn.initializers.normal(1.0), shape)
        bias = self.param("bias", nn.initializers.normal(1.0), (self.features,))
        a = self.param("lora_a", nn.initializers.normal(1.0), (x.shape[-1], RANK))
        b = self.param("lora_b", nn.initializers.zeros, (RANK, self.features))
        kernel = kernel if self.order == "in,out" else kernel.T
        return x @ kernel + bias + self.scale * (x @ a) @ b


class Attention(nn.Module):
    order: str
    scale: float

    @nn.compact
    def __call__(self, x):
        x = Projection(2 * WIDTH, self.order, self.scale, name="c_attn")(x)
        x = jnp.tanh(x[..., :WIDTH]) * x[..., WIDTH:]
        return Projection(WIDTH, self.order, self.scale, name="c_proj")(x)


def linen(order, scale):
    kernels = {"c_attn/kernel": order, "c_proj/kernel": order}
    return of_linen(
        Attention(order, scale), normal(9, WIDTH, seed=1), kernels, scale=scale
    )


class Affine(nnx.Module):
    """Conv1D of GPT-2 in NNX, or Dense."""

    def __init__(self, inputs, outputs, order, rngs):
        sides = (inputs, outputs)
        shape = sides if order == "in,out" else sides[::-1]
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), shape))
        self.bias = nnx.Param(jnp.ones(outputs))
        self.order = order

    def __call__(self, x):
        kernel = self.kernel[...]
        return x @ (kernel if self.order == "in,out" else kernel.T) + self.bias


class Block(nnx.Module):
    def __init__(self, order, rngs):
        attn, proj = (Affine(WIDTH, x, order, rngs) for x in (2 * WIDTH, WIDTH))
        wrap = lambda base, outputs: nnx.LoRA(
            WIDTH, RANK, outputs, base_module=base, rngs=rngs
        )
        self.c_attn, self.c_proj = wrap(attn, 2 * WIDTH), wrap(proj, WIDTH)

    def __call__(self, x):
        x = self.c_attn(x)
        return self.c_proj(jnp.tanh(x[..., :WIDTH]) * x[..., WIDTH:])


def wrapped(order, scale):
    """`nnx.LoRA` has no scale: s = 1."""
    kernels = {f"{x}/base_module/kernel": order for x in ("c_attn", "c_proj")}
    return of_nnx(Block(order, nnx.Rngs(0)), normal(9, WIDTH, seed=1), kernels)


def torch(order, scale):
    """PyTorch's GPT-2 and Llama with PEFT: A r×n and B m×r, beside `weight`."""
    params = {}
    for seed, (name, outputs) in enumerate({"c_attn": 12, "c_proj": 6}.items()):
        sides = (WIDTH, outputs) if order == "in,out" else (outputs, WIDTH)
        params |= {
            f"{name}.base_layer.weight": normal(*sides, seed=seed),
            f"{name}.base_layer.bias": normal(outputs, seed=seed),
            f"{name}.lora_A.default.weight": normal(RANK, WIDTH, seed=seed),
            f"{name}.lora_B.default.weight": jnp.zeros((outputs, RANK)),
        }

    def apply(params):
        def layer(name, x):
            kinds = "base_layer.weight", "base_layer.bias"
            w, bias = (params[f"{name}.{kind}"] for kind in kinds)
            a, b = (params[f"{name}.lora_{x}.default.weight"] for x in "AB")
            w = w if order == "in,out" else w.T
            return x @ w + bias + scale * x @ a.T @ b.T

        x = layer("c_attn", normal(9, WIDTH, seed=1))
        return layer("c_proj", jnp.tanh(x[..., :WIDTH]) * x[..., WIDTH:])

    kernels = {f"{name}/base_layer/weight": order for name in ("c_attn", "c_proj")}
    return Layers(params, apply, kernels, {"scale": scale})


def matrix(x, order):
    """m×n, float64."""
    x = np.asarray(x, np.float64)
    return x.T if order == "in,out" else x


def a_matrix(x):
    """r×n, float64, of an A in any of these stacks."""
    x = np.asarray(x, np.float64)
    return x if x.shape[0] == RANK else x.T


STACKS = {"linen": linen, "nnx": wrapped, "torch": torch}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("stack", STACKS)
def test_a_layer_of_either_order_starts_as_the_method_says(stack, order, name):
    """The square kernel too, at a positive and at a negative scale."""
    for scale in (1.5, -0.5) if stack != "nnx" else (1.0,):
        made = STACKS[stack](order, scale)
        gradients = gradients_of(made.params, made.kernels)
        before = leaves_by_path(made.params)

        new = initialize_adapters(
            METHODS[name], made.params, gradients, key=KEY, **made.options
        )

        after, due = leaves_by_path(new), {}
        pairs = find_pairs(new)
        assert len(pairs) == len(made.kernels)
        for pair, (path, _) in zip(pairs, made.kernels.items(), strict=True):
            w, g = (matrix(x[path], order) for x in (before, gradients))
            a, b = after[pair.a], after[pair.b]
            b = b if stack != "torch" else b.T
            product = scale * np.asarray(b, np.float64).T @ a_matrix(a)
            assert_promised(name, product, w, g, a_matrix(a), scale)
            total = w if METHODS[name].changes_weight else w + product
            due[path] = jnp.asarray(
                total.T if order == "in,out" else total, jnp.float32
            )
        # The forward pass is that of the promised weights, without adapters.
        off = {pair.b: 0 * before[pair.b] for pair in pairs}
        want = made.apply(replaced(made.params, due | off))
        assert distance(made.apply(new), want) < TOLERANCE
        # Negative control: it is not with the square kernel turned.
        square = next(x for x in made.kernels if "c_proj" in x)
        turned = made.apply(replaced(made.params, due | off | {square: due[square].T}))
        assert distance(turned, want) > 20 * TOLERANCE


@pytest.mark.parametrize(
    "layout",
    [
        "nnx", "nnx, stacked on axis 1", "linen, scanned on axis 1", "qwix, nnx",
        "PEFT", "gemma", "Keras, query",
    ],
)  # fmt: skip
def test_methods_that_move_a_layer_move_it_as_they_say(layout):
    """LoRA-One on every kind of kernel, its matrices read off the test's letters."""
    made = MODELS[layout]()
    leaves, gradients = (
        leaves_by_path(made.params),
        gradients_of(made.params, made.kernels),
    )
    pairs = find_pairs(made.params, **made.options)
    scale = float(pairs[0].scale)
    due = {pair.b: 0 * leaves[pair.b] for pair in pairs}
    for path, (letters, inputs) in made.kernels.items():
        stack = "".join(x for x in letters if x.isupper())
        outputs = "".join(x for x in letters if x not in stack + inputs)
        paper = f"{stack}{outputs}{inputs}"
        g = np.einsum(f"{letters}->{paper}", np.asarray(gradients[path], np.float64))
        depth = len(stack)
        layers = int(np.prod(g.shape[:depth]))
        rows = int(np.prod(g.shape[depth : depth + len(outputs)]))
        change = [
            promised("lora_one", x, x, np.zeros((RANK, x.shape[1])), scale)
            for x in g.reshape(layers, rows, -1)
        ]
        change = np.einsum(f"{paper}->{letters}", np.reshape(change, g.shape))
        due[path] = leaves[path] + jnp.asarray(change, jnp.float32)
    want = made.apply(replaced(made.params, due))

    new = initialize_adapters(
        METHODS["lora_one"], made.params, gradients, key=KEY, **made.options
    )

    assert distance(made.apply(new), want) < TOLERANCE
    off = {pair.b: 0 * leaves[pair.b] for pair in pairs}
    plain = made.apply(replaced(made.params, off))
    assert distance(plain, want) > 2 * TOLERANCE  # control: it moved


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("axis", [0, 1])
def test_each_layer_of_a_stack_starts_with_its_own_scale(axis, name):
    """One s for each layer, signs included; against each layer alone in NumPy."""
    scales = np.array([2.0, -0.5, 7.0])
    shapes = {"kernel": (WIDTH, 8), "lora_a": (WIDTH, RANK), "lora_b": (RANK, 8)}
    draw = lambda x: normal(*np.insert(shapes[x], axis, 3), seed=len(x))
    layer = {"kernel": draw("kernel"), "lora_a": draw("lora_a")}
    layer["lora_b"] = 0 * draw("lora_b")
    gradients = {"kernel": 3 * draw("kernel")[::-1]}
    at = dict.fromkeys(("a_batch_axes", "b_batch_axes"), (axis,))
    pair = LoRAPair("lora_a", "lora_b", 2, 1 if axis == 0 else 0, **at, scale=scales)

    new = initialize_adapters(METHODS[name], layer, gradients, key=KEY, pairs=[pair])

    for i, scale in enumerate(scales):
        of = lambda x: np.take(np.asarray(x, np.float64), i, axis)  # noqa: B023
        w, g = of(layer["kernel"]).T, of(gradients["kernel"]).T
        a, b = of(new["lora_a"]).T, of(new["lora_b"]).T
        assert_promised(name, scale * b @ a, w, g, a, scale)
        kept = of(new["kernel"]).T
        if METHODS[name].changes_weight:
            assert distance(kept + scale * b @ a, w) < TOLERANCE
        else:
            np.testing.assert_array_equal(kept, w)
    # The same from an argument, and not the same from one scale for all.
    again = initialize_adapters(
        METHODS[name], layer, gradients, key=KEY, pairs=[pair._replace(scale=None)],
        scale=jnp.asarray(scales),
    )  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, again, new)
    if name not in ("lora", "lora_ga"):
        one = initialize_adapters(
            METHODS[name], layer, gradients, key=KEY,
            pairs=[pair._replace(scale=2.0)],
        )  # fmt: skip
        assert distance(one["lora_b"], new["lora_b"]) > 0.1 or name == "olora"


def square_model(base):
    """A square layer of some class in `nnx.LoRA`, with nothing beside it."""
    return nnx.LoRA(WIDTH, RANK, WIDTH, base_module=base, rngs=nnx.Rngs(1))


def test_the_classes_of_an_nnx_model_prove_the_order_of_its_kernels():
    """Its state alone does not."""
    model = square_model(nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0)))
    x = normal(9, WIDTH)
    before = model(x)
    with pytest.raises(ValueError, match="no other leaf called `kernel` proves"):
        initialize_adapters(pissa(), nnx.state(model), key=KEY)
    initialize_model(METHODS["pissa"], model, key=KEY)
    assert distance(model(x), before) < TOLERANCE
    assert (model.lora_b[...] != 0).any()


def test_a_class_of_the_users_own_proves_nothing():
    """And the remedy starts it rightly."""
    model = square_model(Affine(WIDTH, WIDTH, "out,in", nnx.Rngs(0)))
    x = normal(9, WIDTH)
    before = model(x)
    with pytest.raises(ValueError, match=r"kernels={'lora_a': \(path, input axes"):
        initialize_model(METHODS["pissa"], model, key=KEY)
    np.testing.assert_array_equal(model(x), before)
    kernels = {"lora_a": ("base_module/kernel", (1,), (0,))}
    initialize_model(METHODS["pissa"], model, key=KEY, kernels=kernels)
    assert distance(model(x), before) < TOLERANCE
