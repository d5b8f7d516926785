"""One line of a JSONL file as tokens, and which of them are to be learnt.

Prompts and answers are tokenised apart and put together: exactly what generation
does, so that no token reaches over the border between them.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

FORMS = '{"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}'


class Example(NamedTuple):
    """One text to learn from.

    Attributes:
      tokens: `(t,)`, int32.
      answers: `(t,)`, bool: whether a token is to be learnt, given those before it.
    """

    tokens: np.ndarray
    answers: np.ndarray


class Piece(NamedTuple):
    """A part of a text that is an answer as a whole or not at all."""

    text: str
    answer: bool


class Question(NamedTuple):
    """Something to answer: the tokens up to the answer, and the right one."""

    prompt: list[int]
    answer: str


class BadLine(Exception):
    """Why a line is no example."""


def encode(record: Any, tokenizer: Any) -> Example:
    """An example of any length.

    Args:
      record: What a line says in JSON, in one of `FORMS`.
      tokenizer: From `load_tokenizer`.

    Raises:
      BadLine: The record has none of these forms, or no answer.
    """
    if not isinstance(record, dict):
        raise BadLine(f"not an object of the form {FORMS}")
    if "messages" in record:
        pieces = chat_pieces(record["messages"], tokenizer)
        return _joined((_plain(x.text, tokenizer), x.answer) for x in pieces)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if "prompt" in record and "completion" in record:
        prompt, completion = _text(record, "prompt"), _text(record, "completion")
        answer = _plain(completion, tokenizer) + end
        return _joined([(encode_prompt(prompt, tokenizer), False), (answer, True)])
    if "text" in record:
        tokens = encode_prompt(_text(record, "text"), tokenizer) + end
        # Nothing comes before the first token that it could be predicted from.
        return _joined([(tokens[:1], False), (tokens[1:], True)])
    found = ", ".join(sorted(map(str, record))) or "nothing"
    raise BadLine(f"has {found}, not the form {FORMS}")


def question(record: Any, tokenizer: Any) -> Question:
    """A line of a file of questions.

    Args:
      record: What it says in JSON: `question` and `answer`, which the tokenizer's chat
        template puts into form if there is one; `prompt` and `completion`, as it is; or
        `messages`, of which the last one is the assistant's.
      tokenizer: From `load_tokenizer`.

    Raises:
      BadLine: The record has none of these forms.
    """
    prompt, answer = _question(record, tokenizer)
    if not prompt:
        raise BadLine("the question is empty")
    return Question(prompt, answer)


def _question(record: Any, tokenizer: Any) -> tuple[list[int], str]:
    if not isinstance(record, dict):
        raise BadLine("not an object")
    if "messages" in record:
        _check(record["messages"])
        *before, last = record["messages"]
        if last["role"] != "assistant":
            raise BadLine("the last message is not the assistant's")
        return chat_prompt(before, tokenizer), last["content"]
    if "prompt" in record and "completion" in record:
        prompt = encode_prompt(_text(record, "prompt"), tokenizer)
        return prompt, _text(record, "completion")
    if "question" in record and "answer" in record:
        text, answer = _text(record, "question"), _text(record, "answer")
        if not tokenizer.chat_template:
            return encode_prompt(text, tokenizer), answer
        return chat_prompt([{"role": "user", "content": text}], tokenizer), answer
    raise BadLine("lacks question and answer, prompt and completion, or messages")


def encode_prompt(text: str, tokenizer: Any) -> list[int]:
    """The tokens of a text's beginning, with what the tokenizer puts before it."""
    tokens = list(tokenizer(text)["input_ids"])
    # Some tokenizers also end every text, after which no model goes on.
    if tokens and tokens[-1] == tokenizer.eos_token_id != tokenizer.bos_token_id:
        tokens.pop()
    return tokens


def chat_prompt(messages: list[dict], tokenizer: Any) -> list[int]:
    """The tokens of a conversation up to where the assistant's answer begins."""
    if not tokenizer.chat_template:
        raise BadLine("has messages, but the tokenizer has no chat template")
    return _plain(_render(messages, tokenizer, answer=True), tokenizer)


def chat_pieces(messages: Any, tokenizer: Any) -> list[Piece]:
    """A conversation as the tokenizer's template writes it, cut around all answers.

    An answer begins where the template lets the assistant begin, and ends with the
    mark that ends a turn. What the template puts after that, such as a line break, is
    not learnt: generation has stopped there.

    Raises:
      BadLine: No messages, no answer of the assistant, an empty one, or a template
        that refuses them or writes a conversation not from left to right.
    """
    _check(messages)
    if not tokenizer.chat_template:
        raise BadLine("has messages, but the tokenizer has no chat template")
    whole, pieces, done = _render(messages, tokenizer), [], 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(messages[:i], tokenizer, answer=True)
        content = message["content"].strip()  # some templates do so, too
        # What ends the turn is seen where it is the last one.
        _, found, ending = _render(messages[: i + 1], tokenizer).rpartition(content)
        said, begin = content + ending.rstrip(), len(prompt)
        end = whole.find(said, begin) + len(said)
        if not found or end < begin + len(said) or not whole.startswith(prompt):
            raise BadLine(f"message {i + 1}: later messages change how it is written")
        pieces.append(Piece(whole[done:begin], False))
        pieces.append(Piece(whole[begin:end], True))
        done = end
    return [x for x in [*pieces, Piece(whole[done:], False)] if x.text]


def _check(messages: Any) -> None:
    """Raises `BadLine` for what no chat template can be given."""
    if not isinstance(messages, list) or not messages:
        raise BadLine("messages is no list, or an empty one")
    for i, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise BadLine(f"message {i} lacks role or content")
        if not _is_text(message["content"]):
            raise BadLine(f"message {i}: content is no text")
        if message["role"] == "assistant" and not message["content"].strip():
            raise BadLine(f"message {i}: the assistant's answer is empty")
    if not any(message["role"] == "assistant" for message in messages):
        raise BadLine("no message of the assistant")


def _render(messages: list[dict], tokenizer: Any, answer: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=answer
        )
    except Exception as error:  # a template raises what it likes
        raise BadLine(f"the chat template refuses it: {error}") from error


def _plain(text: str, tokenizer: Any) -> list[int]:
    """Without what the tokenizer puts around texts: the template has written it."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _text(record: dict, name: str) -> str:
    if not _is_text(record[name]):
        raise BadLine(f"{name} is no text")
    if not record[name].strip() and name != "prompt":
        raise BadLine(f"{name} is empty")
    return record[name]


def _is_text(value: Any) -> bool:
    """JSON may write the halves of a character, which are no text of their own."""
    return isinstance(value, str) and not any("\ud800" <= x <= "\udfff" for x in value)


def _joined(parts: Iterator[tuple[list[int], bool]] | list) -> Example:
    parts = list(parts)
    tokens = np.concatenate([np.array(x, np.int32) for x, _ in parts])
    answers = np.concatenate([np.full(len(x), answer) for x, answer in parts])
    answers[:1] = False
    if not answers.any():
        raise BadLine("nothing in it is to be learnt")
    return Example(tokens, answers)
