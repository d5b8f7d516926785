"""LoRA-Pro in Keras 3 on JAX: a jitted loop over `stateless_call`.

    KERAS_BACKEND=jax python -m examples.recipes.keras_loop

Keras hands an optimizer a list of arrays without names, so the pairs come from
`keras_pairs(model)`, with each layer's own `lora_alpha / lora_rank` as scale.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import keras
import optax
from keras import layers

from examples.recipes import digits
from lorapro_jax import lorapro_adamw
from lorapro_jax.keras import keras_pairs

RANK, ALPHA = 4, 8


def attention_model() -> keras.Model:
    """Attention between the eight rows of an image `(64,)`, to logits `(10,)`."""
    images = keras.Input((64,))
    x = layers.Dense(32, name="embed")(layers.Reshape((8, 8))(images))
    y = layers.LayerNormalization(name="norm")(x)
    x = x + layers.MultiHeadAttention(4, key_dim=8, name="attention")(y, y)
    x = layers.Dense(64, activation="gelu", name="hidden")(layers.Flatten()(x))
    return keras.Model(images, layers.Dense(10, name="logits")(x))


def values(variables) -> list[jax.Array]:
    """What Keras's variables hold."""
    return [variable.value for variable in variables]


def write_back(variables, trained: list[jax.Array]) -> None:
    """Puts values that were trained outside into Keras's variables."""
    for variable, value in zip(variables, trained, strict=True):
        variable.assign(value)


def apply_with(model: keras.Model):
    """A function `(trainable, images) -> logits`; all else is as it is now."""
    frozen = values(model.non_trainable_variables)
    return lambda trainable, images: model.stateless_call(trainable, frozen, images)[0]


def new_model() -> keras.Model:
    """A pretrained model with adapters, the only ones to be trained."""
    keras.utils.set_random_seed(0)
    model = attention_model()
    trained = digits.pretrain(apply_with(model), values(model.trainable_variables))
    write_back(model.trainable_variables, trained)
    attention = model.get_layer("attention")
    dense = [model.get_layer(name) for name in ("embed", "hidden", "logits")]
    for layer in (attention.query_dense, attention.value_dense, *dense):
        layer.enable_lora(RANK, lora_alpha=ALPHA)
    for variable in model.trainable_variables:  # Keras would go on training biases
        variable.trainable = "lora" in variable.name
    return model


def fine_tune(model: keras.Model, steps: int, rate: float = 1e-2) -> None:
    """Trains the adapters on all ten digits."""
    train, _ = digits.load()
    apply = apply_with(model)
    rates = optax.cosine_decay_schedule(rate, steps)
    adamw = lorapro_adamw(rates, pairs=keras_pairs(model))
    tx = optax.chain(optax.clip_by_global_norm(1.0), adamw)

    @jax.jit
    def train_step(trainable, state, batch):
        loss = lambda x: digits.cross_entropy(apply(x, batch.images), batch.labels)
        updates, state = tx.update(jax.grad(loss)(trainable), state, trainable)
        return optax.apply_updates(trainable, updates), state

    trainable = values(model.trainable_variables)
    state = tx.init(trainable)
    for batch in digits.batches(train, steps):
        trainable, state = train_step(trainable, state, batch)
    write_back(model.trainable_variables, trainable)


def main(steps: int = 200) -> tuple[float, float]:
    """Fine-tunes, and returns the test loss before and after."""
    _, test = digits.load()
    model = new_model()
    before = model(test.images)
    fine_tune(model, steps)
    return digits.report(before, model(test.images), test.labels)


if __name__ == "__main__":
    main()
