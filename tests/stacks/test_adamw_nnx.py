"""`lorapro_adamw` in `nnx.Optimizer`, alone and with other parameters beside."""

from importlib.metadata import version

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from lorapro_jax import lorapro_adamw
from tests.support.layouts import leaves_by_path
from tests.support.nnx_stack import Stacked, loss_of

OLD_FLAX = tuple(map(int, version("flax").split(".")[:2])) < (0, 12)
pytestmark = [
    pytest.mark.usefixtures("quick_compiles"),
    # Its `nnx.Optimizer` cannot hold an `optax.MaskedNode`, also not of `optax.masked`.
    pytest.mark.skipif(OLD_FLAX, reason="needs flax 0.12"),
]

WRT = {"factors": nnx.LoRAParam, "factors and others": nnx.Param}
MODELS = {
    "one layer": lambda rngs: nnx.LoRALinear(6, 7, lora_rank=2, rngs=rngs),
    "stacked on axis 0": lambda rngs: Stacked(0, rngs),
    "stacked on axis 1": lambda rngs: Stacked(1, rngs),
}


def make(name):
    """A model whose B is 0, and data for it."""
    model, rng = MODELS[name](nnx.Rngs(0)), np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((16, 6)), jnp.float32)
    return model, (x, jnp.asarray(rng.standard_normal(model(x).shape), jnp.float32))


def step(model, optimizer, wrt, data):
    factors = nnx.DiffState(0, wrt)
    loss, grads = nnx.value_and_grad(loss_of, argnums=factors)(model, data)
    optimizer.update(model, grads)
    return loss, grads


def jitted(wrt):
    return nnx.jit(lambda model, optimizer, data: step(model, optimizer, wrt, data))


@pytest.mark.parametrize(
    ("name", "wrt", "moments"),
    [
        ("one layer", "factors and others", "factored"),
        ("one layer", "factors and others", "dense"),
        ("stacked on axis 0", "factors", "dense"),
        ("stacked on axis 1", "factors", "factored"),
    ],
)
def test_nnx_optimizer_takes_the_steps_of_a_plain_tree(name, wrt, moments):
    """`init` gets Variables, `update` bare arrays; MaskedNodes are in the state."""
    model, data = make(name)
    tx = lorapro_adamw(0.01, moments=moments, weight_decay=0.1)
    start = plain = leaves_by_path(nnx.clone(nnx.state(model, WRT[wrt])))
    state, update = tx.init(plain), jax.jit(tx.update)
    optimizer, jitted_step = nnx.Optimizer(model, tx, wrt=WRT[wrt]), jitted(WRT[wrt])

    for _ in range(3):
        _, grads = jitted_step(model, optimizer, data)
        updates, state = update(leaves_by_path(grads), state, plain)
        plain = optax.apply_updates(plain, updates)

    received = leaves_by_path(nnx.state(model, WRT[wrt]))
    chex.assert_trees_all_close(received, plain, rtol=1e-3, atol=1e-5)
    for path, x in start.items():  # negative control: every leaf did move
        assert jnp.abs(received[path] - x).max() > 1e-3, path


@pytest.mark.parametrize(
    ("wrt", "moments"), [("factors", "factored"), ("factors and others", "dense")]
)
def test_jitted_training_step_lowers_the_loss_and_compiles_once(wrt, moments):
    model, data = make("one layer")
    tx = lorapro_adamw(0.01, moments=moments)
    optimizer, traces = nnx.Optimizer(model, tx, wrt=WRT[wrt]), []

    @nnx.jit
    def train(model, optimizer, data):
        traces.append(1)
        return step(model, optimizer, WRT[wrt], data)[0]

    losses = [train(model, optimizer, data) for _ in range(10)]

    assert losses[-1] < 0.95 * losses[0]
    assert len(traces) == 1


def test_nnx_optimizer_goes_on_bit_by_bit_from_an_orbax_checkpoint(tmp_path):
    def start():
        model, data = make("one layer")
        tx = lorapro_adamw(0.01, moments="factored")
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param), data

    model, optimizer, data = start()
    train = jitted(nnx.Param)
    for _ in range(2):
        train(model, optimizer, data)
    restored, restored_optimizer, _ = start()
    state = lambda *modules: dict(zip("mo", map(nnx.state, modules), strict=True))

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", state(model, optimizer))
        checkpointer.wait_until_finished()
        template = state(restored, restored_optimizer)
        saved = checkpointer.restore(tmp_path / "run", template)
    nnx.update(restored, saved["m"])
    nnx.update(restored_optimizer, saved["o"])

    for x, y in ((model, optimizer), (restored, restored_optimizer)):
        train(x, y, data)
    expected, received = (leaves_by_path(nnx.state(x)) for x in (model, restored))
    chex.assert_trees_all_equal(received, expected)
