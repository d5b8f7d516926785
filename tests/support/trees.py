"""A small tree of parameters, its loss, and the usual `lorapro_adamw` for it."""

import jax
import jax.numpy as jnp

from lorapro_jax import lorapro_adamw

RATE = 0.02


def make_params(dtype=jnp.float32, seed=0):
    """Two pairs of different rank, one of them stacked, and two other leaves."""
    key = iter(jax.random.split(jax.random.key(seed), 8))
    normal = lambda *shape: jax.random.normal(next(key), shape).astype(dtype)
    return {
        "layers": {"lora_a": normal(3, 10, 4), "lora_b": normal(3, 4, 6)},
        "head": {"lora_a": normal(8, 2), "lora_b": normal(2, 5), "bias": normal(5)},
        "norm": normal(10),
    }


def loss_fn(params, scale=1.0):
    """A least-squares fit of W0 + s A B to a target, W0 = 0."""
    product = lambda x: scale * jnp.einsum("...ir,...ro->...io", *x)
    total = 0.0
    for name in ("layers", "head"):
        pair = params[name]["lora_a"], params[name]["lora_b"]
        total += jnp.sum((product(pair) - 1.0) ** 2)
    return total + jnp.sum(params["norm"] ** 2) + jnp.sum(params["head"]["bias"] ** 2)


def make(moments, learning_rate=RATE, **options):
    options = {"damping": 0.01, "scale": 1.5, "weight_decay": 0.1, **options}
    return lorapro_adamw(learning_rate, moments=moments, **options)


def others(tree):
    """The leaves that are no factors."""
    return {"norm": tree["norm"], "head": {"bias": tree["head"]["bias"]}}


def with_others(tree, rest):
    """Another tree's leaves in place of those that are no factors."""
    head = {**tree["head"], "bias": rest["head"]["bias"]}
    return {**tree, "head": head, "norm": rest["norm"]}
