"""Adapters in Flax Linen modules, beside their frozen kernels in one `params` dict."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

from lorapro_jax import lorapro
from tests.support.layouts import (
    DAMPING,
    assert_adjusted,
    assert_found,
    leaves_by_path,
    pair_at,
    random_like,
)

pytestmark = pytest.mark.usefixtures("quick_compiles")

RANK, ALPHA = 2, 6.0
SCALE = ALPHA / RANK


class LoRADense(nn.Module):
    """A Dense layer with its adapter, as users write it; perhaps with boxed params."""

    features: int
    boxed: str = ""

    @nn.compact
    def __call__(self, x):
        kernel = self._param("kernel", nn.initializers.lecun_normal(), x, "io")
        a = self._param("lora_a", nn.initializers.he_uniform(), x, "ir")
        b = self._param("lora_b", nn.initializers.zeros, x, "ro")
        return x @ kernel + SCALE * (x @ a) @ b

    def _param(self, name, init, x, axes):
        sizes = {"i": x.shape[-1], "r": RANK, "o": self.features}
        box = {
            "partitioned": nn.with_partitioning,
            "logical": nn.with_logical_partitioning,
        }.get(self.boxed)
        init = box(init, tuple(axes)) if box else init
        return self.param(name, init, [sizes[x] for x in axes])


class Model(nn.Module):
    """Two adapted layers and a trained head without an adapter."""

    boxed: str = ""
    pairs = (pair_at("up", "ir", "ro", SCALE), pair_at("down", "ir", "ro", SCALE))

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(LoRADense(7, self.boxed, name="up")(x))
        x = nn.tanh(LoRADense(6, self.boxed, name="down")(x))
        return nn.Dense(3, name="head")(x)


class Block(nn.Module):
    boxed: str = ""

    @nn.compact
    def __call__(self, x, _):
        hidden = nn.tanh(LoRADense(7, self.boxed, name="up")(x))
        return x + LoRADense(6, self.boxed, name="down")(hidden), None


class Scanned(nn.Module):
    """Four blocks in one set of arrays, stacked by `nn.scan` along `axis`."""

    axis: int
    boxed: str = ""

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            Block,
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=4,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = layers(self.boxed, name="layers")(x, None)
        return nn.Dense(3, name="head")(x)

    @property
    def pairs(self):
        axes = ("Lir", "Lro") if self.axis == 0 else ("iLr", "rLo")
        return tuple(pair_at(f"layers/{x}", *axes, SCALE) for x in ("up", "down"))


MODELS = {
    "modules": Model(),
    "boxed": Model("logical"),
    "scanned on axis 0": Scanned(0),
    "scanned on axis 1": Scanned(1),
    "scanned on axis 1, boxed": Scanned(1, "partitioned"),
}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]


@pytest.fixture
def data():
    rng = np.random.default_rng(1)
    shapes = (16, 6), (16, 3)
    return tuple(jnp.asarray(rng.standard_normal(x), jnp.float32) for x in shapes)


def loss_of(params, apply_fn, data):
    x, y = data
    return jnp.mean((apply_fn({"params": params}, x) - y) ** 2) * y.shape[-1]


@jax.jit
def gradients(state, data):
    return jax.grad(loss_of)(state.params, state.apply_fn, data)


def labels(params):
    """Only the adapters train."""
    is_factor = lambda path, _: "lora_" in jax.tree_util.keystr(path)
    return jax.tree_util.tree_map_with_path(
        lambda *leaf: "lora" if is_factor(*leaf) else "frozen", params
    )


def outside(inner, **options):
    """`lorapro()` sees the whole tree, then a partition trains the factors."""
    groups = {"lora": inner, "frozen": optax.set_to_zero()}
    return optax.chain(lorapro(alpha=ALPHA, **options), optax.partition(groups, labels))


def inside(inner, **options):
    """The whole chain belongs to the group of the factors."""
    chain = optax.chain(lorapro(alpha=ALPHA, **options), inner)
    return optax.partition({"lora": chain, "frozen": optax.set_to_zero()}, labels)


def make_state(model, data, tx, *, seed=None):
    """A TrainState with Flax's initial values, or random ones."""
    params = model.init(jax.random.key(0), data[0])["params"]
    params = params if seed is None else random_like(params, seed)
    return TrainState.create(apply_fn=model.apply, params=params, tx=tx)


def test_the_model_is_read_as_it_was_written(model, data):
    """Boxes and scans change paths and shapes, but not what belongs together."""
    state = make_state(model, data, optax.identity())
    assert_found(state.params, model.pairs, alpha=ALPHA)


@pytest.mark.parametrize("chain", [inside, outside])
def test_a_partitioned_train_state_applies_the_adjusted_gradients(model, data, chain):
    """With SGD at rate 1 a step is minus LoRA-Pro's gradient, and frozen means 0."""
    tx = chain(optax.sgd(1.0), damping=DAMPING)
    before = make_state(model, data, tx, seed=2)
    grads = gradients(before, data)

    after = jax.jit(TrainState.apply_gradients)(before, grads=grads)

    steps = jax.tree.map(jnp.subtract, before.params, after.params)
    chex.assert_trees_all_equal_structs(before.params, after.params)
    of_factors = lambda tree: {
        path: x for path, x in leaves_by_path(tree).items() if "lora_" in path
    }
    assert_adjusted(*map(of_factors, (steps, grads, before.params)), model.pairs)
    for path in leaves_by_path(steps).keys() - of_factors(steps).keys():
        assert not leaves_by_path(steps)[path].any(), path
        assert leaves_by_path(grads)[path].any(), path  # there was something to freeze


def test_leaves_beside_the_adapters_keep_their_gradients(model, data):
    """Without a partition, kernels and biases come back as the same objects."""
    tx = lorapro(alpha=ALPHA, damping=DAMPING)
    state = make_state(model, data, tx, seed=3)
    grads = gradients(state, data)

    updates, _ = tx.update(grads, state.opt_state, state.params)

    assert_adjusted(updates, grads, state.params, model.pairs)
    before, after = leaves_by_path(grads), leaves_by_path(updates)
    others = [path for path in before if "lora_" not in path]
    assert others
    assert all(after[path] is before[path] for path in others)


@pytest.mark.parametrize("chain", [inside, outside])
@pytest.mark.parametrize("model", ["modules", "scanned on axis 1"], indirect=True)
def test_training_from_b_zero_lowers_the_loss(model, data, chain):
    """AdamW behind `lorapro()` under `jax.jit`, from Flax's own initial values."""

    @jax.jit
    def train_step(state):
        value, grads = jax.value_and_grad(loss_of)(state.params, state.apply_fn, data)
        return state.apply_gradients(grads=grads), value

    state = make_state(model, data, chain(optax.adamw(1e-2)))
    losses = []
    for _ in range(40):
        state, value = train_step(state)
        losses.append(float(value))
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.8 * losses[0]
