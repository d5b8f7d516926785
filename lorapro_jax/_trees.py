"""From an optimizer's trees to the arrays of their pairs, and back.

What all transforms here share: the options that say where the pairs are, and the
checks of the trees that `update` gets.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, cast, get_args

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from ._coefficients import Gauge
from ._factors import PairArrays
from ._layout import LoRAPair, factor_axes
from ._leaves import Leaf, check_factor, index_leaves
from ._pairs import PairsSpec, find_pairs
from ._scale import ScaleSpec, check_scale_options, is_real_scalar

OnNoPairs: TypeAlias = Literal["error", "ignore"]
FindPairs: TypeAlias = Callable[[optax.Params], tuple[LoRAPair, ...]]


def pair_finder(
    *,
    scale: ScaleSpec,
    alpha: ScaleSpec | None,
    rslora: bool,
    pairs: PairsSpec | None,
    stack_axis: int | Sequence[int] | None,
    on_no_pairs: OnNoPairs,
) -> FindPairs:
    """`find_pairs` with a transform's options, checked; see `lorapro` for them.

    The function raises ValueError for a tree with leaves and without a pair, unless
    `on_no_pairs` is `"ignore"`.
    """
    check_scale_options(scale, alpha, rslora)
    check_choice("on_no_pairs", on_no_pairs, OnNoPairs)
    if isinstance(stack_axis, jax.Array):
        raise TypeError(
            "`stack_axis` is static. In `optax.inject_hyperparams(..., "
            "static_args=('stack_axis',))` name it."
        )
    if pairs is not None and not callable(pairs):
        pairs = tuple(pairs)  # a generator could be read only once
    find = functools.partial(
        find_pairs,
        scale=scale,
        alpha=alpha,
        rslora=rslora,
        pairs=pairs,
        stack_axis=stack_axis,
    )

    def find_any(tree: optax.Params) -> tuple[LoRAPair, ...]:
        found = find(tree)
        if not found and on_no_pairs == "error" and jax.tree.leaves(tree):
            raise ValueError(_no_pairs_message(tree))
        return found

    return find_any


def take_pairs(
    found: Sequence[LoRAPair], updates: optax.Updates, params: optax.Params | None
) -> list[PairArrays]:
    """The arrays of the pairs that `find_pairs` found in `updates`.

    Raises:
      ValueError: `params` is missing or does not match.
    """
    if not found:
        return []
    if params is None:
        raise ValueError(
            "LoRA-Pro needs the current factors: call "
            "`tx.update(grads, state, params)`."
        )
    grads, factors = index_leaves(updates), index_leaves(params)
    return [_take(pair, grads, factors) for pair in found]


def positions(found: Sequence[LoRAPair], tree: optax.Params) -> list[tuple[int, int]]:
    """The positions of A and B of each pair among all leaves of the tree."""
    index = index_leaves(tree)
    return [(index[pair.a].position, index[pair.b].position) for pair in found]


def by_position(
    at: Sequence[tuple[int, int]], steps: Sequence[tuple[jax.Array, jax.Array]]
) -> dict[int, jax.Array]:
    """The steps of all pairs by the positions of their leaves."""
    return {
        place: x
        for places, step in zip(at, steps, strict=True)
        for place, x in zip(places, step, strict=True)
    }


def put_leaves(
    updates: optax.Updates,
    new: Mapping[int, jax.Array],
    params: optax.Params | None = None,
) -> optax.Updates:
    """`updates` with new leaves at some positions, each in the old one's dtype.

    Or, given `params`, in the wider one of both.
    """
    leaves = jax.tree.leaves(updates)
    structure: Any = jax.tree.structure(updates)
    like = leaves if params is None else structure.flatten_up_to(params)
    for position, x in new.items():
        both = jnp.asarray(leaves[position]), jnp.asarray(like[position])
        leaves[position] = cast_to(x, jnp.promote_types(*(y.dtype for y in both)))
    return jax.tree.unflatten(structure, leaves)


def check_concrete(params: optax.Params) -> None:
    """Raises ValueError where a parameter is a shape without values."""
    for path, leaf in index_leaves(params).items():
        if isinstance(leaf.value, jax.ShapeDtypeStruct):
            raise ValueError(
                f"`{path}` is a `jax.ShapeDtypeStruct`; the state holds the factors "
                "themselves. For a state of shapes, `jax.eval_shape(tx.init, params)`."
            )


def cast_to(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`x` in a leaf's dtype; what is finite stays finite (float16 ends at 65504)."""
    if not jnp.issubdtype(dtype, jnp.floating):
        return x.astype(dtype)
    limit = float(jnp.finfo(dtype).max)
    if limit < float(jnp.finfo(x.dtype).max):
        x = jnp.where(jnp.isfinite(x), jnp.clip(x, -limit, limit), x)
    return x.astype(dtype)


