"""What Hugging Face calls the weights, where tunix has them, and how they lie there."""

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from examples.finetune_llm.errors import Refused

MLP = "gate_proj", "up_proj", "down_proj"
ATTENTION = "q_proj", "k_proj", "v_proj", "o_proj"
# Of the norms of a layer: Hugging Face's name, and tunix's.
NORMS = {"input_layernorm": "input_layernorm.w"}
NORMS["post_attention_layernorm"] = "post_attention_layernorm.w"
GEMMA_NORMS = {
    "input_layernorm": "pre_attention_norm.scale",
    "post_attention_layernorm": "post_attention_norm.scale",
    "pre_feedforward_layernorm": "pre_ffw_norm.scale",
    "post_feedforward_layernorm": "post_ffw_norm.scale",
}


class Weight(NamedTuple):
    """One tensor of Hugging Face's files.

    Attributes:
      path: Of tunix's weight, with dots.
      shape: As Hugging Face has it.
      turn: From tunix's array to Hugging Face's.
    """

    path: str
    shape: tuple[int, ...]
    turn: Callable[[np.ndarray], np.ndarray]


def weights(spec: Any) -> dict[str, Weight]:
    """All tensors of a model by name."""
    c, found = spec.model_config, {}
    words = c.num_embed if spec.family == "gemma3" else c.vocab_size
    table, same = (words, c.embed_dim), lambda x: x
    found["model.embed_tokens.weight"] = Weight("embedder.input_embedding", table, same)
    for i in range(c.num_layers):
        for name, weight in _layer(spec.family, c):
            at = weight._replace(path=f"layers.{i}.{weight.path}")
            found[f"model.layers.{i}.{name}"] = at
    norm = "final_norm.scale" if spec.family == "gemma3" else "final_norm.w"
    found["model.norm.weight"] = Weight(norm, (c.embed_dim,), same)
    if not is_tied(spec):
        found["lm_head.weight"] = Weight("lm_head.w", table, np.transpose)
    if has_images(spec):
        return {f"language_model.{name}": weight for name, weight in found.items()}
    return found


def has_images(spec: Any) -> bool:
    """Whether the model for text is a part of one that sees images, too."""
    architectures = spec.config.get("architectures") or [""]
    return "ConditionalGeneration" in architectures[0]


def in_modules(spec: Any) -> str:
    """Where PyTorch's model has its layers; with images, its files say otherwise."""
    return "model.language_model" if has_images(spec) else "model"


def is_tied(spec: Any) -> bool:
    """Whether the output uses the table of the input."""
    c = spec.model_config
    if spec.family == "gemma3":
        return True
    return c.weight_tying if spec.family == "llama" else c.use_tied_embedding


def _layer(family: str, c: Any) -> Iterator[tuple[str, Weight]]:
    """The tensors of one layer."""
    shapes = dict.fromkeys(MLP, (c.hidden_dim, c.embed_dim))
    shapes["down_proj"] = (c.embed_dim, c.hidden_dim)
    for name in MLP:
        path = f"mlp.{name}.kernel"
        yield f"mlp.{name}.weight", Weight(path, shapes[name], np.transpose)
    queries, values = (n * c.head_dim for n in (c.num_heads, c.num_kv_heads))
    wide = {"q_proj": queries, "k_proj": values, "v_proj": values}
    places = gemma_places(c) if family == "gemma3" else {}
    for name in ATTENTION:
        shape = (wide[name], c.embed_dim) if name in wide else (c.embed_dim, queries)
        path, turn = f"attn.{name}.w", _after_heads if name == "o_proj" else _heads
        if places:
            path, turn = places[name]
        yield f"self_attn.{name}.weight", Weight(path, shape, turn)
    norms = GEMMA_NORMS if family == "gemma3" else NORMS
    for name, path in norms.items():
        yield f"{name}.weight", Weight(path, (c.embed_dim,), lambda x: x)
    if family == "qwen2":
        for name in "qkv":
            shape = (wide[f"{name}_proj"],)
            weight = Weight(f"attn.{name}_bias", shape, lambda x: x)
            yield f"self_attn.{name}_proj.bias", weight
    if family in ("qwen3", "gemma3"):
        end = ("q_norm.w", "k_norm.w")
        if family == "gemma3":
            end = ("_query_norm.scale", "_key_norm.scale")
        for name, path in zip("qk", end, strict=True):
            weight = Weight(f"attn.{path}", (c.head_dim,), lambda x: x)
            yield f"self_attn.{name}_norm.weight", weight


