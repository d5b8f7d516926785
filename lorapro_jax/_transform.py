"""`lorapro()`: LoRA's gradients in, LoRA-Pro's out."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, cast, get_args

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from ._adjust import adjust
from ._coefficients import Gauge
from ._factors import PairArrays
from ._layout import LoRAPair, factor_axes
from ._leaves import Leaf, check_factor, index_leaves
from ._pairs import PairsSpec, find_pairs
from ._scale import ScaleSpec, check_scale_options, is_real_scalar

OnNoPairs: TypeAlias = Literal["error", "ignore"]

DEFAULT_DAMPING = 0.1


def lorapro(
    scale: ScaleSpec = 1.0,
    *,
    alpha: ScaleSpec | None = None,
    rslora: bool = False,
    gauge: Gauge = "sylvester",
    damping: ArrayLike = DEFAULT_DAMPING,
    pairs: PairsSpec | None = None,
    stack_axis: int | Sequence[int] | None = None,
    on_no_pairs: OnNoPairs = "error",
) -> optax.GradientTransformationExtraArgs:
    """Replaces LoRA's gradients by those closest to the full gradient.

    LoRA trains W = W0 + s B A. Of all steps (a, b) on (A, B) this takes the one
    whose effect on W, `s (B a + b A)`, is closest to the gradient G of W, damped so
    that a tiny B cannot make it huge. G is never formed. Everything else in the tree
    passes through unchanged, so no mask is needed, and there is no state.

    Put it first in a chain, before momentum, Adam or per-leaf clipping: the two
    gradients of a pair have to come from one G, which is not checked (clipping by the
    global norm may stand before it). Sweep the learning rate anew; before AdamW the
    best one is about 3 times that of plain LoRA.

    On CPU keep to one `lorapro()` in a program: two batched eigendecompositions at
    the same time can hang XLA's thread pool on machines with few cores.

    Args:
      scale: The s of the forward pass: a number, `{regex: number}` searched in the
        paths of the factors (first match counts), or a function of a `LoRAPair`.
        1.0 is right for `nnx.LoRA`, gemma and EasyDeL. A wrong s multiplies the
        result by (s_true/s)².
      alpha: Instead of `scale`: s = alpha / r, pair by pair, as in qwix, tunix,
        MaxText, Keras and PEFT. A number, mapping or function, like `scale`.
      rslora: With `alpha`: s = alpha / sqrt(r).
      gauge: Which of the steps with this effect on W: `"sylvester"`, the closest to
        LoRA's own gradients (the paper's choice); `"symmetric"`, the correction
        divided equally between A and B; `"zero"`, all of it on B.
      damping: Levenberg-Marquardt damping in units of `(tr BᵀB + tr AAᵀ) / r`, at
        least 0. 0 is the paper exactly; large values approach LoRA's gradients,
        each pair's times a number of its own. The default is the best of 0 to 10, or
        within noise of it, before AdamW and before SGD with momentum in
        `benchmarks/damping.py` (three seeds, learning rates swept); there 0 and 1e-4
        are clearly worse, because a tiny B makes the undamped step of A huge. In
        float32, values between 0 and about 1e-5 are below the rounding of
        ill-conditioned factors.
      pairs: Explicit pairs instead of those found by name: `LoRAPair`s or plain
        `(path of A, path of B)` tuples, or a function from the tree to them. What
        is not among them passes through, whatever its name.
      stack_axis: The axis (or axes) along which layers are stacked in factors of
        three axes or more, where their shapes cannot settle it; `()` for none.
        Under `optax.inject_hyperparams`, name in `static_args` what is no number:
        `stack_axis`, and `scale`, `alpha` or `pairs` if they are functions.
      on_no_pairs: `"error"`, or `"ignore"` to let a tree without a pair pass.

    Returns:
      A `GradientTransformationExtraArgs` with `optax.EmptyState`; `update` needs
      `params`. It computes in float32 (float64 where a leaf is float64) and returns
      each leaf in its own dtype; what overflows there becomes its largest number.

    Raises:
      ValueError: For contradictory options; from `init` and `update`, while
        tracing, for everything that `find_pairs` raises, for a tree without pairs,
        and for missing or mismatched `params`.

    References:
      Wang et al., `LoRA-Pro: Are Low-Rank Adapters Properly Optimized?
      <https://arxiv.org/abs/2407.18242>`_, ICLR 2025, Theorems 2.1 and 2.3.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from lorapro_jax import lorapro
      >>> params = {"lora_a": jnp.ones((64, 4)), "lora_b": jnp.zeros((4, 32))}
      >>> tx = optax.chain(lorapro(alpha=8.0), optax.adamw(1e-3))
      >>> state = tx.init(params)
      >>> grads = jax.tree.map(jnp.ones_like, params)
      >>> updates, state = tx.update(grads, state, params)
      >>> params = optax.apply_updates(params, updates)
    """
    check_scale_options(scale, alpha, rslora)
    _check_options(gauge, damping, on_no_pairs)
    if isinstance(stack_axis, jax.Array):
        raise TypeError(
            "`stack_axis` is static. In `optax.inject_hyperparams(lorapro, "
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

    def init_fn(params: optax.Params) -> optax.EmptyState:
        find_any(params)  # a wrong tree should fail here, not at the first step
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates,
        state: optax.EmptyState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del extra_args
        found = find_any(updates)
        if not found:
            return updates, state
        if params is None:
            raise ValueError(
                "`lorapro` needs the current factors: call "
                "`tx.update(grads, state, params)`."
            )
        grads, factors = index_leaves(updates), index_leaves(params)
        arrays = [_take(pair, grads, factors) for pair in found]
        steps = adjust(arrays, damping=damping, gauge=gauge)

        leaves = jax.tree.leaves(updates)
        for pair, step in zip(found, steps, strict=True):
            for path, x in zip((pair.a, pair.b), step, strict=True):
                leaf = grads[path]
                leaves[leaf.position] = _cast(x, leaf.value.dtype)
        return jax.tree.unflatten(jax.tree.structure(updates), leaves), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


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


def _cast(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`x` in a leaf's dtype; what is finite stays finite (float16 ends at 65504)."""
    limit = float(jnp.finfo(dtype).max)
    if limit < float(jnp.finfo(x.dtype).max):
        x = jnp.where(jnp.isfinite(x), jnp.clip(x, -limit, limit), x)
    return x.astype(dtype)


def _check_options(gauge: str, damping: Any, on_no_pairs: str) -> None:
    for name, value, allowed in (
        ("gauge", gauge, get_args(Gauge)),
        ("on_no_pairs", on_no_pairs, get_args(OnNoPairs)),
    ):
        if value not in allowed:
            raise ValueError(f"`{name}={value!r}` has to be one of {allowed}.")
    # Under `inject_hyperparams` the damping may be traced.
    traced = isinstance(damping, jax.core.Tracer)
    if not traced and not (is_real_scalar(damping) and 0 <= damping < math.inf):
        raise ValueError(
            f"`damping={damping!r}` has to be a finite number of at least 0; 0 is the "
            "paper's undamped adjustment."
        )


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
        "`lora/a`, `lora_down`. Give others with `pairs=[(path of A, path of B)]`, or "
        "pass `on_no_pairs='ignore'` to let such a tree through."
    )
