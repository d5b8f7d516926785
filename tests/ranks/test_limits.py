"""The limits of the ranks, and patterns: what the user typed is what errors name."""

import jax.numpy as jnp
import pytest

from lorapro_jax import allocate_ranks
from lorapro_jax.ranks._budget import rank_limits

WEIGHTS = {"up/kernel": jnp.ones((8, 24)), "down/kernel": jnp.ones((24, 8))}
HEADS = {"q/kernel": jnp.ones((8, 2, 6))}


@pytest.mark.parametrize(
    ("given", "due"),
    [
        ((4, None, None), (2, 16)),
        ((1, None, None), (1, 4)),
        ((4, 3, 5), (3, 5)),
        ((4, 16, None), (16, 16)),
        ((4, None, 2), (2, 2)),
    ],
)
def test_limits_are_those_given_or_half_and_four_times_the_rank(given, due):
    assert rank_limits(*given) == due


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"rank": 4, "min_rank": 17},
            r"`min_rank=17` is above the default maximum, 16, four times `rank=4`\. "
            r"Pass `max_rank=` too, or a lower `min_rank`\.",
        ),
        (
            {"rank": 8, "max_rank": 3},
            r"The default minimum, 4, half of `rank=8`, is above `max_rank=3`\. "
            r"Pass `min_rank=` too, or a higher `max_rank`\.",
        ),
        (
            {"rank": 4, "min_rank": 3, "max_rank": 2},
            r"`min_rank=3` is above `max_rank=2",
        ),
        ({"rank": 0}, r"`rank=0` has to be an integer of at least 1"),
        ({"rank": "4"}, r"`rank='4'` has to be an integer"),
        ({"rank": None}, r"`rank=None` has to be an integer"),
        ({"rank": True}, r"`rank=True` has to be an integer"),
        ({"rank": 4, "min_rank": 1.5}, r"`min_rank=1.5` has to be an integer"),
        ({"rank": 4, "max_rank": "9"}, r"`max_rank='9'` has to be an integer"),
    ],
)
def test_error_names_what_the_user_typed(options, message):
    with pytest.raises(ValueError, match=message):
        allocate_ranks(WEIGHTS, WEIGHTS, **options)


def test_remedies_of_crossed_limits_work():
    budget = {"rank": 4, "min_rank": 4}
    assert allocate_ranks(WEIGHTS, WEIGHTS, **budget, max_rank=17)["up"] == 4
    assert allocate_ranks(WEIGHTS, WEIGHTS, rank=8, min_rank=1, max_rank=3)["up"] == 3


def test_pattern_of_input_axes_that_occurs_nowhere_is_an_error():
    axes = {"q": 0}
    assert allocate_ranks(HEADS, HEADS, rank=2, input_axes=axes)["q"] == 2
    with pytest.raises(
        ValueError, match=r"The pattern 'kk' of `input_axes` .*Close to"
    ):
        allocate_ranks(HEADS, HEADS, rank=2, input_axes={**axes, "kk": 0})
