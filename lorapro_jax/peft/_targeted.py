"""Which modules PEFT adapts: `target_modules`, `exclude_modules` and their like."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# PEFT's task types, and the starts that it takes; it is an error there with others.
_TASKS = (
    "SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)  # fmt: skip
_STARTS = ("eva", "orthogonal")
_STARTS_OF_ANY_CASE = ("gaussian", "mica")


def check_given(config: Mapping[str, Any], modules: Sequence[str]) -> None:
    """Raises ValueError for entries that PEFT refuses, or leaves out a module with.

    Args:
      config: What the user has in it.
      modules: The modules that the file has factors of; no parameters.
    """
    for option in ("layers_to_transform", "layers_pattern"):
        if config.get(option) is not None:
            raise ValueError(
                f"`config` has `{option}`, which chooses layers; these follow from the "
                "factors. Leave it out."
            )
    _check_values(config)
    for option in ("target_modules", "exclude_modules"):
        if option in config:
            _check_option(option, config[option])
    for name in modules:
        if _drops(config, name):
            raise ValueError(
                f"`target_modules` and `exclude_modules` of `config` leave out "
                f"`{name}`, so that PEFT would drop its factors without a word. Leave "
                "them out, and they are worked out."
            )


def check_dropped(config: Mapping[str, Any], modules: Iterable[str]) -> None:
    """Raises ValueError where PEFT would not use a module's factors in a file.

    Args:
      config: The configuration of the file.
      modules: The modules that the tree wants from it; no parameters.
    """
    for name in modules:
        try:
            option = _drops(config, name)
        except (re.error, TypeError):
            raise ValueError(
                "its `target_modules` or `exclude_modules` is neither a regex nor a "
                "list of names"
            ) from None
        if option:
            raise ValueError(
                f"its `{option}` leaves out `{name}`, whose factors PEFT would drop. "
                "If they belong to the adapter, make it null in the configuration; if "
                "not, take the layer out of the tree, and its entries with `ignore=`"
            )


def _check_values(config: Mapping[str, Any]) -> None:
    """That PEFT takes the entries at all."""
    task, start = config.get("task_type"), config.get("init_lora_weights", True)
    if task is not None and task not in _TASKS:
        raise ValueError(
            f"`config` has the `task_type` {task!r}, which PEFT does not know. It is "
            f"one of {list(_TASKS)}, or None."
        )
    known = start is None or isinstance(start, bool) or start in _STARTS
    if not (known or str(start).lower() in _STARTS_OF_ANY_CASE):
        raise ValueError(
            f"`config` has the `init_lora_weights` {start!r}, which PEFT does not know "
            "when it loads. Trained factors have no use for it: leave it out."
        )
    if config.get("ensure_weight_tying"):
        raise ValueError(
            "`config` has `ensure_weight_tying`, with which PEFT adapts the head too "
            "where it is tied to an embedding: another adapter. Leave it out; one leaf "
            "that is two weights has both names in `extra=`, as a tuple."
        )


def _check_option(option: str, value: Any) -> None:
    """That `target_modules` or `exclude_modules` says something certain."""
    remedy = "Leave it out, and it is worked out."
    if value is None and option == "exclude_modules":
        return
    if isinstance(value, str):
        if option == "target_modules" and value.lower() == "all-linear":
            raise ValueError(
                "`config` has `target_modules` 'all-linear', with which PEFT leaves "
                f"out heads and embeddings. {remedy}"
            )
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(
                f"`config` has the `{option}` {value!r}, which is no regular "
                f"expression: {error}. {remedy}"
            ) from None
    elif not isinstance(value, list) or not all(isinstance(x, str) for x in value):
        default = ", for which PEFT has a list of its own" if value is None else ""
        raise ValueError(
            f"`config` has the `{option}` {value!r}{default}. It is a regular "
            f"expression or a list of names. {remedy}"
        )


def _drops(config: Mapping[str, Any], name: str) -> str | None:
    """The entry by which PEFT does not adapt a module; None if it does."""
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    if excluded and _is_among(excluded, name):
        return "exclude_modules"
    everything = isinstance(targets, str) and targets.lower() == "all-linear"
    if targets is not None and not everything and not _is_among(targets, name):
        return "target_modules"
    layers = config.get("layers_to_transform")
    if isinstance(layers, int):
        layers = [layers]
    found = re.search(r"\.(\d+)\.", name)
    if layers and isinstance(targets, list) and found and int(found[1]) not in layers:
        return "layers_to_transform"
    return None


def _is_among(targets: Any, name: str) -> bool:
    """Whether a regex or a list of ends names a module."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == x or name.endswith(f".{x}") for x in targets)
