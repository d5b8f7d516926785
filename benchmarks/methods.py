"""What the quality benchmarks compare: a name, an optimizer, and where to look.

Every method is a function of a learning-rate schedule and the s of the forward pass.
All have the same b1 = .9, b2 = .99 and eps = 1e-8 where they have any, and none decays
weights: short runs on small data would measure that instead.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx

from lorapro_jax import find_pairs, lora_rite, lorapro, lorapro_adamw

B2 = 0.99
KERNELS = nnx.All(nnx.Param, nnx.PathContains("kernel"))

adamw = functools.partial(optax.adamw, b2=B2, weight_decay=0.0)


class Recipe(NamedTuple):
    """A method of fine-tuning.

    Attributes:
      make: From a schedule and s to the Optax transform.
      low: The lowest learning rate that a sweep begins with.
      high: The highest.
      trains: A filter of variables instead of the adapters', for full fine-tuning.
    """

    make: Callable[[optax.Schedule, Any], optax.GradientTransformation]
    low: float
    high: float
    trains: Any = None


def lora_plus(rate: optax.Schedule, ratio: float = 16.0) -> Any:
    """AdamW with 16 times the rate on B (Hayou et al., arXiv 2402.12354)."""
    label = lambda path, _: "B" if "lora_b" in jax.tree_util.keystr(path) else "A"
    return optax.partition(
        {"A": adamw(rate), "B": adamw(lambda count: ratio * rate(count))},
        lambda tree: jax.tree_util.tree_map_with_path(label, tree),
    )


def riemannian(reg: float = 1e-2) -> optax.GradientTransformation:
    """g_A becomes (BᵀB + reg)⁻¹ g_A and g_B becomes g_B (AAᵀ + reg)⁻¹.

    Zhang and Pilanci, arXiv 2402.02347, as PEFT has it: `create_riemannian_optimizer`
    with its default `reg`. Flax's A is n×r and its B r×m.
    """

    def update(grads, state, params):
        factors, found = (dict(nnx.to_flat_state(x)) for x in (params, grads))
        by_name = {"/".join(map(str, path)): path for path in factors}
        for pair in find_pairs(params):
            at_a, at_b = by_name[pair.a], by_name[pair.b]
            a, b = factors[at_a][...], factors[at_b][...]
            eye = reg * jax.numpy.eye(a.shape[1])
            of_a = jax.numpy.linalg.solve(b @ b.T + eye, found[at_a][...].T).T
            of_b = jax.numpy.linalg.solve(a.T @ a + eye, found[at_b][...])
            for at, step in ((at_a, of_a), (at_b, of_b)):
                found[at] = found[at].replace(step)
        return nnx.from_flat_state(found), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def _ours(rate: optax.Schedule, scale: Any, **options: Any) -> Any:
    return lorapro_adamw(rate, b2=B2, scale=scale, **options)


METHODS = {
    "full": Recipe(lambda rate, _: adamw(rate), 1e-3, 3.2e-2, nnx.Param),
    "full:nesterov": Recipe(
        lambda rate, _: adamw(rate, nesterov=True), 1e-3, 3.2e-2, nnx.Param
    ),
    "full:kernels": Recipe(lambda rate, _: adamw(rate), 1e-3, 3.2e-2, KERNELS),
    "LoRA": Recipe(lambda rate, _: adamw(rate), 3.2e-3, 1e-1),
    "LoRA:nesterov": Recipe(lambda rate, _: adamw(rate, nesterov=True), 3.2e-3, 1e-1),
    "LoRA+": Recipe(lambda rate, _: lora_plus(rate), 3.2e-4, 1e-2),
    "Riemannian": Recipe(
        lambda rate, _: optax.chain(riemannian(), adamw(rate)), 3.2e-3, 1e-1
    ),
    "lora_rite": Recipe(
        lambda rate, s: lora_rite(rate, b2=B2, scale=s), 1e-3, 3.2e-2
    ),
    "lorapro+AdamW": Recipe(
        lambda rate, s: optax.chain(lorapro(scale=s), adamw(rate)), 3.2e-3, 1e-1
    ),
    "lorapro_adamw": Recipe(_ours, 1e-3, 3.2e-2),
    "lorapro_adamw:nesterov": Recipe(
        functools.partial(_ours, nesterov=True), 1e-3, 3.2e-2
    ),
    "lorapro_adamw:dense": Recipe(
        functools.partial(_ours, moments="dense"), 1e-3, 3.2e-2
    ),
}  # fmt: skip
ALL_BUT_DENSE = tuple(name for name in METHODS if name != "lorapro_adamw:dense")
