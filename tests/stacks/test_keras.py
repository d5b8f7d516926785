"""Pairs and scales of Keras models are those of Keras's own forward pass."""

import os
import subprocess
import sys

os.environ.setdefault("KERAS_BACKEND", "jax")  # read when Keras is imported

import jax
import jax.numpy as jnp
import keras
import pytest
from keras import layers

from examples.recipes import keras_loop
from lorapro_jax import equivalent_gradient, lorapro
from lorapro_jax.keras import keras_pairs
from tests.support.layouts import RTOL, distance, random_like

pytestmark = pytest.mark.usefixtures("quick_compiles")

RANK, ALPHA = 2, 6


def built(layer, *shapes):
    layer.build(*shapes)
    return layer


def attention():
    return built(layers.MultiHeadAttention(3, 5, 4), (None, 6, 7), (None, 6, 7))


LAYERS = {
    "Dense": lambda: built(layers.Dense(5), (None, 7)),
    "EinsumDense": lambda: built(layers.EinsumDense("bd,dnh->bnh", (3, 5)), (None, 7)),
    "query": lambda: attention().query_dense,
    "value": lambda: attention().value_dense,
    "output": lambda: attention().output_dense,
    "Conv2D": lambda: built(layers.Conv2D(5, (2, 3)), (None, 6, 6, 7)),
    "Embedding": lambda: built(layers.Embedding(9, 5), (None, 4)),
}


class Scaled(layers.Layer):
    """The factors of a user's own LoRA layer, which says its scale if `declared`."""

    def __init__(self, declared):
        super().__init__()
        self.lora_enabled, self.lora_alpha, self.lora_rank = declared, ALPHA, RANK

    def build(self, shape):
        self.a = self.add_weight(name="lora_a", shape=(shape[-1], RANK))
        self.b = self.add_weight(name="lora_b", shape=(RANK, 5))


class Inner(layers.Layer):
    """Layers within a layer, which `model.layers` does not list."""

    def __init__(self):
        super().__init__()
        self.attention = layers.MultiHeadAttention(2, key_dim=3)
        self.project = layers.Dense(6)

    def call(self, x):
        return self.project(self.attention(x, x))


def submodel():
    x = keras.Input((4, 6))
    return keras.Model(x, layers.Dense(6, name="same")(x))


@pytest.fixture(scope="module")
def nested():
    """A model with adapters of different ranks and alphas, and its adapted layers."""
    x = keras.Input((4, 6))
    model = keras.Model(x, layers.Dense(3)(Inner()(submodel()(submodel()(x)))))
    _, first, second, inner, last = model.layers
    adapted = [first.get_layer("same"), second.get_layer("same")]
    adapted += [inner.attention.query_dense, inner.attention.output_dense]
    adapted += [inner.project, last]
    for number, layer in enumerate(adapted):
        layer.enable_lora(1 + number % 2, lora_alpha=3 + number)
    return model, adapted


@pytest.mark.parametrize("name", LAYERS)
def test_pair_and_scale_are_what_the_layer_computes(name):
    layer = LAYERS[name]()
    layer.enable_lora(RANK, lora_alpha=ALPHA)
    (pair,) = keras_pairs(layer)
    places = int(pair.a), int(pair.b)

    def weight(*factors):
        variables = [layer.trainable_variables[place] for place in places]
        with keras.StatelessScope(list(zip(variables, factors, strict=True))):
            return layer.embeddings if name == "Embedding" else layer.kernel

    values = tuple(layer.trainable_variables[place].value for place in places)
    factors, steps = random_like(values, seed=0), random_like(values, seed=1)
    _, due = jax.jvp(weight, factors, steps)
    change = lambda scale: equivalent_gradient(*factors, *steps, scale, pair=pair)
    tolerance = 8 * float(jnp.finfo(jnp.float32).eps)  # sums of 2·RANK products
    assert distance(change(pair.scale), due) < tolerance
    # Negative control: neither 1 nor alpha would do.
    for wrong in (1.0, ALPHA):
        assert distance(change(wrong), due) > 1e5 * tolerance


