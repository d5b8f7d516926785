"""How good a model is: the loss on data that it has not seen, and right answers."""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from examples.finetune_llm.chat import Question, question
from examples.finetune_llm.data import Example, Problems, in_order, read_lines
from examples.finetune_llm.generation import Generator, stop_tokens
from examples.finetune_llm.scoring import SCORES
from examples.finetune_llm.training import loss_and_count, put, share_of_process


class Loss(NamedTuple):
    """On all examples: each token that is learnt counts the same.

    Attributes:
      loss: Mean cross entropy in nats.
      perplexity: Its exponential.
      tokens: How many were predicted.
    """

    loss: float
    perplexity: float
    tokens: int


class Answers(NamedTuple):
    """Answers of a model.

    Attributes:
      score: The share of right ones.
      texts: All of them, in order.
      right: Which are right.
    """

    score: float
    texts: list[str]
    right: list[bool]


def perplexity(
    spec: Any,
    examples: Sequence[Example],
    *,
    mesh: Mesh,
    batch: int,
    length: int,
    packing: bool = False,
) -> Callable[[nnx.Module], Loss]:
    """A function that evaluates a model on examples; it compiles once.

    Args:
      spec: From `models.read_spec`.
      examples: From `read_examples`, the same in every process.
      mesh: With an axis "fsdp", whose size divides `batch`.
      batch: Rows at once.
      length: Tokens of a row.
      packing: Whether short examples share a row, which changes nothing but the time.
    """
    index, count = share_of_process(mesh, batch)
    held = in_order(
        examples, batch=batch, length=length, packing=packing,
        process_index=index, process_count=count,
    )  # fmt: skip

    @functools.partial(jax.jit, static_argnums=0)
    def measure(graph, state, rows):
        return loss_and_count(spec, nnx.merge(graph, state), rows)

    def evaluate(model: nnx.Module) -> Loss:
        graph, state = nnx.split(model)
        with mesh:
            sums = [measure(graph, state, put(rows, mesh, batch)) for rows in held]
        sums = [(float(total), int(number)) for total, number in sums]
        tokens = sum(number for _, number in sums)
        loss = math.fsum(total for total, _ in sums) / max(tokens, 1)
        with np.errstate(over="ignore"):  # a model may have diverged
            return Loss(loss, float(np.exp(loss)), tokens)

    return evaluate


def read_questions(
    path: Path, tokenizer: Any, *, strict: bool = False
) -> tuple[list[Question], Problems]:
    """The questions of a JSONL file with their answers.

    A line has `question` and `answer`, `prompt` and `completion`, or `messages` of
    which the last one is the assistant's.

    Raises:
      Refused: As `read_lines`.
    """
    return read_lines(path, lambda record: question(record, tokenizer), strict)


def answers(
    spec: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    kind: str,
    mesh: Mesh,
    tokens: int = 256,
    batch: int = 16,
) -> Callable[[nnx.Module], Answers]:
    """A function that asks a model all questions, greedily.

    Args:
      spec: From `models.read_spec`.
      tokenizer: From `load_tokenizer`.
      questions: From `read_questions`.
      kind: Which of `SCORES` says whether an answer is right.
      mesh: Where the model is.
      tokens: Of an answer at most.
      batch: Questions at once.
    """
    prompts = [x.prompt for x in questions]
    ask = new_generator(spec, tokenizer, prompts, mesh=mesh, tokens=tokens, batch=batch)

    def evaluate(model: nnx.Module) -> Answers:
        texts = ask(model)
        pairs = zip(texts, questions, strict=True)
        right = [SCORES[kind](text, x.answer) for text, x in pairs]
        return Answers(sum(right) / len(right), texts, right)

    return evaluate


def new_generator(
    spec: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    mesh: Mesh,
    tokens: int,
    batch: int,
) -> Callable[[nnx.Module], list[str]]:
    """A function from a model to its greedy continuations of the prompts.

    Args:
      spec: From `models.read_spec`.
      tokenizer: From `load_tokenizer`.
      prompts: Tokens of each.
      mesh: Where the model is.
      tokens: Of a continuation at most.
      batch: Prompts at once.
    """
    made: list[Generator] = []

    def generate(model: nnx.Module) -> list[str]:
        if not made:  # tunix's sampler wants the first model for its structure
            stop = stop_tokens(spec.folder, tokenizer)
            made.append(
                Generator(
                    model, spec.model_config, tokenizer, stop, mesh=mesh,
                    longest=max(map(len, prompts)), tokens=tokens, batch=batch,
                )
            )  # fmt: skip
        return made[0](model, prompts)

    return generate
