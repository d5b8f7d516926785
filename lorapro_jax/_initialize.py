"""An initialiser on all LoRA pairs of a tree: factors and base kernels that start so.

The methods themselves are in `initializers`; here are trees, dtypes and shardings.
"""

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp

from ._initializer import Initializer
from ._kernels import Kernel, KernelsSpec, find_kernels
from ._layout import LoRAPair, factor_axes
from ._leaves import Leaf, index_leaves
from ._pairs import PairsSpec, find_pairs
from ._scale import ScaleSpec
from ._start import Side, gradient_of, placed_like, start, weight_of


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
    weights in float32.

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
      scale: See `lorapro`; the same as there, and as in the forward pass.
      alpha: See `lorapro`.
      rslora: See `lorapro`.
      pairs: See `lorapro`; other factors stay as they are.
      stack_axis: See `lorapro`.
      kernels: Where base kernels are that cannot be found by name, as
        `{regex: path}`, or which of their axes are what, as `{regex: (path, input
        axes, output axes)}`. The regex has to match all of the path of A or of B;
        the path may use its groups, `r"\1/gate"`. Needed where a kernel is square and
        not `(in, out)`; `weight` beside PyTorch's factors is taken as `(out, in)`.

    Returns:
      A new tree of the same structure, dtypes and shardings.

    Raises:
      ValueError: No pair; no base kernel, or one that names and sizes do not settle;
        a quantised kernel where the method needs its values or changes it; one kernel
        of two pairs that would both change it, or a B that is not 0; a gradient that is
        missing, of another shape or not finite; what `find_pairs` and the method raise.
        The message names the path.
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
    if not isinstance(method, Initializer):
        raise TypeError(
            f"`method` is {method!r}. Pass an initialiser first, called, such as "
            "`lorapro_jax.initializers.lora_ga()`."
        )
    found = find_pairs(
        params,
        scale=scale,
        alpha=alpha,
        rslora=rslora,
        pairs=pairs,
        stack_axis=stack_axis,
    )
    leaves = index_leaves(params)
    if not found:
        raise ValueError(
            f"No LoRA pair to initialise among {len(leaves)} leaves, such as "
            f"{list(leaves)[:4]}. Put adapters into the model first, or give those "
            "with other names as `pairs=[(path of A, path of B)]`."
        )
    by_path = _by_path(gradients) if method.needs_gradient else {}
    at = _kernels(method, leaves, by_path, found, kernels)
    new: dict[int, Any] = {}
    for pair, kernel in zip(found, at, strict=True):
        for path, x in _start(method, pair, kernel, leaves, by_path, key).items():
            new[leaves[path].position] = placed_like(x, leaves[path].value)
    if method.changes_weight:
        _check_untrained(found, leaves)
    flat = enumerate(jax.tree.leaves(params))
    return jax.tree.unflatten(jax.tree.structure(params), [new.get(*x) for x in flat])


def initialize_model(
    method: Initializer, model: Any, gradients: Any = None, **options: Any
) -> None:
    """`initialize_adapters` on an NNX model, in place.

    Until it is done, the base kernels that change are there twice.

    Args:
      method: See `initialize_adapters`.
      model: An `nnx.Module`.
      gradients: See `initialize_adapters`.
      **options: See `initialize_adapters`; `key` is needed.

    Raises:
      ValueError: As `initialize_adapters`; the model is then as it was.
      TypeError: An argument is of another kind.

    Examples:
      >>> import jax
      >>> from flax import nnx
      >>> from lorapro_jax import initialize_model
      >>> from lorapro_jax.initializers import olora
      >>> model = nnx.LoRALinear(6, 5, lora_rank=2, rngs=nnx.Rngs(0))
      >>> initialize_model(olora(), model, key=jax.random.key(1))
      >>> bool((model.lora.lora_b[...] != 0).all())
      True
    """
    from flax import nnx

    if not isinstance(model, nnx.Module):
        raise TypeError(f"`model` is a {type(model).__name__}, not an `nnx.Module`.")
    state = nnx.state(model)
    nnx.update(model, initialize_adapters(method, state, gradients, **options))


def _kernels(
    method: Initializer,
    leaves: Mapping[str, Leaf],
    gradients: Mapping[str, Any],
    found: Sequence[LoRAPair],
    given: KernelsSpec | None,
) -> Sequence[Kernel | None]:
    """The base kernels, where the method needs them or their gradients."""
    if not (method.needs_weight or method.needs_gradient or method.changes_weight):
        return [None] * len(found)
    # The gradients may be there without their kernels, or with quantised ones.
    arrays = {path: leaf.value for path, leaf in leaves.items()}
    try:
        at = find_kernels(arrays, found, given)
    except ValueError:
        if not gradients:
            raise
        at = find_kernels({**gradients, **arrays}, found, given)
    if method.changes_weight:
        path, count = Counter(kernel.path for kernel in at).most_common(1)[0]
        if count > 1:
            owners = [x.a for x, y in zip(found, at, strict=True) if y.path == path]
            raise ValueError(
                f"{owners} adapt one base weight, `{path}`, and each would change it. "
                "Initialise one of them so, with `pairs=[...]`, and the others with a "
                "method that leaves W0 as it is."
            )
    return at


def _check_untrained(found: Sequence[LoRAPair], leaves: Mapping[str, Leaf]) -> None:
    """Raises ValueError where a B is known not to be 0: s B A would be lost."""
    for pair in found:
        b = leaves[pair.b].value
        if not isinstance(b, jax.core.Tracer) and jnp.any(b != 0):
            raise ValueError(
                f"`{pair.b}` is not 0, so the model would lose what its adapters hold. "
                "Was it initialised before? Begin with the original base weights, and "
                "with B = 0."
            )


def _start(
    method: Initializer,
    pair: LoRAPair,
    kernel: Kernel | None,
    leaves: Mapping[str, Leaf],
    gradients: Mapping[str, Any],
    key: jax.Array,
) -> dict[str, jax.Array]:
    """The new leaves of one pair by their paths."""
    weight = gradient = None
    path = kernel.path if kernel else ""
    if method.needs_weight or method.changes_weight:
        weight = weight_of(pair.a, path, leaves)
    if method.needs_gradient:
        gradient = gradient_of(pair.a, path, gradients, leaves)
    # From the path, not from a counter: a new layer leaves the others as they were.
    key = jax.random.fold_in(key, zlib.crc32(pair.a.encode()))
    factors = (leaves[path].value for path in pair[:2])
    a, b = (
        Side(tuple(x.shape), x.dtype, axes)
        for x, axes in zip(factors, factor_axes(pair), strict=True)
    )
    try:
        new_a, new_b, base = start(
            weight,
            gradient,
            cast(jax.Array, pair.scale),
            key,
            method=method,
            rank=cast(int, pair.rank),
            kernel=kernel._replace(path="") if kernel else None,
            a=a,
            b=b,
        )
    except ValueError as error:
        raise ValueError(f"`{pair.a}`: {error}") from error
    return {pair.a: new_a, pair.b: new_b} | ({} if base is None else {path: base})


def _by_path(gradients: Any) -> dict[str, Any]:
    if gradients is None:
        raise ValueError(
            "This method starts from the gradients of the base weights, and "
            "`gradients` is None. Pass what `estimate_gradients` returns."
        )
    return {path: leaf.value for path, leaf in index_leaves(gradients).items()}
