"""Whether an answer is right."""

import re
from collections.abc import Callable
from decimal import Decimal

# The last number after one of these, as PEFT's comparison on MetaMathQA has them
# (`method_comparison/MetaMathQA/utils.py`), or else the last number at all.
MARKS = re.compile(r"####|the (?:final )?answer is:?", re.IGNORECASE)
NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")

DROPPED = str.maketrans("", "", ",$")  # within a number


def exact(text: str, answer: str) -> bool:
    """Whether the texts are the same but for the white space around them."""
    return text.strip() == answer.strip()


def final_number(text: str) -> Decimal | None:
    """The number that a solution ends with; None if there is no number.

    GSM8K writes it after `####`, and MetaMathQA after "The answer is:". There the first
    number counts, elsewhere the last one. Thousands may be separated by commas; signs
    of currency, per cent and what follows do not count.
    """
    *before, after = MARKS.split(text)
    marked = NUMBER.findall(after)[:1] if before else []
    found = marked or NUMBER.findall(text)[-1:]
    return Decimal(found[0].translate(DROPPED)) if found else None


def gsm8k(text: str, answer: str) -> bool:
    """Whether both end with the same number."""
    wanted = final_number(answer)
    return wanted is not None and final_number(text) == wanted


SCORES: dict[str, Callable[[str, str], bool]] = {"exact": exact, "gsm8k": gsm8k}
