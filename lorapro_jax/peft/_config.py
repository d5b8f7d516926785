"""The scales of a PEFT adapter: `adapter_config.json`.

PEFT multiplies by `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`.
Modules that differ from the rest have entries in `rank_pattern` and `alpha_pattern`.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, cast

from .._checks import is_real_scalar
from ..pairs._axes import LoRAPair

# What PEFT writes for an adapter that is LoRA and nothing else.
_FIXED = {
    "peft_type": "LORA",
    "task_type": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "lora_dropout": 0.0,
    "modules_to_save": None,
}

# These say what is computed, so they follow from the pairs and are not the user's.
_WORKED_OUT = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}

# Options with which PEFT computes something else than W0 + s B A.
_NOT_LORA = (
    "use_dora",
    "use_bdlora",
    "trainable_token_indices",
    "alora_invocation_tokens",
)
# Initialisers that change W0, also when an adapter is loaded.
_CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def peft_config(
    layers: Mapping[str, LoRAPair], *, rslora: bool, extra: Mapping[str, Any]
) -> dict[str, Any]:
    """The configuration of an adapter, from the pair of each module.

    Args:
      layers: The pair of each module, with the module's own scale, by PyTorch's name
        of the module.
      rslora: Whether PEFT is to divide alpha by the square root of the rank.
      extra: More entries, as the user gave them.

    Raises:
      ValueError: `extra` has an entry that follows from the pairs.
    """
    if both := sorted(_WORKED_OUT & extra.keys()):
        raise ValueError(
            f"`config` has {both}, which follow from the factors and from `alpha=`, "
            "`scale=` and `rslora=`. Change those instead."
        )
    ranks = {name: cast(int, pair.rank) for name, pair in layers.items()}
    alphas = {
        name: _tidy(float(cast(float, pair.scale)) * _divisor(ranks[name], rslora))
        for name, pair in layers.items()
    }
    rank, alpha = _most_common(ranks), _most_common(alphas)
    return {
        **_FIXED,
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "target_modules": sorted(ranks),
        "rank_pattern": _pattern(ranks, rank),
        "alpha_pattern": _pattern(alphas, alpha),
        **extra,
    }


def check_config(config: Mapping[str, Any]) -> None:
    """Raises ValueError for an adapter that is more than pairs of factors."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"its `peft_type` is {kind!r}, not 'LORA'")
    for option in _NOT_LORA:
        if config.get(option):
            raise ValueError(
                f"it uses `{option}`, which plain factors cannot do; merge it into "
                "its model with PEFT, and take the weights"
            )
    init = str(config.get("init_lora_weights", True))
    if init.startswith(_CHANGE_BASE):
        raise ValueError(
            f"its `init_lora_weights` is {init!r}, with which PEFT changes the base "
            "weights; convert it there: `save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)`"
        )
    patterns = [config.get(f"{name}_pattern") or {} for name in ("rank", "alpha")]
    if not all(isinstance(pattern, Mapping) for pattern in patterns):
        raise ValueError("its `rank_pattern` or `alpha_pattern` is no mapping")
    numbers = {"r": config.get("r"), "lora_alpha": config.get("lora_alpha")}
    for name, number in (numbers | patterns[0] | patterns[1]).items():
        if not (is_real_scalar(number) and math.isfinite(number)):
            raise ValueError(f"its `{name}` is {number!r}, no finite number")


def module_rank(config: Mapping[str, Any], name: str) -> int:
    """The rank that a configuration gives to a module."""
    return int(_look_up(config.get("rank_pattern"), name, config["r"]))


def module_scale(config: Mapping[str, Any], name: str) -> float:
    """The scale s of W0 + s B A that a configuration gives to a module."""
    alpha = _look_up(config.get("alpha_pattern"), name, config["lora_alpha"])
    rslora = bool(config.get("use_rslora"))
    return float(alpha) / _divisor(module_rank(config, name), rslora)


def _divisor(rank: int, rslora: bool) -> float:
    return math.sqrt(rank) if rslora else rank


def _look_up(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The entry for a module, as PEFT's `get_pattern_key` finds it.

    A key is a regex for the end of the module's name.
    """
    for key, value in (pattern or {}).items():
        try:
            matches = re.match(rf"(.*\.)?({key})$", name)
        except re.error as error:
            raise ValueError(f"its pattern {key!r} is no regex: {error}") from None
        if matches:
            return value
    return default


def _pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """The modules that differ from the default, by regexes of PEFT's.

    They begin with `^`, because `q` is also the end of `block.q`.
    """
    return {
        f"^{re.escape(name)}": value
        for name, value in values.items()
        if value != default
    }


def _tidy(alpha: float) -> float:
    """A whole number where alpha is one up to rounding: 16, not 16.000000000000004."""
    nearest = round(alpha)
    return nearest if math.isclose(alpha, nearest, rel_tol=1e-12) else alpha


def _most_common(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]
