"""Fine-tunes a language model from its Hugging Face folder."""
