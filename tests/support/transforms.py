"""Every transform of the package, and what it has to do according to the oracles.

A new optimizer is one line in `TRANSFORMS`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from lorapro_jax import lora_rite, lorapro, lorapro_adamw, scale_by_lorapro_adam
from tests.support import oracle, oracle_adamw, oracle_rite
from tests.support.trees import others, with_others

# No defaults, so that each of them matters. This eps keeps entries of E that are
# nearly 0 from a direction of ±1, on which two roundings could disagree.
ADAM = {"b1": 0.8, "b2": 0.95, "eps": 1e-2}
SCALE = {"scale": 1.5}
LORAPRO = {"damping": 0.01} | SCALE
# Of factors that stay where they are, this is the same damping.
BY_MOTION = {"damping": 1.0} | SCALE
DESCENT = {"learning_rate": 0.02, "weight_decay": 0.1}

Tree = Any
Oracle = Callable[[Tree, Sequence[Tree]], list[Tree]]


def lorapro_chain(learning_rate, eps, scale, damping):
    """What most users have."""
    adamw = optax.adamw(learning_rate, eps=eps, weight_decay=0.0)
    return optax.chain(lorapro(scale=scale, damping=damping), adamw)


def each_layer(
    start: Callable[[], Callable[..., Any]], params: Tree, sequence: Sequence[Tree]
) -> list[dict[str, Any]]:
    """The steps of `start()(a, b, grad_a, grad_b)`, anew for every layer.

    Of the pairs of `make_params`, which lie as in Flax; for each of the gradients in
    sequence, at factors that stay.
    """
    result: list[dict[str, Any]] = [{} for _ in sequence]
    for name in ("layers", "head"):
        pair = [
            np.asarray(params[name][x], np.float64).mT for x in ("lora_a", "lora_b")
        ]
        stack = pair[0].shape[:-2]
        rule = {index: start() for index in np.ndindex(stack)}
        for tree, steps in zip(sequence, result, strict=True):
            grads = [
                np.asarray(tree[name][x], np.float64).mT for x in ("lora_a", "lora_b")
            ]
            moved = [np.empty_like(x) for x in pair]
            for k in np.ndindex(stack):
                new = rule[k](*(x[k] for x in (*pair, *grads)))
                moved[0][k], moved[1][k] = new
            steps[name] = {"lora_a": moved[0].mT, "lora_b": moved[1].mT}
    return result


def adjusted(params: Tree, sequence: Sequence[Tree]) -> list[Tree]:
    """LoRA-Pro's gradients; the other leaves are as they were."""
    start = lambda: functools.partial(oracle.adjust, **LORAPRO)
    steps = each_layer(start, params, sequence)
    return [with_others(x, grads) for x, grads in zip(steps, sequence, strict=True)]


def adjusted_then_adamw(params: Tree, sequence: Sequence[Tree]) -> list[Tree]:
    """Optax's AdamW on these."""
    rate, eps = DESCENT["learning_rate"], ADAM["eps"]
    tx, result = optax.adamw(rate, eps=eps, weight_decay=0.0), []
    state = tx.init(params)
    for grads in adjusted(params, sequence):
        updates, state = tx.update(grads, state, params)
        result.append(updates)
    return result


def over_others(steps: list[Tree], params: Tree, sequence: Sequence[Tree]):
    """These steps, and those of Optax's Adam for the leaves that are no factors."""
    adam = optax.scale_by_adam(**ADAM)
    state = adam.init(others(params))
    result = []
    for step, grads in zip(steps, sequence, strict=True):
        rest, state = adam.update(others(grads), state)
        result.append(with_others(step, rest))
    return result


def adam(moments: str) -> Oracle:
    """Adam of the equivalent gradient, in `oracle_adamw`."""

    def start():
        # Only Jᵀ G is known of G. It is all that E depends on.
        weight = oracle_adamw.Weight(
            np.zeros((1, 1)), np.zeros((1, 1)), LORAPRO["scale"], moments=moments,
            damping=BY_MOTION["damping"], **ADAM,
        )  # fmt: skip

        def step(a, b, grad_a, grad_b):
            if not weight.count:
                weight.a, weight.b = a, b
                weight.momentum = weight.energy = np.zeros((len(b), a.shape[1]))
                weight.before = a, b
                weight.look()
            tangent = oracle.adjust(a, b, grad_a, grad_b, **LORAPRO)
            e = oracle.equivalent(a, b, *tangent, LORAPRO["scale"])
            return weight.direction(e)

        return step

    return lambda params, sequence: over_others(
        each_layer(start, params, sequence), params, sequence
    )


def descent(direction: Oracle) -> Oracle:
    """Rate and decay behind it: of the product B A, and of the other leaves."""
    rate, decay = DESCENT["learning_rate"], DESCENT["weight_decay"]
    shrink = np.sqrt(1 - rate * decay) - 1

    def descended(direction, params):
        of_pair = lambda d, p: shrink * np.float64(p) - rate * d
        of_other = lambda d, p: -rate * (d + decay * p)
        pairs = jax.tree.map(of_pair, direction, params)
        return with_others(pairs, jax.tree.map(of_other, direction, params))

    return lambda params, sequence: [
        descended(x, params) for x in direction(params, sequence)
    ]


def rite(params: Tree, sequence: Sequence[Tree]) -> list[Tree]:
    """LoRA-RITE, in `oracle_rite`."""
    start = lambda: oracle_rite.Weight(SCALE["scale"], **ADAM).direction
    return over_others(each_layer(start, params, sequence), params, sequence)


class Row(NamedTuple):
    """A transform.

    Attributes:
      factory: Makes it.
      options: With these, all of them numbers.
      oracle: From the parameters and a sequence of gradients to the updates of each,
        at parameters that stay.
      descends: Whether its updates go downhill as they are.
    """

    factory: Callable[..., optax.GradientTransformationExtraArgs]
    options: Mapping[str, float]
    oracle: Oracle
    descends: bool = False

    def make(self) -> optax.GradientTransformationExtraArgs:
        """With these options."""
        return self.factory(**self.options)


_dense = {"moments": "dense"}
TRANSFORMS = {
    "lorapro": Row(lorapro, LORAPRO, adjusted),
    "lorapro before adamw": Row(
        lorapro_chain, {"learning_rate": 0.02, "eps": ADAM["eps"]} | LORAPRO,
        adjusted_then_adamw, True,
    ),
    "scale_by_lorapro_adam": Row(
        scale_by_lorapro_adam, ADAM | BY_MOTION, adam("factored")
    ),
    "scale_by_lorapro_adam, dense": Row(
        functools.partial(scale_by_lorapro_adam, **_dense), ADAM | BY_MOTION,
        adam("dense"),
    ),
    "lorapro_adamw": Row(
        lorapro_adamw, DESCENT | ADAM | BY_MOTION, descent(adam("factored")), True
    ),
    "lorapro_adamw, dense": Row(
        functools.partial(lorapro_adamw, **_dense), DESCENT | ADAM | BY_MOTION,
        descent(adam("dense")), True,
    ),
    "lora_rite": Row(  # `masked` shows it a part of the tree, with another norm
        functools.partial(lora_rite, max_grad_norm=None), DESCENT | ADAM | SCALE,
        descent(rite), True,
    ),
}  # fmt: skip