def test_nested_layers_with_equal_paths_have_their_own_pairs_and_scales(nested):
    model, adapted = nested
    variables = model.trainable_variables
    paths = [variable.path for variable in variables]
    assert len(set(paths)) < len(paths)  # a dict by path would not do
    for pair, layer in zip(keras_pairs(model), adapted, strict=True):
        assert variables[int(pair.a)] is layer.lora_kernel_a
        assert variables[int(pair.b)] is layer.lora_kernel_b
        assert pair.rank == layer.lora_rank
        assert pair.scale == layer.lora_alpha / layer.lora_rank


def test_pairs_follow_the_order_of_the_given_variables(nested):
    model = nested[0]
    backward = model.trainable_variables[::-1]
    mirror = lambda path: str(len(backward) - 1 - int(path))
    pairs, mirrored = keras_pairs(model), keras_pairs(model, backward)
    due = [x._replace(a=mirror(x.a), b=mirror(x.b)) for x in pairs[::-1]]
    assert mirrored == tuple(due) != pairs


def test_update_of_the_list_is_that_of_a_named_tree(nested):
    model, adapted = nested
    params = random_like([x.value for x in model.trainable_variables], seed=0)
    grads = random_like(params, seed=1)
    pairs = keras_pairs(model)

    def update(params, grads, **options):
        tx = lorapro(**options)
        return tx.update(grads, tx.init(params), params)[0]

    def named(leaves):
        return {
            f"layer{i}": {"lora_a": leaves[int(pair.a)], "lora_b": leaves[int(pair.b)]}
            for i, pair in enumerate(pairs)
        }

    alpha = {f"layer{i}/": layer.lora_alpha for i, layer in enumerate(adapted)}
    due = jax.tree.leaves(update(named(params), named(grads), alpha=alpha))
    got = jax.tree.leaves(named(update(params, grads, pairs=pairs)))
    # Negative control: the same factors without the layers' scales.
    plain = [(pair.a, pair.b) for pair in pairs]
    unscaled = jax.tree.leaves(named(update(params, grads, pairs=plain)))
    for x, y, other in zip(got, due, unscaled, strict=True):
        assert distance(x, y) < RTOL
        assert distance(other, y) > 100 * RTOL


def test_frozen_layers_are_left_out(nested):
    model, adapted = nested
    adapted[0].trainable = False
    frozen = keras_pairs(model)
    adapted[0].trainable = True
    assert (len(frozen), len(keras_pairs(model))) == (len(adapted) - 1, len(adapted))


def test_own_layers_count_once_they_say_their_scale():
    (pair,) = keras_pairs(built(Scaled(declared=True), (None, 7)))
    assert (pair.a, pair.b, pair.scale) == ("0", "1", ALPHA / RANK)
    with pytest.raises(ValueError, match=r"lora_a.*`lora_enabled = True`"):
        keras_pairs(built(Scaled(declared=False), (None, 7)))


def test_errors_say_what_to_do(nested):
    with pytest.raises(ValueError, match=r"functional.*enable_lora\(rank"):
        keras_pairs(submodel())
    model, adapted = nested
    factors = [adapted[0].lora_kernel_a, adapted[0].lora_kernel_b]
    with pytest.raises(ValueError, match="without its partner"):
        keras_pairs(model, factors[:1])
    with pytest.raises(ValueError, match=r"same/lora_kernel_a.* variable 0 and .* 2 "):
        keras_pairs(model, [*factors, factors[0]])
    with pytest.raises(ValueError, match=r"None of the 1 given.*Leave `variables` out"):
        keras_pairs(model, [adapted[0].bias])
    with pytest.raises(TypeError, match="not their values"):
        keras_pairs(model, [factor.value for factor in factors])
    assert len(keras_pairs(model, factors)) == 1  # control: these two are fine


def test_importing_it_does_not_load_keras():
    def loads_keras(modules):
        code = f"import sys, {modules}; print('keras' in sys.modules)"
        return subprocess.check_output([sys.executable, "-c", code]) == b"True\n"

    assert not loads_keras("lorapro_jax.keras")
    assert loads_keras("lorapro_jax.keras, keras")  # negative control


def test_recipe_lowers_the_test_loss_of_the_keras_model():
    before, after = keras_loop.main(steps=60)
    assert after < 0.5 * before