def check_choice(name: str, value: Any, allowed: Any) -> None:
    """Raises ValueError where `value` is not one of a `Literal`."""
    if value not in get_args(allowed):
        raise ValueError(f"`{name}={value!r}` has to be one of {get_args(allowed)}.")


def check_number(name: str, value: Any, low: float, high: float) -> None:
    """Raises ValueError where a number is known and not in `[low, high)`."""
    if is_traced(value):
        return  # under `inject_hyperparams`
    if not (is_real_scalar(value) and low <= value < high):
        raise ValueError(f"`{name}={value!r}` has to be in [{low:g}, {high:g}).")


def check_positive(name: str, value: Any) -> None:
    """Raises ValueError where a number is known and not above 0."""
    if not is_traced(value) and not (is_real_scalar(value) and value > 0):
        raise ValueError(f"`{name}={value!r}` has to be a number above 0.")


def check_adjustment(gauge: Any, damping: Any) -> None:
    """Raises ValueError for a gauge that is none, or a damping below 0."""
    check_choice("gauge", gauge, Gauge)
    if is_traced(damping):
        return  # under `inject_hyperparams`
    if not (is_real_scalar(damping) and 0 <= damping < math.inf):
        raise ValueError(
            f"`damping={damping!r}` has to be a finite number of at least 0; 0 is the "
            "paper's undamped adjustment."
        )


def is_traced(number: ArrayLike) -> bool:
    """Whether a number has no value yet, as under `optax.inject_hyperparams`."""
    return isinstance(number, jax.core.Tracer)


def _take(
    pair: LoRAPair, grads: Mapping[str, Leaf], factors: Mapping[str, Leaf]
) -> PairArrays:
    """The arrays of one pair of `find_pairs`."""
    paths = (pair.a, pair.b)
    for path in paths:
        _check_match(path, grads[path], factors.get(path))
        check_factor(path, factors[path])
    a, b = (jnp.asarray(factors[path].value) for path in paths)
    grad_a, grad_b = (jnp.asarray(grads[path].value) for path in paths)
    scale = cast(ArrayLike, pair.scale)
    return PairArrays(a, b, grad_a, grad_b, scale, *factor_axes(pair))


def _check_match(path: str, grad: Leaf, factor: Leaf | None) -> None:
    if factor is None:
        raise ValueError(
            f"`params` has no leaf `{path}`, but the gradients do. Pass the parameters "
            "that the gradients were taken of: `tx.update(grads, state, params)`."
        )
    if factor.shape != grad.shape:
        raise ValueError(
            f"`{path}` has shape {factor.shape} in `params` and {grad.shape} in the "
            "gradients. Pass the parameters that the gradients were taken of."
        )


def _no_pairs_message(tree: optax.Params) -> str:
    paths = list(index_leaves(tree))
    return (
        f"No LoRA pair among the {len(paths)} leaves, such as {paths[:4]}. Factors are "
        "known by names like `lora_a` and `lora_b`, `kernel_lora_a`, `lora_A.weight`, "
        "`lora/a`, `lora_down`. Give others with `pairs=[(path of A, path of B)]` (for "
        "Keras's lists, `lorapro_jax.keras.keras_pairs(model)`), or pass "
        "`on_no_pairs='ignore'` to let such a tree through."
    )
