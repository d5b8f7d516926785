"""What PyTorch can read: a PEFT folder, and a Hugging Face folder with merged weights.

The merged folder is the base's, file by file, with other kernels; each is computed in
float32 and rounded once, to the dtype that it has in the file.
"""

import functools
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from flax import nnx
from jax.experimental import multihost_utils
from safetensors import safe_open
from safetensors.numpy import save_file

from examples.finetune_llm.kernels import (
    Module,
    kernel_axes,
    module_names,
    modules_of,
)
from examples.finetune_llm.names import Weight, in_modules, weights
from lorapro_jax import merge_adapters
from lorapro_jax.peft import save_peft_adapter

LEFT_OUT = (".safetensors", ".bin", ".pth", ".gguf", ".h5", ".msgpack")


def save_adapter(
    spec: Any, model: Any, folder: Path, *, initial: Any = None, **pair_options: Any
) -> None:
    """Writes the adapters as PEFT does, for the base as it is in its folder.

    Args:
      spec: From `read_spec`.
      model: With adapters.
      folder: To be written.
      initial: The factors at the start, if that changed the base weights.
      **pair_options: From `adapters.pair_options`.
    """
    within = in_modules(spec)
    known = [re.sub(r"^(language_model\.)?model\b", within, x) for x in weights(spec)]
    save_peft_adapter(
        folder,
        nnx.state(model, nnx.LoRAParam),
        initial=initial,
        module_names=module_names(_adapted(spec, model), within),
        model=known,
        config={
            "base_model_name_or_path": str(spec.folder),
            "task_type": "CAUSAL_LM",
        },
        **pair_options,
    )


def save_merged(spec: Any, model: Any, folder: Path, **pair_options: Any) -> str:
    """Writes the base's folder with merged weights; the model stays as it is.

    Args:
      spec: From `read_spec`.
      model: With adapters.
      folder: To be written, or to be replaced.
      **pair_options: From `adapters.pair_options`.

    Returns:
      What to say of it.
    """
    merged = _Merged(spec, model, pair_options)
    due, first = weights(spec), jax.process_index() == 0
    target = folder.with_name(f"{folder.name}.partial")
    if first:
        _copy_beside(spec.folder, target)
    for path in sorted(spec.folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            tensors = {}
            for name in file.keys():  # noqa: SIM118
                old, weight = file.get_tensor(name), due.get(name)
                new = merged(weight) if weight else None
                tensors[name] = old if new is None else new.astype(old.dtype)
            if first:
                _write(tensors, target / path.name)
    if first:
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(target, folder)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("save_merged")
    if not merged.quantised:
        return f"{folder}: merged weights, in the dtypes of {spec.folder}"
    return (
        f"{folder}: merged weights; the quantised base was dequantised, and is no "
        f"longer that of {spec.folder}"
    )


def save_base(spec: Any, model: Any, folder: Path) -> None:
    """Writes the weights of a model without adapters beside its config.json."""
    flat = {
        ".".join(map(str, path)): x.get_value()
        for path, x in nnx.to_flat_state(nnx.state(model))
    }
    tensors = {
        name: weight.turn(_on_host(flat[weight.path]))
        for name, weight in weights(spec).items()
    }
    if jax.process_index() == 0:
        _write(tensors, folder / "model.safetensors")


class _Merged:
    """Kernels of a model with their adapters, one at a time, on the host."""

    def __init__(self, spec: Any, model: Any, pair_options: Mapping[str, Any]):
        self.model, self.options = model, pair_options
        self.modules = {x.path: x for x in modules_of(spec)}
        self.quantised = False
        # k_proj and v_proj of one array follow each other in the files.
        self.kernel: Callable[[str], Any] = functools.lru_cache(4)(self._kernel)

    def __call__(self, weight: Weight) -> np.ndarray | None:
        """A weight as Hugging Face has it; None if it is as in the base's files."""
        new = self.kernel(weight.path)
        return None if new is None else weight.turn(new)

    def _kernel(self, path: str) -> np.ndarray | None:
        top, *rest = path.split(".")
        if top != "layers" or "/".join(rest[1:3]) not in self.modules:
            return None
        module = self.modules["/".join(rest[1:3])]
        owner = _owner(self.model, int(rest[0]), module)
        value = getattr(owner, module.kernel)
        kernel, known = dequantised(value), isinstance(value, nnx.Param)
        self.quantised |= not known
        factors = _factors(owner, module)
        if known and not factors:
            return None
        kernel = kernel.astype(jnp.float32)
        if factors:
            tree: Any = {module.kernel: kernel, **factors}
            for name in reversed((*("layers", rest[0]), *module.path.split("/"))):
                tree = {name: tree}
            axes = kernel_axes([module])
            tree = merge_adapters(tree, remove=True, kernels=axes, **self.options)
            kernel = jax.tree.leaves(tree)[0]
        return _on_host(kernel)


def dequantised(value: Any) -> jax.Array:
    """The array of a kernel, whether qwix keeps it in codes or not."""
    if isinstance(value, nnx.Param):
        return value.get_value()
    return qwix.dequantize(value.value.array)


def _adapted(spec: Any, model: Any) -> list[Module]:
    """The modules of a layer that have adapters."""
    return [x for x in modules_of(spec) if _factors(_owner(model, 0, x), x)]


def _owner(model: Any, layer: int, module: Module) -> Any:
    owner = model.layers[layer]
    for name in module.path.split("/"):
        owner = getattr(owner, name)
    return owner


def _factors(owner: Any, module: Module) -> dict[str, jax.Array]:
    names = (f"{module.kernel}_lora_{x}" for x in "ab")
    return {x: getattr(owner, x).get_value() for x in names if hasattr(owner, x)}


def _on_host(x: jax.Array) -> np.ndarray:
    """All of an array, in every process."""
    if x.is_fully_addressable:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def _copy_beside(source: Path, target: Path) -> None:
    """Everything of a folder but weights: config, tokenizer, index of files."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file() and path.suffix not in LEFT_OUT:
            shutil.copy(path, target / path.name)


def _write(tensors: Mapping[str, np.ndarray], path: Path) -> None:
    whole = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    save_file(whole, path, metadata={"format": "pt"})
