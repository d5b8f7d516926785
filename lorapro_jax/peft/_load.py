"""From a PEFT adapter to the factors of a tree."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from .._checks import compiled
from .._placement import from_host
from ..pairs._find import PairsSpec
from ..pairs._leaves import index_leaves
from ..pairs._scale import ScaleSpec
from ._config import numbers_by
from ._entries import Source, check_entries, read_extra, read_factors
from ._extra import Extra, ExtraSpec, find_extra
from ._files import check_numbers, read_adapter
from ._keys import read_keys
from ._names import NamesSpec
from ._parameters import read_parameters, wrapping_modules
from ._refused import check_config
from ._targeted import check_dropped
from ._targets import Target, find_targets

Tree = TypeVar("Tree")


def load_peft_adapter(
    path: str | os.PathLike[str],
    template: Tree,
    *,
    scale: ScaleSpec = 1.0,
    alpha: ScaleSpec | None = None,
    rslora: bool = False,
    pairs: PairsSpec | None = None,
    stack_axis: int | Sequence[int] | None = None,
    module_names: NamesSpec = None,
    target_parameters: Sequence[str] | None = None,
    extra: ExtraSpec | None = None,
    adapter: str | None = None,
    resize: bool = False,
    ignore: str | None = None,
) -> Tree:
    """Reads an adapter of Hugging Face PEFT into a tree.

    What the model computes is what PEFT computes: where the file's scale (of
    `lora_alpha`, `use_rslora` and the patterns) is another than the model's, B is
    multiplied by their ratio. With equal scales the factors are the file's bits,
    cast to the dtypes of the tree. Convolutions and embeddings show in the file. One
    that was saved with `initial=` needs a tree of twice the rank, and the original base
    weights; to go on training, restore a checkpoint of all weights instead.

    Keys may have the name of an adapter in them, and may lack PEFT's prefix
    `base_model.model.`; tensors may be of 8 bits. Refused is what plain factors do not
    compute, by what it does: DoRA, KaSA, a bias behind B, initialisers that change the
    base weights (PiSSA), options that are not known here.

    Args:
      path: The folder with `adapter_model.safetensors` and `adapter_config.json`.
      template: The tree to fill: arrays or `jax.ShapeDtypeStruct`s. It is not
        changed. Factors keep its dtypes and shardings.
      scale: The s that the model multiplies B A by; see `lorapro`.
      alpha: The same as alpha, to be divided by the rank; see `lorapro`.
      rslora: Whether alpha is divided by the square root of the rank.
      pairs: See `lorapro`.
      stack_axis: See `lorapro`.
      module_names: See `save_peft_adapter`. Where one pair is several modules whose
        shared factors differ in the file (k_proj and v_proj that were trained with an A
        each), it is exact in a tree that has the sum of their ranks, and as close as
        can be with `resize=True`.
      target_parameters: See `save_peft_adapter`.
      extra: See `save_peft_adapter`: the leaves that get the file's biases, heads and
        other weights (`modules_to_save`). A leaf with several names needs all of them
        in the file, with one value: PEFT unties an embedding that it saved alone.
      adapter: Which adapter to read, where the file has several: the name in its keys,
        as `default` of `lora_A.default.weight`; `""` for the one without a name.
      resize: Whether layers of another rank than the tree's are brought to it: the
        closest product of a lower rank, or the product itself, with new directions that
        have a B of 0. `resize_adapters` does the same, and tells what is lost.
      ignore: A regex, searched in the keys of the file: entries without a place in
        the tree that are left out, factors too. What was trained there is then lost;
        the copy of an embedding that PEFT saves as `base_layer` is only that.

    Returns:
      A tree like the template with the factors of the file, and the leaves of `extra`;
      all other leaves are the template's.

    Raises:
      FileNotFoundError: A file of the adapter is missing.
      ValueError: A damaged file, or a configuration of other weights; an adapter that
        is more than LoRA factors (DoRA) or changes the base weights (PiSSA); several
        adapters and no choice; factors that the configuration leaves out; layers, ranks
        or shapes that are not those of the template, or tensors that are not finite,
        listed in one message; a factor that overflows the dtype of the template; no
        pair in the template, or what `find_pairs` raises; a bad regex.
      ImportError: safetensors is not installed.
    """
    ignored = None if ignore is None else compiled(ignore, "ignore")
    parameters = read_parameters(target_parameters)
    targets = find_targets(
        template,
        module_names,
        parameters,
        scale=scale,
        alpha=alpha,
        rslora=rslora,
        pairs=pairs,
        stack_axis=stack_axis,
    )
    factors = [path for target in targets for path in target.pair.paths]
    extras = find_extra(template, extra, factors)
    found = read_adapter(Path(path))
    try:
        check_config(found.config)
        check_numbers(found)
        keys = read_keys(found.tensors, adapter)
        adapted = found.config.get("target_parameters") or []
        named = [x for t in targets if t.naming.is_parameter for x in t.names]
        wrappers = wrapping_modules(named, parameters, adapted)
        source = Source(found, keys, wrappers, numbers_by(found.config))
        check_entries(source, targets, extras, ignored, resize=resize)
        modules = (t for t in targets if not t.naming.is_parameter)
        check_dropped(found.config, (x for t in modules for x in t.names))
        return _filled(template, source, targets, extras)
    except ValueError as error:
        raise ValueError(f"`{os.fspath(path)}` cannot be loaded: {error}") from None


def _filled(
    template: Tree, source: Source, targets: Sequence[Target], extras: Sequence[Extra]
) -> Tree:
    """The template with what the file has for it."""
    index = index_leaves(template)
    leaves: list[Any] = jax.tree.leaves(template)

    def put(path: str, x: np.ndarray) -> None:
        leaves[index[path].position] = from_host(path, x, index[path].value)

    for target in targets:
        factors = read_factors(source, target)
        for path, x in zip(target.pair.paths, factors, strict=True):
            put(path, x)
    for extra in extras:
        put(extra.path, read_extra(source, extra))
    filled: Tree = jax.tree.unflatten(jax.tree.structure(template), leaves)
    return filled
