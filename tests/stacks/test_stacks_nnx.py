"""Adapters made with Flax NNX: `nnx.LoRA` and `nnx.LoRALinear` in real models."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lorapro_jax import find_pairs, lorapro, lorapro_adamw
from tests.support.layouts import (
    DAMPING,
    assert_adjusted,
    assert_found,
    leaves_by_path,
    pair_at,
    random_like,
)
from tests.support.nnx_stack import RANK, Stacked, loss_of

pytestmark = pytest.mark.usefixtures("quick_compiles")

List = getattr(nnx, "List", list)  # before Flax 0.12 a plain list of modules does


class Model(nnx.Module):
    """A LoRALinear, an `nnx.LoRA` around a Linear, and a list of bare adapters."""

    pairs = (
        pair_at("q/lora", "ir", "ro"),
        pair_at("mlp", "ir", "ro"),
        pair_at("layers/0", "ir", "ro"),
        pair_at("layers/1", "ir", "ro"),
    )

    def __init__(self, rngs):
        base = nnx.Linear(7, 5, rngs=rngs)
        self.q = nnx.LoRALinear(6, 7, lora_rank=RANK, rngs=rngs)
        self.mlp = nnx.LoRA(7, RANK, 5, base_module=base, rngs=rngs)
        self.layers = List([nnx.LoRA(5, RANK, 5, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        x = self.mlp(jnp.tanh(self.q(x)))
        for layer in self.layers:
            x = x + jnp.tanh(layer(x))
        return x


MODELS = {
    "modules": Model,
    "stacked on axis 0": lambda rngs: Stacked(0, rngs),
    "stacked on axis 1": lambda rngs: Stacked(1, rngs),
}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param](nnx.Rngs(0))


@pytest.fixture
def data(model):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((16, 6)), jnp.float32)
    size = model(x).shape[-1]
    return x, jnp.asarray(rng.standard_normal((16, size)), jnp.float32)


def away_from_zero(model, seed):
    """A model whose adapters have trained for a while: no B is 0."""
    nnx.update(model, random_like(nnx.state(model, nnx.LoRAParam), seed))
    return model


@pytest.mark.parametrize("wrt", [nnx.LoRAParam, nnx.Param])
def test_nnx_optimizer_applies_the_adjusted_gradients(model, data, wrt):
    """With SGD at rate 1 a step is minus LoRA-Pro's gradient, of factors only."""
    away_from_zero(model, seed=2)
    grads = _gradients(model, data, wrt)
    before = nnx.clone(nnx.state(model, wrt))  # the optimizer writes into Variables
    tx = optax.chain(lorapro(damping=DAMPING), optax.sgd(1.0))

    optimizer = nnx.Optimizer(model, tx, wrt=wrt)
    optimizer.update(model, grads)

    steps = jax.tree.map(jnp.subtract, before, nnx.state(model, wrt))
    assert_adjusted(steps, grads, before, model.pairs)


@pytest.mark.parametrize("wrt", [nnx.LoRAParam, nnx.Param])
def test_init_and_update_of_nnx_optimizer_show_the_same_pairs(model, data, wrt):
    """`init` gets Variables and `update` bare arrays; the pairs have one name."""
    seen = []
    spy = optax.GradientTransformation(
        init=lambda params: seen.append(params) or optax.EmptyState(),
        update=lambda updates, state, _: seen.append(updates) or (updates, state),
    )
    grads = _gradients(model, data, wrt)
    nnx.Optimizer(model, spy, wrt=wrt).update(model, grads)

    at_init, at_update = seen
    assert find_pairs(at_init) == find_pairs(at_update)
    for tree in seen:
        assert_found(tree, model.pairs)


@pytest.mark.parametrize("gauge", ["sylvester", "symmetric", "zero"])
def test_a_split_state_goes_through_plain_optax(model, data, gauge):
    """`nnx.split`, keyword arguments and `nnx.merge`, as EasyDeL trains."""
    away_from_zero(model, seed=3)
    graph, factors, rest = nnx.split(model, nnx.LoRAParam, ...)
    loss = lambda factors: loss_of(nnx.merge(graph, factors, rest), data)
    grads = jax.grad(loss)(factors)
    tx = lorapro(damping=DAMPING, gauge=gauge)

    update = jax.jit(tx.update)
    updates, _ = update(updates=grads, state=tx.init(factors), params=factors)

    assert jax.tree.structure(updates) == jax.tree.structure(factors)
    assert_found(factors, model.pairs)
    assert_adjusted(updates, grads, factors, model.pairs, gauge=gauge)


def test_the_base_model_may_be_bfloat16():
    """`param_dtype=bfloat16` leaves the adapter in float32, and so does a step."""
    module = nnx.LoRALinear(
        6, 7, lora_rank=RANK, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(4)
    )
    params = nnx.state(away_from_zero(module, seed=4), nnx.Param)
    grads = random_like(params, seed=5)
    updates, _ = lorapro().update(grads, lorapro().init(params), params)

    dtypes = {path: x.dtype for path, x in leaves_by_path(updates).items()}
    assert dtypes["kernel"] == jnp.bfloat16
    assert dtypes["lora/lora_a"] == dtypes["lora/lora_b"] == jnp.float32


@pytest.mark.parametrize("wrt", [nnx.LoRAParam, nnx.Param])
def test_training_from_b_zero_lowers_the_loss(model, data, wrt):
    """`chain(lorapro(), adamw)` under `nnx.jit`, from Flax's own initial values."""
    tx = optax.chain(lorapro(), optax.adamw(1e-2))
    optimizer = nnx.Optimizer(model, tx, wrt=wrt)

    @nnx.jit
    def train_step(model, optimizer):
        value, grads = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, wrt))(
            model, data
        )
        optimizer.update(model, grads)
        return value

    losses = [float(train_step(model, optimizer)) for _ in range(40)]
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.8 * losses[0]


def _gradients(model, data, wrt):
    grad = nnx.grad(loss_of, argnums=nnx.DiffState(0, wrt))
    return grad(model, data)


def test_lorapro_adamw_trains_with_its_state_beside_the_model():
    """The way with Flax before 0.12, whose `nnx.Optimizer` cannot hold the state."""
    model, tx = (
        nnx.LoRALinear(6, 5, lora_rank=RANK, rngs=nnx.Rngs(0)),
        lorapro_adamw(0.1),
    )
    factors = lambda model: nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((16, 6)), jnp.float32)

    @nnx.jit
    def train_step(model, state):
        loss_fn = lambda model: jnp.mean((model(x) - 1) ** 2)
        on_factors = nnx.DiffState(0, nnx.LoRAParam)
        loss, grads = nnx.value_and_grad(loss_fn, argnums=on_factors)(model)
        params = factors(model)
        updates, state = tx.update(nnx.to_pure_dict(grads), state, params)
        nnx.update(model, optax.apply_updates(params, updates))
        return loss, state

    kernel, state, losses = model.kernel[...], tx.init(factors(model)), []
    for _ in range(10):
        loss, state = train_step(model, state)
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]
    assert (model.kernel[...] == kernel).all()
