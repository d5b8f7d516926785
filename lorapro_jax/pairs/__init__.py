"""Which leaves of a tree are the factors of LoRA pairs: static Python, no arrays."""
