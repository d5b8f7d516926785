"""LoRA adapters to and from Hugging Face PEFT.

    save_peft_adapter("adapter", nnx.state(model, nnx.LoRAParam), alpha=16)

writes `adapter_model.safetensors` and `adapter_config.json`, which
`peft.PeftModel.from_pretrained(torch_model, "adapter")`, transformers and vLLM load;
`load_peft_adapter` reads what they wrote. Both need the extra `lorapro_jax[peft]`.
Where the initialiser changed the base weights, as PiSSA does, the adapter is for the
changed ones; `initial=` makes it one for the original weights.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from ._layout import LoRAPair, factor_axes
from ._leaves import index_leaves
from ._pairs import PairsSpec, find_pairs
from ._peft_arrays import like_leaf, on_host, sides, to_peft
from ._peft_config import check_config, peft_config
from ._peft_files import read_adapter, write_adapter
from ._peft_import import Adapter, Target, check_adapter, read_factors
from ._peft_names import (
    NamesSpec,
    file_keys,
    is_embedding,
    layer_path,
    name_modules,
)
from ._peft_start import check_begun, join_start, read_start
from ._scale import ScaleSpec

Tree = TypeVar("Tree")


def save_peft_adapter(
    path: str | os.PathLike[str],
    params: Any,
    *,
    scale: ScaleSpec = 1.0,
    alpha: ScaleSpec | None = None,
    rslora: bool = False,
    pairs: PairsSpec | None = None,
    stack_axis: int | Sequence[int] | None = None,
    module_names: NamesSpec = None,
    conv: str | None = None,
    embedding: str | None = None,
    initial: Any = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    r"""Writes the adapters of a tree as Hugging Face PEFT does.

    Stacked layers become one entry each, heads of an einsum are flattened, and every
    factor keeps its dtype. Leaves that are no factor are left out.

    Both files are complete on disk before the first of them takes the place of an
    older one: what goes wrong until then leaves the folder as it was (a killed process
    may leave hidden files). Then the two are renamed, one after the other; who reads
    just then may get new weights with the old configuration, so save adapters of
    other ranks or scales to a new folder. With several processes all have to call it;
    the first one writes.

    Args:
      path: The folder.
      params: A tree with the factors, such as `nnx.state(model, nnx.LoRAParam)`.
      scale: The s that the model multiplies B A by; see `lorapro`. Give what the
        optimizer got: the file says nothing else of s, and with a wrong one PyTorch
        computes something else.
      alpha: The same as alpha, to be divided by the rank; see `lorapro`.
      rslora: Whether by its square root; also `use_rslora` of the file.
      pairs: See `lorapro`.
      stack_axis: See `lorapro`.
      module_names: What PyTorch calls the layers: `{regex: template}`, such as
        `{r"layers/attn/(.)": r"model.layers.{}.self_attn.\1_proj"}`. The first regex
        that matches the whole path of a layer counts (the path of the pair without
        the factor, and without a `lora` at its end); `{}` in the template stands for
        the position on a stacked axis. Or a function from the `LoRAPair` to the
        name, also with `{}`. Default: the path with dots.
      conv: A regex, searched in the same paths: these layers are convolutions with
        A of `(*window, channels, r)`.
      embedding: Likewise: these are embeddings, as those are anyway whose factors
        have it in their names (`lora_embedding_A`).
      initial: The tree right after `initialize_adapters`, if the method changed the
        base weights (LoRA-GA, PiSSA, OLoRA). Without it, the file is for the changed
        weights, to be saved too. With it, for the original ones: it holds [B, -B0] and
        [A; A0], of twice the rank and the same s, as PEFT's own conversion does, and
        lacks only the rounding of the changed weights. Make it a copy, as a state of
        NNX follows its model: `jax.device_get(nnx.state(model, nnx.LoRAParam))`. The
        starts of LoRA-One and GoRA belong to the adapter: pass None.
      config: More entries of `adapter_config.json`, such as
        `{"base_model_name_or_path": "...", "task_type": "CAUSAL_LM"}`, or other
        `target_modules`.

    Raises:
      ValueError: No pair in the tree, or what `find_pairs` raises; a layer without a
        name, or two with one; factors that are no arrays or of a dtype that PyTorch
        lacks; a bad regex; an entry of `config` that follows from the factors; an
        `initial` with other factors, or with the same values.
      ImportError: safetensors is not installed.

    Examples:
      >>> import jax.numpy as jnp, tempfile
      >>> from lorapro_jax.peft import load_peft_adapter, save_peft_adapter
      >>> up = {"lora_a": jnp.ones((8, 2)), "lora_b": jnp.ones((2, 4))}
      >>> tree, names = {"mlp": {"up": up}}, {"mlp/(.*)": r"model.mlp.\1_proj"}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_peft_adapter(folder, tree, alpha=4, module_names=names)
      ...     back = load_peft_adapter(folder, tree, alpha=4, module_names=names)
      >>> back["mlp"]["up"]["lora_a"].shape
      (8, 2)
    """
    options = {"scale": scale, "alpha": alpha, "rslora": rslora}
    targets = _targets(
        params, module_names, pairs=pairs, stack_axis=stack_axis, **options
    )
    leaves = index_leaves(params)
    due = [name for target in targets for name in target.pair[:2]]
    factors = {name: on_host(name, leaves[name].value) for name in due}
    start = None if initial is None else read_start(initial, factors)
    if start is not None:
        check_begun(start, [target.pair.b for target in targets])
    tensors: dict[str, np.ndarray] = {}
    layers: dict[str, LoRAPair] = {}
    for pair, a, _, names in targets:
        features = factor_axes(pair)[0].features(len(a))
        window = len(features) - 1 if _is_any(pair, conv, "conv") else 0
        words = is_embedding(pair) or _is_any(pair, embedding, "embedding")
        for side, (factor, axes, is_a) in enumerate(sides(pair)):
            x = to_peft(factors[factor], axes, is_a=is_a, window=window)
            if start is not None:
                x0 = to_peft(start[factor], axes, is_a=is_a, window=window)
                x = join_start(x, x0, is_a=is_a, stack=len(axes.batch))
            for index, name in names.items():
                tensors[file_keys(name, embedding=words)[side]] = x[index]
        rank = cast(int, pair.rank) * (1 if start is None else 2)
        layers |= dict.fromkeys(names.values(), pair._replace(rank=rank))
    entries = peft_config(layers, rslora=rslora, extra=config or {})
    try:
        if jax.process_index() == 0:
            write_adapter(Path(path), tensors, entries)
    finally:
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("save_peft_adapter")


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
      rslora: Whether by its square root.
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
        the template; no pair in the template, or what `find_pairs` raises.
      ImportError: safetensors is not installed.
    """
    options = {"scale": scale, "alpha": alpha, "rslora": rslora}
    targets = _targets(
        template, module_names, pairs=pairs, stack_axis=stack_axis, **options
    )
    adapter = Adapter(*read_adapter(Path(path)))
    try:
        check_config(adapter.config)
        check_adapter(adapter, targets, ignore)
    except ValueError as error:
        raise ValueError(f"`{os.fspath(path)}` cannot be loaded: {error}") from None

    index = index_leaves(template)
    leaves = jax.tree.leaves(template)
    for target in targets:
        factors = read_factors(adapter, target)
        for name, x in zip(target.pair[:2], factors, strict=True):
            leaves[index[name].position] = like_leaf(name, x, index[name].value)
    filled: Tree = jax.tree.unflatten(jax.tree.structure(template), leaves)
    return filled


def _targets(tree: Any, names: NamesSpec, **options: Any) -> list[Target]:
    """The pairs of a tree, with their shapes and PyTorch's names of their layers."""
    leaves = index_leaves(tree)
    found = find_pairs(tree, **options)
    if not found:
        raise ValueError(
            f"No LoRA pair in the tree, whose leaves are {list(leaves)[:4]}. Pass the "
            "tree with the factors, or name them with `pairs=`."
        )
    shapes = [(leaves[pair.a].shape, leaves[pair.b].shape) for pair in found]
    stacks = [
        tuple(a[axis] for axis in pair.a_batch_axes)
        for pair, (a, _) in zip(found, shapes, strict=True)
    ]
    modules = name_modules(found, stacks, names)
    return [
        Target(pair, *both, layers)
        for pair, both, layers in zip(found, shapes, modules, strict=True)
    ]


def _is_any(pair: LoRAPair, pattern: str | None, option: str) -> bool:
    """Whether the layer of a pair is one of those that an option means."""
    try:
        return pattern is not None and bool(re.search(pattern, layer_path(pair)))
    except (re.error, TypeError) as error:
        raise ValueError(f"`{option}={pattern!r}` is no regex: {error}.") from None
