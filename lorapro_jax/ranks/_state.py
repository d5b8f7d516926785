"""The state of `lorapro_adamw` for factors of another rank.

Its moments are those of W, so they can come along. With factored moments M is a pair of
steps at the factors of its last update, and becomes what the new factors can express of
it; the sums of V have no rank, and stay. Dense moments have none at all. The factors of
the last step, which tell how far it went, are the new ones: nothing has moved yet.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._checks import some
from .._placement import cast_to, placed_like
from ..algebra._adjust import project
from ..algebra._axes import Shape
from ..algebra._factors import Both, Factor, PairArrays, Step, in_compute_dtype
from ..algebra._products import times
from ..algebra._spectra import decompose
from ..algebra._thin import carry
from ..optimizers._dense import DenseMoments
from ..optimizers._factored import FactoredMoments
from ..pairs._axes import LoRAPair
from ..pairs._leaves import index_leaves
from ..pairs._names import normalize_path
from ..transforms._over_pairs import OverPairsState

_REMEDY = (
    "Make a new state, `tx.init(new_params)`, or pass the part of this one that is a "
    "`ScaleByLoRAProAdamState` (of an NNX optimizer, `optimizer.opt_state`)."
)


class Change(NamedTuple):
    """One pair, before and after.

    Attributes:
      old: The pair as it was found.
      shapes: Those of A and B as they were.
      factors: The new A and B, as leaves of the tree.
      scale: The new s.
    """

    old: LoRAPair
    shapes: Both[Shape]
    factors: Both[Any]
    scale: ArrayLike


def resize_state(state: Any, changes: Sequence[Change]) -> Any:
    """A state of any Optax chain with `lorapro_adamw` for the changed factors.

    Raises:
      ValueError: It holds something else for the entries of a factor, or moments and
        none of these factors.
    """
    is_ours = lambda x: isinstance(x, OverPairsState)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_ours)
    ours = [x.pairs for _, x in leaves if is_ours(x)]
    new = []
    for path, x in leaves:
        if is_ours(x):
            x = x._replace(pairs=_resized(x.pairs, changes))
        else:
            _check_foreign(normalize_path(path), x, changes)
        new.append(x)
    _check_known(ours, changes)
    return jax.tree.unflatten(treedef, new)


def _check_known(ours: Sequence[Any], changes: Sequence[Change]) -> None:
    """Raises ValueError where moments are of other paths than all changed factors."""
    known = [path for x in ours for path in _values(x.factors)]
    changed = [path for change in changes for path in change.old.paths]
    if known and changed and not set(known) & set(changed):
        raise ValueError(
            f"`state` has moments of {some(known)}, and of none of the factors that "
            f"change, {some(changed)}. Pass the tree that `tx.init` got, or leave "
            "`state` out if these are frozen."
        )


def _check_foreign(path: str, leaf: Any, changes: Sequence[Change]) -> None:
    """Raises ValueError for what another optimizer keeps for each entry of a factor."""
    for change in changes:
        for factor, shape in zip(change.old.paths, change.shapes, strict=True):
            # Adafactor has rows and columns of a factor, SM3 a list of them: all that
            # is more than one number was made for its axes.
            if f"/{factor}/" in f"/{path}/" and jnp.size(leaf) > 1:
                raise ValueError(
                    f"`state` has `{path}` {jnp.shape(leaf)}, which belongs to the "
                    f"entries of `{factor}` {shape} and has no meaning at another "
                    "rank. Only the moments of `lorapro_adamw`, which are those of W, "
                    f"have one. {_REMEDY}"
                )


def _resized(moments: Any, changes: Sequence[Change]) -> Any:
    """The moments of all pairs that the state knows."""
    if not isinstance(moments, FactoredMoments | DenseMoments):
        raise ValueError(
            f"`state` has {type(moments).__name__}, which have no meaning at another "
            f"rank. Only the moments of `lorapro_adamw` have one. {_REMEDY}"
        )
    like_factors = [*([] if isinstance(moments, DenseMoments) else ["mu"]), "factors"]
    old = {name: _values(getattr(moments, name)) for name in like_factors}
    new: dict[str, dict[str, Any]] = {name: {} for name in old}
    for change in changes:
        paths = change.old.paths
        if not all(path in tree for path in paths for tree in old.values()):
            continue  # of another part of an `optax.partition`, or frozen
        both = {name: Both(*(tree[x] for x in paths)) for name, tree in old.items()}
        for path, factor in zip(paths, change.factors, strict=True):
            # A copy: donating the parameters would delete the state.
            new["factors"][path] = jnp.copy(factor)
        if "mu" in new:
            mean = _carried(change, both["mu"], both["factors"])
            for path, mu in zip(paths, mean, strict=True):
                new["mu"][path] = placed_like(mu, old["mu"][path])
    return moments._replace(
        **{name: _with(getattr(moments, name), values) for name, values in new.items()}
    )


def _carried(change: Change, mean: Both[Any], factors: Both[Any]) -> Both[jax.Array]:
    """The M of one pair at its new factors, in the dtypes that it had."""
    pair = change.old
    for path, mu, shape in zip(pair.paths, mean, change.shapes, strict=True):
        if jnp.shape(mu) != shape:
            raise ValueError(
                f"`state` has a moment of shape {jnp.shape(mu)} for `{path}`, which "
                f"has shape {shape}. Pass the state of these parameters."
            )
    as_factors = lambda both: Both(*map(Factor, both, pair.factor_axes))
    now = as_factors(change.factors.map(jnp.asarray))
    arrays = PairArrays(*now, now, change.scale)
    found = _project(arrays, as_factors(factors), as_factors(mean), pair.scale)
    cast: Both[jax.Array] = found.map(lambda x, y: cast_to(x.array, y.dtype), mean)
    return cast


@jax.jit
def _project(
    pair: PairArrays, old: Both[Factor], mean: Step, old_scale: ArrayLike
) -> Step:
    """(μ_a, μ_b) of today's factors for the M = s⁻ (B⁻ μ_a + μ_b A⁻) of former ones."""
    pair = in_compute_dtype(pair)
    ratio = jnp.asarray(old_scale, pair.dtype) / pair.scale
    mean = mean.map(lambda x: times(ratio, x.astype(pair.dtype)))
    carried, spectra = carry(pair, old, mean), decompose([pair])
    return project(spectra, [pair], [carried], e=0 * spectra.squares)[0]


def _values(tree: Any) -> dict[str, Any]:
    return {path: leaf.value for path, leaf in index_leaves(tree).items()}


def _with(tree: Any, values: Mapping[str, Any]) -> Any:
    """A tree with other values at some paths."""
    put = lambda path, x: values.get(normalize_path(path), x)
    return jax.tree_util.tree_map_with_path(put, tree)
