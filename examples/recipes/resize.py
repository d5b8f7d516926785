"""Other ranks in the middle of training: more where it pays, then no more than needed.

    python -m examples.recipes.resize

Training begins at rank 2 and goes on at rank 8, with the same optimizer: its moments
are those of the kernels and know of no rank. In the end rank 4 is cut out, the closest
there is, and trained a little more.
"""

import functools
from collections.abc import Iterable

import jax
from flax import nnx

from examples.recipes import digits
from examples.recipes.nnx_optimizer import MLP, train_step
from lorapro_jax import lorapro_adamw, resize_adapters

RANKS = 2, 8, 4
TX = lorapro_adamw(1e-2)


def empty_model(rank: int) -> MLP:
    """A model with adapters of a rank."""
    return MLP(functools.partial(nnx.LoRALinear, lora_rank=rank), nnx.Rngs(1))


def new_model() -> MLP:
    """Pretrained kernels, and new adapters beside them."""
    base = MLP(nnx.Linear, nnx.Rngs(0))
    digits.pretrain_nnx(base)
    model = empty_model(RANKS[0])
    nnx.update(model, nnx.state(base))
    return model


def resized(
    model: MLP, optimizer: nnx.Optimizer, rank: int
) -> tuple[MLP, nnx.Optimizer]:
    """The model and its optimizer at another rank."""
    result = resize_adapters(
        nnx.state(model), rank, key=jax.random.key(rank), state=optimizer.opt_state
    )
    for path, error in result.errors.items():
        print(f"{path:16} rank {rank}, relative error of the product {error:.3f}")
    model = empty_model(rank)
    nnx.update(model, result.params)
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.LoRAParam)
    optimizer.opt_state = result.state
    return model, optimizer


def fine_tune(
    model: MLP, optimizer: nnx.Optimizer, batches: Iterable[digits.Digits]
) -> None:
    """Trains the adapters, in place."""
    for batch in batches:
        train_step(model, optimizer, batch)


def main(steps: int = 200) -> tuple[float, float]:
    """Fine-tunes at all three ranks; returns the test loss before and after."""
    train, test = digits.load()
    model = new_model()
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.LoRAParam)
    before = model(test.images)
    fine_tune(model, optimizer, digits.batches(train, steps // 2))
    for seed, (rank, share) in enumerate(zip(RANKS[1:], (3, 6), strict=True), 1):
        model, optimizer = resized(model, optimizer, rank)
        fine_tune(model, optimizer, digits.batches(train, steps // share, seed))
    return digits.report(before, model(test.images), test.labels)


if __name__ == "__main__":
    main()
