"""`equivalent_gradient` in every layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorapro_jax import LoRAPair, equivalent_gradient, find_pairs, lorapro
from tests.support import oracle

pytestmark = pytest.mark.usefixtures("quick_compiles")


def problem(seed=0):
    a, b, full = oracle.factors(seed, 9, 6, 3)
    grads = oracle.lora_gradients(a, b, full, 2.0)
    return [jnp.asarray(x, jnp.float32) for x in (a, b, *grads)], full


def test_flax_layout_gives_the_shape_of_the_kernel():
    (a, b, da, db), _ = problem()
    expected = oracle.equivalent(a, b, da, db, 2.0)

    received = equivalent_gradient(a.T, b.T, da.T, db.T, 2.0)

    np.testing.assert_allclose(received, expected.T, rtol=1e-5, atol=1e-5)


def test_pytorch_layout_gives_the_shape_of_its_weight():
    (a, b, da, db), _ = problem()
    expected = oracle.equivalent(a, b, da, db, 2.0)
    received = equivalent_gradient(a, b, da, db, 2.0)
    np.testing.assert_allclose(received, expected, rtol=1e-5, atol=1e-5)


def test_stacked_heads_come_as_layers_inputs_outputs():
    """(L, D, r), (L, r, N, H) with the pair of `find_pairs`: (L, D, N, H)."""
    key = jax.random.split(jax.random.key(0), 4)
    shapes = [(5, 8, 2), (5, 2, 3, 4)] * 2
    a, b, da, db = (jax.random.normal(k, s) for k, s in zip(key, shapes, strict=True))
    (pair,) = find_pairs({"lora_a": a, "lora_b": b})

    received = equivalent_gradient(a, b, da, db, 0.5, pair=pair)

    product = lambda x, y: jnp.einsum("ldr,lrnh->ldnh", x, y)
    expected = 0.5 * (product(da, b) + product(a, db))
    np.testing.assert_allclose(received, expected, rtol=1e-5, atol=1e-5)


def test_adjusted_gradients_are_closer_to_the_full_gradient_than_those_of_lora():
    """Of the gradients as they are, and of LoRA's at its best length."""
    (a, b, da, db), full = problem()
    params, grads = {"lora_a": a.T, "lora_b": b.T}, {"lora_a": da.T, "lora_b": db.T}
    step, _ = lorapro(scale=2.0, damping=0.0).update(grads, None, params)
    effect = lambda x: equivalent_gradient(
        *params.values(), x["lora_a"], x["lora_b"], 2.0
    )
    distance = lambda x: np.linalg.norm(x - full.T) / np.linalg.norm(full)

    plain = effect(grads)
    best = plain * np.vdot(plain, full.T) / np.vdot(plain, plain)

    assert distance(effect(step)) < distance(best) < distance(plain)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(9, 3), (3, 6), (3, 9), (6, 3)], r"steps have shapes \(3, 9\) .*`\(a, b, da"),
        ([(9, 3), (2, 6)] * 2, r"\(9, 3\) and \(2, 6\) cannot be read.*`pair=`"),
        (
            [(4, 4), (4, 4)] * 2,
            r"they can be read as .* or .*`pair=` from `find_pairs`",
        ),
    ],
)
def test_bad_shapes_are_errors(shapes, message):
    with pytest.raises(ValueError, match=message):
        equivalent_gradient(*(jnp.ones(shape) for shape in shapes))


def test_square_factors_are_settled_by_a_pair():
    a, b = jnp.arange(16.0).reshape(4, 4), jnp.eye(4)
    received = equivalent_gradient(a, b, a, b, pair=LoRAPair("a", "b", 1, 0))
    np.testing.assert_allclose(received, 2 * a)
