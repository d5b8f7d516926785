"""The state of `lorapro_adamw()`: from the parameters' trees to pairs, and back."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ._dense import DenseMoments
from ._factored import FactoredMoments
from ._factors import PairArrays
from ._layout import LoRAPair, Shape
from ._paths import normalize_path
from ._trees import positions

_FOREIGN = (
    "The optimizer state is not that of these gradients. Call `tx.init` with the "
    "parameters that they were taken of, and with the same `moments=`."
)

Places = Sequence[tuple[int, int]]
PairMoments = DenseMoments | FactoredMoments


class ScaleByLoRAProAdamState(NamedTuple):
    """State of `scale_by_lorapro_adam`: arrays only, in trees like the parameters.

    Attributes:
      count: Steps done, int32.
      mu: First moments. Factored: at A and B the pair (μ_a, μ_b), whose equivalent
        gradient at `factors` is the mean M of E. Dense: at A the M of its pair,
        `(*batch, *features of B, *features of A)`; at B nothing.
      nu: Second moments. Factored: at A the column sums of the mean V of E∘E and at B
        the row sums, like the factors with a rank axis of size 1. Dense: at A the V of
        its pair; at B nothing.
      factors: Factored: at A and B what they were at the last step, in their own
        dtype; nothing elsewhere, and nothing at all if dense.

    Where there is nothing there is an `optax.MaskedNode()`, which `tree_map_params`
    with a second tree has to be told: `is_leaf=lambda x: isinstance(x, MaskedNode)`.
    Leaves that are no factor have Adam's moments. Moments are float32, or float64 for
    a pair with a float64 factor and for other float64 leaves.
    """

    count: jax.Array  # type: ignore[assignment]
    mu: optax.Updates
    nu: optax.Updates
    factors: optax.Params


def divide(
    found: Sequence[LoRAPair], tree: optax.Params
) -> tuple[Places, dict[int, jax.Array]]:
    """The positions of both factors of each pair, and the other leaves by position.

    The other leaves are in float32 at least: at the usual b2, a second moment in
    bfloat16 would never decay.
    """
    at = positions(found, tree)
    taken = {position for pair in at for position in pair}
    others = {
        position: x.astype(jnp.promote_types(x.dtype, jnp.float32))
        for position, x in enumerate(map(jnp.asarray, jax.tree.leaves(tree)))
        if position not in taken
    }
    return at, others


def join(
    tree: optax.Params,
    at: Places,
    moments: Sequence[PairMoments],
    others: optax.ScaleByAdamState,
) -> ScaleByLoRAProAdamState:
    """A state with trees like `tree`; the count and other leaves' moments as given."""
    mu: dict[int, Any] = dict(others.mu)
    nu: dict[int, Any] = dict(others.nu)
    factors: dict[int, Any] = {}
    for (a, b), m in zip(at, moments, strict=True):
        if isinstance(m, DenseMoments):
            mu[a], nu[a] = m
        else:
            mu[a], mu[b], nu[a], nu[b], factors[a], factors[b] = m
    like = jax.tree.structure(tree)
    return ScaleByLoRAProAdamState(
        others.count, *(_unflatten(like, leaves) for leaves in (mu, nu, factors))
    )


def split(
    tree: optax.Params,
    at: Places,
    pairs: Sequence[PairArrays],
    others: Mapping[int, jax.Array],
    state: ScaleByLoRAProAdamState,
    kind: type[PairMoments],
) -> tuple[list[Any], optax.ScaleByAdamState]:
    """What `join` has joined.

    Raises:
      ValueError: It was joined for another tree, or for moments of another kind.
    """
    like: Any = jax.tree.structure(tree)
    try:
        mu, nu, factors = (like.flatten_up_to(x) for x in state[1:])
    except ValueError as error:
        raise ValueError(f"{_FOREIGN} The first difference: {error}") from None
    moments: list[Any] = []
    for (a, b), pair in zip(at, pairs, strict=True):
        if kind is DenseMoments:
            moments.append(DenseMoments(mu[a], nu[a]))
        else:
            slots = (mu[a], mu[b], nu[a], nu[b], factors[a], factors[b])
            moments.append(FactoredMoments(*slots))
        _check_shapes(tree, a, moments[-1], kind.shapes(pair))
    for i, x in others.items():
        _check_shapes(tree, i, (mu[i], nu[i]), 2 * [x.shape])
    return moments, optax.ScaleByAdamState(
        state.count, {i: mu[i] for i in others}, {i: nu[i] for i in others}
    )


def _check_shapes(
    tree: optax.Params, position: int, arrays: Sequence[Any], shapes: Sequence[Shape]
) -> None:
    """Raises ValueError where the state of a leaf is not what its tree needs."""
    found = [getattr(x, "shape", None) for x in arrays]
    if found != list(shapes):
        path, _ = jax.tree_util.tree_leaves_with_path(tree)[position]
        raise ValueError(
            f"{_FOREIGN} At `{normalize_path(path)}` it has shapes {found}, not "
            f"{list(shapes)}."
        )


def _unflatten(like: Any, leaves: Mapping[int, Any]) -> Any:
    nothing = optax.MaskedNode()
    return jax.tree.unflatten(
        like, [leaves.get(i, nothing) for i in range(like.num_leaves)]
    )
