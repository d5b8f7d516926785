"""A start from the gradient: ranks by GoRA's rule, factors by LoRA-GA.

    python -m examples.recipes.gradient_start

For pretrained models: the gradients of the base weights on a few batches say which
layers get more rank, and in which directions their factors start. LoRA-GA changes the
base weights; the export is for the original ones. LoRA's start at one rank runs as
well, at the same rate and for as many steps: sweep the rates before you conclude.
"""

import jax
import optax
import qwix
from flax import nnx

from examples.recipes import digits
from examples.recipes.nnx_optimizer import MLP
from lorapro_jax import (
    allocate_ranks,
    describe_pairs,
    estimate_gradients,
    initialize_model,
    lorapro,
)
from lorapro_jax.initializers import lora_ga
from lorapro_jax.peft import save_peft_adapter

RANK, SCALE = 3, 2.0  # the rank sets the budget; one s for all layers
FOLDER = "out/gradient_start"


def loss_fn(model: nnx.Module, batch: digits.Digits) -> jax.Array:
    """The mean of a batch."""
    return digits.cross_entropy(model(batch.images), batch.labels)


def base_model() -> nnx.Module:
    """Pretrained, without adapters."""
    base = MLP(nnx.Linear, nnx.Rngs(0))
    digits.pretrain_nnx(base)
    return base


def adapted(base: nnx.Module, rules: list) -> nnx.Module:
    """The model with qwix's factors: A random, B zero."""
    provider, images = qwix.LoraProvider(rules), digits.load()[0].images[:1]
    return qwix.apply_lora_to_model(base, provider, images, rngs=nnx.Rngs(1))


def new_model() -> nnx.Module:
    """A pretrained model with adapters that start from its gradients."""
    base = base_model()
    batches = digits.batches(digits.load()[0], 8)
    gradients = estimate_gradients(loss_fn, base, batches, kernels="kernel$")
    # LoRA-GA takes 2r directions of each gradient, and the head has 10 outputs.
    ranks = allocate_ranks(base, gradients, rank=RANK, min_rank=1, max_rank=5)
    print(ranks)
    model = adapted(base, ranks.qwix_rules(scale=SCALE))
    key = jax.random.key(0)
    initialize_model(lora_ga(), model, gradients, key=key, scale=SCALE)
    return model


@nnx.jit
def train_step(model, optimizer, batch):
    """One step on the adapters; model and optimizer change in place."""
    grads = nnx.grad(loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, batch)
    optimizer.update(model, grads)


def fine_tune(model: nnx.Module, steps: int, rate: float = 1e-2) -> nnx.Module:
    """Trains the adapters on all ten digits."""
    train, _ = digits.load()
    tx = optax.chain(lorapro(scale=SCALE), optax.adamw(rate))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
    for batch in digits.batches(train, steps):
        train_step(model, optimizer, batch)
    return model


def main(steps: int = 200) -> tuple[float, float]:
    """Fine-tunes and exports; returns the test loss before and after."""
    test, model = digits.load()[1], new_model()
    print(describe_pairs(nnx.state(model, nnx.LoRAParam), scale=SCALE))
    before = model(test.images)
    initial = jax.device_get(nnx.state(model, nnx.LoRAParam))  # a copy
    model = fine_tune(model, steps)
    losses = digits.report(before, model(test.images), test.labels)
    factors = nnx.state(model, nnx.LoRAParam)
    save_peft_adapter(FOLDER, factors, initial=initial, scale=SCALE)

    rule = qwix.LoraRule(module_path=".*", rank=RANK, alpha=SCALE * RANK)
    plain = fine_tune(adapted(base_model(), [rule]), steps)
    print(f"LoRA's start, rank {RANK} everywhere:")
    digits.report(before, plain(test.images), test.labels)
    return losses


if __name__ == "__main__":
    main()
