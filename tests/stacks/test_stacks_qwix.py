"""Adapters that qwix puts into Flax models: names, shapes and alpha are qwix's own.

Its forward pass is `W + (alpha / rank) A B`, and alpha is kept nowhere in the tree.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lorapro_jax import lorapro
from tests.support.layouts import (
    DAMPING,
    assert_adjusted,
    assert_found,
    leaves_by_path,
    pair_at,
    random_like,
)

qwix = pytest.importorskip("qwix")
# What qwix still calls is deprecated in Flax.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:qwix.*"),
    pytest.mark.usefixtures("quick_compiles"),
]

RANK, ALPHA = 2, 6.0
EXPERTS, HEADS, SIZE = 4, 3, 5
PROVIDER = qwix.LoraProvider(module_path=".*", rank=RANK, alpha=ALPHA)


def qwix_pair(owner, a_axes, b_axes):
    names = ("kernel_lora_a", "kernel_lora_b")
    return pair_at(owner, a_axes, b_axes, ALPHA / RANK, names=names)


class Layers(nnx.Module):
    """One of each kind of layer that qwix adapts in NNX."""

    pairs = (
        qwix_pair("linear", "ir", "ro"),
        qwix_pair("general", "ir", "ro"),  # (7, 3, 5), flattened by qwix
        qwix_pair("q", "dr", "rnh"),
        qwix_pair("o", "nhr", "rd"),
        qwix_pair("conv", "kir", "ro"),
        qwix_pair("moe", "edr", "rf"),  # the experts share one B
    )

    def __init__(self, rngs):
        wide = HEADS * SIZE
        self.linear = nnx.Linear(6, 7, rngs=rngs)
        self.general = nnx.LinearGeneral(7, (HEADS, SIZE), rngs=rngs)
        self.q = nnx.Einsum("bd,dnh->bnh", (wide, HEADS, SIZE), rngs=rngs)
        self.o = nnx.Einsum("bnh,nhd->bd", (HEADS, SIZE, 8), rngs=rngs)
        self.conv = nnx.Conv(8, 6, (3,), rngs=rngs)
        self.moe = nnx.Einsum("ebd,edf->ebf", (EXPERTS, 6, 7), rngs=rngs)

    def __call__(self, x):
        x = self.general(nnx.tanh(self.linear(x)))
        x = self.o(nnx.tanh(self.q(x.reshape(len(x), -1))))
        x = self.conv(nnx.tanh(x)[None])[0]
        return self.moe(jnp.tile(nnx.tanh(x), (EXPERTS, 1, 1))).sum(0)


class Block(nn.Module):
    """One of each kind of layer that qwix adapts in Linen; attention is four."""

    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(HEADS, name="attention")(x, x)
        x = nn.DenseGeneral((2, SIZE), name="general")(x)
        x = nn.tanh(x).reshape(*x.shape[:-2], -1)
        return nn.Dense(6, name="dense")(x), None


class Scanned(nn.Module):
    axis: int

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            Block,
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=4,
        )
        return layers(name="layers")(x, None)[0]


def linen_pairs(owner, a_axes, b_axes):
    attention = [f"attention/{x}" for x in ("query", "key", "value", "out")]
    return tuple(
        qwix_pair(owner + layer, a_axes, b_axes)
        for layer in (*attention, "general", "dense")
    )


LINEN = {
    "one block": (Block(), linen_pairs("", "ir", "ro")),
    "scanned on axis 0": (Scanned(0), linen_pairs("layers/", "Lir", "Lro")),
    "scanned on axis 1": (Scanned(1), linen_pairs("layers/", "iLr", "rLo")),
}


@pytest.fixture(params=LINEN, scope="module")
def linen(request):
    model, pairs = LINEN[request.param]
    adapted = qwix.apply_lora_to_model(model, PROVIDER)
    params = jax.jit(adapted.init)(jax.random.key(0), normal(2, 5, 6))["params"]

    def loss(params):
        output = adapted.apply({"params": params}, normal(2, 5, 6, seed=1))
        output = output[0] if isinstance(output, tuple) else output
        return squared_error(output)

    return params, pairs, loss


@pytest.fixture(scope="module")
def layers():
    return qwix.apply_lora_to_model(
        Layers(nnx.Rngs(0)), PROVIDER, normal(9, 6), rngs=nnx.Rngs(1)
    )


def normal(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def squared_error(output):
    target = normal(*output.shape, seed=2)
    return jnp.mean((output - target) ** 2) * output.shape[-1]


def loss_of_layers(model):
    return squared_error(model(normal(9, 6, seed=1)))


def test_nnx_factors_are_read_as_qwix_contracts_them(layers):
    """Heads, kernel windows and experts are features, whichever factor has them."""
    assert_found(nnx.state(layers, nnx.LoRAParam), Layers.pairs, alpha=ALPHA)


def test_nnx_optimizer_applies_the_adjusted_gradients(layers):
    """With SGD at rate 1 a step is minus LoRA-Pro's gradient at s = alpha / r."""
    model = nnx.clone(layers)
    factors = random_like(nnx.state(model, nnx.LoRAParam), seed=3)
    nnx.update(model, factors)
    wrt = nnx.DiffState(0, nnx.LoRAParam)
    grads = nnx.jit(nnx.grad(loss_of_layers, argnums=wrt))(model)
    tx = optax.chain(lorapro(alpha=ALPHA, damping=DAMPING), optax.sgd(1.0))

    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    nnx.jit(lambda optimizer, *args: optimizer.update(*args))(optimizer, model, grads)

    after = nnx.state(model, nnx.LoRAParam)
    steps = jax.tree.map(jnp.subtract, factors, after)
    assert_adjusted(steps, grads, factors, Layers.pairs)


