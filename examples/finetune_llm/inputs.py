"""Everything that a run needs, read and checked before any weight is loaded."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from examples.finetune_llm import adapters, models
from examples.finetune_llm.data import Example, load_tokenizer, read_examples, rows_of
from examples.finetune_llm.errors import Refused
from examples.finetune_llm.evaluation import read_questions
from examples.finetune_llm.mesh import make_mesh
from examples.finetune_llm.names import check_files
from examples.finetune_llm.options import Options


class Inputs(NamedTuple):
    """What a run is made of, but for its weights.

    Attributes:
      spec: The model.
      tokenizer: Its tokenizer.
      mesh: Where it is to be.
      train: Examples to learn from.
      validation: Examples to evaluate on.
      questions: To answer at the end; may be empty.
      steps: Of the optimizer.
    """

    spec: models.Spec
    tokenizer: Any
    mesh: Mesh
    train: list[Example]
    validation: list[Example]
    questions: list[Any]
    steps: int


def read_model(options: Options) -> tuple[models.Spec, Mesh]:
    """The model's description and the mesh, which has to divide it.

    Raises:
      Refused: No such model, one that is not supported, a mesh that does not divide
        it, or adapters that cannot be.
    """
    folder = given(options.model)
    if not folder.is_dir():
        raise Refused(f"--model {folder} is no folder.")
    spec = models.read_spec(folder, remat=options.remat)
    mesh = make_mesh(options)
    models.abstract(spec, mesh, options.dtype)
    adapters.check(spec, options)
    return spec, mesh


def read_inputs(options: Options, say: Callable[[str], None]) -> Inputs:
    """Reads all files but the weights.

    Args:
      options: With a model and data.
      say: Is told what was skipped.

    Raises:
      Refused: Something is missing or does not fit.
    """
    for name in ("data", "validation", "questions"):  # before what takes long
        path = getattr(options, name)
        if path is not None and not path.is_file():
            raise Refused(f"--{name} {path} is no file.")
    spec, mesh = read_model(options)
    if (options.evaluate or options.sample_every) and jax.process_count() > 1:
        raise Refused(
            "--evaluate and --sample-every need one process: leave them out here, and "
            "repeat the command in one process when the run is complete."
        )
    check_files(spec)
    tokenizer = load_tokenizer(spec.folder, spec.config["vocab_size"])

    def read(path: Path) -> list[Example]:
        found, problems = read_examples(
            path, tokenizer, length=options.length, strict=options.strict
        )
        if str(problems):
            say(str(problems))
        return found

    train = read(given(options.data))
    if options.validation:
        validation = read(options.validation)
    else:
        train, validation = hold_out(train, options.held_out, options.seed)
    questions: list[Any] = []
    if options.questions:
        questions, problems = read_questions(
            options.questions, tokenizer, strict=options.strict
        )
        if str(problems):
            say(str(problems))
    steps = options.steps or steps_of(options, train)
    return Inputs(spec, tokenizer, mesh, train, validation, questions, steps)


def given(path: Path | None) -> Path:
    """A path that the options cannot lack, for those who check types."""
    assert path is not None
    return path


def hold_out(
    examples: Sequence[Any], share: float, seed: int
) -> tuple[list[Any], list[Any]]:
    """Examples to learn from and others to evaluate on, by a seeded choice.

    Raises:
      Refused: There are too few for both.
    """
    count = max(1, round(share * len(examples)))
    if count >= len(examples):
        raise Refused(
            f"--data has {len(examples)} examples, too few to hold some out; name "
            "--validation."
        )
    order = np.random.default_rng(seed).permutation(len(examples))
    held = set(order[:count].tolist())
    parts: tuple[list[Any], list[Any]] = ([], [])
    for i, example in enumerate(examples):
        parts[i in held].append(example)
    return parts


def steps_of(options: Options, examples: list[Example]) -> int:
    """The steps of `--epochs`, the last one of which may begin another epoch."""
    rows = len(rows_of(examples, options.length, options.seed, options.packing))
    return max(1, math.ceil(options.epochs * rows / options.batch))


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return jax.process_index() == 0
