"""The factors that a PEFT file has for the pairs of a tree."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax.numpy as jnp
import numpy as np

from ._layout import LoRAPair, Shape, factor_axes
from ._peft_arrays import from_peft, peft_shapes
from ._peft_config import module_rank, module_scale
from ._peft_names import Index, factor_keys, file_keys

_SHOWN = 8  # problems in one message


class Adapter(NamedTuple):
    """What a folder holds.

    Attributes:
      tensors: The arrays of `adapter_model.safetensors`.
      config: `adapter_config.json`.
    """

    tensors: Mapping[str, np.ndarray]
    config: Mapping[str, Any]


class Target(NamedTuple):
    """A pair of the tree that gets its factors from the file.

    Attributes:
      pair: What `find_pairs` returns.
      a: The shape of A.
      b: The shape of B.
      names: The PyTorch module of each layer, by its index on the stacked axes.
    """

    pair: LoRAPair
    a: Shape
    b: Shape
    names: Mapping[Index, str]


def check_adapter(adapter: Adapter, targets: Sequence[Target]) -> None:
    """Raises ValueError that lists all that is not the same in file and tree."""
    due = {
        key
        for target in targets
        for name in target.names.values()
        for key in file_keys(name, target.pair)
    }
    problems = [f"missing in the file: `{key}`" for key in due - adapter.tensors.keys()]
    for key, is_factor in factor_keys(adapter.tensors.keys() - due):
        kind = "" if is_factor else ", which is no LoRA factor"
        problems.append(f"in the file, not in the tree: `{key}`{kind}")
    for target in targets:
        for name in target.names.values():
            problems += _differences(adapter, target, name)
    if problems:
        rest = len(problems) - _SHOWN
        more = f"; and {rest} more" if rest > 0 else ""
        listed = "; ".join(sorted(problems)[:_SHOWN])
        raise ValueError(
            f"adapter and tree differ: {listed}{more}. Load it into a model with the "
            "same adapters; `module_names=` says what PyTorch calls a layer."
        )


def read_factors(adapter: Adapter, target: Target) -> tuple[np.ndarray, np.ndarray]:
    """A and B in the axes of the tree.

    B takes up the ratio of the file's scale to the pair's, so that the product
    s B A is the file's.
    """
    pair, a, b, names = target
    layers_a, layers_b = [], []
    for name in names.values():
        key_a, key_b = file_keys(name, pair)
        layers_a.append(adapter.tensors[key_a])
        ratio = module_scale(adapter.config, name) / float(cast(float, pair.scale))
        layers_b.append(_times(adapter.tensors[key_b], ratio))
    at_a, at_b = factor_axes(pair)
    stack = tuple(a[axis] for axis in at_a.batch)
    as_stack = lambda x: np.stack(x).reshape(*stack, *x[0].shape)
    return (
        from_peft(as_stack(layers_a), a, at_a, is_a=True),
        from_peft(as_stack(layers_b), b, at_b, is_a=False),
    )


def _differences(adapter: Adapter, target: Target, name: str) -> Iterator[str]:
    """What is wrong with one layer that is in the file."""
    pair = target.pair
    wanted = module_rank(adapter.config, name)
    if wanted != pair.rank:
        yield f"`{name}` has rank {wanted} in the configuration, here {pair.rank}"
    for key, path, shape, axes, is_a in zip(
        file_keys(name, pair), pair[:2], target[1:3], factor_axes(pair), (True, False),
        strict=True,
    ):  # fmt: skip
        if key not in adapter.tensors:
            continue
        found = adapter.tensors[key]
        allowed = peft_shapes(shape, axes, is_a=is_a)
        if found.shape not in allowed:
            yield (
                f"`{key}` has shape {found.shape}, but {allowed[0]} is due for "
                f"`{path}` {shape}"
            )
        elif not jnp.issubdtype(found.dtype, jnp.floating):
            yield f"`{key}` has dtype {found.dtype}, which is no real floating point"


def _times(x: np.ndarray, ratio: float) -> np.ndarray:
    """The same bits where both scales are equal up to how they were written."""
    if math.isclose(ratio, 1.0, rel_tol=1e-6):
        return x
    return (x.astype(np.promote_types(x.dtype, np.float32)) * ratio).astype(x.dtype)
