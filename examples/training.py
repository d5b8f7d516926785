"""Training that runs many learning rates and seeds at once, by `jax.vmap`.

One compiled program serves a whole sweep; every run sees the same batches for the
same seed, whatever the method.
"""

import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from examples.vit_digits import Data, Split, ViT, loss_and_accuracy
from lorapro_jax import equivalent_gradient, find_pairs, lorapro

BATCH, RANK, CHUNK = 64, 4, 25


class Method(NamedTuple):
    """A way to fine-tune.

    Attributes:
      name: For tables and pictures.
      optimizer: From a learning-rate schedule to the Optax transform.
      rates: The learning rates of its sweep, ascending.
      trains: The type of variable it trains: `nnx.LoRAParam` or `nnx.Param`.
    """

    name: str
    optimizer: Callable[[optax.Schedule], optax.GradientTransformation]
    rates: tuple[float, ...]
    trains: type[nnx.Variable] = nnx.LoRAParam


class Run(NamedTuple):
    """One training run in progress; under `vmap`, with leading axes (rate, seed).

    Attributes:
      trainable: The state that is trained.
      opt_state: Of the optimizer.
      frozen: The rest of the model's state.
      rate: The peak learning rate.
      key: For the order of the batches.
      step: Steps done.
    """

    trainable: Any
    opt_state: Any
    frozen: Any
    rate: jax.Array
    key: jax.Array
    step: jax.Array


class Trained(NamedTuple):
    """What comes out of `train`, for R rates and S seeds.

    Attributes:
      runs: The final runs, with leading axes `(R, S)`.
      losses: Of the batches, `(R, S, steps)`.
      watched: What `watch` returned before each chunk, `(R, S, steps / CHUNK)` each.
      seconds: For one run, without compilation.
    """

    runs: Run
    losses: jax.Array
    watched: Any
    seconds: float


def schedule(rate: jax.typing.ArrayLike, steps: int) -> optax.Schedule:
    """Linear warm-up over a tenth of the steps, then cosine decay to 0."""
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, steps // 10, steps)
    return lambda count: rate * shape(count)


def start(method: Method, base: nnx.State, steps: int) -> Callable[..., Run]:
    """A function `(rate, seed) -> Run` from pretrained weights, vmappable."""

    def begin(rate, seed):
        model = new_model(method, seed)
        nnx.update(model, base)
        _, trainable, frozen = nnx.split(model, method.trains, ...)
        tx = method.optimizer(schedule(rate, steps))
        key = jax.random.key(seed)
        return Run(trainable, tx.init(trainable), frozen, rate, key, jnp.int32(0))

    return begin


def new_model(method: Method, seed: jax.typing.ArrayLike = 0) -> ViT:
    """The model that a method trains: with adapters or without."""
    rank = RANK if method.trains is nnx.LoRAParam else None
    return ViT(nnx.Rngs(jax.random.key(seed)), rank=rank)


def make_chunk(
    method: Method, graph: nnx.GraphDef, data: Data, steps: int
) -> Callable[[Run], tuple[Run, jax.Array]]:
    """A function that trains one run for `CHUNK` steps and returns the losses."""

    def loss_fn(trainable, frozen, batch):
        return loss_and_accuracy(nnx.merge(graph, trainable, frozen), batch)[0]

    def one(run: Run, _):
        tx = method.optimizer(schedule(run.rate, steps))
        batch = take_batch(run, data)
        loss, grads = jax.value_and_grad(loss_fn)(run.trainable, run.frozen, batch)
        updates, opt_state = tx.update(grads, run.opt_state, run.trainable)
        trainable = optax.apply_updates(run.trainable, updates)
        new = run._replace(trainable=trainable, opt_state=opt_state, step=run.step + 1)
        return new, loss

    return lambda run: jax.lax.scan(one, run, length=CHUNK)


def take_batch(run: Run, data: Data) -> Data:
    """The batch of a run's current step: it depends on its seed and step alone."""
    key = jax.random.fold_in(run.key, run.step)
    index = jax.random.randint(key, (BATCH,), 0, len(data.labels))
    return Data(data.images[index], data.labels[index])


