"""Small trees of one pair, and what a PEFT file of them holds."""

import json

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

# Of each letter: r is the rank, L and E are stacked.
SIZES = {"d": 6, "n": 2, "h": 3, "f": 5, "w": 3, "x": 2, "c": 4, "L": 4, "E": 3, "r": 2}


def tree_of(path, a_axes, b_axes, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    tree = {}
    for role, axes in (("a", a_axes), ("b", b_axes)):
        *parents, name = path.format(role).split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = jnp.asarray(rng.standard_normal([SIZES[x] for x in axes]), dtype)
    return tree


def pair_tree(seed=0, dtype=jnp.float32):
    return tree_of("mlp/up/lora_{}", "dr", "rf", seed, dtype)


def read(folder):
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    return tensors, json.loads((folder / CONFIG).read_text())


def written_by_another(folder, entries=None, rename=lambda key: key):
    """The same files without what only this package writes: its metadata.

    Args:
      folder: That of the adapter.
      entries: Changes of the configuration.
      rename: From our keys to that program's.
    """
    tensors, config = read(folder)
    tensors = {rename(key): x for key, x in tensors.items()}
    safetensors.numpy.save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config | (entries or {})))
