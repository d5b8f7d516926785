"""A Llama of a few thousand weights in JAX, with stacked layers and einsum heads.

The weights come from transformers' `LlamaForCausalLM`; the adapters have the axes of
JAX's own LoRA stacks, so that what PEFT makes of them can be compared output by output.
"""

import jax
import jax.numpy as jnp
import numpy as np

LAYERS, WIDTH, HEADS, KV_HEADS, SIZE, HIDDEN, WORDS = 3, 24, 4, 2, 6, 40, 50
CONFIG = {
    "num_hidden_layers": LAYERS, "hidden_size": WIDTH, "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS, "head_dim": SIZE, "intermediate_size": HIDDEN,
    "vocab_size": WORDS, "max_position_embeddings": 32,
}  # fmt: skip

# What an adapter of a kernel `x -> y` looks like: axes of x and of y.
AXES = {
    "q": ("d", "nh"), "k": ("d", "kh"), "v": ("d", "kh"), "o": ("nh", "d"),
    "gate": ("d", "f"), "up": ("d", "f"), "down": ("f", "d"),
}  # fmt: skip
SIZES = {"d": WIDTH, "n": HEADS, "k": KV_HEADS, "h": SIZE, "f": HIDDEN}
MODULES = {
    "layers/attn/([qkvo])": r"model.layers.{}.self_attn.\1_proj",
    "layers/mlp/(.*)": r"model.layers.{}.mlp.\1_proj",
}


def block_of(name):
    return "attn" if name in "qkvo" else "mlp"


def adapters(ranks, seed, dtype=jnp.float32):
    """Random factors for these kernels, `(layers, *x, r)` and `(layers, r, *y)`."""
    rng = np.random.default_rng(seed)
    tree = {"attn": {}, "mlp": {}}
    for name, rank in ranks.items():
        x, y = ([SIZES[axis] for axis in axes] for axes in AXES[name])
        shapes = {"lora_a": (LAYERS, *x, rank), "lora_b": (LAYERS, rank, *y)}
        tree[block_of(name)][name] = {
            key: jnp.asarray(0.3 * rng.standard_normal(shape), dtype)
            for key, shape in shapes.items()
        }
    return {"layers": tree}


def weights_of(model):
    """The weights of a `LlamaForCausalLM`, layers stacked, kernels `(*x, *y)`."""
    arrays = {name: x.detach().numpy() for name, x in model.state_dict().items()}

    def stacked(suffix):
        return np.stack([arrays[f"model.layers.{i}.{suffix}"] for i in range(LAYERS)])

    layers = {
        "input_norm": stacked("input_layernorm.weight"),
        "output_norm": stacked("post_attention_layernorm.weight"),
    }
    for name, axes in AXES.items():
        module = "self_attn" if block_of(name) == "attn" else "mlp"
        kernel = stacked(f"{module}.{name}_proj.weight").swapaxes(1, 2)
        layers[name] = kernel.reshape(LAYERS, *(SIZES[axis] for axis in "".join(axes)))
    return {
        "embed": arrays["model.embed_tokens.weight"],
        "layers": layers,
        "norm": arrays["model.norm.weight"],
        "head": arrays["lm_head.weight"].T,
    }


def logits(weights, factors, scales, text):
    """The model's output `(batch, length, words)`, with s B A beside every kernel."""

    def layer(x, inputs):
        weights, factors = inputs

        def linear(name, x):
            source, target = AXES[name]
            y = jnp.einsum(f"bt{source},{source}{target}->bt{target}", x, weights[name])
            pair = factors[block_of(name)].get(name)
            if pair is None:
                return y
            low = jnp.einsum(f"bt{source},{source}r->btr", x, pair["lora_a"])
            return y + scales[name] * jnp.einsum(
                f"btr,r{target}->bt{target}", low, pair["lora_b"]
            )

        h = _rms_norm(x, weights["input_norm"])
        q, k, v = _rotated(linear("q", h)), _rotated(linear("k", h)), linear("v", h)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + linear("o", mixed)
        h = _rms_norm(x, weights["output_norm"])
        return x + linear(
            "down", jax.nn.silu(linear("gate", h)) * linear("up", h)
        ), None

    with jax.default_matmul_precision("highest"):
        x = weights["embed"][text]
        x, _ = jax.lax.scan(layer, x, (weights["layers"], factors["layers"]))
        return _rms_norm(x, weights["norm"]) @ weights["head"]


def _rms_norm(x, weight):
    return weight * x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)


def _rotated(x):
    """Rotary positions, halves as in transformers, base 10,000."""
    time, half = x.shape[1], x.shape[-1] // 2
    angles = jnp.arange(time)[:, None] / 1e4 ** (jnp.arange(half) / half)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    )
