"""LoRA adapters to and from Hugging Face PEFT.

    save_peft_adapter("adapter", nnx.state(model, nnx.LoRAParam), alpha=16)

writes `adapter_model.safetensors` and `adapter_config.json`, which
`peft.PeftModel.from_pretrained(torch_model, "adapter")`, transformers and vLLM load;
`load_peft_adapter` reads what they wrote. Both need the extra `lorapro_jax[peft]`.
vLLM needs `uniform=True` where ranks or scales differ.
Where the initialiser changed the base weights, as PiSSA does, the adapter is for the
changed ones; `initial=` makes it one for the original weights.
"""

from ._load import load_peft_adapter as load_peft_adapter
from ._save import save_peft_adapter as save_peft_adapter

__all__ = ["load_peft_adapter", "save_peft_adapter"]
