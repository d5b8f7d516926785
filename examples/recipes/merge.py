"""Merged weights: fine-tune with qwix's adapters, then take them into the kernels.

    python -m examples.recipes.merge

For a model that goes into production, or into another round of training. `merge_model`
merges in place and leaves the adapters at their start, B = 0; without the adapters the
merged weights fit the plain model, which needs neither qwix nor this package.
"""

import jax
import numpy as np
import qwix
from flax import nnx

from examples.recipes import digits
from examples.recipes.nnx_optimizer import MLP, train_step
from lorapro_jax import describe_pairs, lorapro_adamw, merge_adapters, merge_model

RANK, ALPHA = 4, 8.0


def new_model() -> nnx.Module:
    """A pretrained model with adapters; it multiplies by ALPHA / RANK."""
    base = MLP(nnx.Linear, nnx.Rngs(0))
    digits.pretrain_nnx(base)
    rule = qwix.LoraRule(module_path=".*", rank=RANK, alpha=ALPHA)
    images = digits.load()[0].images[:1]  # qwix traces the model once
    rngs = nnx.Rngs(1)
    return qwix.apply_lora_to_model(base, qwix.LoraProvider([rule]), images, rngs=rngs)


def fine_tune(model: nnx.Module, steps: int, rate: float = 1e-2) -> nnx.Module:
    """Trains the adapters on all ten digits."""
    train, _ = digits.load()
    tx = lorapro_adamw(rate, alpha=ALPHA)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    for batch in digits.batches(train, steps):
        train_step(model, optimizer, batch)
    return model


def plain_model(model: nnx.Module) -> MLP:
    """The model as it was written, with merged kernels and no adapters."""
    plain = MLP(nnx.Linear, nnx.Rngs(0))
    merged = merge_adapters(nnx.state(model), remove=True, alpha=ALPHA)
    nnx.update(plain, merged)
    return plain


def furthest(x: jax.Array, y: jax.Array) -> float:
    """The largest difference of two sets of logits, by the largest logit."""
    return float(np.abs(x - y).max() / np.abs(y).max())


def main(steps: int = 200) -> tuple[float, float]:
    """Fine-tunes and merges; returns the test loss before and after."""
    _, test = digits.load()
    model = new_model()
    print(describe_pairs(nnx.state(model, nnx.LoRAParam), alpha=ALPHA))
    before = model(test.images)
    model = fine_tune(model, steps)
    adapted = model(test.images)

    plain = plain_model(model)
    print(
        f"without adapters: logits off by {furthest(plain(test.images), adapted):.1e}"
    )
    merge_model(model, alpha=ALPHA)
    print(f"with B = 0: logits off by {furthest(model(test.images), adapted):.1e}")
    return digits.report(before, plain(test.images), test.labels)


if __name__ == "__main__":
    main()
