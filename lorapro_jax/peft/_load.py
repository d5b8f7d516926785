"""From a PEFT adapter to the factors of a tree."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax

from .._checks import compiled
from .._placement import from_host
from ..pairs._find import PairsSpec
from ..pairs._leaves import index_leaves
from ..pairs._scale import ScaleSpec
from ._config import check_config
from ._entries import check_entries, read_factors
from ._files import read_adapter
from ._names import NamesSpec
from ._targets import find_targets

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
    ignore: str | None = None,
) -> Tree:
    """Reads an adapter of Hugging Face PEFT into a tree.

    What the model computes is what PEFT computes: where the file's scale (of
    `lora_alpha`, `use_rslora` and the patterns) is another than the model's, B is
    multiplied by their ratio. With equal scales the factors are the file's bits,
    cast to the dtypes of the tree. Convolutions and embeddings show in the file. One
    that was saved with `initial=` needs a tree of twice the rank, and the original base
    weights; to go on training, restore a checkpoint of all weights instead.

    Args:
      path: The folder with `adapter_model.safetensors` and `adapter_config.json`.
      template: The tree to fill: arrays or `jax.ShapeDtypeStruct`s. It is not
        changed. Factors keep its dtypes and shardings.
      scale: The s that the model multiplies B A by; see `lorapro`.
      alpha: The same as alpha, to be divided by the rank; see `lorapro`.
      rslora: Whether alpha is divided by the square root of the rank.
      pairs: See `lorapro`.
      stack_axis: See `lorapro`.
      module_names: See `save_peft_adapter`.
      ignore: A regex, searched in the keys of the file: entries without a place in
        the tree that are left out, factors too. `"classifier|base_layer"` is for a
        head that PEFT saved (`modules_to_save`) and the weight of an embedding.

    Returns:
      A tree like the template with the factors of the file; all other leaves are the
      template's.

    Raises:
      FileNotFoundError: A file of the adapter is missing.
      ValueError: A damaged file, an adapter that is more than LoRA factors (DoRA) or
        changes the base weights (PiSSA), or layers, ranks or shapes that are not those
        of the template, listed in one message; a factor that overflows the dtype of
        the template; no pair in the template, or what `find_pairs` raises; a bad
        regex.
      ImportError: safetensors is not installed.
    """
    ignored = None if ignore is None else compiled(ignore, "ignore")
    targets = find_targets(
        template,
        module_names,
        scale=scale,
        alpha=alpha,
        rslora=rslora,
        pairs=pairs,
        stack_axis=stack_axis,
    )
    adapter = read_adapter(Path(path))
    try:
        check_config(adapter.config)
        check_entries(adapter, targets, ignored)
    except ValueError as error:
        raise ValueError(f"`{os.fspath(path)}` cannot be loaded: {error}") from None

    index = index_leaves(template)
    leaves: list[Any] = jax.tree.leaves(template)
    for target in targets:
        factors = read_factors(adapter, target)
        for name, x in zip(target.pair.paths, factors, strict=True):
            leaves[index[name].position] = from_host(name, x, index[name].value)
    filled: Tree = jax.tree.unflatten(jax.tree.structure(template), leaves)
    return filled
