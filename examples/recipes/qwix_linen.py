"""qwix on Flax Linen: adapters put into a pretrained transformer block.

    python -m examples.recipes.qwix_linen

For Linen models that know nothing of LoRA. The factors are in `params`, beside the
kernels, flattened to matrices also where attention has heads. qwix multiplies by
alpha / rank in its forward pass and stores alpha nowhere in the parameters, so give
`lorapro` the `alpha` of the rule. (qwix 0.1.8 cannot adapt an einsum under Linen.)
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import qwix
from flax.traverse_util import flatten_dict, path_aware_map, unflatten_dict

from examples.recipes import digits
from lorapro_jax import describe_pairs, lorapro

RANK, ALPHA = 4, 8.0


class Transformer(nn.Module):
    """An image's eight rows are tokens that attend to each other."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:  # noqa: D102
        x = nn.Dense(32, name="embed")(images.reshape(-1, 8, 8))
        x += self.param("position", nn.initializers.normal(1.0), (8, 32))
        x += nn.MultiHeadDotProductAttention(4, name="attention")(x)
        return nn.Dense(10, name="head")(nn.gelu(x).mean(axis=1))


def new_model() -> tuple[nn.Module, Any]:
    """The adapted module, and its params: pretrained, with factors beside them."""
    base, image = Transformer(), jnp.zeros((1, 64))
    apply = lambda params, images: base.apply({"params": params}, images)
    params = base.init(jax.random.key(0), image)["params"]
    pretrained = digits.pretrain(apply, params)
    rule = qwix.LoraRule(module_path=".*", rank=RANK, alpha=ALPHA)
    model = qwix.apply_lora_to_model(base, qwix.LoraProvider([rule]))
    params = jax.jit(model.init)(jax.random.key(1), image)["params"]
    return model, unflatten_dict(flatten_dict(params) | flatten_dict(pretrained))


def labels(params: Any) -> Any:
    """For `optax.partition`: which leaves train."""
    label = lambda path, _: "lora" if "_lora_" in path[-1] else "frozen"
    return path_aware_map(label, params)


def fine_tune(model: nn.Module, params: Any, steps: int, rate: float = 1e-2) -> Any:
    """Trains the adapters on all ten digits."""
    chain = optax.chain(lorapro(alpha=ALPHA), optax.adamw(rate))
    tx = optax.partition({"lora": chain, "frozen": optax.set_to_zero()}, labels)

    @jax.jit
    def train_step(params, state, batch):
        def loss_fn(params):
            logits = model.apply({"params": params}, batch.images)
            return digits.cross_entropy(logits, batch.labels)

        updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for batch in digits.batches(digits.load()[0], steps):
        params, state = train_step(params, state, batch)
    return params


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
