"""LoRA adapters to and from Hugging Face PEFT.

    save_peft_adapter("adapter", nnx.state(model, nnx.LoRAParam), alpha=16)

writes `adapter_model.safetensors` and `adapter_config.json`, which
`peft.PeftModel.from_pretrained(torch_model, "adapter")`, transformers and vLLM load;
`load_peft_adapter` reads what they wrote. Both need the extra `lorapro_jax[peft]`.
vLLM needs `uniform=True` where ranks or scales differ.
Where the initialiser changed the base weights, as PiSSA does, the adapter is for the
changed ones; `initial=` makes it one for the original weights.

PEFT says nothing of what does not fit the base model, and leaves it out. Only with
`model=` can `save_peft_adapter` know, and refuse with the remedy:

  - names of modules, parameters and weights that the model lacks, and other shapes;
  - a layer that is an embedding or a convolution, where the options say otherwise;
  - a kernel for a Conv1D, whose weight is `(in, out)`: its name gets `.T`;
  - one of several tied weights, which PEFT unties: a leaf gets all of their names. A
    pair on a tied embedding is on the embedding only, and the head keeps its weights;
  - a head or another module of `extra=` that is not saved as a whole, and modules whose
    names end like it, as `pre_classifier` does like `classifier`;
  - `gate_proj`, `up_proj` and `down_proj` outside of the experts in models of Qwen3-MoE
    and its family: PEFT on transformers 5 takes them for experts. As parameters,
    `down_proj.weight` in `target_parameters=`, they work.

Kinds and ties of modules show in the model itself, and in a folder or configuration
that transformers can build; a state dict has names and shapes, a list names only.

Ranks and scales that differ become patterns of full names, for PEFT from 0.15 on: older
ones would compute with the common alpha. transformers' own `model.load_adapter` leaves
out heads of `extra=`, as it does with those that PEFT saved.
"""

from ._load import load_peft_adapter as load_peft_adapter
from ._save import save_peft_adapter as save_peft_adapter

__all__ = ["load_peft_adapter", "save_peft_adapter"]
