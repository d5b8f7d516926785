"""LoRA-Pro in real LoRA stacks, one file each: `python -m examples.recipes.qlora`."""
