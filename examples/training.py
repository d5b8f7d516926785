"""Training that runs many learning rates and seeds at once, by `jax.vmap`.

One compiled program serves a whole sweep; every run sees the same batches for the
same seed, whatever the method.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lorapro_jax import equivalent_gradient, find_pairs, lorapro

RANK, CHUNK = 4, 25


class Data(NamedTuple):
    """Inputs of a model, and the classes it should predict, with a leading axis."""

    inputs: jax.Array
    labels: jax.Array


class Task(NamedTuple):
    """What to learn, and from what.

    Attributes:
      name: For tables and pictures.
      new_model: From a rank (`None`: without adapters) and a seed to a model, which
        maps inputs to logits.
      batch: Examples per step.
      train: Training data.
      validation: Data to choose a learning rate by.
      test: Data to report.
    """

    name: str
    new_model: Callable[[int | None, jax.typing.ArrayLike], nnx.Module]
    batch: int
    train: Data
    validation: Data
    test: Data


class Method(NamedTuple):
    """A way to fine-tune.

    Attributes:
      name: For tables and pictures.
      optimizer: From a learning-rate schedule to the Optax transform.
      rates: The learning rates of its sweep, ascending.
      rank: Of the adapters it trains; `None` trains the model without adapters.
      only: A filter of the variables that it trains, if not all of these.
    """

    name: str
    optimizer: Callable[[optax.Schedule], optax.GradientTransformation]
    rates: tuple[float, ...]
    rank: int | None = RANK
    only: Any = None

    @property
    def trains(self) -> Any:
        """A filter of the variables that it trains."""
        if self.only is not None:
            return self.only
        return nnx.Param if self.rank is None else nnx.LoRAParam


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
      watched: What `watch` returned, `(R, S, times)` each.
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


def start(
    task: Task, method: Method, base: nnx.State, steps: int
) -> Callable[..., Run]:
    """A function `(rate, seed) -> Run` from pretrained weights, vmappable."""

    def begin(rate, seed):
        model = task.new_model(method.rank, seed)
        nnx.update(model, base)
        _, trainable, frozen = nnx.split(model, method.trains, ...)
        tx = method.optimizer(schedule(rate, steps))
        key = jax.random.key(seed)
        return Run(trainable, tx.init(trainable), frozen, rate, key, jnp.int32(0))

    return begin


def spread(values: Sequence[float]) -> str:
    """Mean ± its standard error over seeds, for a table; one value alone."""
    mean, count = f"{np.mean(values):.3f}", len(values)
    if count < 2:
        return mean
    return f"{mean} ± {np.std(values, ddof=1) / np.sqrt(count):.3f}"


def loss_and_accuracy(model: Any, data: Data) -> tuple[jax.Array, jax.Array]:
    """Mean cross entropy in nats, and the share of right answers."""
    logits = model(data.inputs)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, data.labels).mean()
    return loss, (logits.argmax(-1) == data.labels).mean()


def make_measure(task: Task, method: Method) -> Callable[..., Any]:
    """A function `(trainable, frozen, data)` to the loss and the accuracy."""
    graph = nnx.graphdef(task.new_model(method.rank, 0))
    return lambda trainable, frozen, data: loss_and_accuracy(
        nnx.merge(graph, trainable, frozen), data
    )


def make_chunk(
    task: Task, method: Method, steps: int
) -> Callable[[Run], tuple[Run, jax.Array]]:
    """A function that trains one run for `CHUNK` steps and returns the losses."""
    grad_fn = jax.value_and_grad(make_measure(task, method), has_aux=True)

    def one(run: Run, _):
        tx = method.optimizer(schedule(run.rate, steps))
        batch = take_batch(run, task)
        (loss, _), grads = grad_fn(run.trainable, run.frozen, batch)
        updates, opt_state = tx.update(grads, run.opt_state, run.trainable)
        trainable = optax.apply_updates(run.trainable, updates)
        new = run._replace(trainable=trainable, opt_state=opt_state, step=run.step + 1)
        return new, loss

    return lambda run: jax.lax.scan(one, run, length=CHUNK)


def take_batch(run: Run, task: Task) -> Data:
    """The batch of a run's current step: it depends on its seed and step alone."""
    key = jax.random.fold_in(run.key, run.step)
    index = jax.random.randint(key, (task.batch,), 0, len(task.train.labels))
    return jax.tree.map(lambda x: x[index], task.train)


