"""The learning rate and the weight decay of AdamW, on factors and on other leaves."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from .._checks import check_number, is_real_scalar, is_traced, known, some
from .._placement import cast_to
from ..algebra._factors import Both
from ..pairs._find import PairsSpec, as_spec
from ..pairs._leaves import index_leaves, is_placeholder, is_under
from ..pairs._names import normalize_path
from ._options import FindPairs, pair_finder
from ._view import View
from ._wrt import WrtSpec, without_frozen

_MASKS = (
    "It has to be a tree of bools like the parameters or a prefix of it, or a function "
    "from the parameters to one. Under `optax.inject_hyperparams`, name a function in "
    "`static_args`."
)


def descending(
    direction: Callable[..., optax.GradientTransformationExtraArgs],
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: ArrayLike,
    mask: Any,
    *,
    pairs: PairsSpec | None,
    wrt: WrtSpec,
    **where: Any,
) -> optax.GradientTransformationExtraArgs:
    """A direction for LoRA pairs, and `descend` behind it.

    Args:
      direction: From the options that say where the pairs are to the direction.
      learning_rate: See `descend`, as for the two below.
      weight_decay: λ.
      mask: Which leaves decay.
      pairs: Explicit pairs. An iterator is read once, and serves both.
      wrt: Which factors move.
      **where: The other options of `pair_finder`.
    """
    check_number("weight_decay", weight_decay, 0, math.inf)
    where |= {"pairs": None if pairs is None else as_spec(pairs), "wrt": wrt}
    find = pair_finder(**where)
    tx = optax.chain(
        direction(**where), descend(learning_rate, weight_decay, mask, find)
    )
    return without_frozen(tx, find, wrt)


def descend(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: ArrayLike,
    mask: Any,
    find: FindPairs,
) -> optax.GradientTransformationExtraArgs:
    """From directions to steps: -lr · direction, and decoupled weight decay.

    A factor becomes √(1 - lr·λ) times what it was, so that the product B A decays by
    1 - lr·λ as the weights do in full fine-tuning; 1 - lr·λ times where its partner
    does not move. Another leaf moves by -lr·λ times itself, as in `optax.adamw`.

    Args:
      learning_rate: A number or a schedule.
      weight_decay: λ.
      mask: Which leaves decay: a tree of bools, a prefix of the parameters, or a
        function from the parameters to one; None for all.
      find: From a tree to its pairs.
    """
    _check_rate(learning_rate)
    if not callable(mask):
        _check_flags(mask)
    decaying = is_traced(weight_decay) or bool(known(weight_decay) != 0)

    def init_fn(params: optax.Params) -> optax.OptState:
        if not is_placeholder(params):
            _which(mask, params)  # a wrong mask should fail here
        if callable(learning_rate):
            return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args
        rate = learning_rate
        if callable(rate):
            rate = rate(state.count)
            state = optax.ScaleByScheduleState(optax.safe_increment(state.count))
        if not decaying:
            return jax.tree.map(lambda u: _step(-rate * u, u), updates), state

        if params is None:
            raise ValueError(
                "Weight decay needs the parameters: call `tx.update(grads, state, "
                "params)`."
            )
        shares = _shares(rate * weight_decay)

        def of_factor(
            u: jax.Array, w: jax.Array, decays: bool, share: Any
        ) -> jax.Array:
            if share is None or not decays:
                return _step(-rate * u, u)
            return _step(-rate * u + share * w, u)

        def of_other(u: jax.Array, w: jax.Array, decays: bool) -> jax.Array:
            return _step(-rate * (u + weight_decay * w if decays else u), u)

        view = View.of(find(updates), updates)
        trees = updates, params, _which(mask, params)
        factors = zip(*map(view.gather, trees), strict=True)
        steps = [
            u.map(of_factor, w, decays, shares[pair.wrt])
            for pair, (u, w, decays) in zip(view.pairs, factors, strict=True)
        ]
        rest = jax.tree.map(of_other, *map(view.rest, trees))
        return view.spread(steps, rest), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _shares(decay: ArrayLike) -> dict[str, Both[Any]]:
    """What A and B are multiplied with and added to themselves, for each `wrt`.

    A factor whose partner does not move has all of the decay, lr·λ.
    """
    loss = jnp.clip(decay, 0, 1)  # more than all cannot decay
    shrink = -loss / (1 + jnp.sqrt(1 - loss))  # √(1 - loss) - 1, exact when tiny
    return {
        "both": Both(shrink, shrink), "a": Both(-loss, None), "b": Both(None, -loss)
    }  # fmt: skip


def _step(step: Any, direction: jax.Array) -> jax.Array:
    """In the dtype of the direction, whatever that of the rate is."""
    return cast_to(jnp.asarray(step), direction.dtype)


def _which(mask: Any, params: optax.Params) -> optax.Params:
    """A bool for every leaf of `params`."""
    flags = mask(params) if callable(mask) else True if mask is None else mask
    _check_flags(flags)
    try:
        return jax.tree.broadcast(flags, params)
    except ValueError:
        raise ValueError(_structure_message(flags, params)) from None


def _check_flags(mask: Any) -> None:
    """Raises ValueError for a mask that has something else than bools."""
    for path, flag in jax.tree_util.tree_leaves_with_path(mask):
        array = isinstance(flag, np.ndarray | jax.Array) and not is_traced(flag)
        if isinstance(flag, bool | np.bool_):
            continue
        if not (array and flag.shape == () and flag.dtype == np.bool_):
            at = f" at `{normalize_path(path)}`" if path else ""
            raise ValueError(f"`mask` has {flag!r}{at}, which is no bool. {_MASKS}")


def _structure_message(flags: Any, params: Any) -> str:
    leaves = list(index_leaves(params))
    given = list(index_leaves(flags))
    lacking = [path for path in leaves if not is_under(path, given)]
    unused = [x for x in given if not any(is_under(path, [x]) for path in leaves)]
    parts = []
    if lacking:
        parts.append(f"no bool for {some(lacking)}")
    if unused:
        parts.append(f"bools at {some(unused)}, where no parameter is")
    found = ", ".join(parts) or "containers of other kinds"
    return f"`mask` has another structure than the parameters: {found}. {_MASKS}"


def _check_rate(rate: Any) -> None:
    """Raises ValueError for a learning rate that is no schedule and no number."""
    if callable(rate) or is_traced(rate):
        return
    if not (is_real_scalar(rate) and 0 <= known(rate) < math.inf):
        raise ValueError(
            f"`learning_rate={rate!r}` has to be a finite number of at least 0, or a "
            "schedule of Optax."
        )
