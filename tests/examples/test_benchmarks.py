"""What the reports of the benchmarks compare, and what they must not."""

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from benchmarks.measure import fingerprint
from benchmarks.quality import is_done
from benchmarks.quality_report import difference


def row_of(*losses, weights="one"):
    """A sweep of one rate."""
    run = {"rate": 0.1, "validation_loss": losses, "test_loss": losses}
    return {"method": "LoRA", "rank": 4, "steps": 10, "weights": weights, "runs": [run]}


def test_a_difference_is_paired_by_seed():
    mean, error = difference(row_of(1.0, 2.5, 3.0), row_of(0.5, 1.5, 2.5))
    assert mean == pytest.approx((0.5 + 1.0 + 0.5) / 3)
    assert error == pytest.approx(0.5 / 3)  # not paired it were 0.83


def test_runs_from_other_pretrained_weights_are_not_compared_or_kept():
    mine, other = row_of(1.0, 2.0), row_of(1.1, 2.1, weights="other")
    key = {"method": "LoRA", "rank": 4, "steps": 10, "weights": "one"}
    assert difference(mine, other) is None
    assert is_done(mine, key, seeds=2)
    assert not is_done(mine, key, seeds=3)
    assert not is_done(other, key, seeds=2)


def test_a_fingerprint_is_of_all_bits():
    tree = {"a": jnp.ones(3), "b": jnp.zeros((2, 2))}
    found = fingerprint(tree)
    assert found == fingerprint(jax.tree.map(jnp.copy, tree))
    assert found != fingerprint(tree | {"b": jnp.full((2, 2), 1e-30)})
