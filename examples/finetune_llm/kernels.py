"""The kernels of a layer: where tunix has them, and what Hugging Face calls them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from examples.finetune_llm.errors import Refused

MLP = "gate_proj", "up_proj", "down_proj"
ATTENTION = "q_proj", "k_proj", "v_proj", "o_proj"


class Module(NamedTuple):
    """A module of tunix's layers and what it is in PyTorch.

    Attributes:
      path: In a layer, such as `attn/kv_einsum`.
      kernel: The name of its kernel.
      inputs: The kernel's input axes.
      outputs: Its output axes.
      targets: Hugging Face's names of what it holds, along B's axis 1 if several.
    """

    path: str
    kernel: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    targets: tuple[str, ...]


_LINEAR = tuple(Module(f"mlp/{x}", "kernel", (0,), (1,), (x,)) for x in MLP)
_HEADS = tuple(Module(f"attn/{x}", "w", (0,), (1, 2), (x,)) for x in ATTENTION[:3])
_PLAIN = (*_HEADS, Module("attn/o_proj", "w", (0, 1), (2,), ("o_proj",)), *_LINEAR)
_OUT = Module("attn/attn_vec_einsum", "w", (0, 1), (2,), ("o_proj",))
_FUSED = Module("attn/qkv_einsum", "w", (2,), (0, 1, 3), ATTENTION[:3])
_QUERY = Module("attn/q_einsum", "w", (1,), (0, 2), ("q_proj",))
_GROUPED = Module("attn/kv_einsum", "w", (2,), (0, 1, 3), ("k_proj", "v_proj"))
TARGETS = {
    "llama": _PLAIN,
    "qwen2": _PLAIN,
    "qwen3": _PLAIN,
    "gemma3": (_QUERY, _GROUPED, _OUT, *_LINEAR),
    "gemma3 fused": (_FUSED, _OUT, *_LINEAR),
}


def modules_of(spec: Any) -> tuple[Module, ...]:
    """All modules with kernels in a layer of a model."""
    c = spec.model_config
    fused = spec.family == "gemma3" and c.num_heads == c.num_kv_heads
    return TARGETS["gemma3 fused" if fused else spec.family]


def chosen(spec: Any, targets: Sequence[str]) -> tuple[Module, ...]:
    """The modules of some targets.

    Raises:
      Refused: An unknown target, or one of several that tunix keeps in one array.
    """
    modules = modules_of(spec)
    known = {name for module in modules for name in module.targets}
    if unknown := [x for x in targets if x not in known]:
        raise Refused(f"--targets has no {unknown[0]}; there are {sorted(known)}.")
    found = tuple(x for x in modules if set(x.targets) & set(targets))
    for module in found:
        if lacking := [x for x in module.targets if x not in targets]:
            raise Refused(
                f"tunix keeps {' and '.join(module.targets)} of this {spec.family} in "
                f"one kernel with one adapter: add {' '.join(lacking)} to --targets."
            )
    return found


def module_names(modules: Sequence[Module], within: str = "model") -> dict[str, Any]:
    """What PyTorch calls modules, as `save_peft_adapter` takes it."""
    found: dict[str, Any] = {}
    for module in modules:
        block = "mlp" if module.path.startswith("mlp") else "self_attn"
        names = [rf"{within}.layers.\1.{block}.{x}" for x in module.targets]
        at = rf"layers/(\d+)/{module.path}"
        found[at] = names[0] if len(names) == 1 else (names, 1)
    return found


def kernel_axes(modules: Sequence[Module]) -> dict[str, Any]:
    """Where base kernels are and which axes are what, as `kernels=` takes it."""
    return {
        rf"(.*)/{x.path}/{x.kernel}_lora_[ab]": (
            rf"\1/{x.path}/{x.kernel}",
            x.inputs,
            x.outputs,
        )
        for x in modules
    }


def shape_of(spec: Any, module: Module) -> tuple[int, int]:
    """Outputs and inputs of a kernel."""
    c = spec.model_config
    if module.path == "mlp/down_proj":
        return c.embed_dim, c.hidden_dim
    if module.targets == ("o_proj",):
        return c.embed_dim, c.num_heads * c.head_dim
    wide = {"q_proj": c.num_heads, "k_proj": c.num_kv_heads, "v_proj": c.num_kv_heads}
    heads = sum(wide.get(x, 0) for x in module.targets)
    return heads * c.head_dim or c.hidden_dim, c.embed_dim
