"""The trees of a step, and the numbers that are to be logged of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ..algebra._factors import Both, Factor
from ..pairs._axes import LoRAPair
from ..pairs._find import PairsSpec
from ..pairs._leaves import Leaf, check_factor, index_leaves
from ..pairs._scale import ScaleSpec
from ..transforms._options import pair_finder
from ..transforms._wrt import WrtSpec, frozen_paths
from ..weights._given import KernelsSpec
from ..weights._norms import kernel_norms
from ._layers import measure, table


def step_metrics(
    params: Any,
    grads: Any,
    updates: Any,
    *,
    base: Any = None,
    before: Any = None,
    damping: ArrayLike | None = None,
    by_layer: bool = False,
    scale: ScaleSpec = 1.0,
    alpha: ScaleSpec | None = None,
    rslora: bool = False,
    pairs: PairsSpec | None = None,
    stack_axis: int | Sequence[int] | None = None,
    wrt: WrtSpec = "both",
    kernels: KernelsSpec | None = None,
) -> dict[str, dict[str, jax.Array]]:
    """What one step does to the weights, as a tree of scalars for any logger.

    Of each pair, and of all together under `"total"`, with E for the part of the full
    gradient G that steps on the factors can follow and L for the equivalent gradient
    of LoRA's own gradients, s (B g_A + g_B A):

    * `closest_norm`: ‖E‖, what full fine-tuning's gradient has within reach.
    * `lora_norm`: ‖L‖. At s = 1 and factors of size 1 it is about as large.
    * `cosine`: of the angle between E and L. 1 where LoRA's direction is the closest
      already; small where it favours directions in which the factors are large.
    * `damped_share`: from 0 to 1, the share of the first-order decrease of the loss
      along E that damping removes. Near 1, damping rules the step, and a smaller one
      or larger factors would follow E further.
    * `update_norm`: ‖ΔW‖ of the step, as the factors have it after
      `optax.apply_updates`: what is lost to the rounding of their dtype does not count.
    * `update_to_adapter`: ‖ΔW‖ / ‖s B A‖, with s B A before or after the step, the
      larger one. So it is 1 in the first step from B = 0.
    * `update_to_base`, where `base` is given: ‖ΔW‖ / ‖W0‖.
    * `balance`: ‖B‖² / (‖A‖² + ‖B‖²) before the step. 0 at B = 0, 1/2 where they are
      equal.
    * `effective_rank` of s B A before the step: (Σσ²)² / Σσ⁴ of its singular values,
      from 1 to r, and 0 where B A is 0.

    Norms of several layers are roots of sums of squares, ratios are those of such
    norms, and the effective rank is the mean. A pair that is not finite is NaN, and so
    is the total.

    There is no array of a weight's size: it takes products of factors and gradients
    with themselves, one batched `eigh` of r×r matrices, and with `base` one pass over
    the base weights. Call it every N steps, inside of `jit`.

    Args:
      params: The parameters before the step.
      grads: Their gradients as they come from differentiation, before any optimizer.
      updates: What the optimizer returned; or the parameters after the step minus
        those before.
      base: A tree with the base weights, such as `nnx.state(model)` or all parameters
        of a Linen model. They are found by name as by `merge_adapters`.
      before: The parameters one step earlier. With them, `damped_share` is that of
        `lorapro_adamw`, which damps by the way from there to `params`; without, that
        of `lorapro`.
      damping: That of the optimizer; by default 0.1, and 1 with `before`.
      by_layer: Whether a stacked pair has an entry for each of its layers,
        `"path[3]"`, in place of one.
      scale: See `lorapro`; the same as there.
      alpha: See `lorapro`.
      rslora: See `lorapro`.
      pairs: See `lorapro`.
      stack_axis: See `lorapro`.
      wrt: See `lorapro`. E and L are then those of the factors that move, and the
        others need no gradient and no update.
      kernels: Where base weights are that cannot be found by name, as for
        `merge_adapters`.

    Returns:
      `{path of A: {name: scalar}, ..., "total": {name: scalar}}`, in float32, or in
      float64 where an array is.

    Raises:
      ValueError: No pair; trees that do not have the same factors; a base weight that
        is not found or quantised; and what `lorapro` raises for these options. The
        message names the path.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from lorapro_jax import lorapro_adamw
      >>> from lorapro_jax.diagnostics import step_metrics
      >>> params = {"lora_a": jnp.ones((8, 2)), "lora_b": jnp.zeros((2, 4))}
      >>> grads = {"lora_a": jnp.zeros((8, 2)), "lora_b": jnp.ones((2, 4))}
      >>> tx = lorapro_adamw(1e-2)
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> metrics = jax.jit(step_metrics)(params, grads, updates)
      >>> sorted(metrics), metrics["total"]["update_to_adapter"]
      (['lora_a', 'total'], Array(1., dtype=float32))
    """
    find = pair_finder(
        scale=scale,
        alpha=alpha,
        rslora=rslora,
        pairs=pairs,
        stack_axis=stack_axis,
        on_no_pairs="error",
        wrt=wrt,
    )
    found = find(params)
    trees = {"params": params, "grads": grads, "updates": updates}
    if before is not None:
        trees["before"] = before
    factors = _factors_of(trees, found)
    weights = None if base is None else kernel_norms(base, params, found, kernels)
    layers = measure(factors, [pair.scale for pair in found], damping, weights)
    return table(found, layers, by_layer)


def _factors_of(
    trees: Mapping[str, Any], found: Sequence[LoRAPair]
) -> dict[str, list[Both[Factor]]]:
    """What each tree has at the factors of each pair.

    What does not move may be missing everywhere but in `params`: it has a gradient and
    an update of 0, and is where it was.
    """
    frozen = frozen_paths(tuple(found))
    leaves = {name: index_leaves(tree) for name, tree in trees.items()}
    params = leaves["params"]

    def value(name: str, path: str) -> Any:
        if name != "params" and path in frozen:
            x = params[path].value
            return x if name == "before" else jnp.zeros_like(x)
        _check_like(name, path, params[path], leaves[name].get(path))
        return jnp.asarray(leaves[name][path].value)

    def both(name: str, pair: LoRAPair) -> Both[Factor]:
        arrays = (value(name, path) for path in pair.paths)
        trains = pair.wrt != "b", pair.wrt != "a"
        return Both(*map(Factor, arrays, pair.factor_axes, trains))

    return {name: [both(name, pair) for pair in found] for name in trees}


def _check_like(name: str, path: str, factor: Leaf, leaf: Leaf | None) -> None:
    """Raises ValueError where a tree does not have a factor of the parameters."""
    check_factor(path, factor)
    if leaf is not None and getattr(leaf.value, "shape", None) == factor.shape:
        return
    has = "no such leaf" if leaf is None else f"{getattr(leaf.value, 'shape', None)}"
    raise ValueError(
        f"`{path}` has shape {factor.shape} in `params`, and `{name}` has {has}. Pass "
        "the parameters before the step, their gradients and the step: trees of the "
        "same factors."
    )
