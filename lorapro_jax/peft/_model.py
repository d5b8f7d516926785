"""Names, kinds and shapes of an adapter, checked against its base model.

PEFT says nothing of a factor or a weight whose name the model lacks, nor of an
embedding's factors in a linear layer: what was trained there is lost.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .._checks import close_to
from ._base import Base
from ._beside import Saved, prefixes
from ._contents import Kinds
from ._extra import Extra, torch_shape
from ._names import layer_path
from ._targets import Target

# PEFT on transformers 5 takes targets with these ends for experts, in models of these
# families (`_MOE_TARGET_MODULE_MAPPING` and `_MODEL_TO_CONVERSION_PATTERN` of 5.12).
_EXPERTS = ("gate_proj", "up_proj", "down_proj")
_FAMILIES = frozenset(
    {
        "afmoe", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1",
        "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite",
        "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "mellum",
        "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_thinker",
        "solar_open",
    }
)  # fmt: skip
_PASS = (
    "If PyTorch has another model than `model=` tells of, pass that itself, "
    "`model=torch_model`, or its state dict."
)


def check_model(
    base: Base,
    targets: Sequence[Target],
    extras: Sequence[Extra],
    kinds: Kinds,
    saved: Saved,
) -> None:
    """Raises ValueError where PEFT would lose a part of an adapter, or not load it.

    Args:
      base: What is known of the base model.
      targets: The pairs.
      extras: The leaves beside them.
      kinds: Which layers are said to be convolutions or embeddings.
      saved: The modules that PEFT saves whole.
    """
    _check_names(base, targets)
    for target in targets:
        for name in () if target.naming.is_parameter else target.names:
            _check_kind(target, name, base.kinds.get(name), kinds)
            _check_family(target, name, base.family)
    for extra in extras:
        _check_extra(base, extra)
        _check_tied(base, extra, saved)
    _check_whole(base, saved, {name for extra in extras for name in extra.names})


def _check_names(base: Base, targets: Sequence[Target]) -> None:
    """That the model has all modules and parameters with factors."""
    holders = {name.rpartition(".")[0] for name in base.shapes if _is_matrix(name)}
    lacking = [
        (target, name)
        for target in targets
        for name in target.names
        if name not in (base.shapes if target.naming.is_parameter else holders)
    ]
    if not lacking:
        return
    target, name = lacking[0]
    more = f" (and {len(lacking) - 1} more like it)" if lacking[1:] else ""
    what = "parameter" if target.naming.is_parameter else "module with a weight"
    raise ValueError(
        f"`module_names=` gives `{target.pair.a}` the PyTorch name {name!r}{more}, "
        f"a {what} which `model=` does not have. "
        f"{_close(name, base.shapes if target.naming.is_parameter else holders)} "
        f"{_PASS}"
    )


def _is_matrix(name: str) -> bool:
    """Whether a weight is one of a layer that may have factors, perhaps quantised."""
    return name.rpartition(".")[2] in ("weight", "qweight")


def _check_kind(target: Target, name: str, kind: str | None, kinds: Kinds) -> None:
    """That the layer is what `conv=` and `embedding=` say."""
    path = layer_path(target.pair)
    for option, found, said in (
        ("embedding", kind == "embedding", kinds.is_embedding(target)),
        ("conv", kind == "convolution", kinds.is_conv(path)),
    ):
        if not kind or found == said or (option == "conv" and not found):
            continue
        raise ValueError(
            f"`{target.pair.a}` is of `{name}`, a {kind} in PyTorch, and "
            + (
                f"`{option}=` does not say so: pass `{option}={_regex(path)!r}`, with "
                "the others behind `|`."
                if found
                else "its factors are said to be of an embedding, by "
                "`embedding=` or by their names. Correct its name in `module_names=`, "
                "or `embedding=`."
            )
        )


def _regex(path: str) -> str:
    return f"^{re.escape(path)}$"


def _check_family(target: Target, name: str, family: str | None) -> None:
    """That PEFT does not take a layer for experts."""
    last = name.rpartition(".")[2]
    if family in _FAMILIES and last in _EXPERTS:
        raise ValueError(
            f"In models of the type {family!r}, PEFT on transformers 5 takes `{name}` "
            "for experts and drops the factors of the module. Adapt its weight as a "
            f"parameter: the name `{name}.weight` in `module_names=`, and "
            f"'{last}.weight' in `target_parameters=`."
        )


def _check_extra(base: Base, extra: Extra) -> None:
    """That a weight beside the factors is one of the model's, of its shape."""
    for place in (x for places in extra.places.values() for x in places):
        if place.name not in base.shapes:
            raise ValueError(
                f"`extra=` gives `{extra.path}` the PyTorch name {place.name!r}, which "
                f"`model=` does not have. {_close(place.name, base.shapes)} {_PASS}"
            )
        due, found = base.shapes[place.name], torch_shape(extra, place)
        kind = base.kinds.get(place.name.rpartition(".")[0])
        turned = kind == "Conv1D" and len(found) == 2
        if kind and extra.is_kernel and turned != place.turned:
            raise ValueError(
                f"`{extra.path}` is a kernel for `{place.name}`, a {kind} in PyTorch, "
                "which has its weight as "
                + (
                    "(in, out): put `.T` behind its name"
                    if turned
                    else "(out, in): leave `.T` out of its name"
                )
                + " in `extra=`."
            )
        if due is not None and due != found:
            raise ValueError(
                f"`{extra.path}` would be `{place.name}` of shape {found}, which is "
                f"{due} in `model=`. Correct the name in `extra=`; `.T` behind it is "
                "for the transpose."
            )


def _check_tied(base: Base, extra: Extra, saved: Saved) -> None:
    """That a weight which the model has twice goes out twice."""
    for places in extra.places.values():
        names = [x.name for x in places]
        for group in base.tied:
            lacking = [x for x in group if x not in names]
            if lacking and any(x in group and saved.covers(x) for x in names):
                raise ValueError(
                    f"`{extra.path}` is {names} in `extra=`, which PyTorch ties to "
                    f"{lacking}. PEFT unties what it saves, and these would keep their "
                    f"old values. Give all names: `extra={{{_regex(extra.path)!r}: "
                    f"{group}, ...}}`."
                )


def _check_whole(base: Base, saved: Saved, names: set[str]) -> None:
    """That the file has all weights of the modules that PEFT saves whole."""
    modules = base.kinds.keys() or {
        x for name in base.shapes for x in [*prefixes(name)][:-1]
    }
    whole = sorted(x for x in modules if x.endswith(saved.ends))
    for module in whole:
        lacking = [
            x for x in base.shapes if x.startswith(f"{module}.") and x not in names
        ]
        if lacking:
            raise ValueError(
                f"PEFT saves modules whose names end in {list(saved.ends)}, and so "
                f"`{module}`, and wants all weights of it: {lacking} are not in "
                "`extra=`. Name these too, with their old values where they did not "
                "train."
                + (
                    " Or leave `task_type` out of `config`, if none of them trained."
                    if module.endswith(saved.heads)
                    else ""
                )
            )
        inside = [x for x in whole if x.startswith(f"{module}.")]
        if inside:
            raise ValueError(
                f"PEFT saves modules whose names end in {list(saved.ends)}: `{module}` "
                f"and {inside} in it once more, which it cannot load. Leave the "
                f"weights of `{module}` out of `extra=`."
            )


def _close(name: str, names: Iterable[str] | Mapping[str, Any]) -> str:
    return close_to(name, sorted(names))
