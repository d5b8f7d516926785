"""The adapters of Llama 3.1 on a mesh, and a training step of them: shapes only.

Sizes are those of the public configurations (8B, 70B, 405B; grouped-query attention).
All layers of a kind are one leaf, `[layers, ...]`, as MaxText scans over them, and they
are sharded as tunix and MaxText do it: of a layer whose output is divided among the
`tp` devices A lies over `fsdp` and B over `tp`, and of one whose input is the reverse.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

HEAD = 128
"""The width of one head."""
VOCABULARY = 128256
ALPHA = 16.0
TENSOR = 4
"""Devices that divide one layer among them, of each mesh."""


class Llama(NamedTuple):
    """One model's sizes."""

    layers: int
    width: int
    hidden: int
    heads: int
    groups: int = 8

    @property
    def weights(self) -> dict[str, tuple[int, int, bool]]:
        """Input, output, and whether it is the output that is divided, of each."""
        queries, keys = self.heads * HEAD, self.groups * HEAD
        return {
            "q": (self.width, queries, True),
            "k": (self.width, keys, True),
            "v": (self.width, keys, True),
            "o": (queries, self.width, False),
            "gate": (self.width, self.hidden, True),
            "up": (self.width, self.hidden, True),
            "down": (self.hidden, self.width, False),
        }


MODELS = {
    "8b": Llama(32, 4096, 14336, 32),
    "70b": Llama(80, 8192, 28672, 64),
    "405b": Llama(126, 16384, 53248, 128),
}


def mesh_of(devices: Any) -> Mesh:
    """`(fsdp, tp)` of these devices."""
    grid = np.array(devices).reshape(-1, min(TENSOR, len(devices)))
    return Mesh(grid, ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)


def adapters(model: Llama, rank: int, mesh: Mesh) -> Any:
    """Factors in float32."""

    def pair(fan_in: int, fan_out: int, column: bool) -> Any:
        at_in, at_out = ("fsdp", "tp") if column else ("tp", "fsdp")
        lead = model.layers
        return {
            "lora_a": _array(mesh, (lead, fan_in, rank), P(None, at_in, None)),
            "lora_b": _array(mesh, (lead, rank, fan_out), P(None, None, at_out)),
        }

    return {name: pair(*x) for name, x in model.weights.items()}


def base_weights(model: Llama, mesh: Mesh) -> Any:
    """What does not train, in bfloat16."""

    def weight(fan_in: int, fan_out: int, column: bool) -> Any:
        spec = ("fsdp", "tp") if column else ("tp", "fsdp")
        shape = model.layers, fan_in, fan_out
        return _array(mesh, shape, P(None, *spec), jnp.bfloat16)

    layers = {name: weight(*x) for name, x in model.weights.items()}
    table = VOCABULARY, model.width
    embed = _array(mesh, table, P("tp", "fsdp"), jnp.bfloat16)
    return {"layers": layers, "embed": embed}


def state_of(tx: optax.GradientTransformation, params: Any, mesh: Mesh) -> Any:
    """The optimizer's state, with what is like a factor sharded like it."""
    state = jax.eval_shape(tx.init, params)

    def like(x: Any, factor: Any) -> Any:
        nothing = isinstance(x, optax.MaskedNode)
        spec = factor.sharding.spec
        return x if nothing else _array(mesh, x.shape, spec, x.dtype)

    return optax.tree.map_params(
        tx,
        like,
        state,
        params,
        transform_non_params=lambda x: _array(mesh, x.shape, P(), x.dtype),
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )


def loss(lora: Any, base: Any, tokens: jax.Array, model: Llama) -> jax.Array:
    """Of the next token, with one layer after the other and each recomputed."""

    @jax.checkpoint
    def block(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        weights, factors = layer

        def linear(name: str, y: jax.Array) -> jax.Array:
            a, b = (factors[name][k].astype(y.dtype) for k in ("lora_a", "lora_b"))
            return y @ weights[name] + ALPHA / a.shape[-1] * ((y @ a) @ b)

        heads = lambda y: y.reshape(*y.shape[:-1], -1, HEAD)
        y = _normed(x)
        q, k, v = (heads(linear(name, y)) for name in "qkv")
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x += linear("o", attended.reshape(*x.shape[:-1], -1))
        y = _normed(x)
        x += linear("down", jax.nn.silu(linear("gate", y)) * linear("up", y))
        return x, None

    x, _ = jax.lax.scan(block, base["embed"][tokens], (base["layers"], lora))
    logits = (_normed(x) @ base["embed"].T).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1], tokens[:, 1:]
    )
    return losses.mean()


def _normed(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5)


def _array(
    mesh: Mesh, shape: tuple[int, ...], spec: P, dtype: Any = jnp.float32
) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
