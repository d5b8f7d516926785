"""What an error of the search for pairs says: the leaf, what was found, the remedy."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .._checks import close_to, some
from ..algebra._axes import Shape
from ._axes import Axes, LayoutError, LoRAPair
from ._leaves import FREEZE, Leaf, index_leaves, is_under, masked_paths
from ._names import FactorName, parse_factor_name


def half_pair_message(
    tree: Any, leaves: Mapping[str, Leaf], path: str, name: FactorName
) -> str:
    """That a factor is alone: who is missing, and why that may be."""
    prefix = f"{name.owner}/" if name.owner else ""

    def beside(paths: Iterable[str]) -> list[str]:
        return sorted(x.removeprefix(prefix) for x in paths if x.startswith(prefix))

    masked = masked_paths(tree)
    also = f"; masked or None: {beside(masked)}" if beside(masked) else ""
    head = (
        f"`{path}` is a LoRA factor without its partner `{name.partner}` (leaves in "
        f"`{name.owner}`: {beside(leaves)}{also}). LoRA-Pro adjusts both factors "
        "together, so it has to see both. "
    )
    rest = "name all other pairs with `pairs=`, and this one counts as any other leaf."
    if is_under(name.partner, masked):
        return (
            f"{head}The partner is masked or None here. If `optax.partition` or "
            "`optax.masked` separates them, give both one label, or put `lorapro()` "
            "before it in the chain. If the partner is to stay as it is, pass "
            f"`wrt={name.role!r}` and both in the parameters, under one label; or "
            f"freeze both: {FREEZE}; or {rest}"
        )
    both = f"{path!r}, path of B" if name.role == "a" else f"path of A, {path!r}"
    return (
        f"{head}If the partner has another name, give all pairs of the tree with "
        f"`pairs=[({both}), ...]`. If it is to stay as it is, pass `wrt={name.role!r}` "
        f"and parameters with both; or leave `{path}` out too, or freeze it with "
        f"`optax.partition` and `optax.set_to_zero()`. If it has no partner, {rest}"
    )


def rivals_message(paths: Sequence[str]) -> str:
    """That several leaves are named like one factor."""
    return (
        f"{list(paths)} all look like the same factor of one LoRA pair. Rename them, "
        "or give the pairs explicitly with `pairs=`."
    )


def unknown_path_message(
    tree: Any, leaves: Mapping[str, Leaf], path: str, given: str
) -> str:
    """That `pairs=` names no leaf.

    Args:
      tree: The tree.
      leaves: Its leaves.
      path: The path, normalised.
      given: The argument as the user wrote it.
    """
    if is_under(path, masked_paths(tree)):
        return (
            f"`{given}` of the given `pairs` is masked or None here. Leave its pair "
            "out of `pairs`; or put `lorapro()` before `optax.partition` or "
            "`optax.masked` in the chain."
        )
    hint = ""
    if re.search(r"[*+?^$|\\{}]", given):
        hint = (
            " Paths in `pairs` are no regular expressions; for these, pass a function: "
            "`pairs=lambda tree: [pair for pair in find_pairs(tree) if "
            "re.search(pattern, pair.a)]`."
        )
    return (
        f"`{given}` of the given `pairs` is no path of this tree of {len(leaves)} "
        f"leaves. {close_to(path, leaves)} In a list, a path is an index, such as "
        f"'4'.{hint}"
    )


def no_pair_message(pair: LoRAPair, a: Shape, b: Shape, reason: LayoutError) -> str:
    """That two shapes cannot be read as a pair, or in more than one way."""
    head = (
        f"`{pair.a}` {a} and `{pair.b}` {b} cannot be read as one LoRA pair: {reason}. "
    )
    if pair.has_axes:
        return (
            f"{head}Correct its axes in `pairs=`, or leave all of them out, to have "
            "them read from the shapes."
        )
    if reason.remedy:
        return head + reason.remedy
    if reason.readings:
        options = " or ".join(_written_out(pair, axes) for axes in reason.readings)
        return (
            f"{head}Say which with `stack_axis=`, the stacked axes of all factors of "
            "three axes or more, `()` for none; or list all pairs of the tree, "
            f"`pairs=[...]`, this one as {options}."
        )
    return (
        f"{head}If they do belong to one layer, list all pairs of the tree, this one "
        f"with its axes: `pairs=[LoRAPair({pair.a!r}, {pair.b!r}, a_rank_axis=..., "
        "b_rank_axis=..., a_batch_axes=..., b_batch_axes=...), ...]`."
    )


def shared_weight_message(paths: Sequence[str]) -> str:
    """That several adapters belong to one weight."""
    return (
        f"{list(paths)} are factors of adapters on one weight, and each would be "
        "adjusted to all of its gradient: together their step is too long. Train one, "
        f"and freeze the others: {FREEZE} of each; or do not differentiate them. If no "
        "two of them are ever active in one step, list all pairs with `pairs=`."
    )


def no_pairs_message(tree: Any, remedy: str) -> str:
    """That a tree has no pair: what it has, how factors are known, what to do.

    Args:
      tree: The tree.
      remedy: What else may help, for this caller; a sentence or more.
    """
    paths = list(index_leaves(tree))
    return (
        f"No LoRA pair among the {len(paths)} leaves, such as {paths[:4]}. Factors are "
        "known by names like `lora_a` and `lora_b`, `kernel_lora_a`, `lora_A.weight`, "
        "`lora/a`, `lora_down`. Give others with `pairs=[(path of A, path of B)]` (for "
        f"Keras's lists, `lorapro_jax.keras.keras_pairs(model)`). {remedy}"
    )


def no_leaves_message(tree: Any) -> str:
    """That a tree has nothing to train at all."""
    masked = sorted(masked_paths(tree))
    if masked:
        found = f" ({some(masked)} masked or None)"
        cause = "Does a label of `optax.partition` or a mask match no leaf?"
    else:
        found = ""
        cause = (
            "Does the model have adapters, and is the filter for their kind, as "
            "`nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)` has it?"
        )
    return (
        f"The tree has no leaf{found}, so nothing would train. {cause} If it is meant "
        "to be empty, pass `on_no_pairs='ignore'`."
    )


def shared_weights(pairs: Iterable[LoRAPair]) -> list[list[str]]:
    """The As of adapters whose names show that they are on one weight."""
    owners = defaultdict(list)
    for pair in pairs:
        if name := parse_factor_name(pair.a):
            owners[name.weight].append(pair.a)
    return [paths for paths in owners.values() if len(paths) > 1]


def _written_out(pair: LoRAPair, axes: Axes) -> str:
    """A pair as the user may write it."""
    stacks = f", {axes.a_batch}, {axes.b_batch}" if axes.a_batch else ""
    ranks = f"{axes.a_rank}, {axes.b_rank}"
    return f"`LoRAPair({pair.a!r}, {pair.b!r}, {ranks}{stacks})`"
