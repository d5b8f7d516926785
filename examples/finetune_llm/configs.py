"""From a Hugging Face config.json to the configuration of a model of tunix."""

from collections.abc import Mapping
from typing import Any

from tunix.models.gemma3 import model as gemma3
from tunix.models.llama3 import model as llama3
from tunix.models.qwen2 import model as qwen2
from tunix.models.qwen3 import model as qwen3

from examples.finetune_llm.errors import Refused
from examples.finetune_llm.rotary import LlamaConfig, Scaling

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma3ForConditionalGeneration": "gemma3",  # its part for text
}
# What transformers leaves out of the config.json of the larger Gemmas.
GEMMA_DEFAULTS = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
}
_REMAT = {
    "llama": llama3.RematConfig,
    "qwen2": qwen2.RematConfig,
    "qwen3": qwen3.RematConfig,
    "gemma3": gemma3.RematConfig,
}
# What a model may have that tunix's lacks: the entry, and the values that are fine.
_PLAIN = {
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "hidden_act": (None, "silu"),
    "hidden_activation": (None, "gelu_pytorch_tanh"),
    "use_sliding_window": (None, False),
    "use_bidirectional_attention": (None, False),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "quantization_config": (None,),
}
GEMMA_PATTERN = 6  # of so many layers, the last sees everything


def family_of(config: Mapping[str, Any]) -> str:
    """The family of an architecture.

    Raises:
      Refused: It is none of those supported.
    """
    found = (config.get("architectures") or ["nothing"])[0]
    if found not in FAMILIES:
        raise Refused(
            f"config.json has the architecture {found}, which is not supported. "
            f"Supported are {', '.join(FAMILIES)}."
        )
    return FAMILIES[found]


