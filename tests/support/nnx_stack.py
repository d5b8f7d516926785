"""Layers that `nnx.vmap` has stacked."""

import jax
import jax.numpy as jnp
from flax import nnx

from tests.support.layouts import pair_at

RANK = 2


class Stacked(nnx.Module):
    """Four layers in one pair of arrays, stacked by `nnx.vmap` along `axis`."""

    def __init__(self, axis, rngs):
        make = lambda key: nnx.LoRA(6, RANK, 6, rngs=nnx.Rngs(key))
        keys = jax.random.split(rngs.params(), 4)
        self.axis = axis
        self.layers = nnx.vmap(make, in_axes=0, out_axes=axis)(keys)

    def __call__(self, x):
        step = lambda layer, x: x + jnp.tanh(layer(x))
        scan = nnx.scan(step, in_axes=(self.axis, nnx.Carry), out_axes=nnx.Carry)
        return scan(self.layers, x)

    @property
    def pairs(self):
        axes = ("Lir", "Lro") if self.axis == 0 else ("iLr", "rLo")
        return (pair_at("layers", *axes),)


def loss_of(model, data):
    x, y = data
    return jnp.mean((model(x) - y) ** 2) * y.shape[-1]