def train(
    method: Method,
    base: nnx.State,
    data: Data,
    seeds: jax.Array,
    steps: int,
    *,
    progress: Callable[[list[int]], Iterable[int]] = lambda chunks: chunks,
    watch: Callable[[Run], Any] | None = None,
) -> Trained:
    """Trains every rate of a method with every seed, side by side.

    Args:
      method: What to train, how, and at which rates.
      base: The pretrained weights.
      data: Training data.
      seeds: Of the adapters and of the batches, `(S,)`.
      steps: Optimizer steps, a multiple of `CHUNK`.
      progress: Wraps the loop over chunks, to show a bar.
      watch: Called on each run before each chunk, under `vmap` and `jit`.
    """
    every = lambda fn: jax.jit(jax.vmap(jax.vmap(fn)))
    rates, seeds = jnp.meshgrid(jnp.array(method.rates), seeds, indexing="ij")
    runs = every(start(method, base, steps))(rates, seeds)
    graph = nnx.graphdef(new_model(method))
    chunk = every(make_chunk(method, graph, data, steps)).lower(runs).compile()
    look = every(watch) if watch else None
    losses, seen, seconds = [], [], 0.0
    for _ in progress(list(range(steps // CHUNK))):
        if look:
            seen.append(look(runs))
        begun = time.perf_counter()
        runs, loss = jax.block_until_ready(chunk(runs))
        seconds += time.perf_counter() - begun
        losses.append(loss)
    watched = jax.tree.map(lambda *xs: jnp.stack(xs, -1), *seen) if look else None
    return Trained(runs, jnp.concatenate(losses, -1), watched, seconds / rates.size)


def pretrain(
    data: Split,
    steps: int,
    progress: Callable[[list[int]], Iterable[int]] = lambda chunks: chunks,
) -> tuple[nnx.State, float]:
    """Weights that know the upright digits, and their test accuracy."""
    method = Method("pretraining", optax.adamw, (3e-3,), nnx.Param)
    base, seed = nnx.state(new_model(method)), jnp.zeros(1, int)
    runs = train(method, base, data.train, seed, steps, progress=progress).runs
    _, accuracy = evaluate(method, runs, data.test)
    return jax.tree.map(lambda x: x[0, 0], runs.trainable), float(accuracy[0, 0])


def evaluate(method: Method, runs: Run, data: Data) -> tuple[jax.Array, jax.Array]:
    """Loss and accuracy of runs with leading axes `(R, S)`."""
    graph = nnx.graphdef(new_model(method))
    one = lambda run: loss_and_accuracy(
        nnx.merge(graph, run.trainable, run.frozen), data
    )
    return jax.jit(jax.vmap(jax.vmap(one)))(runs)


def distance_to_full_gradient(
    method: Method, data: Data, adjust: Callable[[Any, Any], Any]
) -> Callable[[Run], tuple[jax.Array, ...]]:
    """A `watch` for `train`: ‖E - G‖ / ‖G‖ over all adapted layers.

    G is the gradient of the base kernels, E the equivalent gradient of
    `adjust(gradients of the factors, factors)`. Returned are the distance of E as
    it is, of c E for the best number c, which a learning rate could supply, and
    of the closest E that any step on these factors has (`lorapro` undamped).
    """
    graph = nnx.graphdef(new_model(method))

    def look(run: Run):
        def loss_fn(factors, frozen):
            model = nnx.merge(graph, factors, frozen)
            return loss_and_accuracy(model, take_batch(run, data))[0]

        grads, full = jax.grad(loss_fn, (0, 1))(run.trainable, run.frozen)
        factors, full = dict(_by_path(run.trainable)), dict(_by_path(full))
        pairs = find_pairs(run.trainable)

        def products(steps):
            """⟨E, E⟩, ⟨E, G⟩ and ⟨G, G⟩, summed over all layers."""
            steps = dict(_by_path(steps))
            for pair in pairs:
                values = [x[path] for x in (factors, steps) for path in pair[:2]]
                e = equivalent_gradient(*values, pair.scale, pair=pair)
                g = full[pair.a.removesuffix("lora/lora_a") + "kernel"]
                yield jnp.array([jnp.vdot(e, e), jnp.vdot(e, g), jnp.vdot(g, g)])

        ee, eg, gg = sum(products(adjust(grads, run.trainable)))
        # XLA merges the eigendecompositions of the two adjustments: same Gram matrices.
        exact, _ = lorapro(damping=0.0).update(grads, None, run.trainable)
        limit, *_ = sum(products(exact))  # a projection of G: ⟨E, G⟩ = ⟨E, E⟩
        squares = ee - 2 * eg + gg, gg - eg**2 / ee, gg - limit
        return tuple(jnp.sqrt(jnp.maximum(x, 0) / gg) for x in squares)

    return look


def _by_path(state: nnx.State) -> Iterable[tuple[str, jax.Array]]:
    """Leaves by the paths that `find_pairs` uses."""
    for path, leaf in nnx.to_flat_state(state):
        yield "/".join(map(str, path)), leaf[...]
