"""From JSONL files to batches, in an order that depends on a seed and the step alone.

Batch k is the same whenever, wherever and after however many restarts it is asked for;
each process reads its own rows of it.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np

from examples.finetune_llm.chat import BadLine, Example, encode
from examples.finetune_llm.errors import Refused
from examples.finetune_llm.packing import Batch, fill, pack, stack

__all__ = ["Batch", "Example", "Problems", "batches", "in_order", "load_tokenizer"]
__all__ += ["read_examples", "read_lines", "rows_of"]

SHOWN = 5  # of the bad lines


class Problems(NamedTuple):
    """What was wrong with a file.

    Attributes:
      path: The file.
      lines: Its lines that are not empty.
      bad: For the number of each bad line, from 1 on, what is wrong with it.
      shortened: Examples that were cut to the longest length.
    """

    path: Path
    lines: int
    bad: dict[int, str]
    shortened: int = 0

    def __str__(self) -> str:
        """In one line, or nothing where all is well."""
        found = [f"line {number}: {why}" for number, why in self.bad.items()]
        if len(found) > SHOWN:
            found[SHOWN:] = [f"and {len(found) - SHOWN} more"]
        said = []
        if found:
            counted = f"{len(self.bad)} of {self.lines} lines are bad"
            said.append(f"{counted} ({'; '.join(found)})")
        if self.shortened:
            said.append(f"{self.shortened} examples are longer and were cut")
        return f"{self.path}: {', '.join(said)}" if said else ""


def load_tokenizer(folder: Path, vocabulary: int | None = None) -> Any:
    """The tokenizer of a Hugging Face folder.

    Args:
      folder: With `tokenizer.json`.
      vocabulary: How many tokens the model knows; None for not to check.

    Raises:
      Refused: There is none, it cannot be read, or it has tokens that the model lacks.
    """
    if not (folder / "tokenizer.json").is_file():
        raise Refused(
            f"{folder} has no tokenizer.json; copy the tokenizer's files from where "
            "the model comes from."
        )
    from transformers import AutoTokenizer  # takes seconds

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        raise Refused(f"{folder}: the tokenizer cannot be read: {error}") from error
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if vocabulary is not None and largest >= vocabulary:
        raise Refused(
            f"{folder}: the tokenizer has a token of number {largest}, the model only "
            f"{vocabulary} in all (vocab_size in config.json). They do not belong "
            "together; take the tokenizer of this model."
        )
    return tokenizer


def read_lines(
    path: Path, read: Callable[[Any], Any], strict: bool = False
) -> tuple[list[Any], Problems]:
    """What a function makes of each line of a JSONL file; empty lines do not count.

    Args:
      path: The file.
      read: From what a line says in JSON to anything, or to `BadLine`.
      strict: Whether the first bad line is an error.

    Raises:
      Refused: There is no such file, no good line in it, or a bad one and `strict`.
    """
    if not path.is_file():
        raise Refused(f"{path} is no file.")
    good, bad = [], {}
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                good.append(read(json.loads(line)))
            except ValueError as error:  # of JSON, or not in UTF-8
                bad[number] = f"not JSON: {error}"
            except BadLine as error:
                bad[number] = str(error)
            if strict and bad:
                why = f"{path}, line {number}: {bad[number]}"
                raise Refused(f"{why}. Correct it, or leave --strict out to skip it.")
    problems = Problems(path, len(good) + len(bad), bad)
    if not good:
        raise Refused(f"no line is of use. {problems}" if bad else f"{path} is empty.")
    return good, problems


def read_examples(
    path: Path, tokenizer: Any, *, length: int, strict: bool = False
) -> tuple[list[Example], Problems]:
    """The examples of a JSONL file, none longer than a row.

    A conversation or a pair of prompt and completion that is too long is cut at its
    end, and bad if no answer remains. A `text` that is too long becomes several
    examples.

    Raises:
      Refused: As `read_lines`.
    """
    shortened = 0

    def read(record: Any) -> list[Example]:
        nonlocal shortened
        example = encode(record, tokenizer)
        count = len(example.tokens)
        if count <= length:
            return [example]
        step = length if "text" in record else count
        cut = [_cut(example, at, length) for at in range(0, count, step)]
        cut = [x for x in cut if x.answers.any()]
        if not cut:
            raise BadLine(f"no answer within the first {length} tokens")
        shortened += "text" not in record
        return cut

    found, problems = read_lines(path, read, strict)
    examples = [example for examples in found for example in examples]
    return examples, problems._replace(shortened=shortened)


def rows_of(
    examples: Sequence[Example], length: int, seed: int, packing: bool
) -> list[list[int]]:
    """Which examples stand in one row."""
    if packing:
        return pack([len(x.tokens) for x in examples], length, seed)
    return [[i] for i in range(len(examples))]


def batches(
    examples: Sequence[Example],
    *,
    batch: int,
    length: int,
    seed: int,
    packing: bool = False,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """An endless iterator over batches, shuffled anew in each epoch.

    Args:
      examples: None longer than `length`.
      batch: Rows of a batch, of all processes together.
      length: Tokens of a row.
      seed: Of the order, and of what is packed together.
      packing: Whether short examples share a row.
      process_index: Which share of each batch to give.
      process_count: Shares that there are; divides `batch`.

    Returns:
      A Grain iterator over `Batch`es of NumPy arrays, `(batch / process_count,
      length)`. Its state is `{"next_index": k}` before batch k, in every process.
    """
    rows = rows_of(examples, length, seed, packing)
    dataset = (
        grain.MapDataset.source(rows)
        .seed(seed)
        .shuffle()
        .repeat()[process_index::process_count]
        .map(lambda row: fill([examples[i] for i in row], length))
        .batch(batch // process_count, batch_fn=stack)
    )
    # The state is that of batches received, also where threads are ahead.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(1, 2)))


def in_order(
    examples: Sequence[Example],
    *,
    batch: int,
    length: int,
    packing: bool = False,
    process_index: int = 0,
    process_count: int = 1,
) -> list[Batch]:
    """All examples once, for evaluation; the last batch is filled with empty rows."""
    rows = rows_of(examples, length, 0, packing)
    rows += [[]] * (-len(rows) % batch)
    row = lambda row: fill([examples[i] for i in row], length)
    share = batch // process_count
    begins = range(process_index * share, len(rows), batch)
    return [stack([row(x) for x in rows[at : at + share]]) for at in begins]


def _cut(example: Example, at: int, length: int) -> Example:
    tokens, answers = (np.array(x[at : at + length]) for x in example)
    answers[:1] = False
    return Example(tokens, answers)