def train(
    task: Task,
    method: Method,
    base: nnx.State,
    seeds: jax.Array,
    steps: int,
    *,
    progress: Callable[[list[int]], Iterable[int]] = lambda chunks: chunks,
    watch: Callable[[Run], Any] | None = None,
    watch_every: int = 1,
) -> Trained:
    """Trains every rate of a method with every seed, side by side.

    Args:
      task: What to learn.
      method: What to train, how, and at which rates.
      base: The pretrained weights.
      seeds: Of the adapters and of the batches, `(S,)`.
      steps: Optimizer steps, a multiple of `CHUNK`.
      progress: Wraps the loop over chunks, to show a bar.
      watch: Called on each run before chunks, under `vmap` and `jit`.
      watch_every: How many chunks lie between two such calls, the first included.
    """
    every = lambda fn: jax.jit(jax.vmap(jax.vmap(fn)))
    rates, seeds = jnp.meshgrid(jnp.array(method.rates), seeds, indexing="ij")
    runs = every(start(task, method, base, steps))(rates, seeds)
    chunk = every(make_chunk(task, method, steps)).lower(runs).compile()
    look = every(watch) if watch else None
    losses, seen, seconds = [], [], 0.0
    for i in progress(list(range(steps // CHUNK))):
        if look and i % watch_every == 0:
            seen.append(look(runs))
        begun = time.perf_counter()
        runs, loss = jax.block_until_ready(chunk(runs))
        seconds += time.perf_counter() - begun
        losses.append(loss)
    watched = jax.tree.map(lambda *xs: jnp.stack(xs, -1), *seen) if look else None
    return Trained(runs, jnp.concatenate(losses, -1), watched, seconds / rates.size)


def pretrain(
    task: Task,
    steps: int,
    progress: Callable[[list[int]], Iterable[int]] = lambda chunks: chunks,
    rate: float = 3e-3,
) -> tuple[nnx.State, float]:
    """Weights that know a task, and their accuracy on its test data."""
    method = Method("pretraining", optax.adamw, (rate,), rank=None)
    base, seed = nnx.state(task.new_model(None, 0)), jnp.zeros(1, int)
    runs = train(task, method, base, seed, steps, progress=progress).runs
    _, accuracy = evaluate(task, method, runs, task.test)
    return jax.tree.map(lambda x: x[0, 0], runs.trainable), float(accuracy[0, 0])


def evaluate(
    task: Task, method: Method, runs: Run, data: Data
) -> tuple[jax.Array, jax.Array]:
    """Loss and accuracy of runs with leading axes `(R, S)`.

    One learning rate after the other: the whole of the data for all of them at once
    takes gigabytes.
    """
    measure = make_measure(task, method)
    one = lambda run: measure(run.trainable, run.frozen, data)
    each: Callable[[Run], tuple[jax.Array, jax.Array]]
    each = jax.jit(lambda runs: jax.lax.map(jax.vmap(one), runs))
    return each(runs)


def distance_to_full_gradient(
    task: Task, method: Method, adjust: Callable[[Any, Any], Any]
) -> Callable[[Run], tuple[jax.Array, ...]]:
    """A `watch` for `train`: ‖E - G‖ / ‖G‖ over all adapted layers.

    G is the gradient of the base kernels, E the equivalent gradient of
    `adjust(gradients of the factors, factors)`. Returned are the distance of E as
    it is, of c E for the best number c, which a learning rate could supply, and
    of the closest E that any step on these factors has (`lorapro` undamped).
    """
    grad_fn = jax.grad(make_measure(task, method), (0, 1), has_aux=True)

    def look(run: Run):
        batch = take_batch(run, task)
        (grads, full), _ = grad_fn(run.trainable, run.frozen, batch)
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
