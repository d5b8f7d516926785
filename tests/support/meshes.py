"""Trees on meshes of simulated devices, and what programs send between these."""

import re

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

LAYOUTS = {
    "features": {
        "lora_a": P("x", None), "lora_b": P(None, "y"),
        "layers": {"lora_a": P(None, "x", None), "lora_b": P(None, None, "y")},
        "heads": {"lora_a": P("y", "x", None), "lora_b": P(None, "x")},
    },
    "layers": {
        "lora_a": P(), "lora_b": P(None, "y"),
        "layers": {"lora_a": P("y"), "lora_b": P("y", None, "x")},
        "heads": {"lora_a": P("y"), "lora_b": P()},
    },
    "layers of one factor": {
        "lora_a": P("y", None), "lora_b": P(),
        "layers": {"lora_a": P("y"), "lora_b": P(None, None, "y")},
        "heads": {"lora_a": P("y", "x", None), "lora_b": P(None, "x")},
    },
    "layers of the other": {
        "lora_a": P(), "lora_b": P(),
        "layers": {"lora_a": P(None, "x"), "lora_b": P("y", None, "x")},
        "heads": {"lora_a": P(), "lora_b": P()},
    },
    "rank": {
        "lora_a": P(None, "y"), "lora_b": P("y"),
        "layers": {"lora_a": P(None, None, "y"), "lora_b": P(None, "y")},
        "heads": {"lora_a": P(), "lora_b": P()},
    },
    "replicated": {
        "lora_a": P(), "lora_b": P(),
        "layers": {"lora_a": P(), "lora_b": P()},
        "heads": {"lora_a": P(), "lora_b": P()},
    },
}  # fmt: skip
SHAPES = {
    "lora_a": (16, 4), "lora_b": (4, 24),
    "layers": {"lora_a": (6, 64, 4), "lora_b": (6, 4, 24)},
    "heads": {"lora_a": (8, 16, 3), "lora_b": (3, 32)},
}  # fmt: skip


def random_tree(seed):
    leaves, treedef = jax.tree.flatten(SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    arrays = [jax.random.normal(k, s) for k, s in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, arrays)


def put(tree, mesh, specs):
    is_spec = lambda x: isinstance(x, P)
    shardings = jax.tree.map(lambda p: NamedSharding(mesh, p), specs, is_leaf=is_spec)
    return jax.device_put(tree, shardings)


def collectives(program):
    """`(operation, shape)` of all that a compiled program sends between devices."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", program)
    return {
        (kind, shape)
        for result, kind in found
        for shape in re.findall(r"\w+\[([\d,]*)\]", result)
    }
