"""Configurations that are read: of plain LoRA, and with numbers that mean something.

What an option does decides. PEFT has a field for each variant of LoRA that is off when
it is false, empty or null, and lower-cases names of initialisers.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from .._checks import is_real_scalar

_MERGE = "merge it into its model with PEFT, and take the weights"

# Fields of PEFT's variants: what would be lost with plain factors, and what to do.
_NOT_LORA = {
    "use_dora": ("norms and trained magnitudes of the rows of W0 + s B A", _MERGE),
    "kasa_config": (
        "a trained diagonal between B and A, and singular values taken off W0",
        _MERGE,
    ),
    "lora_bias": ("a trained bias behind B", _MERGE),
    "use_qalora": ("the mean over groups of inputs before A", _MERGE),
    "use_bdlora": ("factors that are block-diagonal", _MERGE),
    "monteclora_config": ("noise on the factors", _MERGE),
    "layer_replication": ("layers of the base model that are repeated", _MERGE),
    "trainable_token_indices": ("trained rows of an embedding", _MERGE),
    "arrow_config": ("a router between adapters", "load these one by one"),
    "alora_invocation_tokens": (
        "that it starts in the middle of the text",
        "there is no model of weights alone that does this",
    ),
}
# What PEFT may add; without effect on what a trained adapter computes.
_HARMLESS = frozenset(
    {
        "use_rslora",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "loftq_config",
        "velora_config",
        "megatron_config",
        "runtime_config",
    }
)
# How factors may start without a change of W0; and how W0 changes, on loading too.
_STARTS = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")
_CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_LARGEST = float(np.finfo(np.float32).max)
_HIGHEST = 2**31 - 1  # of a rank, as axes of arrays have them


def check_config(config: Mapping[str, Any]) -> None:
    """Raises ValueError for an adapter that is more than pairs of factors."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"its `peft_type` is {kind!r}, not 'LORA'")
    for option, (lost, remedy) in _NOT_LORA.items():
        if config.get(option):
            raise ValueError(
                f"it uses `{option}`: plain factors would lose {lost}; {remedy}"
            )
    for option, value in config.items():
        if option in _HARMLESS or not value:
            continue
        is_object = isinstance(value, Mapping) and option.endswith("_config")
        if is_object or (option.startswith("use_") and value is True):
            raise ValueError(
                f"it uses `{option}`, which is not known here and may change what is "
                "computed. If it does not, make it null in the configuration"
            )
    _check_start(config.get("init_lora_weights", True))
    bias = config.get("bias") or "none"
    if bias not in ("none", "all", "lora_only"):
        raise ValueError(f"its `bias` is {bias!r}, not 'none', 'all' or 'lora_only'")
    _check_numbers(config)


def _check_start(value: Any) -> None:
    start = str(value).lower()
    if start.startswith(_CHANGE_BASE):
        remedy = (
            "merge it into the model that it was trained on, and take the weights"
            if start.startswith("loftq")
            else "convert it there: `save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)`"
        )
        raise ValueError(
            f"its `init_lora_weights` is {value!r}, with which PEFT changes the base "
            f"weights; {remedy}"
        )
    if start not in _STARTS:
        raise ValueError(
            f"its `init_lora_weights` is {value!r}, which is not known here and may "
            "change the base weights. If it does not, make it true in the configuration"
        )


def _check_numbers(config: Mapping[str, Any]) -> None:
    """That ranks are whole, scales finite, and patterns regexes."""
    ranks, alphas = config.get("rank_pattern"), config.get("alpha_pattern")
    for name, pattern in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        if not isinstance(pattern or {}, Mapping):
            raise ValueError(f"its `{name}` is {pattern!r}, no mapping")
        for key in pattern or {}:
            try:
                re.compile(rf"(.*\.)?({key})$")
            except re.error as error:
                raise ValueError(
                    f"its `{name}` has {key!r}, which is no regex: {error}"
                ) from None
    _check_rank("r", config.get("r"))
    for key, value in (ranks or {}).items():
        _check_rank(f"rank_pattern[{key!r}]", value)
    _check_alpha("lora_alpha", config.get("lora_alpha"))
    for key, value in (alphas or {}).items():
        _check_alpha(f"alpha_pattern[{key!r}]", value)


def _check_rank(name: str, value: Any) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not (whole and 0 < value <= _HIGHEST):
        raise ValueError(f"its `{name}` is {_shown(value)}, no whole number above 0")


def _check_alpha(name: str, value: Any) -> None:
    try:
        good = is_real_scalar(value) and abs(float(value)) <= _LARGEST
    except OverflowError:  # an integer beyond the floats
        good = False
    if not good:
        raise ValueError(
            f"its `{name}` is {_shown(value)}, no finite number that float32 can hold"
        )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:40]}... ({len(text)} characters)"
