"""Adapters into the base weights: W0 + s B A for every pair of a tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding

from .._checks import is_traced
from .._placement import placed_like
from ..algebra._factors import Both, Factor
from ..pairs._axes import LoRAPair
from ..pairs._find import PairsSpec, find_pairs
from ..pairs._leaves import index_leaves
from ..pairs._messages import no_pairs_message, shared_weights
from ..pairs._scale import ScaleSpec
from ._axes import Order
from ._find import Kernel, find_kernels
from ._given import KernelsSpec
from ._mergeable import check_one_each, check_weight, check_width
from ._product import add_product
from ._prune import without


def merge_adapters(
    params: Any,
    *,
    remove: bool = False,
    scale: ScaleSpec = 1.0,
    alpha: ScaleSpec | None = None,
    rslora: bool = False,
    pairs: PairsSpec | None = None,
    stack_axis: int | Sequence[int] | None = None,
    kernels: KernelsSpec | None = None,
) -> Any:
    r"""A tree whose base weights are W0 + s B A, and which computes the same.

    B becomes 0 and A stays: the model with its adapters is where LoRA starts, and a
    training that goes on has directions to go. Make a new optimizer state for it; the
    old one has moments of factors that are no more. With `remove=True` the tree has no
    factors, and is that of the model without adapters.

    Each sum is taken in float32 (float64 if an array is), and rounded once to the
    dtype of the base weight. In bfloat16 that moves each weight by up to 2⁻⁸ of it, and
    what an adapter adds below that is lost: to keep it, cast the base weights to
    float32 first.

    Memory, beside the new weights: one layer's product at a time, in float32 (XLA
    copies a stack once more, on CPUs one in bfloat16, on TPUs one along axis 1). On a
    mesh each device computes its part of a kernel, and only factors travel; layers
    that are sharded along their stack are computed at once. It compiles its own
    programs, one for each kind of layer. Under `jit` the compiler plans all of that,
    and layers of a stack are computed at once.

    Args:
      params: Any tree with the factors and their base weights, such as Linen's
        `params`, `nnx.state(model)`, or of a Keras model `{x.path: x.value for x in
        model.variables}`; for an NNX model itself there is `merge_model`.
      remove: Whether to leave the factors out, and modules that held nothing else.
      scale: See `lorapro`; the same as there, and as in the forward pass.
      alpha: See `lorapro`.
      rslora: See `lorapro`.
      pairs: See `lorapro`; other adapters stay as they are.
      stack_axis: See `lorapro`.
      kernels: Where base weights are that cannot be found by name, as
        `{regex: path}`, or which of their axes are what; see `initialize_adapters`.

    Returns:
      A new tree of the same dtypes and shardings, and without `remove` of the same
      structure; all other leaves are the same objects.

    Raises:
      ValueError: No pair; no base weight, or one whose axes nothing proves; a
        quantised one; two adapters on one weight, unless `pairs` names them; a sum that
        is not finite, which under `jit` is not looked at; NumPy's float64 without JAX's
        64 bits; factors that cannot be removed; what `find_pairs` raises. The message
        names the path.

    Examples:
      >>> import jax.numpy as jnp
      >>> from lorapro_jax import merge_adapters
      >>> a, b = jnp.ones((3, 1)), jnp.ones((1, 2))
      >>> layer = {"kernel": jnp.zeros((3, 2)), "lora_a": a, "lora_b": b}
      >>> merge_adapters(layer, scale=0.5, remove=True)
      {'kernel': Array([[0.5, 0.5],
             [0.5, 0.5],
             [0.5, 0.5]], dtype=float32)}
    """
    options: dict[str, Any] = {"scale": scale, "alpha": alpha, "rslora": rslora}
    options |= {"pairs": pairs, "stack_axis": stack_axis}
    leaves = index_leaves(params)
    new: dict[str, Any] = {}
    todo = plan_merge(params, kernels, options)
    for merge in todo:
        arrays = {path: new.get(path, leaves[path].value) for path in merge.paths}
        new |= merged(merge, arrays)
    flat = list(jax.tree.leaves(params))
    for path, x in new.items():
        flat[leaves[path].position] = x
    tree = jax.tree.unflatten(jax.tree.structure(params), flat)
    if not remove:
        return tree
    return without(tree, {path for merge in todo for path in merge.pair.paths})


class Merge(NamedTuple):
    """One pair and its base weight."""

    pair: LoRAPair
    kernel: Kernel

    @property
    def paths(self) -> tuple[str, str, str]:
        """Those of A, of B and of the base weight."""
        return *self.pair.paths, self.kernel.path


def plan_merge(
    params: Any,
    kernels: KernelsSpec | None,
    options: Mapping[str, Any],
    known: Mapping[str, Order] | None = None,
) -> list[Merge]:
    """All pairs of a tree with their base weights, checked. It keeps no array.

    Args:
      params: See `merge_adapters`.
      kernels: See `merge_adapters`.
      options: Those of `find_pairs`.
      known: See `find_kernels`.

    Raises:
      ValueError: As `merge_adapters`, but for sums and removal.
    """
    found = find_pairs(params, **options)
    if not found:
        raise ValueError(no_pairs_message(params, "Has it been merged already?"))
    for paths in shared_weights(found) if options["pairs"] is None else ():
        raise ValueError(
            f"{paths} are factors of adapters on one weight. Which of them the model "
            "adds up is not known: name those, with `pairs=[(path of A, path of B), "
            "...]`."
        )
    at, leaves = find_kernels(params, found, kernels, known), index_leaves(params)
    if options["pairs"] is None:
        check_one_each(found, at)
    todo = [Merge(*x) for x in zip(found, at, strict=True)]
    for merge in todo:
        check_weight(merge.pair, merge.kernel.path, leaves)
        for path in merge.paths:
            check_width(path, leaves[path].value)
    return todo


def merged(merge: Merge, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The new base weight and B of one pair, by their paths.

    Args:
      merge: The pair and its weight.
      arrays: The leaves at its paths.

    Raises:
      ValueError: The sum is not finite.
    """
    pair, path = merge.pair, merge.kernel.path
    a, b, weight = (arrays[x] for x in merge.paths)
    factors = Both(*map(Factor, map(jnp.asarray, (a, b)), pair.factor_axes))
    new, finite = add_product(
        weight,
        factors,
        pair.scale,
        # Without its path: pairs of equal shapes then share one program.
        kernel=merge.kernel._replace(path=""),
        sharding=_sharding(weight),
        one_by_one=_one_by_one(weight, merge.kernel),
    )
    if not is_traced(finite) and not finite:
        raise ValueError(
            f"`{path}` {weight.dtype} plus s B A of `{pair.a}` is not finite. Look at "
            "these three arrays. If they are, the dtype of the base weight cannot hold "
            "the sum: cast it to a wider one first."
        )
    return {path: placed_like(new, weight), pair.b: _zeros(b)}


def _zeros(x: Any) -> Any:
    return placed_like(jnp.zeros(x.shape, x.dtype), x)


def _sharding(x: Any) -> NamedSharding | None:
    """The sharding of an array on a mesh with automatic axes.

    Left to itself the compiler may put the sum elsewhere. Explicit axes say it
    themselves.
    """
    sharding = None if is_traced(x) else getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return None
    return None if AxisType.Explicit in sharding.mesh.axis_types else sharding


def _one_by_one(x: Any, kernel: Kernel) -> bool:
    """Whether each device has all layers of a stack, as far as that is known.

    A loop over layers that lie on several devices would gather them.
    """
    if is_traced(x):
        return False
    sharding = getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return True
    spec = dict(enumerate(sharding.spec))
    return all(spec.get(axis) is None for axis in kernel.batch)
