"""If base weights can take the sum W0 + s B A: one adapter each, of real floats."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..pairs._axes import LoRAPair
from ..pairs._leaves import Leaf
from ._find import Kernel
from ._values import is_quantized


def check_one_each(pairs: Sequence[LoRAPair], kernels: Sequence[Kernel]) -> None:
    """Raises ValueError where several pairs have one base weight."""
    owners = defaultdict(list)
    for pair, kernel in zip(pairs, kernels, strict=True):
        owners[kernel.path].append(pair.a)
    for path, several in owners.items():
        if len(several) > 1:
            raise ValueError(
                f"{several} are factors of adapters on one weight, `{path}`. Which of "
                "them the model adds up is not known: name those, with "
                "`pairs=[(path of A, path of B), ...]`. If `kernels=` says so, and "
                "each has its own, give each pair an entry there."
            )


def check_width(path: str, x: Any) -> None:
    """Raises ValueError for 64 bits that JAX would make 32."""
    is_wide = isinstance(x, np.ndarray) and x.dtype.itemsize > 4
    if is_wide and jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
        raise ValueError(
            f"`{path}` is {x.dtype}, which JAX would round to 32 bits. Turn its 64 "
            "bits on first, `jax.config.update('jax_enable_x64', True)`, or cast the "
            "tree to float32."
        )


def check_weight(pair: LoRAPair, path: str, leaves: Mapping[str, Leaf]) -> None:
    """Raises ValueError where a base weight cannot take a sum."""
    if path not in leaves or is_quantized(leaves[path].value):
        parts = [x for x in leaves if x == path or x.startswith(f"{path}/")]
        kinds = {x: str(leaves[x].value.dtype) for x in parts}
        raise ValueError(
            f"`{path}`, the base weight of `{pair.a}`, is quantised: {kinds}. Its "
            "codes cannot hold the sum: dequantise it first. With qwix that is "
            "`jax.tree.map(lambda x: qwix.dequantize(x) if isinstance(x, qwix.QArray) "
            "else x, tree, is_leaf=lambda x: isinstance(x, qwix.QArray))` for the "
            "parameters of a Linen model, and the same with "
            "`nnx.Param(qwix.dequantize(x))` for an NNX model itself, whose state "
            "knows no `QArray`. Or put these factors beside the weights as they were "
            "before, and merge there."
        )
    leaf = leaves[path]
    if not leaf.unique:
        raise ValueError(f"Two leaves have the path `{path}`. Rename one of them.")
    if not jnp.issubdtype(leaf.value.dtype, jnp.floating):
        raise ValueError(
            f"`{path}`, the base weight of `{pair.a}`, is {leaf.value.dtype}, not real "
            "floating point. Cast it first, or leave this pair out with `pairs=`."
        )
    if isinstance(leaf.value, jax.ShapeDtypeStruct):
        raise ValueError(
            f"`{path}` is a shape without values. For a tree of shapes, call "
            "`merge_adapters` under `jax.eval_shape`."
        )
