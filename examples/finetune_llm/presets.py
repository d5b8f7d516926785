"""Settings of publications and of the demo, as defaults that options override."""

from typing import Any, NamedTuple


class Preset(NamedTuple):
    """Settings, and where they come from."""

    settings: dict[str, Any]
    source: str


ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

PRESETS = {
    # `default_training_params.json`, the configuration of the experiment
    # `lora/llama-3.2-3B-rank32` (whose targets are PEFT's for Llama), and
    # `WARMUP_STEP_RATIO` of `utils.py`. The optimizer there is AdamW on LoRA's factors.
    "metamathqa": Preset(
        {
            "rank": 32,
            "alpha": 64.0,
            "targets": ("q_proj", "v_proj"),
            "optimizer": "lora",
            "rate": 1e-4,
            "weight_decay": 0.1,
            "warmup": 0.1,
            "max_grad_norm": 1.0,
            "batch": 4,
            "steps": 5000,
            "length": 768,
            "evaluate_every": 250,
            "dtype": "bfloat16",
        },
        "PEFT's comparison of methods on MetaMathQA with meta-llama/Llama-3.2-3B: "
        "https://github.com/huggingface/peft/tree/main/method_comparison/MetaMathQA",
    ),
    # The experiments on Llama-2-7B.
    "lora-pro": Preset(
        {
            "rank": 8,
            "alpha": 16.0,
            "targets": ALL,
            "optimizer": "lorapro_adamw",
            "rate": 2e-5,
            "weight_decay": 0.0,
            "warmup": 0.03,
            "max_grad_norm": 0.0,
            "batch": 32,
            "epochs": 1.0,
            "length": 1024,
            "dtype": "bfloat16",
        },
        "Wang et al., LoRA-Pro: Are Low-Rank Adapters Properly Optimized?, ICLR 2025, "
        "https://arxiv.org/abs/2407.18242",
    ),
}

DEMO = {
    "rank": 8,
    "alpha": 16.0,
    "dtype": "float32",
    "rates": (3e-3, 1e-2, 3e-2),
    "steps": 80,
    "batch": 16,
    "length": 128,
    "packing": True,
    "warmup": 0.1,
    "evaluate_every": 20,
    "sample_every": 80,
    "save_every": 40,
    "answer_tokens": 24,
}
QUICK_DEMO = {
    "rates": (3e-3, 1e-2),
    "steps": 20,
    "batch": 8,
    "evaluate_every": 10,
    "sample_every": 0,
    "save_every": 10,
    "answer_tokens": 8,
}
