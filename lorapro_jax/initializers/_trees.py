"""An initialiser on all LoRA pairs of a tree: new factors and base kernels."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax

from .._placement import placed_like
from ..pairs._axes import LoRAPair
from ..pairs._find import PairsSpec, find_pairs
from ..pairs._leaves import Leaf, index_leaves
from ..pairs._messages import no_pairs_message
from ..pairs._scale import ScaleSpec
from ..weights._axes import Order
from ..weights._find import Kernel, find_kernels
from ..weights._given import KernelsSpec
from ..weights._values import gradient_of, weight_of
from ._contract import Initializer
from ._guards import check_distinct, check_faults, check_untrained
from ._layer import Side, Started, initialize_pair


def initialize_adapters(
    method: Initializer,
    params: Any,
    gradients: Any = None,
    *,
    key: jax.Array,
    scale: ScaleSpec = 1.0,
    alpha: ScaleSpec | None = None,
    rslora: bool = False,
    pairs: PairsSpec | None = None,
    stack_axis: int | Sequence[int] | None = None,
    kernels: KernelsSpec | None = None,
) -> Any:
    r"""A tree whose LoRA factors start as a method says.

    Call it once, before training and before `tx.init`; what the factors held before is
    dropped. Methods that change the base weights W0 (LoRA-GA, PiSSA, OLoRA) make them
    W0 - s B A, so that the model starts as it was with B = 0. Save these weights too:
    to the old ones the adapters do not fit (`save_peft_adapter(initial=...)` makes them
    fit).

    Computed in float32, or float64 if an array is, one layer at a time; then A and B
    are rounded to the dtypes of their leaves, W0 - s B A is taken of the rounded ones,
    and rounded once itself. In bfloat16 that moves each weight by up to 2⁻⁸ of it, as
    casting the model to bfloat16 did before. For an exact start keep these base
    weights in float32. Where s B A is so large that more than 1/16 of the largest base
    weight would be rounded away, the start is refused.

    Args:
      method: From `lorapro_jax.initializers`, such as `lora_ga()`.
      params: Any tree with the factors and their base kernels, frozen ones included,
        such as Linen's `params` or `nnx.state(model)`. The method says which arrays it
        needs: `lora()` takes the factors alone, and `gora()` and `lora_one()` do not
        read the kernels, so these may be quantised.
      gradients: The mean gradients at W0 by the paths of the kernels, as
        `estimate_gradients` returns them; or any tree in which they have these paths.
      key: A key of `jax.random`. Each pair has its own, from its path, whatever else
        is in the tree.
      scale: See `lorapro`; the same as there, and as in the forward pass. It may be
        negative, and each layer of a stack may have its own.
      alpha: See `lorapro`.
      rslora: See `lorapro`.
      pairs: See `lorapro`; other factors stay as they are.
      stack_axis: See `lorapro`.
      kernels: Where base kernels are that cannot be found by name, as
        `{regex: path}`, or which of their axes are what, as `{regex: (path, input
        axes, output axes)}`. The regex has to match all of the path of A or of B;
        the path may use its groups, `r"\1/gate"`. Needed where a kernel is square and
        nothing in the tree proves its order, which no name does: `kernel` is `(in,
        out)` in Flax's Dense, `(out, in)` in the Conv1D of its GPT-2. Proofs are
        other leaves of the same last name, if they agree: kernels with sides that
        differ and with factors or a bias, those whose axes are given here, those of
        `nnx.LoRALinear`; and for `initialize_model` the classes of Flax.

    Returns:
      A new tree of the same structure, dtypes and shardings.

    Raises:
      ValueError: No pair; no base kernel, or one whose axes nothing proves; a quantised
        kernel where the method needs its values or changes it; one kernel of two pairs
        that would both change it, or a B that is not 0; a gradient that is missing, of
        another shape or not finite; a start that its dtypes cannot hold, or beside
        which they cannot hold W0; what `find_pairs` and the method raise. The message
        names the path. What depends on values is NaN instead under `jit`.
      TypeError: `method` is no `Initializer`.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from lorapro_jax import initialize_adapters
      >>> from lorapro_jax.initializers import pissa
      >>> kernel = jax.random.normal(jax.random.key(0), (6, 5))
      >>> a, b = jnp.ones((6, 2)), jnp.zeros((2, 5))
      >>> layer = {"kernel": kernel, "lora_a": a, "lora_b": b}
      >>> new = initialize_adapters(pissa(), layer, key=jax.random.key(1))
      >>> start = new["kernel"] + new["lora_a"] @ new["lora_b"]
      >>> bool(abs(start - kernel).max() < 1e-5)
      True
    """
    options: dict[str, Any] = {"scale": scale, "alpha": alpha, "rslora": rslora}
    options |= {"pairs": pairs, "stack_axis": stack_axis}
    return start_adapters(method, params, gradients, key, kernels, options)


def start_adapters(
    method: Initializer,
    params: Any,
    gradients: Any,
    key: jax.Array,
    kernels: KernelsSpec | None,
    options: Mapping[str, Any],
    known: Mapping[str, Order] | None = None,
) -> Any:
    """`initialize_adapters`, with the orders of kernels whose layers are known.

    Args:
      method: See `initialize_adapters`.
      params: See `initialize_adapters`.
      gradients: See `initialize_adapters`.
      key: See `initialize_adapters`.
      kernels: See `initialize_adapters`.
      options: Those of `find_pairs`.
      known: See `find_kernels`.
    """
    if not isinstance(method, Initializer):
        raise TypeError(
            f"`method` is {method!r}. Pass an initialiser first, called, such as "
            "`lorapro_jax.initializers.lora_ga()`."
        )
    found = find_pairs(params, **options)
    if not found:
        raise ValueError(no_pairs_message(params, "Put adapters into the model first."))
    leaves = index_leaves(params)
    by_path = _gradients_by_path(gradients) if method.needs_gradient else {}
    at = _find_needed_kernels(method, leaves, by_path, found, kernels, known)
    new: dict[int, Any] = {}
    faults = []
    for pair, kernel in zip(found, at, strict=True):
        started = _start_pair(method, pair, kernel, leaves, by_path, key)
        faults.append(started.faults)
        paths = *pair.paths, kernel.path if kernel else ""
        for path, x in zip(paths, started[:3], strict=True):
            if x is not None:
                new[leaves[path].position] = placed_like(x, leaves[path].value)
    for pair, kernel, fault in zip(found, at, faults, strict=True):
        check_faults(pair, kernel, leaves, fault)
    if method.changes_weight:
        check_untrained(found, leaves)
    flat = enumerate(jax.tree.leaves(params))
    return jax.tree.unflatten(jax.tree.structure(params), [new.get(*x) for x in flat])


def _find_needed_kernels(
    method: Initializer,
    leaves: Mapping[str, Leaf],
    gradients: Mapping[str, Any],
    found: Sequence[LoRAPair],
    given: KernelsSpec | None,
    known: Mapping[str, Order] | None,
) -> Sequence[Kernel | None]:
    """The base kernel of each pair, if the method needs it or its gradient."""
    if not (method.needs_weight or method.needs_gradient or method.changes_weight):
        return [None] * len(found)
    # The gradients may be there without their kernels, or with quantised ones.
    arrays = {path: leaf.value for path, leaf in leaves.items()}
    try:
        at = find_kernels(arrays, found, given, known)
    except ValueError:
        if not gradients:
            raise
        at = find_kernels({**gradients, **arrays}, found, given, known)
    if method.changes_weight:
        check_distinct(found, at)
    return at


def _start_pair(
    method: Initializer,
    pair: LoRAPair,
    kernel: Kernel | None,
    leaves: Mapping[str, Leaf],
    gradients: Mapping[str, Any],
    key: jax.Array,
) -> Started:
    """The new leaves of one pair."""
    weight = gradient = None
    path = kernel.path if kernel else ""
    if method.needs_weight or method.changes_weight:
        weight = weight_of(pair.a, path, leaves)
    if method.needs_gradient:
        gradient = gradient_of(pair.a, path, gradients, leaves)
    # From the path, not from a counter: a new layer leaves the others as they were.
    key = jax.random.fold_in(key, zlib.crc32(pair.a.encode()))
    a, b = (
        Side(leaves[factor].shape, leaves[factor].value.dtype, axes)
        for factor, axes in zip(pair.paths, pair.factor_axes, strict=True)
    )
    try:
        started: Started = initialize_pair(
            weight,
            gradient,
            cast(jax.Array, pair.scale),
            key,
            method=method,
            rank=cast(int, pair.rank),
            # Without its path: pairs of equal shapes then share one program.
            kernel=kernel._replace(path="") if kernel else None,
            a=a,
            b=b,
        )
    except ValueError as error:
        raise ValueError(f"`{pair.a}`: {error}") from error
    return started


def _gradients_by_path(gradients: Any) -> dict[str, Any]:
    """The gradients, whatever their tree, by the paths of their kernels."""
    if gradients is None:
        raise ValueError(
            "This method starts from the gradients of the base weights, and "
            "`gradients` is None. Pass what `estimate_gradients` returns."
        )
    return {path: leaf.value for path, leaf in index_leaves(gradients).items()}