def for_text(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries for text, in one mapping; those for images are left out."""
    inner = config.get("text_config")
    if not isinstance(inner, Mapping):
        return dict(config)
    outer = {k: v for k, v in config.items() if not isinstance(v, Mapping)}
    return {**GEMMA_DEFAULTS, **outer, **inner}


def model_config(family: str, config: Mapping[str, Any], remat: bool) -> Any:
    """The configuration of a family in tunix.

    Args:
      family: One of the values of `FAMILIES`.
      config: What config.json has, as transformers 4 or 5 writes it.
      remat: Whether the backward pass computes each layer again.

    Raises:
      Refused: An entry is missing, or asks for something that tunix's model lacks.
    """
    for name, fine in _PLAIN.items():
        if config.get(name) not in fine:
            raise Refused(
                f"config.json has {name} = {config[name]!r}, which tunix's {family} "
                f"lacks: it computes with {fine[-1]!r}."
            )
    kind = _REMAT[family]
    common = _sizes(family, config)
    common["remat_config"] = kind.DECODER if remat else kind.NONE
    return {"llama": _llama, "qwen2": _qwen2, "qwen3": _qwen3, "gemma3": _gemma3}[
        family
    ](config, common)


def _need(config: Mapping[str, Any], name: str) -> Any:
    if config.get(name) is None:
        raise Refused(f"config.json has no {name}.")
    return config[name]


def _sizes(family: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What all families call alike."""
    heads, width = (_need(config, x) for x in ("num_attention_heads", "hidden_size"))
    size = config.get("head_dim")
    if size is None:
        size = {"qwen3": 128, "gemma3": 256}.get(family, width // heads)
    kv_heads = config.get("num_key_value_heads") or heads
    if size % 2 or heads % kv_heads:
        raise Refused(
            f"config.json has {heads} heads of {size} for {kv_heads} of keys and "
            "values: the size has to be even, and the second number divide the first."
        )
    return {
        "num_layers": _need(config, "num_hidden_layers"),
        "embed_dim": width,
        "hidden_dim": _need(config, "intermediate_size"),
        "num_heads": heads,
        "head_dim": size,
        "num_kv_heads": kv_heads,
    }


def rope_of(config: Mapping[str, Any], kind: str | None = None) -> dict[str, Any]:
    """The rotary parameters: type, base and the rest, from either version's entries.

    Args:
      config: What config.json has.
      kind: The kind of attention, where they differ (Gemma 3).
    """
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if kind:
        found = dict(found.get(kind) or ({} if kind in _kinds(config) else found))
    found.setdefault("rope_type", found.pop("type", "default"))
    found.setdefault("rope_theta", config.get("rope_theta", 10_000.0))
    return found


def _kinds(config: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = config.get("rope_parameters") or {}
    return {k: v for k, v in parameters.items() if isinstance(v, Mapping)}


def _check_rope(rope: Mapping[str, Any], *known: str) -> None:
    if rope["rope_type"] not in known:
        raise Refused(
            f"config.json has rotary positions of type {rope['rope_type']!r}; for this "
            f"family only {', '.join(known)} can be computed."
        )


def _tied(config: Mapping[str, Any], default: bool = False) -> bool:
    return bool(config.get("tie_word_embeddings", default))


def _llama(config: Mapping[str, Any], common: dict[str, Any]) -> LlamaConfig:
    rope = rope_of(config)
    _check_rope(rope, "default", "llama3")
    scaling = None
    if rope["rope_type"] == "llama3":
        scaling = Scaling(*(_need(rope, name) for name in Scaling._fields))
    return LlamaConfig(
        **common,
        vocab_size=_need(config, "vocab_size"),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        rope_theta=rope["rope_theta"],
        rope_scaling=scaling,
        weight_tying=_tied(config),
    )


def _qwen(config: Mapping[str, Any], common: dict[str, Any]) -> dict[str, Any]:
    rope = rope_of(config)
    _check_rope(rope, "default")
    return common | {
        "vocab_size": _need(config, "vocab_size"),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "rope_theta": rope["rope_theta"],
        "use_tied_embedding": _tied(config),
    }


def _qwen2(config: Mapping[str, Any], common: dict[str, Any]) -> qwen2.ModelConfig:
    return qwen2.ModelConfig(**_qwen(config, common))


def _qwen3(config: Mapping[str, Any], common: dict[str, Any]) -> qwen3.ModelConfig:
    return qwen3.ModelConfig(**_qwen(config, common))


def _gemma3(config: Mapping[str, Any], common: dict[str, Any]) -> gemma3.ModelConfig:
    if not _tied(config, default=True) or config.get("rms_norm_eps", 1e-6) != 1e-6:
        raise Refused(
            "config.json has an untied output or an rms_norm_eps other than 1e-06, "
            "which tunix's gemma3 lacks."
        )
    _check_layers(config, common["num_layers"])
    near, far = rope_of(config, "sliding_attention"), rope_of(config, "full_attention")
    if not _kinds(config):  # as transformers 4 writes it
        near = {"rope_type": "default"}
        near["rope_theta"] = config.get("rope_local_base_freq", 10_000.0)
        far["rope_theta"] = config.get("rope_theta", 1_000_000.0)
    for rope in (near, far):
        _check_rope(rope, "default", "linear")
    return gemma3.ModelConfig(
        **common,
        num_embed=_need(config, "vocab_size"),
        sliding_window_size=config.get("sliding_window", 4096),
        local_base_frequency=near["rope_theta"],
        global_base_frequency=far["rope_theta"],
        local_scale_factor=near.get("factor", 1.0),
        global_scale_factor=far.get("factor", 1.0),
        query_pre_attn_norm=_gemma_norm(config, common),
    )


def _gemma_norm(
    config: Mapping[str, Any], common: Mapping[str, Any]
) -> gemma3.QueryPreAttentionNormalisation:
    """How queries are scaled."""
    kinds = gemma3.QueryPreAttentionNormalisation
    scalar = config.get("query_pre_attn_scalar", 256)
    known = {
        common["embed_dim"]
        // common["num_heads"]: kinds.BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS,
        common["head_dim"]: kinds.BY_ONE_OVER_SQRT_HEAD_DIM,
    }
    if scalar not in known:
        raise Refused(
            f"config.json has query_pre_attn_scalar = {scalar}; tunix's gemma3 takes "
            f"{' or '.join(map(str, known))} for these sizes."
        )
    return known[scalar]


def _check_layers(config: Mapping[str, Any], count: int) -> None:
    """Raises Refused for another order of near- and far-sighted layers."""
    every = config.get("sliding_window_pattern", GEMMA_PATTERN)
    near, far = "sliding_attention", "full_attention"
    due = [far if (i + 1) % GEMMA_PATTERN == 0 else near for i in range(count)]
    if every != GEMMA_PATTERN or (config.get("layer_types") or due) != due:
        raise Refused(
            "config.json has another order of layers with sliding and full attention "
            f"than tunix's gemma3, where every {GEMMA_PATTERN}th is full."
        )
