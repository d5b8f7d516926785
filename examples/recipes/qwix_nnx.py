"""qwix on Flax NNX: adapters put into a pretrained model, attention heads included.

    python -m examples.recipes.qwix_nnx

For models that know nothing of LoRA: `qwix.apply_lora_to_model` adds the factors.
qwix multiplies by alpha / rank in its forward pass and stores alpha nowhere in the
parameters, so give `lorapro` the `alpha` of the `LoraRule`. If rules differ, a mapping
`{regex: alpha}` says which pairs have which.
"""

import jax
import optax
import qwix
from flax import nnx

from examples.recipes import digits
from lorapro_jax import describe_pairs, lorapro

RANK, ALPHA = 4, 8.0
WIDTH, HEADS, SIZE = 32, 4, 8


class Attention(nnx.Module):
    """An image's eight rows are tokens that attend to each other."""

    def __init__(self, rngs: nnx.Rngs):
        split = ("btd,dnh->btnh", (WIDTH, HEADS, SIZE))
        self.embed = nnx.Linear(8, WIDTH, rngs=rngs)
        self.position = nnx.Param(rngs.params.normal((8, WIDTH)))
        self.query = nnx.Einsum(*split, rngs=rngs)
        self.key = nnx.Einsum(*split, rngs=rngs)
        self.value = nnx.Einsum(*split, rngs=rngs)
        self.out = nnx.Einsum("btnh,nhd->btd", (HEADS, SIZE, WIDTH), rngs=rngs)
        self.head = nnx.Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:  # noqa: D102
        x = self.embed(images.reshape(-1, 8, 8)) + self.position[...]
        heads = jax.nn.dot_product_attention(self.query(x), self.key(x), self.value(x))
        return self.head(nnx.gelu(x + self.out(heads)).mean(axis=1))


def new_model() -> nnx.Module:
    """A pretrained model, and qwix's factors beside each of its kernels."""
    base = Attention(nnx.Rngs(0))
    digits.pretrain_nnx(base)
    rule = qwix.LoraRule(module_path=".*", rank=RANK, alpha=ALPHA)
    images = digits.load()[0].images[:1]  # qwix traces the model once
    rngs = nnx.Rngs(1)
    return qwix.apply_lora_to_model(base, qwix.LoraProvider([rule]), images, rngs=rngs)


@nnx.jit
def train_step(model, optimizer, batch):
    """One step on the adapters; model and optimizer change in place."""

    def loss_fn(model):
        return digits.cross_entropy(model(batch.images), batch.labels)

    grads = nnx.grad(loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    optimizer.update(model, grads)


def fine_tune(model: nnx.Module, steps: int, rate: float = 1e-2) -> nnx.Module:
    """Trains the adapters on all ten digits."""
    train, _ = digits.load()
    tx = optax.chain(lorapro(alpha=ALPHA), optax.adamw(rate))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    for batch in digits.batches(train, steps):
        train_step(model, optimizer, batch)
    return model


def main(steps: int = 200) -> tuple[float, float]:
    """Fine-tunes; returns the test loss before and after."""
    _, test = digits.load()
    model = new_model()
    print(describe_pairs(nnx.state(model, nnx.LoRAParam), alpha=ALPHA))
    before = model(test.images)
    model = fine_tune(model, steps)
    return digits.report(before, model(test.images), test.labels)


if __name__ == "__main__":
    main()
