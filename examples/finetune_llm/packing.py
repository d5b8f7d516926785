"""Texts side by side in rows of one length, none of which sees another.

A packed row is what its texts are in rows of their own: positions begin anew with each
text, attention stays within it, and its first token is predicted from nothing.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from examples.finetune_llm.chat import Example

OPEN_ROWS = 256  # among which the first with room is taken


class Batch(NamedTuple):
    """Rows of texts, all fields `(b, t)`; one row alone has `(t,)`.

    Attributes:
      tokens: int32, 0 where there is none.
      positions: int32, of each token in its own text.
      segments: int32, which text of its row a token belongs to, from 1 on; 0 where
        there is no token.
      answers: bool, whether a token is to be learnt.
    """

    tokens: Any
    positions: Any
    segments: Any
    answers: Any


def pack(lengths: Sequence[int], length: int, seed: int) -> list[list[int]]:
    """Which texts share a row: in random order each goes to the first with room.

    Args:
      lengths: Tokens of each text, none above `length`.
      length: Tokens of a row.
      seed: Of the order.

    Returns:
      For each row the numbers of its texts.
    """
    rows: list[list[int]] = []
    room = np.zeros(0, int)  # of the last rows
    for i in np.random.default_rng(seed).permutation(len(lengths)).tolist():
        fits = np.flatnonzero(room >= lengths[i])
        if not len(fits):
            rows.append([])
            room = np.append(room, length)[-OPEN_ROWS:]
            fits = [len(room) - 1]
        room[fits[0]] -= lengths[i]
        rows[len(rows) - len(room) + int(fits[0])].append(i)
    return rows


def fill(examples: Sequence[Example], length: int) -> Batch:
    """One row with some texts, filled up to its length."""
    lengths = [len(x.tokens) for x in examples]

    def row(parts, dtype):
        parts = np.concatenate([*parts, np.zeros(0, dtype)]).astype(dtype)
        return np.pad(parts, (0, length - len(parts)))

    return Batch(
        tokens=row([x.tokens for x in examples], np.int32),
        positions=row([np.arange(n) for n in lengths], np.int32),
        segments=row([np.full(n, i) for i, n in enumerate(lengths, 1)], np.int32),
        answers=row([x.answers for x in examples], bool),
    )


def stack(rows: Sequence[Batch]) -> Batch:
    """Rows as one batch."""
    return Batch(*(np.stack(fields) for fields in zip(*rows, strict=True)))


def attention_mask(segments: jax.Array) -> jax.Array:
    """Who sees whom, `(b, t, t)`: each token its own text up to itself.

    Where there is no token, the others without a token are seen, so that no row of the
    attention is empty.
    """
    same = segments[:, :, None] == segments[:, None, :]
    return same & jnp.tril(jnp.ones(same.shape[1:], bool))


def learnt(batch: Batch) -> jax.Array:
    """Whether the prediction of token t + 1 from token t counts, `(b, t - 1)`."""
    same = batch.segments[:, 1:] == batch.segments[:, :-1]
    return batch.answers[:, 1:] & same & (batch.segments[:, 1:] > 0)
