"""From the factors of a tree to a PEFT adapter."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from ..pairs._find import PairsSpec
from ..pairs._leaves import index_leaves
from ..pairs._scale import ScaleSpec
from ._arrays import on_host
from ._base import ModelSpec, read_base
from ._beside import Saved, check_saved, find_saved
from ._config import peft_config
from ._contents import Kinds, collect
from ._extra import Extra, ExtraSpec, find_extra
from ._files import write_adapter
from ._json import read_entries
from ._model import check_model
from ._names import NamesSpec
from ._original import initial_factors
from ._parameters import read_parameters
from ._targets import Target, find_targets, wrapped_modules


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
    target_parameters: Sequence[str] | None = None,
    conv: str | None = None,
    embedding: str | None = None,
    extra: ExtraSpec | None = None,
    initial: Any = None,
    uniform: bool = False,
    model: ModelSpec | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    r"""Writes the adapters of a tree as Hugging Face PEFT does.

    Stacked layers become one entry each, heads of an einsum are flattened, and every
    factor keeps its dtype. Leaves that are no factor are left out, but for `extra`.

    Both files are complete on disk before the first of them takes the place of an
    older one: what goes wrong until then leaves the folder as it was. Then the two are
    renamed, one after the other. Who reads just then, or after a process was killed
    there, may find new weights with the old configuration; if ranks or scales differ,
    `load_peft_adapter` refuses them, but PEFT does not, so save adapters of other ranks
    or scales to a new folder. With several processes all have to call it; the first
    one writes. Do not save to one folder twice at the same time.

    Args:
      path: The folder to write to; it is made where there is none. Files keep their
        permissions when they are replaced.
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
        the position on a stacked axis, `{1}` for that on the second. One pair that is
        several modules in PyTorch has `(names, axis)`: the axis of B along which they
        lie, in equal parts, as in
        `{"attn/kv_einsum": (["attn.k_proj", "attn.v_proj"], 1)}` for Gemma's B of
        `(r, 2, heads, size)`; `(names, axis, "a")` is for an axis of A. Or a function
        from the `LoRAPair` to any of these. Default: the path with dots.
      target_parameters: The ends of names that are no modules but parameters, as
        transformers has the experts of an MoE layer (PEFT ≥ 0.17), in the order in
        which their module has them: `("gate_up_proj", "down_proj")`. The stacked axis
        that such a name does not mention holds the experts. PEFT ≥ 0.19 takes a
        parameter as `(experts, out, in)`, or as `(experts, in, out)` where its module
        says `is_transposed`; `"gate_up_proj.T"` is for one that is the other way
        round, as Llama 4's, and then A and B change places (before 0.19, every
        `(experts, out, in)` is one).
      conv: A regex, searched in the same paths: these layers are convolutions with
        A of `(*window, channels, r)`.
      embedding: A regex, searched in the same paths: these layers are embeddings, as
        those are anyway whose factors have it in their names (`lora_embedding_A`).
      extra: Leaves beside the factors that go along, such as trained biases and a
        classifier's head: `{regex: template}`, from the whole path of a leaf to the
        parameter in PyTorch, such as `{"head/kernel": "score.weight"}`; `{}` stands for
        the position on a leading axis. A leaf called `kernel` is `(in, out)`, or
        `(*window, in, out)` for a layer of `conv`, and goes out as `nn.Linear` or a
        convolution has it; one called `bias` goes out flat, all else as it is. `.T`
        behind a name is for the transpose, as the Conv1D of GPT-2 has it. A leaf that
        is several weights in PyTorch, as a tied embedding is, has a tuple of names.
        They become `bias` and `modules_to_save` of the configuration: PEFT wants every
        weight of a module that is saved so, and takes no factors in it.
      initial: The tree right after `initialize_adapters`, if the method changed the
        base weights (LoRA-GA, PiSSA, OLoRA). Without it, the file is for the changed
        weights, to be saved too. With it, for the original ones: it holds [B, -B0] and
        [A; A0], of twice the rank and the same s, as PEFT's own conversion does, and
        lacks only the rounding of the changed weights. Make it a copy, as a state of
        NNX follows its model: `jax.device_get(nnx.state(model, nnx.LoRAParam))`. The
        starts of LoRA-One and GoRA belong to the adapter: pass None.
      uniform: Whether all modules get one rank and one scale, for readers that know
        `r`, `lora_alpha` and `use_rslora` only, and no patterns, such as vLLM: where
        ranks or scales differ, they would compute something else without a word. The
        largest rank holds for all (the others get zeros), and the most common scale; B
        takes up the ratio, in float32 where its own dtype cannot hold it. vLLM's
        `max_lora_rank` has to be at least the `r` of the file: the next of 8, 16, 32,
        64, 128, 256, 320, 512. vLLM takes nothing of `extra`.
      model: The base model, to check the adapter against, as PEFT drops what does not
        fit without a word: the PyTorch model itself, on any device; its state dict; the
        names of all weights; or a folder or `config.json` of transformers (without
        these, the names in its files). See `lorapro_jax.peft` for what is checked.
      config: More entries of `adapter_config.json`, such as
        `{"base_model_name_or_path": "...", "task_type": "CAUSAL_LM"}`, or other
        `target_modules`.

    Raises:
      ValueError: No pair in the tree, or what `find_pairs` raises; a layer without a
        name, two with one, or what `model` lacks or has otherwise; factors that are no
        arrays, not finite, or of a dtype that PyTorch lacks; a bad regex, or one that
        matches nothing; factors that PEFT would drop because of `extra`; an entry of
        `config` that follows from the factors, that leaves out some, or that PEFT or
        `load_peft_adapter` would refuse; an `initial` with other factors, or with the
        same values.
      TypeError: An option that is no mapping.
      ImportError: safetensors is not installed, or what `model` needs.

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
    parameters = read_parameters(target_parameters)
    targets = find_targets(
        params,
        module_names,
        parameters,
        scale=scale,
        alpha=alpha,
        rslora=rslora,
        pairs=pairs,
        stack_axis=stack_axis,
    )
    names = [name for target in targets for name in target.names]
    due = [path for target in targets for path in target.pair.paths]
    extras = find_extra(params, extra, due)
    kinds, given = Kinds.read(conv, embedding), read_entries(config)
    saved = _find_saved(targets, extras, given, kinds, model)
    leaves = index_leaves(params)
    arrays = {
        path: on_host(path, leaves[path].value)
        for path in (*due, *(x.path for x in extras))
    }
    before = None
    if initial is not None:
        at_b = [target.pair.b for target in targets]
        before = initial_factors(initial, {path: arrays[path] for path in due}, at_b)

    how = kinds, parameters, saved
    contents = collect(targets, extras, arrays, before, *how, uniform=uniform)
    entries = peft_config(
        contents.modules,
        rslora=rslora,
        parameters=contents.parameters,
        beside=contents.beside,
        extra=given,
    )
    try:
        if jax.process_index() == 0:
            write_adapter(Path(path), contents.tensors, entries, names)
    finally:
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("save_peft_adapter")


def _find_saved(
    targets: Sequence[Target],
    extras: Sequence[Extra],
    config: Mapping[str, Any],
    kinds: Kinds,
    model: ModelSpec | None,
) -> Saved:
    """The modules that PEFT saves whole, and all checks of names."""
    kinds.check(targets, extras)
    factors = {name: target.pair.a for target in targets for name in target.names}
    saved = find_saved(extras, wrapped_modules(targets), config.get("task_type"))
    check_saved(extras, saved, factors, known=model is not None)
    if model is not None:
        check_model(read_base(model), targets, extras, kinds, saved)
    return saved
