"""The entries of a PEFT file that the pairs of a tree get: checked and read."""

import math
import re
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from ._arrays import from_peft, peft_shapes, sides
from ._config import module_rank, module_scale
from ._files import Adapter
from ._names import file_keys, is_factor_key
from ._targets import Target

_SHOWN = 4  # problems of a kind in one message


def check_entries(
    adapter: Adapter, targets: Sequence[Target], ignored: re.Pattern[str] | None
) -> None:
    """Raises ValueError that lists what is not the same in file and tree.

    Args:
      adapter: What the folder of the adapter holds.
      targets: The pairs of the tree that the entries are for.
      ignored: A regex for the entries that may lack a place in the tree.
    """
    missing: list[str] = []
    wrong: list[str] = []
    due: set[str] = set()
    for target in targets:
        for name in target.names.values():
            keys = _keys(adapter, name)
            due.update(keys)
            lacking = [key for key in keys if key not in adapter.tensors]
            missing += [f"missing in the file: `{key}`" for key in lacking]
            if not lacking:
                wrong += _differences(adapter, target, name)
    others = sorted(
        key
        for key in adapter.tensors.keys() - due
        if ignored is None or not ignored.search(key)
    )
    extra = [f"in the file, not in the tree: `{key}`" for key in others]
    problems = [_first(x) for x in (missing, extra, wrong) if x]
    if problems:
        hints = ["`module_names=` says what PyTorch calls a layer"]
        if not all(is_factor_key(key) for key in others):
            hints.append("`ignore=` leaves out entries that are no factors")
        raise ValueError(
            f"adapter and tree differ: {'; '.join(problems)}. {', '.join(hints)}."
        )


def read_factors(adapter: Adapter, target: Target) -> tuple[np.ndarray, np.ndarray]:
    """A and B in the axes of the tree.

    Each layer of B takes up the ratio of the file's scale to its own, so that the
    product s B A is the file's.
    """
    scales = target.scales
    layers_a, layers_b = [], []
    for index, name in target.names.items():
        key_a, key_b = _keys(adapter, name)
        layers_a.append(adapter.tensors[key_a])
        ratio = module_scale(adapter.config, name) / scales[index]
        layers_b.append(_times(adapter.tensors[key_b], ratio))
    at_a, at_b = target.pair.factor_axes
    as_stack = lambda x: np.stack(x).reshape(*target.stack, *x[0].shape)
    return (
        from_peft(as_stack(layers_a), target.a, at_a, is_a=True),
        from_peft(as_stack(layers_b), target.b, at_b, is_a=False),
    )


def _keys(adapter: Adapter, name: str) -> tuple[str, str]:
    """The keys of a module's A and B: those of an embedding, if the file has them."""
    embedding = file_keys(name, embedding=True)
    if any(key in adapter.tensors for key in embedding):
        return embedding
    return file_keys(name, embedding=False)


def _differences(adapter: Adapter, target: Target, name: str) -> Iterator[str]:
    """What is wrong with one layer that is in the file."""
    pair = target.pair
    wanted = module_rank(adapter.config, name)
    if wanted != pair.rank:
        yield f"`{name}` has rank {wanted} in the configuration, here {pair.rank}"
    for key, shape, (path, axes, is_a) in zip(
        _keys(adapter, name), (target.a, target.b), sides(pair), strict=True
    ):
        found = adapter.tensors[key]
        allowed = peft_shapes(shape, axes, is_a=is_a)
        if found.shape not in allowed:
            yield (
                f"`{key}` has shape {found.shape}, but {allowed[0]} is due for "
                f"`{path}` {shape}"
            )
        elif not jnp.issubdtype(found.dtype, jnp.floating):
            yield f"`{key}` has dtype {found.dtype}, which is no real floating point"


def _first(problems: list[str]) -> str:
    """The first problems of a kind, and how many more there are."""
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return "; ".join(problems[:_SHOWN]) + more


def _times(x: np.ndarray, ratio: float) -> np.ndarray:
    """The same bits where the scales are equal; else at least in float32."""
    if math.isclose(ratio, 1.0, rel_tol=1e-12):
        return x
    return x.astype(np.promote_types(x.dtype, np.float32)) * ratio
