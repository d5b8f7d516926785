"""The ranks and scales of a PEFT adapter: `adapter_config.json`.

PEFT multiplies by `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`.
Modules that differ from the rest have entries in `rank_pattern` and `alpha_pattern`.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ._refused import check_config
from ._targeted import check_given

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

# These say what is computed, so they follow from the tree and are not the user's.
_WORKED_OUT = {
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias",
    "modules_to_save", "target_parameters",
}  # fmt: skip


class Numbers(NamedTuple):
    """What the configuration says of one module: its rank and its scale s."""

    rank: int
    scale: float


def peft_config(
    modules: Mapping[str, Numbers],
    *,
    rslora: bool,
    parameters: Sequence[str],
    beside: Mapping[str, Any],
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """The configuration of an adapter.

    Args:
      modules: The rank and scale of each module or parameter, by PyTorch's name.
      rslora: Whether PEFT is to divide alpha by the square root of the rank.
      parameters: Those among the names that are parameters.
      beside: `bias` and `modules_to_save`, for what the file has beside the factors.
      extra: More entries, as `read_entries` returns them.

    Raises:
      ValueError: `extra` has an entry that follows from the tree, or one with which
        the adapter would be more than factors, or less.
    """
    ranks = {name: x.rank for name, x in modules.items()}
    alphas = {
        name: _tidy(x.scale * _divisor(x.rank, rslora)) for name, x in modules.items()
    }
    rank, alpha = most_common(ranks.values()), most_common(alphas.values())
    found = {
        **_FIXED,
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "target_modules": sorted(ranks.keys() - set(parameters)),
        "rank_pattern": _pattern(ranks, rank),
        "alpha_pattern": _pattern(alphas, alpha),
        **beside,
    }
    if parameters:  # PEFT before 0.17 does not know it
        found["target_parameters"] = sorted(parameters)
    both = [x for x in sorted(_WORKED_OUT & extra.keys()) if extra[x] != found.get(x)]
    if both:
        raise ValueError(
            f"`config` has {both}, which follow from the factors and from `alpha=`, "
            "`scale=`, `rslora=`, `extra=` and `target_parameters=`. Change those "
            "instead."
        )
    config = found | dict(extra)
    try:
        check_config(config)
    except ValueError as error:
        raise ValueError(f"`config` would make another adapter: {error}.") from None
    check_given(extra, found["target_modules"])
    return config


def numbers_by(config: Mapping[str, Any]) -> Callable[[str], Numbers]:
    """The rank, and the s of W0 + s B A, that a configuration gives to each module."""
    rslora = bool(config.get("use_rslora"))
    rank_of = _look_up(config.get("rank_pattern"), config["r"])
    alpha_of = _look_up(config.get("alpha_pattern"), config["lora_alpha"])

    def find(name: str) -> Numbers:
        rank = int(rank_of(name))
        return Numbers(rank, float(alpha_of(name)) / _divisor(rank, rslora))

    return find


def most_common(values: Iterable[Any]) -> Any:
    """The value that occurs most often, the first of several."""
    return Counter(values).most_common(1)[0][0]


def _divisor(rank: int, rslora: bool) -> float:
    return math.sqrt(rank) if rslora else rank


def _look_up(pattern: Mapping[str, Any] | None, default: Any) -> Callable[[str], Any]:
    """The entry for each module, as PEFT's `get_pattern_key` finds it.

    A key is a regex for the end of the module's name, and the first that fits counts.
    Those for one name, of which there may be thousands, are looked up.
    """
    entries = list((pattern or {}).items())
    exact: dict[str, tuple[int, Any]] = {}
    regexes: list[tuple[int, re.Pattern[str], Any]] = []
    for place, (key, value) in enumerate(entries):
        name = re.sub(r"\\(.)", r"\1", key.removeprefix("^"))
        if key == _pattern_for(name):
            exact.setdefault(name, (place, value))
        else:
            regexes.append((place, re.compile(rf"(.*\.)?({key})$"), value))

    def find(name: str) -> Any:
        place, value = exact.get(name, (len(entries), default))
        for other, regex, entry in regexes:
            if other < place and regex.match(name):
                return entry
        return value

    return find


def _pattern(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """The modules that differ from the default, by regexes of PEFT's.

    They begin with `^`, because `q` is also the end of `block.q`.
    """
    return {
        _pattern_for(name): value for name, value in values.items() if value != default
    }


def _pattern_for(name: str) -> str:
    return f"^{re.escape(name)}"


def _tidy(alpha: float) -> float:
    """A whole number where alpha is one up to rounding: 16, not 16.000000000000004."""
    nearest = round(alpha)
    return nearest if math.isclose(alpha, nearest, rel_tol=1e-12) else alpha
