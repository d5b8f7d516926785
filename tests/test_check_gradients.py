"""`check_gradients` tells sound pairs from gradients that are not of one weight."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorapro_jax import LoRAPair
from lorapro_jax.diagnostics import check_gradients

rng = np.random.default_rng(0)
normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
X = normal(40, 24)
PARAMS = {"lora_a": normal(24, 4), "lora_b": normal(4, 12)}
SOUND, WRONG = 1e-5, 0.1


def sound(p):
    return jnp.sum(jnp.sin(X @ p["lora_a"] @ p["lora_b"]))


def twice(p):
    """The product is used, and then A is used once more without B's gradient."""
    return sound(p) + jnp.sum(jnp.tanh(X @ p["lora_a"]) @ p["lora_b"])


def test_sound_pairs_agree_to_rounding_in_every_layout():
    grads = jax.grad(sound)(PARAMS)
    torch = lambda tree: {
        "lora_A": {"weight": tree["lora_a"].T}, "lora_B": {"weight": tree["lora_b"].T}
    }  # fmt: skip
    tree, both = ({"x": x, "torch": torch(x)} for x in (PARAMS, grads))
    found = jax.jit(check_gradients)(both, tree)
    assert set(found) == {"x/lora_a", "torch/lora_A/weight"}
    assert all(x < SOUND for x in found.values())


def test_each_layer_of_a_stack_has_its_own_distance():
    stack = lambda tree: jax.tree.map(lambda x: jnp.stack([x, x]), tree)
    grads = jax.tree.map(
        lambda x, y: jnp.stack([x, y]), jax.grad(sound)(PARAMS), jax.grad(twice)(PARAMS)
    )
    distance = check_gradients(grads, stack(PARAMS))["lora_a"]
    assert distance.shape == (2,)
    assert distance[0] < SOUND
    assert distance[1] > WRONG


def test_scaled_or_clipped_factor_by_factor_is_seen():
    grads = jax.grad(sound)(PARAMS)
    plus = {**grads, "lora_b": 16 * grads["lora_b"]}  # LoRA+
    clip = optax.adaptive_grad_clip(1e-3)
    clipped, _ = clip.update(grads, clip.init(PARAMS), PARAMS)
    for wrong in (plus, clipped, jax.grad(twice)(PARAMS)):
        assert check_gradients(wrong, PARAMS)["lora_a"] > WRONG
    same = jax.tree.map(lambda x: 1e30 * x, grads)  # one number for both is sound
    assert check_gradients(same, PARAMS)["lora_a"] < SOUND


def test_one_a_with_several_bs_is_seen_and_right_axes_are_the_remedy():
    params = {"lora_a": normal(24, 3), "lora_b": normal(5, 3, 12)}
    loss = lambda p: jnp.sum(jnp.sin(jnp.einsum("bi,ir,ero->beo", X, *p.values())))
    grads = jax.grad(loss)(params)
    distance = check_gradients(
        grads, params, pairs=[LoRAPair("lora_a", "lora_b", 1, 1)]
    )
    assert distance["lora_a"] < SOUND
    square = {"lora_a": normal(24, 3), "lora_b": normal(3, 3, 12)}
    grads = jax.grad(loss)(square)
    wrong = check_gradients(grads, square, pairs=[LoRAPair("lora_a", "lora_b", 1, 0)])
    assert wrong["lora_a"] > WRONG


def test_zero_factors_and_gradients_are_at_distance_zero():
    zero = {**PARAMS, "lora_b": jnp.zeros_like(PARAMS["lora_b"])}
    assert check_gradients(jax.grad(sound)(zero), zero)["lora_a"] == 0


def test_a_tree_without_pairs_says_so():
    with pytest.raises(ValueError, match="No LoRA pair"):
        check_gradients({"x": X}, {"x": X})