def _heads(x: np.ndarray) -> np.ndarray:
    """`(d, heads, size)` as `(heads * size, d)`."""
    return x.reshape(len(x), -1).T


def _after_heads(x: np.ndarray) -> np.ndarray:
    """`(heads, size, d)` as `(d, heads * size)`."""
    return x.reshape(-1, x.shape[-1]).T


def _inner(x: np.ndarray) -> np.ndarray:
    """`(heads, d, size)` as `(heads * size, d)`."""
    return x.swapaxes(1, 2).reshape(-1, x.shape[1])


def gemma_places(c: Any) -> dict[str, tuple[str, Callable]]:
    """Gemma's attention: which einsum a kernel is in, and how to take it out."""
    part = lambda i: lambda x: _inner(x[i])
    if c.num_heads == c.num_kv_heads:
        found = {x: ("attn.qkv_einsum.w", part(i)) for i, x in enumerate(ATTENTION[:3])}
    else:
        found = {"q_proj": ("attn.q_einsum.w", _inner)}
        found["k_proj"] = ("attn.kv_einsum.w", part(0))
        found["v_proj"] = ("attn.kv_einsum.w", part(1))
    return found | {"o_proj": ("attn.attn_vec_einsum.w", _after_heads)}


def read_header(path: Path) -> dict[str, Any]:
    """The names, dtypes and shapes of a safetensors file, without its weights."""
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
    except (ValueError, struct.error) as error:
        raise Refused(f"{path} is no safetensors file: {error}") from None
    return {k: v for k, v in header.items() if k != "__metadata__"}


def check_files(spec: Any) -> None:
    """Raises Refused unless a folder's files have the weights of its config.json."""
    files = sorted(spec.folder.glob("*.safetensors"))
    if not files:
        raise Refused(f"{spec.folder} has no *.safetensors with weights.")
    due, found = weights(spec), {}
    for path in files:
        header = read_header(path)
        kinds = {x["dtype"] for x in header.values()}
        if len(kinds) > 1 or not kinds <= {"F32", "F16", "BF16"}:
            raise Refused(
                f"{path} has weights of {' and '.join(sorted(kinds))}; tunix reads one "
                "dtype of F32, F16 and BF16. Save the model again in one."
            )
        found |= {name: tuple(x["shape"]) for name, x in header.items()}
    _check_names(spec, due, found)


def _check_names(
    spec: Any, due: Mapping[str, Weight], found: Mapping[str, tuple[int, ...]]
) -> None:
    missing = [x for x in due if x not in found]
    ignored = ("rotary_emb.inv_freq", "lm_head.weight")  # the latter where it is tied
    images = ("vision_tower.", "multi_modal_projector.") if has_images(spec) else ()
    unknown = [
        x
        for x in found
        if x not in due and not x.endswith(ignored) and not x.startswith(images)
    ]
    for names, what in ((missing, "lack"), (unknown, "have the unknown")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise Refused(
                f"the files of {spec.folder} {what} {names[0]}{more}, which does not "
                f"fit a {spec.family} of its config.json."
            )
    for name, weight in due.items():
        if found[name] != weight.shape:
            raise Refused(
                f"{name} of {spec.folder} has shape {found[name]}, by config.json "
                f"{weight.shape}."
            )
