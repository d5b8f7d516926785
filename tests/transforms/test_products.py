"""How products are asked for: what GPUs and TPUs need, and a CPU does not."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

from lorapro_jax import (
    initialize_adapters,
    lora_rite,
    lorapro,
    lorapro_adamw,
    merge_adapters,
    resize_adapters,
)
from lorapro_jax.algebra import _linalg
from lorapro_jax.diagnostics import step_metrics
from lorapro_jax.initializers import gora, lora_ga, lora_one, olora, pissa
from tests.support.meshes import random_tree
from tests.support.programs import equations, products

TRANSFORMS = {
    "lorapro": lambda: optax.chain(lorapro(), optax.adamw(1e-3)),
    "lorapro_adamw": lambda: lorapro_adamw(1e-3, weight_decay=0.1, nesterov=True),
    "lorapro_adamw, dense": lambda: lorapro_adamw(1e-3, moments="dense"),
    "lora_rite": lambda: lora_rite(1e-3, weight_decay=0.1),
}
each_transform = pytest.mark.parametrize("name", TRANSFORMS)
METHODS = (gora, lora_ga, lora_one, olora, pissa)


def layer():
    normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
    shapes = {"kernel": (600, 500), "lora_a": (600, 4), "lora_b": (4, 500)}
    return {name: normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}


def started(method):
    """A start, with all that any of them needs."""
    params, gradients = layer(), {"kernel": layer()["kernel"]}
    params["lora_b"] *= 0
    run = lambda *args: initialize_adapters(method(), *args, key=jax.random.key(0))
    return run, params, gradients


PROGRAMS = {
    "merging": lambda: (merge_adapters, layer()),
    "lower ranks": lambda: (lambda x: resize_adapters(x, 2).params, layer()),
    "higher ranks": lambda: (
        lambda x: resize_adapters(x, 6, key=jax.random.key(0)).params, layer()
    ),
    "metrics": lambda: (
        lambda x, y: step_metrics(x, y, x), random_tree(0), random_tree(1)
    ),
}  # fmt: skip
PROGRAMS |= {x.__name__: functools.partial(started, x) for x in METHODS}


@pytest.fixture
def usual_precision():
    """As users have it; on a GPU `conftest` asks for more."""
    with jax.default_matmul_precision(None):
        yield


def highest(product):
    return product.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2


def test_control_a_product_is_not_exact_by_itself(usual_precision):
    (product,) = products(jnp.matmul, jnp.ones((2, 2)), jnp.ones((2, 2)))
    assert not highest(product)


@each_transform
def test_every_product_of_an_update_is_at_the_highest_precision(name, usual_precision):
    params, tx = random_tree(0), TRANSFORMS[name]()
    found = products(tx.update, random_tree(1), tx.init(params), params)
    assert len(found) > 5
    assert all(map(highest, found))


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_other_product_is_at_the_highest_precision(name, usual_precision):
    found = products(*PROGRAMS[name]())
    assert found
    assert all(map(highest, found))


@pytest.mark.parametrize("on_gpu", [True, False])
@each_transform
def test_side_by_side_no_product_on_a_gpu_has_more_than_three_batch_axes(
    name, on_gpu, monkeypatch
):
    """Four are too many for the compiler of jax 0.11.2; the control has them."""
    monkeypatch.setattr(_linalg, "on_gpu", lambda: on_gpu)
    params, tx = random_tree(0), TRANSFORMS[name]()

    def update(grads, params):
        return tx.update(grads, tx.init(params), params)[0]

    lead = lambda tree: jax.tree.map(lambda x: jnp.stack([x, x])[None], tree)
    side_by_side = jax.vmap(jax.vmap(update))
    found = products(side_by_side, lead(random_tree(1)), lead(params))
    batches = [product.params["dimension_numbers"][1][0] for product in found]
    if on_gpu:
        assert max(map(len, batches)) <= 3
    elif name == "lorapro_adamw":
        assert max(map(len, batches)) > 3


def test_what_is_rounded_and_read_again_is_behind_a_barrier():
    """XLA leaves out a rounding that is only a conversion there and back, on GPUs."""
    narrow = layer() | {"lora_a": layer()["lora_a"].astype(jnp.bfloat16)}
    narrow["lora_b"] = jnp.zeros((4, 500), jnp.bfloat16)
    start = lambda x: initialize_adapters(pissa(), x, key=jax.random.key(0))
    resized = lambda x: resize_adapters(x, 2).params
    for run in (start, resized):
        names = [eqn.primitive.name for eqn in equations(run, narrow)]
        assert "optimization_barrier" in names
