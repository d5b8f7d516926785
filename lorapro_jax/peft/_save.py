"""From the factors of a tree to a PEFT adapter."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from .._checks import compiled
from ..pairs._axes import LoRAPair
from ..pairs._find import PairsSpec
from ..pairs._leaves import index_leaves
from ..pairs._scale import ScaleSpec
from ._arrays import on_host, sides, to_peft
from ._config import peft_config
from ._files import write_adapter
from ._names import NamesSpec, file_keys, is_embedding, layer_path
from ._original import append_initial, initial_factors
from ._targets import Target, find_targets

Arrays = Mapping[str, np.ndarray]


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
      path: The folder to write to; it is made where there is none.
      params: A tree with the factors, such as `nnx.state(model, nnx.LoRAParam)`.
      scale: The s that the model multiplies B A by; see `lorapro`. Give what the
        optimizer got: the file says nothing else of s, and with a wrong one PyTorch
        computes something else.
      alpha: The same as alpha, to be divided by the rank; see `lorapro`.
      rslora: Whether alpha is divided by the square root of the rank; also
        `use_rslora` of the file.
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
      embedding: A regex, searched in the same paths: these layers are embeddings, as
        those are anyway whose factors have it in their names (`lora_embedding_A`).
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
    targets = find_targets(
        params,
        module_names,
        scale=scale,
        alpha=alpha,
        rslora=rslora,
        pairs=pairs,
        stack_axis=stack_axis,
    )
    convs, words = _layers_of(conv, "conv"), _layers_of(embedding, "embedding")
    leaves = index_leaves(params)
    due = [path for target in targets for path in target.pair.paths]
    factors = {path: on_host(path, leaves[path].value) for path in due}
    before = None
    if initial is not None:
        at_b = [target.pair.b for target in targets]
        before = initial_factors(initial, factors, at_b)

    tensors: dict[str, np.ndarray] = {}
    layers: dict[str, LoRAPair] = {}
    for target in targets:
        pair, layer = target.pair, layer_path(target.pair)
        is_conv = bool(convs and convs.search(layer))
        is_words = is_embedding(pair) or bool(words and words.search(layer))
        both = _as_peft(target, factors, before, is_conv=is_conv)
        rank = cast(int, pair.rank) * (1 if before is None else 2)
        scales = target.scales
        for index, name in target.names.items():
            keys = file_keys(name, embedding=is_words)
            tensors |= {key: x[index] for key, x in zip(keys, both, strict=True)}
            layers[name] = pair._replace(rank=rank, scale=scales[index])
    entries = peft_config(layers, rslora=rslora, extra=config or {})
    try:
        if jax.process_index() == 0:
            write_adapter(Path(path), tensors, entries)
    finally:
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("save_peft_adapter")


def _layers_of(pattern: str | None, option: str) -> re.Pattern[str] | None:
    """The regex for the paths of the layers that an option means; None for none."""
    return None if pattern is None else compiled(pattern, option)


def _as_peft(
    target: Target, factors: Arrays, initial: Arrays | None, *, is_conv: bool
) -> list[np.ndarray]:
    """A and B as PyTorch has them, `(*stack, ...)`, for the original base weights."""
    at_a, _ = target.pair.factor_axes
    window = len(at_a.features(len(target.a))) - 1 if is_conv else 0
    both = []
    for path, axes, is_a in sides(target.pair):
        x = to_peft(factors[path], axes, is_a=is_a, window=window)
        if initial is not None:
            x0 = to_peft(initial[path], axes, is_a=is_a, window=window)
            x = append_initial(x, x0, is_a=is_a, stack=len(axes.batch))
        both.append(x)
    return both
