"""QLoRA with qwix: a base in four bits, adapters in float32.

    python -m examples.recipes.qlora

For bases that are too large to keep in 16 bits. A `LoraRule` with `weight_qtype`
quantises the kernels and puts adapters beside them; `wrt=nnx.LoRAParam` trains these
alone, so no gradient of an integer is ever asked for. s is alpha / rank as without
quantisation, hence `alpha=` of the rule. Neither transform looks at the base weights.
"""

import jax
import numpy as np
import qwix
from flax import nnx

from examples.recipes import digits
from lorapro_jax import describe_pairs, lorapro_adamw

RANK, ALPHA = 4, 8.0
WEIGHTS = "nf4"  # or "int4", "int8"; None leaves the base as it is


class MLP(nnx.Module):
    """Images `(n, 64)` to logits `(n, 10)`."""

    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(64, 128, rngs=rngs)
        self.mid = nnx.Linear(128, 128, rngs=rngs)
        self.head = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:  # noqa: D102
        return self.head(nnx.gelu(self.mid(nnx.gelu(self.up(x)))))


def new_model() -> nnx.Module:
    """A pretrained and then quantised model with adapters."""
    base = MLP(nnx.Rngs(0))
    digits.pretrain_nnx(base)
    rule = qwix.LoraRule(
        module_path=".*", rank=RANK, alpha=ALPHA, weight_qtype=WEIGHTS, tile_size=32
    )
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
    tx = lorapro_adamw(rate, alpha=ALPHA)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    for batch in digits.batches(train, steps):
        train_step(model, optimizer, batch)
    return model


def base_weights(model: nnx.Module) -> dict[str, np.ndarray]:
    """All that is no adapter, by path, copied: codes, their scales, and biases."""
    _, _, base = nnx.split(model, nnx.LoRAParam, ...)
    leaves = jax.tree.leaves_with_path(nnx.to_pure_dict(base))
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return {name(path): np.array(x) for path, x in leaves}


def main(steps: int = 200) -> tuple[float, float]:
    """Fine-tunes; returns the test loss before and after."""
    _, test = digits.load()
    model = new_model()
    print(describe_pairs(nnx.state(model, nnx.LoRAParam), alpha=ALPHA))
    before, base = model(test.images), base_weights(model)
    for path, x in base.items():
        print(f"{path:24} {x.dtype!s:8} {x.shape}")
    model = fine_tune(model, steps)
    after = base_weights(model)
    same = all(x.tobytes() == after[path].tobytes() for path, x in base.items())
    print(f"base unchanged, bit by bit: {same}")
    return digits.report(before, model(test.images), test.labels)


if __name__ == "__main__":
    main()
