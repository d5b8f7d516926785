"""Scanned layers: one pair of factors holds the adapters of all of them.

    python -m examples.recipes.scanned_layers

For deep models that stack equal layers with `nnx.vmap` (or `nn.scan`) and run them in
one `nnx.scan`. The factors have a leading axis of layers; `describe_pairs` shows it as
stacked, and each layer gets its own adjustment. `nnx.LoRALinear` has no factor in its
forward pass, so s = 1 and nothing has to be said.
"""

import functools

import jax
import optax
from flax import nnx

from examples.recipes import digits
from lorapro_jax import describe_pairs, lorapro

LAYERS, WIDTH, RANK = 6, 64, 4


class Block(nnx.Module):
    """A residual MLP; `linear` makes its layers."""

    def __init__(self, linear, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:  # noqa: D102
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class Deep(nnx.Module):
    """Images `(n, 64)` to logits `(n, 10)`, through a scan over equal blocks."""

    def __init__(self, linear, rngs: nnx.Rngs):
        make = nnx.vmap(lambda rngs: Block(linear, rngs))
        self.blocks = nnx.split_rngs(splits=LAYERS)(make)(rngs)
        self.head = linear(WIDTH, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:  # noqa: D102
        run = lambda block, x: block(x)
        scan = nnx.scan(run, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return self.head(scan(self.blocks, x))


def new_model() -> Deep:
    """Pretrained kernels, and new adapters beside them."""
    base = Deep(nnx.Linear, nnx.Rngs(0))
    digits.pretrain_nnx(base)
    linear = functools.partial(nnx.LoRALinear, lora_rank=RANK)
    model = Deep(linear, nnx.Rngs(1))
    nnx.update(model, nnx.state(base))
    return model


@nnx.jit
def train_step(model, optimizer, batch):
    """One step on the adapters; model and optimizer change in place."""

    def loss_fn(model):
        return digits.cross_entropy(model(batch.images), batch.labels)

    grads = nnx.grad(loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    optimizer.update(model, grads)


def fine_tune(model: Deep, steps: int, rate: float = 1e-2) -> Deep:
    """Trains the adapters on all ten digits."""
    train, _ = digits.load()
    tx = optax.chain(lorapro(), optax.adamw(rate))
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