def test_linen_factors_are_read_as_qwix_flattened_them(linen):
    """qwix flattens the heads of Linen's attention; a scan stacks the layers."""
    params, pairs, _ = linen
    assert_found(params, pairs, alpha=ALPHA)


def test_linen_factors_get_the_adjusted_gradients(linen):
    """LoRA-Pro's gradient layer by layer; kernels beside the factors keep theirs."""
    params, pairs, loss = linen
    params = random_like(params, seed=4)
    grads = jax.jit(jax.grad(loss))(params)
    tx = lorapro(alpha=ALPHA, damping=DAMPING)

    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)

    assert_adjusted(updates, grads, params, pairs)


@pytest.mark.parametrize("linen", ["scanned on axis 1"], indirect=True)
def test_training_from_b_zero_lowers_the_loss(linen):
    """AdamW behind `lorapro()` on the factors, in a frozen scanned model."""
    params, _, loss = linen
    labels = jax.tree_util.tree_map_with_path(
        lambda path, _: "lora" if "_lora_" in path[-1].key else "frozen", params
    )
    chain = optax.chain(lorapro(alpha=ALPHA), optax.adamw(1e-2))
    tx = optax.partition({"lora": chain, "frozen": optax.set_to_zero()}, labels)

    @jax.jit
    def train_step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = tx.init(params), []
    for _ in range(40):
        params, state, value = train_step(params, state)
        losses.append(float(value))
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.8 * losses[0]


def test_the_scale_of_qwix_is_alpha_over_rank():
    """W(A, B) of a Linear, from its own forward pass: what `alpha=` stands for."""
    linear = nnx.Linear(6, 7, use_bias=False, rngs=nnx.Rngs(0))
    x = jnp.eye(6)
    adapted = qwix.apply_lora_to_model(linear, PROVIDER, x, rngs=nnx.Rngs(1))
    nnx.update(adapted, random_like(nnx.state(adapted, nnx.LoRAParam), seed=5))
    state = leaves_by_path(nnx.state(adapted, nnx.Param))

    delta = adapted(x) - state["kernel"]

    product = state["kernel_lora_a"] @ state["kernel_lora_b"]
    np.testing.assert_allclose(delta, ALPHA / RANK * product, atol=1e-5)
