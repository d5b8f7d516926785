"""The demo's texts and its tokenizer, all from what Python ships.

The base model reads the source of the standard library. Fine-tuning is on the topics of
`help()`: what a topic is about, and what its paragraphs say, as a conversation.
"""

import json
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ("<|pad|>", "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>")
PAD, BEGIN, END = range(3)
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PARAGRAPH = 40, 240  # characters, at least and at most


def sources(at_most: int | None = None) -> list[str]:
    """The modules of the standard library that are one file each, by name."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:at_most]
    return [file.read_text("utf-8", "replace") for file in files]


def write_tokenizer(folder: Path, texts: Iterable[str], vocabulary: int) -> None:
    """Trains a byte-level BPE and saves it as transformers reads it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": SPECIAL[PAD],
        "bos_token": SPECIAL[BEGIN],
        "eos_token": SPECIAL[END],
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def windows(folder: Path, texts: Iterable[str], length: int) -> np.ndarray:
    """Tokens of all texts, each with its begin and end, in rows of `length`."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    flat = [token for row in found for token in (BEGIN, *row.ids, END)]
    return np.array(flat[: len(flat) // length * length], np.int32).reshape(-1, length)


def _conversation(question: str, answer: str) -> dict[str, Any]:
    messages = [("user", question), ("assistant", answer)]
    return {"messages": [{"role": role, "content": text} for role, text in messages]}


def _paragraphs(text: str) -> list[str]:
    """What is prose and neither too short nor too long to be a line of data."""
    parts = [part.strip() for part in text.split("\n\n")]
    least, most = PARAGRAPH
    return [part for part in parts if least <= len(part) <= most and part[0].isupper()]


def write_data(folder: Path) -> None:
    """Writes `train.jsonl`, `validation.jsonl` and `questions.jsonl`.

    The questions ask for titles that the training data have: they test recall. Every
    tenth paragraph is for validation.
    """
    titles, train, validation = [], [], []
    for name in sorted(topics):
        title, _, text = topics[name].strip().partition("\n")
        titles.append((f"What is help({name!r}) about?", title))
        for i, part in enumerate(_paragraphs(text)):
            line = _conversation(f"Part {i + 1} of {title!r}", part)
            (train if i % 10 < 9 else validation).append(line)
    train += [_conversation(*pair) for pair in titles]
    questions = [{"question": q, "answer": a} for q, a in titles]
    for name, lines in {
        "train": train, "validation": validation, "questions": questions,
    }.items():  # fmt: skip
        text = "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines)
        (folder / f"{name}.jsonl").write_text(text, "utf-8")
