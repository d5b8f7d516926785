"""What the recipes share: scikit-learn's handwritten digits, and pretraining on half.

Each recipe pretrains a small model on the digits 0 to 4 and then fine-tunes its
adapters on all ten. Replace this module by your data and your pretrained weights.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


class Digits(NamedTuple):
    """Images `(n, 64)` in [0, 1], eight rows in a line, and labels `(n,)`."""

    images: np.ndarray
    labels: np.ndarray


def load(seed: int = 0) -> tuple[Digits, Digits]:
    """All ten digits: 1347 images to train on, and 450 to test."""
    images, labels = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(
        (images / 16).astype(np.float32),
        labels.astype(np.int32),
        test_size=450,
        stratify=labels,
        random_state=seed,
    )
    return Digits(x, y), Digits(x_test, y_test)


def batches(data: Digits, steps: int, seed: int = 0) -> Iterator[Digits]:
    """Yields `steps` random batches of 64."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        index = rng.integers(len(data.labels), size=64)
        yield Digits(data.images[index], data.labels[index])


def cross_entropy(logits: jax.Array, labels: jax.typing.ArrayLike) -> jax.Array:
    """The mean, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def pretrain(
    apply: Callable[[Any, jax.Array], jax.Array], params: Any, steps: int = 60
) -> Any:
    """AdamW on all `params`, with the digits 0 to 4; `apply(params, images)`."""
    train, _ = load()
    low = Digits(*(x[train.labels < 5] for x in train))
    tx = optax.adamw(3e-3)

    @jax.jit
    def train_step(params, state, batch):
        loss = lambda params: cross_entropy(apply(params, batch.images), batch.labels)
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for batch in batches(low, steps, seed=1):
        params, state = train_step(params, state, batch)
    return params


def pretrain_nnx(model: nnx.Module) -> None:
    """Pretrains all parameters of an NNX model from images to logits, in place."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    apply = lambda params, images: nnx.merge(graph, params, rest)(images)
    nnx.update(model, pretrain(apply, params))


def report(
    before: jax.Array, after: jax.Array, labels: jax.typing.ArrayLike
) -> tuple[float, float]:
    """Prints loss and accuracy of two sets of logits; returns the two losses."""
    losses = []
    for name, logits in (("before", before), ("after", after)):
        losses.append(float(cross_entropy(logits, labels)))
        accuracy = float((logits.argmax(-1) == labels).mean())
        print(f"{name:6}  test loss {losses[-1]:.3f}  accuracy {accuracy:.3f}")
    return losses[0], losses[1]
