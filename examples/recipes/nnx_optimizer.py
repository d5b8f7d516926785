"""Flax NNX: `nnx.LoRALinear` layers, trained with `nnx.Optimizer`.

    python -m examples.recipes.nnx_optimizer

For models that write their adapters with Flax's own `nnx.LoRA` or `nnx.LoRALinear`.
These compute `x @ kernel + x @ A @ B` without a factor, so s = 1: what `lorapro_adamw`
assumes when it is told nothing.
"""

import functools

import jax
from flax import nnx

from examples.recipes import digits
from lorapro_jax import describe_pairs, lorapro_adamw

RANK = 4


class MLP(nnx.Module):
    """Images `(n, 64)` to logits `(n, 10)`; `linear` makes its layers."""

    def __init__(self, linear, rngs: nnx.Rngs):
        self.up = linear(64, 128, rngs=rngs)
        self.mid = linear(128, 128, rngs=rngs)
        self.head = linear(128, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:  # noqa: D102
        return self.head(nnx.gelu(self.mid(nnx.gelu(self.up(x)))))


def new_model() -> MLP:
    """Pretrained kernels, and new adapters beside them."""
    base = MLP(nnx.Linear, nnx.Rngs(0))
    digits.pretrain_nnx(base)
    linear = functools.partial(nnx.LoRALinear, lora_rank=RANK)
    model = MLP(linear, nnx.Rngs(1))
    nnx.update(model, nnx.state(base))
    return model


@nnx.jit
def train_step(model, optimizer, batch):
    """One step on the adapters; model and optimizer change in place."""

    def loss_fn(model):
        return digits.cross_entropy(model(batch.images), batch.labels)

    grads = nnx.grad(loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    optimizer.update(model, grads)


def fine_tune(model: MLP, steps: int, rate: float = 1e-2) -> MLP:
    """Trains the adapters on all ten digits."""
    train, _ = digits.load()
    tx = lorapro_adamw(rate)  # instead of optax.adamw(rate)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    for batch in digits.batches(train, steps):
        train_step(model, optimizer, batch)
    return model


def main(steps: int = 200) -> tuple[float, float]:
    """Fine-tunes; returns the test loss before and after."""
    _, test = digits.load()
    model = new_model()
    print(describe_pairs(nnx.state(model, nnx.LoRAParam)))
    before = model(test.images)
    model = fine_tune(model, steps)
    return digits.report(before, model(test.images), test.labels)


if __name__ == "__main__":
    main()
