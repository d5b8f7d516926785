"""Real models with adapters, as trees of parameters and a function of them.

For the tests of initialisation: what an adapter does is what the model's own forward
pass makes of it. Widths are equal where the stack allows it, so that a transposed
kernel would go through and be noticed.
"""

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.support.layouts import leaves_by_path

os.environ.setdefault("KERAS_BACKEND", "jax")  # read when Keras is imported

RANK, ALPHA = 2, 6.0
WIDTH, HEADS, SIZE, EXPERTS, DEPTH = 12, 3, 4, 5, 2

# A few matrix products of float32 in sequence, at the precision of the CPU.
TOLERANCE = 500 * float(jnp.finfo(jnp.float32).eps)


class Layers(NamedTuple):
    """A model.

    Attributes:
      params: Its parameters, factors and kernels.
      apply: From the parameters to an output.
      kernels: The letters of each base kernel by its path, and of those its inputs;
        capitals are stacked layers.
      options: Those of `initialize_adapters`.
    """

    params: Any
    apply: Callable[[Any], jax.Array]
    kernels: Mapping[str, tuple[str, str]]
    options: Mapping[str, Any] = {}


def normal(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def of_nnx(model, x, kernels, **options):
    graph, state = nnx.split(model)
    return Layers(state, lambda s: nnx.merge(graph, s)(x), kernels, options)


def of_linen(model, x, kernels, **options):
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    return Layers(params, lambda p: model.apply({"params": p}, x), kernels, options)


class NNXModel(nnx.Module):
    """A LoRALinear and an `nnx.LoRA` around a Linear."""

    def __init__(self, rngs):
        base = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.q = nnx.LoRALinear(WIDTH, WIDTH, lora_rank=RANK, rngs=rngs)
        self.mlp = nnx.LoRA(WIDTH, RANK, WIDTH, base_module=base, rngs=rngs)

    def __call__(self, x):
        return self.mlp(jnp.tanh(self.q(x)))


class NNXStack(nnx.Module):
    """Layers in one set of arrays, stacked by `nnx.vmap` along `axis`."""

    def __init__(self, axis, rngs):
        make = lambda key: nnx.LoRALinear(
            WIDTH, WIDTH, lora_rank=RANK, rngs=nnx.Rngs(key)
        )
        keys = jax.random.split(rngs.params(), DEPTH)
        self.axis = axis
        self.layers = nnx.vmap(make, in_axes=0, out_axes=axis)(keys)

    def __call__(self, x):
        step = lambda layer, x: jnp.tanh(layer(x))
        scan = nnx.scan(step, in_axes=(self.axis, nnx.Carry), out_axes=nnx.Carry)
        return scan(self.layers, x)


class LoRADense(nn.Module):
    """A Dense layer with its adapter, as users write it; its parameters boxed."""

    @nn.compact
    def __call__(self, x):
        box = lambda names: nn.with_partitioning(nn.initializers.lecun_normal(), names)
        kernel = self.param("kernel", box(("i", "o")), (x.shape[-1], WIDTH))
        a = self.param("lora_a", box(("i", None)), (x.shape[-1], RANK))
        b = self.param("lora_b", box((None, "o")), (RANK, WIDTH))
        return x @ kernel + ALPHA / RANK * (x @ a) @ b


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = jnp.tanh(LoRADense(name="up")(x))
        # Sides that differ and a bias: this `kernel` proves the order of the other.
        return nn.Dense(WIDTH, name="down")(nn.Dense(2 * WIDTH, name="wide")(x)), None


class LinenAttention(nn.Module):
    """What qwix adapts in Linen: attention has heads, which qwix flattens."""

    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(HEADS, name="attention")(x, x)
        return nn.Dense(WIDTH, name="dense")(x), None


class Scanned(nn.Module):
    block: Any
    axis: int

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            self.block,
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=DEPTH,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return layers(name="layers")(x, None)[0]


class QwixModel(nnx.Module):
    """One of each kind of layer that qwix adapts in NNX."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.general = nnx.LinearGeneral(WIDTH, (HEADS, SIZE), rngs=rngs)
        self.q = nnx.Einsum("bd,dnh->bnh", (WIDTH, HEADS, SIZE), rngs=rngs)
        self.k = nnx.Einsum("bd,ndh->bnh", (HEADS, WIDTH, SIZE), rngs=rngs)
        self.o = nnx.Einsum("bnh,nhd->bd", (HEADS, SIZE, WIDTH), rngs=rngs)
        self.conv = nnx.Conv(WIDTH, WIDTH, (3,), rngs=rngs)
        self.moe = nnx.Einsum("ebd,edf->ebf", (EXPERTS, WIDTH, WIDTH), rngs=rngs)

    def __call__(self, x):
        x = self.general(jnp.tanh(self.linear(x))).reshape(x.shape)
        x = self.o(jnp.tanh(self.q(x) + self.k(x)))
        x = self.conv(jnp.tanh(x)[None])[0]
        return self.moe(jnp.tile(jnp.tanh(x), (EXPERTS, 1, 1))).sum(0)


QWIX = {
    "linear/kernel": ("df", "d"), "general/kernel": ("dnh", "d"),
    "q/kernel": ("dnh", "d"), "k/kernel": ("ndh", "d"), "o/kernel": ("nhd", "nh"),
    "conv/kernel": ("wcf", "wc"), "moe/kernel": ("edf", "ed"),
}  # fmt: skip


def qwix_nnx(**rule):
    qwix = pytest.importorskip("qwix")

    rule = {"module_path": ".*", "rank": RANK, "alpha": ALPHA} | rule
    x = normal(6, WIDTH, seed=1)
    provider = qwix.LoraProvider([qwix.LoraRule(**rule)])
    return qwix.apply_lora_to_model(
        QwixModel(nnx.Rngs(0)), provider, x, rngs=nnx.Rngs(1)
    ), x


def qwix_linen(axis=None):
    qwix = pytest.importorskip("qwix")

    provider = qwix.LoraProvider(module_path=".*", rank=RANK, alpha=ALPHA)
    block = LinenAttention() if axis is None else Scanned(LinenAttention, axis)
    where, put = ("", lambda x: x) if axis is None else ("layers/", stacked(axis))
    kernels = {
        f"{where}attention/{x}/kernel": (put("dnh"), "d")
        for x in ("query", "key", "value")
    }
    kernels[f"{where}attention/out/kernel"] = put("nhd"), "nh"
    kernels[f"{where}dense/kernel"] = put("df"), "d"
    adapted = qwix.apply_lora_to_model(block, provider)
    made = of_linen(adapted, normal(2, 5, WIDTH, seed=1), kernels, alpha=ALPHA)
    first = lambda x: x[0] if isinstance(x, tuple) else x
    return made._replace(apply=lambda p: first(made.apply(p)))


def stacked(axis):
    return lambda letters: letters[:axis] + "L" + letters[axis:]


def peft():
    """PyTorch's layouts: a linear layer, and a convolution of channels first."""
    shapes = {
        "q_proj": ((WIDTH, WIDTH), (RANK, WIDTH), (WIDTH, RANK)),
        "conv": ((WIDTH, WIDTH, 3, 2), (RANK, WIDTH, 3, 2), (WIDTH, RANK, 1, 1)),
    }
    params = {}
    for seed, (name, layer) in enumerate(shapes.items()):
        keys = "base_layer.weight", "lora_A.default.weight", "lora_B.default.weight"
        for place, (key, shape) in enumerate(zip(keys, layer, strict=True)):
            params[f"{name}.{key}"] = normal(*shape, seed=10 * seed + place)

    # Not adapted: its bias proves what comes first in a `weight`.
    params |= {"head.weight": normal(7, WIDTH), "head.bias": normal(7)}

    def apply(params):
        layer = lambda name: [params[f"{name}.{x}"] for x in keys]
        conv = lambda x, w: jax.lax.conv(x, w, (1, 1), "VALID")
        w, a, b = layer("q_proj")
        x = normal(5, 7, WIDTH, seed=1)
        x = jnp.tanh(x @ w.T + ALPHA / RANK * x @ a.T @ b.T)
        x = x.reshape(1, 5, 7, WIDTH).transpose(0, 3, 1, 2)
        w, a, b = layer("conv")
        return conv(x, w) + ALPHA / RANK * conv(conv(x, a), b)

    kernels = {
        "q_proj/base_layer/weight": ("oi", "i"),
        "conv/base_layer/weight": ("oixy", "ixy"),
    }
    return Layers(params, apply, kernels, {"alpha": ALPHA})


def gemma():
    """gemma's einsums, `w` beside `lora/{a,b}`, as its `peft` package computes them."""
    einsums = {
        "q": ("td,ndh->tnh", "dr", "rnh"),
        "kv": ("td,ckdh->ctkh", "dr", "rckh"),
        "gate": ("td,cfd->ctf", "dr", "rcf"),
        "out": ("tnh,nhd->td", "nhr", "rd"),
    }
    sizes = {"d": WIDTH, "n": HEADS, "h": SIZE, "c": 2, "k": HEADS, "f": 7, "r": RANK}
    params: dict[str, Any] = {}
    kernels = {}
    for seed, (name, (equation, a, b)) in enumerate(einsums.items()):
        w = equation.split(",")[1].split("->")[0]
        shaped = [normal(*(sizes[x] for x in y), seed=seed) for y in (w, a, b)]
        params[name] = {"w": shaped[0], "lora": {"a": shaped[1], "b": shaped[2]}}
        kernels[f"{name}/w"] = w, a.removesuffix("r")

    def apply(params):
        def layer(name, x):
            equation, a, b = einsums[name]
            left, right = equation.split(",")
            low = f"{left},{a},{b}->{right.split('->')[1]}"
            p = params[name]
            return jnp.einsum(equation, x, p["w"]) + jnp.einsum(
                low, x, p["lora"]["a"], p["lora"]["b"]
            )

        x = normal(6, WIDTH, seed=1) / WIDTH
        k, v = layer("kv", x)
        x = layer("out", jnp.tanh(layer("q", x) + k) * jnp.tanh(v))
        return layer("gate", x / WIDTH)

    return Layers(params, apply, kernels)


KERAS = {  # layer, input, and the letters of its kernel and of A's features
    "Dense": (lambda k: k.Dense(WIDTH), normal(5, WIDTH), "df", "d"),
    "query": (
        lambda k: k.EinsumDense("btd,dnh->btnh", (None, HEADS, SIZE)),
        normal(2, 5, WIDTH), "dnh", "dn",
    ),
    "output": (
        lambda k: k.EinsumDense("btnh,nhd->btd", (None, WIDTH)),
        normal(2, 5, HEADS, SIZE), "nhd", "nh",
    ),
    "Conv2D": (
        lambda k: k.Conv2D(WIDTH, (2, 3)),
        normal(1, 5, 6, WIDTH), "vwcf", "vwc",
    ),
    "Embedding": (lambda k: k.Embedding(WIDTH, WIDTH), jnp.arange(WIDTH), "ef", "e"),
}  # fmt: skip


def keras_layer(kind):
    """A Keras layer with `enable_lora`, its variables by their paths."""
    keras = pytest.importorskip("keras")
    make, x, letters, inputs = KERAS[kind]
    layer = make(keras.layers)
    layer.build(x.shape)
    layer.enable_lora(RANK, lora_alpha=ALPHA)

    def apply(params):
        values = [(variable, params[variable.path]) for variable in layer.variables]
        with keras.StatelessScope(values):
            return layer(x)

    name = "embeddings" if kind == "Embedding" else "kernel"
    kernels = {f"{layer.path}/{name}": (letters, inputs)}
    params = {variable.path: variable.value for variable in layer.variables}
    return Layers(params, apply, kernels, {"alpha": ALPHA})


def linen_model(axis=None):
    x, options = normal(5, WIDTH, seed=1), {"alpha": ALPHA}
    if axis is None:
        made = of_linen(LinenBlock(), x, {"up/kernel": ("df", "d")}, **options)
        return made._replace(apply=lambda p: made.apply(p)[0])
    kernels = {"layers/up/kernel": (stacked(axis)("df"), "d")}
    return of_linen(Scanned(LinenBlock, axis), x, kernels, **options)


def nnx_model():
    kernels = {"q/kernel": ("df", "d"), "mlp/base_module/kernel": ("df", "d")}
    return of_nnx(NNXModel(nnx.Rngs(0)), normal(5, WIDTH, seed=1), kernels)


def nnx_stack(axis):
    kernels = {"layers/kernel": (stacked(axis)("df"), "d")}
    return of_nnx(NNXStack(axis, nnx.Rngs(0)), normal(5, WIDTH, seed=1), kernels)


MODELS: dict[str, Callable[[], Layers]] = {
    "nnx": nnx_model,
    "nnx, stacked on axis 0": lambda: nnx_stack(0),
    "nnx, stacked on axis 1": lambda: nnx_stack(1),
    "linen, boxed": linen_model,
    "linen, scanned on axis 0": lambda: linen_model(0),
    "linen, scanned on axis 1": lambda: linen_model(1),
    "qwix, nnx": lambda: of_nnx(*qwix_nnx(), QWIX, alpha=ALPHA),
    "qwix, linen": qwix_linen,
    "qwix, scanned on axis 0": lambda: qwix_linen(0),
    "qwix, scanned on axis 1": lambda: qwix_linen(1),
    "PEFT": peft,
    "gemma": gemma,
    **{f"Keras, {kind}": functools.partial(keras_layer, kind) for kind in KERAS},
}


def replaced(params, new):
    """`params` with some leaves replaced, by path; looked up without the package."""
    paths = list(leaves_by_path(params))
    normalized = [path.replace(".", "/") for path in paths]
    assert set(new) <= set(normalized)
    leaves = jax.tree.leaves(params)
    leaves = [new.get(path, x) for path, x in zip(normalized, leaves, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def gradients_of(params, kernels, seed=5):
    leaves = leaves_by_path(params)
    return {
        path: normal(*leaves[path].shape, seed=seed + i)
        for i, path in enumerate(kernels)
    }
