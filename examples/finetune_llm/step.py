"""A training step as a function of arrays.

It is the same function of factors and batch whatever the mesh, the number of processes
and of parts that a batch is computed in, up to rounding.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from examples.finetune_llm import models
from examples.finetune_llm.packing import Batch, attention_mask, learnt

ROWS = P("fsdp")  # how a batch is divided


class Run(NamedTuple):
    """What a checkpoint holds."""

    trainable: Any
    opt_state: Any
    step: jax.Array  # done


class Metrics(NamedTuple):
    """Of one step, before it; scalars."""

    loss: jax.Array  # mean over what is learnt, in nats
    tokens: jax.Array  # that are learnt
    gradient_norm: jax.Array  # of all factors


class Parts(NamedTuple):
    """A model taken apart: `nnx.merge(graph, trainable, frozen)` puts it together."""

    graph: Any
    trainable: Any
    frozen: Any


def split(model: nnx.Module, trains: Any = nnx.LoRAParam) -> Parts:
    """A model as what is trained, by a filter of NNX, and what is not."""
    return Parts(*nnx.split(model, trains, ...))


def loss_and_count(
    spec: Any, model: nnx.Module, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """The sum of the cross entropies of all tokens to be learnt, and their number.

    Args:
      spec: From `models.read_spec`.
      model: Its model.
      batch: Of any number of rows.
    """
    mask = attention_mask(batch.segments)
    logits = models.apply(spec, model, batch.tokens, batch.positions, mask)
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1].astype(jnp.float32), batch.tokens[:, 1:]
    )
    counts = learnt(batch)
    return jnp.where(counts, losses, 0).sum(), counts.sum()


def mean_loss(spec: Any, model: nnx.Module, batch: Batch) -> jax.Array:
    """The mean cross entropy of the tokens to be learnt, in nats."""
    total, count = loss_and_count(spec, model, batch)
    return total / jnp.maximum(count, 1)


def loss_and_gradient(
    spec: Any, parts: Parts, batch: Batch, accumulate: int, mesh: Mesh
) -> tuple[jax.Array, jax.Array, Any]:
    """Mean loss of a batch, number of tokens, and the gradient of the mean.

    The batch is computed in `accumulate` parts, one after the other. Each token counts
    the same, however the tokens are distributed over the parts.
    """

    def total(trainable, part):
        model = nnx.merge(parts.graph, trainable, parts.frozen)
        return loss_and_count(spec, model, part)

    def add(sums, part):
        new = jax.value_and_grad(total, has_aux=True)(parts.trainable, part)
        return jax.tree.map(lambda x, y: x + y.astype(x.dtype), sums, new), None

    # Part k has every `accumulate`-th row, so that all devices have rows in each part.
    cut = lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1)
    where = NamedSharding(mesh, P(None, *ROWS))
    divided = jax.tree.map(
        lambda x: jax.lax.with_sharding_constraint(cut(x), where), batch
    )
    zeros = jax.tree.map(
        lambda x: jnp.zeros_like(x, jnp.promote_types(x.dtype, jnp.float32)),
        parts.trainable,
    )
    start = (jnp.float32(0), jnp.int32(0)), zeros
    ((loss, count), grads), _ = jax.lax.scan(add, start, divided)
    share = 1 / jnp.maximum(count, 1)
    grads = jax.tree.map(
        lambda g, x: (share * g).astype(x.dtype), grads, parts.trainable
    )
    return share * loss, count, grads


def make_step(
    spec: Any,
    graph: Any,
    tx: optax.GradientTransformation,
    *,
    mesh: Mesh,
    accumulate: int = 1,
    out_shardings: Any = None,
) -> Callable[[Run, Any, Batch], tuple[Run, Metrics]]:
    """One optimizer step under `jit`, to be called and lowered within `with mesh:`.

    Args:
      spec: From `models.read_spec`.
      graph: From `split`.
      tx: The optimizer.
      mesh: With an axis "fsdp", over which the rows of a batch are divided.
      accumulate: Parts that a batch is computed in.
      out_shardings: Where the new run is to be, a `Run`; None leaves it to XLA.

    Returns:
      A function `(run, frozen, batch) -> (run, metrics)`; it consumes the run.
    """

    def step(run, frozen, batch):
        parts = Parts(graph, run.trainable, frozen)
        loss, count, grads = loss_and_gradient(spec, parts, batch, accumulate, mesh)
        updates, opt_state = tx.update(grads, run.opt_state, run.trainable)
        trainable = optax.apply_updates(run.trainable, updates)
        metrics = Metrics(loss, count, optax.tree.norm(grads))
        return Run(trainable, opt_state, run.step + 1), metrics

    where = None
    if out_shardings is not None:
        where = out_shardings, NamedSharding(mesh, P())
    return jax.jit(step, donate_argnums=0, out_shardings=where)
