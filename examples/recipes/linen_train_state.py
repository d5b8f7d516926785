"""Flax Linen: your own LoRA layer, a `TrainState`, and frozen base weights.

    python -m examples.recipes.linen_train_state

For models whose adapters you wrote yourself, beside the base weights in one `params`
dict. Your forward pass multiplies by s, here alpha / rank = 16 / 4 = 4, so tell
`lorapro_adamw` the same: `alpha=16`, or `scale=4`. `optax.partition` freezes the rest.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict, path_aware_map, unflatten_dict

from examples.recipes import digits
from lorapro_jax import describe_pairs, lorapro_adamw

RANK, ALPHA = 4, 16.0


class LoRADense(nn.Dense):
    """A Dense layer and its adapter, which the forward pass multiplies by s."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # noqa: D102
        a = self.param("lora_a", nn.initializers.he_uniform(), (x.shape[-1], RANK))
        b = self.param("lora_b", nn.initializers.zeros, (RANK, self.features))
        return super().__call__(x) + (ALPHA / RANK) * (x @ a @ b)


class MLP(nn.Module):
    """Images `(n, 64)` to logits `(n, 10)`; `dense` makes its layers."""

    dense: type[nn.Dense] = nn.Dense

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # noqa: D102
        x = nn.gelu(self.dense(128, name="up")(x))
        x = nn.gelu(self.dense(128, name="mid")(x))
        return self.dense(10, name="head")(x)


def new_model() -> tuple[MLP, Any]:
    """The module, and its params: pretrained kernels with new adapters beside them."""
    base, model = MLP(), MLP(LoRADense)
    init = lambda module: module.init(jax.random.key(0), jnp.zeros((1, 64)))["params"]
    apply = lambda params, images: base.apply({"params": params}, images)
    pretrained = digits.pretrain(apply, init(base))
    params = flatten_dict(init(model)) | flatten_dict(pretrained)
    return model, unflatten_dict(params)


def labels(params: Any) -> Any:
    """For `optax.partition`: which leaves train."""
    label = lambda path, _: "lora" if path[-1].startswith("lora_") else "frozen"
    return path_aware_map(label, params)


@jax.jit
def train_step(state: TrainState, batch: digits.Digits) -> TrainState:
    """One step on the adapters."""

    def loss_fn(params):
        logits = state.apply_fn({"params": params}, batch.images)
        return digits.cross_entropy(logits, batch.labels)

    return state.apply_gradients(grads=jax.grad(loss_fn)(state.params))


def fine_tune(model: MLP, params: Any, steps: int, rate: float = 1e-2) -> Any:
    """Trains the adapters on all ten digits."""
    groups = {"lora": lorapro_adamw(rate, alpha=ALPHA), "frozen": optax.set_to_zero()}
    tx = optax.partition(groups, labels)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    for batch in digits.batches(digits.load()[0], steps):
        state = train_step(state, batch)
    return state.params


def main(steps: int = 200) -> tuple[float, float]:
    """Fine-tunes; returns the test loss before and after."""
    _, test = digits.load()
    model, params = new_model()
    print(describe_pairs(params, alpha=ALPHA))
    predict = lambda params: model.apply({"params": params}, test.images)
    tuned = fine_tune(model, params, steps)
    return digits.report(predict(params), predict(tuned), test.labels)


if __name__ == "__main__":
    main()
