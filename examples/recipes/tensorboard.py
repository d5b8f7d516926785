"""Numbers of the steps for TensorBoard, and as a picture.

    python -m examples.recipes.tensorboard
    tensorboard --logdir out/tensorboard    # pip install tensorboard

Every few steps `step_metrics` says of each pair, and of all together, how large the
step is, how close LoRA's own direction is to the best one, and how much damping
removes. They are scalars, so any other logger takes them as well.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure
from tensorboardX import SummaryWriter

from examples.recipes import digits
from examples.recipes.nnx_optimizer import MLP, new_model
from lorapro_jax import describe_pairs, lorapro_adamw
from lorapro_jax.diagnostics import step_metrics

FOLDER, EVERY = Path("out/tensorboard"), 5


def factors(model: MLP) -> Any:
    """The adapters, as a tree of arrays."""
    return nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))


@nnx.jit
def train_step(model, optimizer, batch):
    """One step on the adapters, in place; returns the gradients."""
    loss_fn = lambda model: digits.cross_entropy(model(batch.images), batch.labels)
    grads = nnx.grad(loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    optimizer.update(model, grads)
    return nnx.to_pure_dict(grads)


@jax.jit
def numbers(before, params, grads, after, base):
    """Those of the step from `params` to `after`, whose `before` is one earlier."""
    updates = jax.tree.map(jnp.subtract, after, params)
    return step_metrics(params, grads, updates, before=before, base=base)


def watched_steps(model: MLP, steps: int, rate: float):
    """Trains; yields a step's count and its numbers, now and then."""
    optimizer = nnx.Optimizer(model, lorapro_adamw(rate), wrt=nnx.LoRAParam)
    base = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    before = factors(model)
    for step, batch in enumerate(digits.batches(digits.load()[0], steps)):
        params = factors(model)
        grads = train_step(model, optimizer, batch)
        if step % EVERY == 0:
            yield step, numbers(before, params, grads, factors(model), base)
        before = params


def fine_tune(model: MLP, steps: int, rate: float = 1e-2) -> MLP:
    """Trains the adapters on all ten digits, with a log and a picture."""
    seen = []
    with SummaryWriter(str(FOLDER)) as writer:
        for step, values in watched_steps(model, steps, rate):
            seen.append(values)
            for path, row in values.items():
                for name, x in row.items():
                    writer.add_scalar(f"{name}/{path}", float(x), step)
    draw(jax.tree.map(lambda *xs: np.array(xs), *seen), FOLDER / "steps.png")
    return model


def draw(curves: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """One panel for each number: each pair, and all together in black."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(3, 3).flat
    for panel, name in zip(panels, curves["total"], strict=True):
        for pair, row in curves.items():
            style = "k-" if pair == "total" else "-"
            panel.plot(EVERY * np.arange(len(row[name])), row[name], style, label=pair)
        panel.set(title=name.replace("_", " "), xlabel="step", ylim=(0, None))
    panel.legend(fontsize=8)
    figure.savefig(path, dpi=80)


def main(steps: int = 200) -> tuple[float, float]:
    """Fine-tunes; returns the test loss before and after."""
    _, test = digits.load()
    model = new_model()
    print(describe_pairs(factors(model)))
    before = model(test.images)
    model = fine_tune(model, steps)
    return digits.report(before, model(test.images), test.labels)


if __name__ == "__main__":
    main()
