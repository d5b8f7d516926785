"""All LoRA pairs of a tree at other ranks, and the optimizer's state with them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from .._checks import is_traced
from .._placement import placed_like
from ..algebra._axes import FactorAxes, Shape
from ..algebra._factors import Both
from ..pairs._axes import LoRAPair
from ..pairs._find import PairsSpec, as_spec, find_pairs, read_pairs
from ..pairs._leaves import Leaf, index_leaves
from ..pairs._messages import no_pairs_message
from ..pairs._scale import ScaleSpec, resolve_scale
from ..weights._layout import as_factor
from ._factors import resize_factors
from ._state import Change, resize_state
from ._wanted import RanksSpec, wanted_ranks


class Resized(NamedTuple):
    """What `resize_adapters` returns.

    Attributes:
      params: The tree with the new factors.
      errors: By the path of each pair's A, the relative error of the product,
        ‖s' B' A' - s B A‖ / ‖s B A‖ in the Frobenius norm, with the factors rounded as
        their leaves are; of stacked layers one each. 0 at an equal or higher rank,
        but for the rounding of s / s' B, and where B A is 0.
      state: The optimizer's state; None if none was given.
    """

    params: Any
    errors: dict[str, jax.Array]
    state: Any = None


def resize_adapters(
    params: Any,
    ranks: RanksSpec,
    *,
    key: jax.Array | None = None,
    state: Any = None,
    scale: ScaleSpec = 1.0,
    alpha: ScaleSpec | None = None,
    rslora: bool = False,
    pairs: PairsSpec | None = None,
    stack_axis: int | Sequence[int] | None = None,
) -> Resized:
    """LoRA factors of other ranks that compute the same, as closely as they can.

    **To a lower rank** the product s B A becomes the closest one of that rank: its
    first singular triplets, found from two thin QR decompositions and an r×r core. The
    factor with the larger norm, usually A, gets orthogonal rows of equal length, the
    root mean square of those it had, and the other one the singular values.

    **To a higher rank** the product stays. A keeps its rows and gets random ones of
    their length, orthogonal to them while there are inputs left; B gets columns of 0.
    This is how LoRA starts: the new columns of B have gradients at once, and a step
    can move W in as many more directions.

    **The scale.** With `alpha=` s is alpha / r, and changes with the rank. So that
    s B A is what it was, B is multiplied by s / s'. From then on the model has to
    multiply by s': make it with the new rank. The optimizer has the same options.

    Args:
      params: Any tree with the factors; other leaves come back as the same objects. A
        model is made anew with the new ranks, and takes these leaves (in NNX,
        `nnx.update(model, resized.params)`).
      ranks: The rank of all pairs; `{regex: rank}`, where the first pattern that
        occurs in a path of a pair counts; or what `allocate_ranks` returned.
      key: A key of `jax.random`, needed where a rank rises. Each pair has its own,
        from its path.
      state: The state of an Optax chain with `lorapro_adamw`, with factored or dense
        moments. These are moments of W, and stay those: of M remains what the new
        factors can express, which at a higher rank is all that the old ones could, and
        V's sums are what they were. No other optimizer's moments of factors have a
        meaning at another rank. In NNX pass `optimizer.opt_state`, and assign the
        result to that of the new optimizer.
      scale: See `lorapro`; what the forward pass multiplies by, before and after.
      alpha: See `lorapro`; the same before and after.
      rslora: See `lorapro`.
      pairs: See `lorapro`; other factors stay as they are.
      stack_axis: See `lorapro`.

    Returns:
      A `Resized`. The tree has the structure, dtypes and shardings of `params`; it is
      computed in float32, or float64 if a factor is, one layer at a time. A layer with
      an entry that is not finite becomes NaN, and no other does.

    Raises:
      ValueError: No pair; a rank that is no integer of at least 1, a pair without one,
        or one of no pair; no `key` for a rank that rises, or one that is none; a rank
        that a sharded axis cannot have; moments of another optimizer in `state`, or of
        other factors; what `find_pairs` raises.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from lorapro_jax import resize_adapters
      >>> a = jax.random.normal(jax.random.key(0), (64, 8))
      >>> b = jax.random.normal(jax.random.key(1), (8, 32))
      >>> resized = resize_adapters({"lora_a": a, "lora_b": b}, 4, alpha=16.0)
      >>> resized.params["lora_b"].shape
      (4, 32)
      >>> 0 < resized.errors["lora_a"] < 1
      Array(True, dtype=bool)
    """
    _check_key(key)
    pairs = None if pairs is None else as_spec(pairs)
    options: dict[str, Any] = {"scale": scale, "alpha": alpha, "rslora": rslora}
    found = find_pairs(params, **options, pairs=pairs, stack_axis=stack_axis)
    if not found:
        raise ValueError(no_pairs_message(params, "Put adapters into the model first."))
    wanted = wanted_ranks(ranks, found)
    leaves = index_leaves(params)
    changes, errors = [], {}
    read = read_pairs(params, pairs, stack_axis)
    for pair, unscaled, rank in zip(found, read, wanted, strict=True):
        batch = tuple(leaves[pair.a].shape[axis] for axis in pair.a_batch_axes)
        new_scale = resolve_scale(unscaled._replace(rank=rank), batch, **options)
        old = Both(*(leaves[path] for path in pair.paths))
        errors[pair.a] = jnp.zeros(batch)
        if _differ(pair, rank, new_scale):
            factors, errors[pair.a] = _resize_pair(pair, old, rank, new_scale, key)
            shapes = old.map(lambda leaf: leaf.shape)
            changes.append(Change(pair, shapes, factors, new_scale))
    new = {
        leaves[path].position: factor
        for change in changes
        for path, factor in zip(change.old.paths, change.factors, strict=True)
    }
    flat = enumerate(jax.tree.leaves(params))
    tree = jax.tree.unflatten(jax.tree.structure(params), [new.get(*x) for x in flat])
    return Resized(
        tree, errors, None if state is None else resize_state(state, changes)
    )


def _check_key(key: Any) -> None:
    """Raises ValueError for what is no key of `jax.random`."""
    if key is None:
        return
    try:
        jax.eval_shape(jax.random.fold_in, key, 0)
    except (TypeError, ValueError):
        raise ValueError(
            f"`key={key!r}` is no key of `jax.random`. Pass `key=jax.random.key(0)` or "
            "another key."
        ) from None


def _differ(pair: LoRAPair, rank: int, scale: ArrayLike) -> bool:
    """Whether a pair gets another rank or scale, as far as that is known."""
    known = not any(map(is_traced, (scale, pair.scale)))
    equal = known and np.array_equal(cast(Any, scale), cast(Any, pair.scale))
    return not (rank == pair.rank and equal)


def _resize_pair(
    pair: LoRAPair, old: Both[Leaf], rank: int, scale: ArrayLike, key: jax.Array | None
) -> tuple[Both[Any], jax.Array]:
    """The new leaves of one pair, and their error."""
    for path, leaf in zip(pair.paths, old, strict=True):
        if isinstance(leaf.value, jax.ShapeDtypeStruct):
            raise ValueError(
                f"`{path}` is a shape without values. For a tree of shapes, call "
                "`resize_adapters` under `jax.eval_shape`."
            )
    if key is None and rank > cast(int, pair.rank):
        raise ValueError(
            f"The rank of `{pair.a}` rises from {pair.rank} to {rank}, and its new "
            "directions are random. Pass `key=jax.random.key(0)` or another key."
        )
    # From the path, not from a counter: a new layer leaves the others as they were.
    key = jax.random.key(0) if key is None else key
    key = jax.random.fold_in(key, zlib.crc32(pair.a.encode()))
    a, b = map(_matrices, old, pair.factor_axes)
    ratio = cast(Any, pair.scale) / cast(Any, scale)
    found = resize_factors(a, b.swapaxes(-1, -2), rank, key, ratio)
    rows = found.a, found.b.swapaxes(-1, -2)
    args = zip(pair.paths, rows, pair.factor_axes, old, strict=True)
    return Both(*(_leaf(*x, rank=rank) for x in args)), found.error


def _matrices(leaf: Leaf, axes: FactorAxes) -> jax.Array:
    """A, or Bᵀ, as `(*batch, r, features)`."""
    x = jnp.transpose(leaf.value, axes.rank_first(len(leaf.shape)))
    first = len(axes.batch) + 1
    return x.reshape(*x.shape[:first], axes.feature_count(leaf.shape))


def _leaf(path: str, rows: jax.Array, axes: FactorAxes, old: Leaf, *, rank: int) -> Any:
    """A new factor, laid out, typed and sharded like the old one."""
    shape = list(old.shape)
    shape[axes.rank] = rank
    _check_sharding(path, tuple(shape), old)
    return placed_like(as_factor(rows, axes, tuple(shape)), old.value)


def _check_sharding(path: str, shape: Shape, old: Leaf) -> None:
    """Raises ValueError where a mesh cannot divide the new rank as it did the old."""
    sharding = getattr(old.value, "sharding", None)
    if sharding is None or is_traced(old.value):
        return
    try:
        sharding.shard_shape(shape)
    except ValueError as error:
        raise ValueError(
            f"`{path}` {old.shape} is sharded along its rank, and as {shape} it cannot "
            f"be: {error}. Choose a rank that its mesh divides, or take the sharding "
            "off this axis with `jax.device_put` first."
        ) from None
