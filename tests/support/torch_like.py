"""Stand-ins for modules of PyTorch: names, classes, shapes and ties, no arithmetic."""

from types import SimpleNamespace

import numpy as np

# What `lorapro_jax.peft` knows of a class is its name.
CLASSES = {
    name: type(name, (), {})
    for name in ("Embedding", "Conv1D", "_ConvNd", "Linear", "LayerNorm", "Block")
}


class TorchLike:
    """A model with weights of these shapes.

    Args:
      weights: The shape of each weight by name.
      kinds: The name of the class of some modules; of the others, `Linear` where they
        have a weight of their own.
      tied: Names that are one parameter.
      family: `config.model_type`.
    """

    def __init__(self, weights, kinds=None, tied=(), family="llama"):
        self._weights = {name: np.zeros(shape) for name, shape in weights.items()}
        for name in tied:
            self._weights[name] = self._weights[tied[0]]
        self._kinds = kinds or {}
        self.config = SimpleNamespace(model_type=family)

    def state_dict(self):
        return {name: x.view() for name, x in self._weights.items()}  # others, as there

    def named_parameters(self, remove_duplicate=True):
        assert not remove_duplicate
        return iter(self._weights.items())

    def named_modules(self, remove_duplicate=True):
        assert not remove_duplicate
        for name in self._weights:
            parts = name.split(".")
            for i in range(len(parts)):
                module = ".".join(parts[:i])
                kind = "Linear" if i == len(parts) - 1 else "Block"
                yield module, CLASSES[self._kinds.get(module, kind)]()
