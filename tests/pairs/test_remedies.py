"""Every error of the search for pairs, and its remedy followed to the letter.

One row a remedy: what provokes the message, a part of the message that states it, and
what a user does who follows it, which passes and does the right thing.
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorapro_jax import LoRAPair, find_pairs, lorapro, lorapro_adamw
from tests.support import oracle

pytestmark = pytest.mark.usefixtures("quick_compiles")

RNG = np.random.default_rng(0)
A, B = (jnp.asarray(RNG.standard_normal(x), jnp.float32) for x in ((8, 2), (2, 6)))
FULL = RNG.standard_normal((6, 8))
GRAD_A, GRAD_B = (
    jnp.asarray(x.T, jnp.float32) for x in oracle.lora_gradients(A.T, B.T, FULL, 1.0)
)
DUE_A, DUE_B = (
    x.T for x in oracle.adjust(A.T, B.T, GRAD_A.T, GRAD_B.T, 1.0, damping=0.1)
)

PAIR, GRADS = {"lora_a": A, "lora_b": B}, {"lora_a": GRAD_A, "lora_b": GRAD_B}
OTHER, OTHER_GRADS = jnp.ones((4, 2)), jnp.full((4, 2), 0.5)


def close(x, y):
    return np.allclose(x, y, rtol=1e-3, atol=1e-4)


def updates(tx, params, grads):
    return jax.jit(tx.update)(grads, tx.init(params), params)[0]


def adjusted(tree, names=("lora_a", "lora_b")):
    """Whether a module has the adjusted gradients of `PAIR`."""
    return close(tree[names[0]], DUE_A) and close(tree[names[1]], DUE_B)


def still(tree):
    return not any(np.any(x) for x in jax.tree.leaves(tree))


def frozen(tx, labels):
    """As messages write it."""
    return optax.partition({"train": tx, "frozen": optax.set_to_zero()}, labels)


class Remedy(NamedTuple):
    """A message, and what to do about it.

    Attributes:
      wrong: Raises it.
      says: A regex in it.
      right: Does what it says; true where the result is right.
    """

    wrong: Any
    says: str
    right: Any


LONE = {"m": PAIR, "q": {"lora_a": OTHER}}
LONE_GRADS = {"m": GRADS, "q": {"lora_a": OTHER_GRADS}}
RENAMED = {"m": {"lora_a": A, "down": B}}
TWO = {"m": PAIR, "q": {"lora_a": OTHER, "lora_b": jnp.ones((2, 3))}}
TWO_GRADS = {"m": GRADS, "q": {"lora_a": OTHER_GRADS, "lora_b": jnp.ones((2, 3))}}
SPLIT = {"m": {"lora_a": "a", "lora_b": "b"}}


def split_labels(tx):
    return optax.partition({"a": tx, "b": optax.sgd(-1.0)}, SPLIT)


def of_m(result):
    return adjusted(result["m"])


def renamed_pair():
    grads = {"m": {"lora_a": GRAD_A, "down": GRAD_B}}
    got = updates(lorapro(pairs=[("m/lora_a", "m/down")]), RENAMED, grads)
    return adjusted(got["m"], ("lora_a", "down"))


def lone_frozen():
    labels = {"m": "train", "q": {"lora_a": "frozen"}}
    got = updates(frozen(lorapro(), labels), LONE, LONE_GRADS)
    return of_m(got) and still(got["q"])


def lone_as_other():
    tx = lorapro(pairs=[("m/lora_a", "m/lora_b")])
    got = updates(tx, LONE, LONE_GRADS)
    return of_m(got) and close(got["q"]["lora_a"], OTHER_GRADS)


def one_side(label):
    """A trains alone: with all gradients under one label, and with A's only."""
    params: Any = {"m": PAIR}
    grads: Any = {"m": GRADS if label else {"lora_a": GRAD_A, "lora_b": None}}
    tx = lorapro(wrt="a")
    if label:
        tx = frozen(tx, {"m": "train"})
    got = jax.jit(tx.update)(grads, tx.init(params), params)[0]["m"]
    return not close(got["lora_a"], GRAD_A) and still(got["lora_b"])


def lone_gradient():
    """An update in which the frozen partner has no gradient."""
    tx = lorapro()
    grads = {"m": {"lora_a": GRAD_A, "lora_b": None}}
    tx.update(grads, tx.init({"m": PAIR}), {"m": PAIR})


def one_label():
    tx = optax.partition({"x": lorapro()}, {"m": {"lora_a": "x", "lora_b": "x"}})
    return of_m(updates(tx, {"m": PAIR}, {"m": GRADS}))


def before_the_partition():
    sgd = optax.sgd(-1.0)
    tx = optax.chain(lorapro(), optax.partition({"a": sgd, "b": sgd}, SPLIT))
    return of_m(updates(tx, {"m": PAIR}, {"m": GRADS}))


HALF_FROZEN = {"m": "train", "q": {"lora_a": "train", "lora_b": "frozen"}}


def both_frozen(make=lorapro):
    labels = {"m": "train", "q": {"lora_a": "frozen", "lora_b": "frozen"}}
    got = updates(frozen(make(), labels), TWO, TWO_GRADS)
    return still(got["q"]) and (make is not lorapro or of_m(got))


def half_as_other():
    tx = frozen(lorapro(pairs=[("m/lora_a", "m/lora_b")]), HALF_FROZEN)
    got = updates(tx, TWO, TWO_GRADS)
    same = close(got["q"]["lora_a"], OTHER_GRADS)
    return of_m(got) and same and still(got["q"]["lora_b"])


HALVES = {
    "half a pair, the partner has another name": Remedy(
        lambda: lorapro().init(RENAMED),
        r"its partner `m/lora_b` .*`pairs=\[\('m/lora_a', path of B\), \.\.\.\]`\.",
        renamed_pair,
    ),
    "half a pair, the partner is not differentiated": Remedy(
        lambda: lorapro().init(LONE),
        r"`q/lora_b` .*leave `q/lora_a` out too",
        lambda: of_m(updates(lorapro(), {"m": PAIR}, {"m": GRADS})),
    ),
    "half a pair, frozen": Remedy(
        lambda: lorapro().init(LONE),
        r"or freeze it with `optax.partition` and `optax.set_to_zero\(\)`",
        lone_frozen,
    ),
    "half a pair, no partner": Remedy(
        lambda: lorapro().init(LONE),
        r"no partner, name all other pairs with `pairs=`, and this one counts as any",
        lone_as_other,
    ),
    "separated, one label": Remedy(
        lambda: split_labels(lorapro()).init({"m": PAIR}),
        r"The partner is masked or None here\..*give both one label",
        one_label,
    ),
    "separated, before": Remedy(
        lambda: split_labels(lorapro()).init({"m": PAIR}),
        r"or put `lorapro\(\)` before it in the chain",
        before_the_partition,
    ),
    "half a pair, B": Remedy(
        lambda: lorapro().init({"m": {"up": A, "lora_b": B}}),
        r"its partner `m/lora_a` .*`pairs=\[\(path of A, 'm/lora_b'\), \.\.\.\]`\.",
        lambda: find_pairs({"m": {"up": A, "lora_b": B}}, pairs=[("m/up", "m/lora_b")]),
    ),
    "half a pair, the partner is fixed": Remedy(
        lambda: lorapro().init(LONE),
        r"to stay as it is, pass `wrt='a'` and parameters with both",
        lambda: one_side(label=False),
    ),
    "a partner without a gradient": Remedy(
        lone_gradient,
        r"to stay as it is, pass `wrt='a'` and both in the parameters",
        lambda: one_side(label=False),
    ),
    "a fixed partner, one label": Remedy(
        lambda: frozen(lorapro(), HALF_FROZEN).init(TWO),
        r"`wrt='a'` and both in the parameters, under one label",
        lambda: one_side(label=True),
    ),
    "frozen partner": Remedy(
        lambda: frozen(lorapro(), HALF_FROZEN).init(TWO),
        r"freeze both: `optax.partition\(\{'train': tx, 'frozen': optax.set_to_zero\(\)"
        r"\}, labels\)` with 'frozen' at both factors",
        both_frozen,
    ),
    "frozen partner, lorapro_adamw": Remedy(
        lambda: frozen(lorapro_adamw(1e-2), HALF_FROZEN).init(TWO),
        r"freeze both: `optax.partition",
        lambda: both_frozen(lambda: lorapro_adamw(1e-2)),
    ),
    "frozen partner, as any other leaf": Remedy(
        lambda: frozen(lorapro(), HALF_FROZEN).init(TWO),
        r"or name all other pairs with `pairs=`, and this one counts as any other",
        half_as_other,
    ),
    "masked at a module above": Remedy(
        lambda: find_pairs({"q": {"lora_a": {"kernel": A}, "lora_b": None}}),
        r"its partner `q/lora_b/kernel` .*The partner is masked or None here",
        lambda: find_pairs({"q": {"lora_a": {"kernel": A}, "lora_b": {"kernel": B}}}),
    ),
}

RIVALS = {"m": {"lora_a": A, "lora_A": OTHER, "lora_b": B}}
RIVALS_GRADS = {"m": {"lora_a": GRAD_A, "lora_A": OTHER_GRADS, "lora_b": GRAD_B}}
NUMBERS: Any = [(0, 1)]
LAYERS = {"layers": [PAIR, PAIR]}
PATTERN = r"layers/\d+/lora_a"
FROZEN_B = {"m": "train", "q": "frozen"}


def by_pattern():
    """As the message has it."""
    pattern = PATTERN
    tx = lorapro(
        pairs=lambda tree: [
            pair for pair in find_pairs(tree) if re.search(pattern, pair.a)
        ]
    )
    got = updates(tx, LAYERS, {"layers": [GRADS, GRADS]})
    return all(map(adjusted, got["layers"]))


def rivals(tx):
    return of_m(updates(tx, RIVALS, RIVALS_GRADS))


def left_out():
    tx = frozen(lorapro(pairs=[("m/lora_a", "m/lora_b")]), FROZEN_B)
    got = updates(tx, TWO, TWO_GRADS)
    return of_m(got) and still(got["q"])


def all_before():
    pairs = [("m/lora_a", "m/lora_b"), ("q/lora_a", "q/lora_b")]
    tx = optax.chain(lorapro(pairs=pairs), frozen(optax.sgd(-1.0), FROZEN_B))
    got = updates(tx, TWO, TWO_GRADS)
    return of_m(got) and still(got["q"])


NAMES = {
    "two leaves for one factor, renamed": Remedy(
        lambda: lorapro().init(RIVALS),
        r"Rename them",
        lambda: of_m(
            updates(
                lorapro(),
                {"m": {**PAIR, "other": OTHER}},
                {"m": {**GRADS, "other": OTHER_GRADS}},
            )
        ),
    ),
    "two leaves for one factor, explicit": Remedy(
        lambda: lorapro().init(RIVALS),
        r"or give the pairs explicitly with `pairs=`",
        lambda: rivals(lorapro(pairs=[("m/lora_a", "m/lora_b")])),
    ),
    "two leaves with one path": Remedy(
        lambda: lorapro().init({"m": PAIR, "m/lora_a": A}),
        r"Rename one of them",
        lambda: lorapro().init({"m": PAIR, "m/other": A}) == optax.EmptyState(),
    ),
    "wrong path": Remedy(
        lambda: lorapro(pairs=[("m/lora_x", "m/lora_b")]).init({"m": PAIR}),
        r"Close to it: \['m/lora_.'",
        lambda: of_m(
            updates(
                lorapro(pairs=[("m/lora_a", "m/lora_b")]), {"m": PAIR}, {"m": GRADS}
            )
        ),
    ),
    "path of a list": Remedy(
        lambda: lorapro(pairs=[("a", "b")]).init([A, B]),
        r"In a list, a path is an index, such as '4'",
        lambda: adjusted(
            updates(lorapro(pairs=[("0", "1")]), [A, B], [GRAD_A, GRAD_B]), (0, 1)
        ),
    ),
    "path that is a pattern": Remedy(
        lambda: lorapro(pairs=[(PATTERN, PATTERN)]).init(LAYERS),
        r"`layers/\\d\+/lora_a` of .*are no regular expressions; for these, pass a func"
        r"tion: `pairs=lambda tree: \[pair for pair in find_pairs\(tree\) if re.search",
        by_pattern,
    ),
    "masked path, left out": Remedy(
        lambda: frozen(lorapro(pairs=find_pairs(TWO)), FROZEN_B).init(TWO),
        r"`q/lora_a` of the given `pairs` is masked or None here\. Leave its pair out",
        left_out,
    ),
    "masked path, before": Remedy(
        lambda: frozen(lorapro(pairs=find_pairs(TWO)), FROZEN_B).init(TWO),
        r"or put `lorapro\(\)` before `optax.partition` or `optax.masked` in the chain",
        all_before,
    ),
    "factor in two pairs": Remedy(
        lambda: find_pairs(
            TWO, pairs=[("m/lora_a", "m/lora_b"), ("q/lora_a", "m/lora_b")]
        ),
        r"Name each factor once",
        lambda: find_pairs(
            TWO, pairs=[("m/lora_a", "m/lora_b"), ("q/lora_a", "q/lora_b")]
        ),
    ),
    "one pair without a list": Remedy(
        lambda: find_pairs(TWO, pairs=("m/lora_a", "m/lora_b")),
        r"It is a list of `LoRAPair`s or of tuples `\(path of A, path of B\)`, also",
        lambda: find_pairs(TWO, pairs=[("m/lora_a", "m/lora_b")]),
    ),
    "paths that are numbers": Remedy(
        lambda: find_pairs([A, B], pairs=NUMBERS),
        r"both paths have to be strings, such as '4' for the fifth leaf of a list",
        lambda: find_pairs([A, B], pairs=[("0", "1")]),
    ),
    "no pairs, explicit": Remedy(
        lambda: lorapro().init({"m": {"x": A, "y": B}}),
        r"Give others with `pairs=\[\(path of A, path of B\)\]`",
        lambda: adjusted(
            updates(
                lorapro(pairs=[("m/x", "m/y")]),
                {"m": {"x": A, "y": B}},
                {"m": {"x": GRAD_A, "y": GRAD_B}},
            )["m"],
            ("x", "y"),
        ),
    ),
    "no pairs, ignored": Remedy(
        lambda: lorapro().init({"x": A}),
        r"pass `on_no_pairs='ignore'` to let such a tree through",
        lambda: close(
            updates(lorapro(on_no_pairs="ignore"), {"x": A}, {"x": A})["x"], A
        ),
    ),
    "no leaves, ignored": Remedy(
        lambda: lorapro().init({}),
        r"meant to be empty, pass `on_no_pairs='ignore'`",
        lambda: lorapro(on_no_pairs="ignore").init({}) == optax.EmptyState(),
    ),
    "text in the tree": Remedy(
        lambda: lorapro_adamw(1e-3).init({"m": PAIR, "name": "text"}),
        r"`name` is a str, no array of numbers\. Put None in its place",
        lambda: of_m(
            updates(lorapro(), {"m": PAIR, "name": None}, {"m": GRADS, "name": None})
        ),
    ),
    "a function in the tree": Remedy(
        lambda: lorapro().init({"m": PAIR, "f": jnp.tanh}),
        r"`f` is a .*, no array of numbers\. Put None in its place",
        lambda: lorapro().init({"m": PAIR, "f": None}) == optax.EmptyState(),
    ),
    "an array of text in the tree": Remedy(
        lambda: lorapro().init({"m": PAIR, "f": np.array(["a"])}),
        r"`f` is an array of dtype <U1, no array of numbers\. Put None in its place",
        lambda: lorapro().init({"m": PAIR, "f": None}) == optax.EmptyState(),
    ),
}

PEFT = {
    "q": {
        "lora_A": {"one": {"weight": A.T}, "two": {"weight": OTHER.T}},
        "lora_B": {"one": {"weight": B.T}, "two": {"weight": jnp.ones((6, 2))}},
    }
}
PEFT_GRADS = {
    "q": {
        "lora_A": {"one": {"weight": GRAD_A.T}, "two": {"weight": OTHER_GRADS.T}},
        "lora_B": {"one": {"weight": GRAD_B.T}, "two": {"weight": jnp.ones((6, 2))}},
    }
}
NESTED = {"x": {**PAIR, "base_module": {"lora_a": OTHER, "lora_b": jnp.ones((2, 6))}}}
NESTED_GRADS = {
    "x": {**GRADS, "base_module": {"lora_a": OTHER_GRADS, "lora_b": jnp.ones((2, 6))}}
}


def one_of_peft(got):
    side = lambda name: got["q"][name]["one"]["weight"].T
    return close(side("lora_A"), DUE_A) and close(side("lora_B"), DUE_B)


def second_frozen(make=lorapro):
    label = lambda path, _: "frozen" if "two" in str(path) else "train"
    labels = jax.tree.map_with_path(label, PEFT)
    got = updates(frozen(make(), labels), PEFT, PEFT_GRADS)
    two = [got["q"][name]["two"] for name in ("lora_A", "lora_B")]
    return still(two) and (make is not lorapro or one_of_peft(got))


def inner_frozen():
    """With `pairs=` where `lorapro` stands before, and so sees both."""
    labels = {"x": {"lora_a": "train", "lora_b": "train", "base_module": "frozen"}}
    results = []
    for tx in (
        frozen(lorapro(), labels),
        optax.chain(
            lorapro(pairs=[("x/lora_a", "x/lora_b")]), frozen(optax.sgd(-1.0), labels)
        ),
    ):
        got = updates(tx, NESTED, NESTED_GRADS)
        results.append(adjusted(got["x"]) and still(got["x"]["base_module"]))
    return all(results)


def not_differentiated():
    outer = lambda tree: {"x": {**tree["x"], "base_module": None}}
    return adjusted(updates(lorapro(), outer(NESTED), outer(NESTED_GRADS))["x"])


def never_together():
    """Where the other adapter is not active, its gradients are 0, and so its steps."""
    grads = jax.tree.map(jnp.zeros_like, PEFT_GRADS)
    for side in ("lora_A", "lora_B"):
        grads["q"][side]["one"] = PEFT_GRADS["q"][side]["one"]
    got = updates(lorapro(pairs=find_pairs(PEFT)), PEFT, grads)
    return one_of_peft(got) and still(
        [got["q"][x]["two"] for x in ("lora_A", "lora_B")]
    )


ADAPTERS = {
    "two adapters, one frozen": Remedy(
        lambda: lorapro().init(PEFT),
        r"freeze the others: `optax.partition\(\{'train': tx, 'frozen': optax.set",
        second_frozen,
    ),
    "two adapters, one frozen, lorapro_adamw": Remedy(
        lambda: lorapro_adamw(1e-2).init(PEFT),
        r"freeze the others: `optax.partition",
        lambda: second_frozen(lambda: lorapro_adamw(1e-2)),
    ),
    "an adapter around an adapter": Remedy(
        lambda: lorapro().init(NESTED),
        r"\['x/base_module/lora_a', 'x/lora_a'\] are .*freeze the others",
        inner_frozen,
    ),
    "two adapters, one not differentiated": Remedy(
        lambda: lorapro().init(NESTED),
        r"or do not differentiate them",
        not_differentiated,
    ),
    "two adapters, never together": Remedy(
        lambda: lorapro().init(PEFT),
        r"ever active in one step, list all pairs with `pairs=`",
        never_together,
    ),
}

INTEGER = {"m": PAIR, "q": {"lora_a": jnp.ones((4, 2), jnp.int8), "lora_b": B}}
INTEGER_GRADS = {"m": GRADS, "q": {"lora_a": jnp.zeros((4, 2), jnp.int8), "lora_b": B}}
COMPLEX = {"m": PAIR, "q": {"lora_a": OTHER + 0j, "lora_b": B}}
COMPLEX_GRADS = {"m": GRADS, "q": {"lora_a": OTHER_GRADS + 1j, "lora_b": B}}
STACK = {"m": {"lora_a": jnp.ones((4, 5, 2)), "lora_b": jnp.ones((4, 2, 3))}}
SQUARE = {"m": {"lora_a": A, "lora_b": jnp.ones((2, 2, 6))}}
EXPERTS = {"m": {"lora_a": A, "lora_b": jnp.ones((3, 2, 6))}}
THREE = {"m": {"lora_a": jnp.ones((5, 4, 5, 2)), "lora_b": jnp.ones((2, 4, 2))}}
TIED = {"m": {"lora_a": jnp.ones((4, 4, 8, 4)), "lora_b": jnp.ones((4, 4, 16))}}


def integer_frozen():
    got = updates(frozen(lorapro(), FROZEN_B), INTEGER, INTEGER_GRADS)
    return of_m(got) and still(got["q"])


def complex_as_other():
    tx = lorapro(pairs=[("m/lora_a", "m/lora_b")])
    got = updates(tx, COMPLEX, COMPLEX_GRADS)
    return of_m(got) and close(got["q"]["lora_a"], OTHER_GRADS + 1j)


def written_out(tree, options):
    """Every `LoRAPair` that the message offers, as it stands there."""
    with pytest.raises(ValueError, match="cannot be read as one") as error:
        find_pairs(tree, **options)
    offered = re.findall(r"`(LoRAPair\(.*?\))`", str(error.value))
    return offered and all(find_pairs(tree, pairs=[eval(x)]) for x in offered)


def of_other_pairs(lone):
    return find_pairs({"m": PAIR, "q": lone}, pairs=[("m/lora_a", "m/lora_b")])


def given_axes(**axes):
    pair = LoRAPair("m/lora_a", "m/lora_b", **axes)
    return find_pairs(STACK, pairs=[pair])


SHAPES = {
    "integers, not differentiated": Remedy(
        lambda: lorapro().init(INTEGER),
        r"has dtype int8.*leave it out of what you differentiate",
        lambda: lorapro().init({"m": PAIR, "q": None}) == optax.EmptyState(),
    ),
    "integers, frozen": Remedy(
        lambda: lorapro().init(INTEGER),
        r"or freeze it: `optax.partition\(\{'train': tx",
        integer_frozen,
    ),
    "complex numbers": Remedy(
        lambda: lorapro().init(COMPLEX),
        r"has dtype complex64.*name all other pairs with `pairs=`, and it counts as",
        complex_as_other,
    ),
    "numbers that are no arrays": Remedy(
        lambda: find_pairs({"m": {"lora_a": 1.0, "lora_b": B}}),
        r"Pass the factors as arrays",
        lambda: find_pairs({"m": PAIR}),
    ),
    "numbers that are no factors": Remedy(
        lambda: find_pairs({"m": PAIR, "q": {"lora_a": 1.0, "lora_b": 2.0}}),
        r"or say with `pairs=` which leaves are the factors",
        lambda: of_other_pairs({"lora_a": 1.0, "lora_b": 2.0}),
    ),
    "one axis": Remedy(
        lambda: find_pairs({"m": PAIR, "q": {"lora_a": jnp.ones(4), "lora_b": B}}),
        r"Name all pairs of the tree with `pairs=\[\(path of A, path of B\), \.\.\.\]`",
        lambda: of_other_pairs({"lora_a": jnp.ones(4), "lora_b": B}),
    ),
    "no elements": Remedy(
        lambda: find_pairs({"m": {"lora_a": A[:, :0], "lora_b": B[:0]}}),
        r"no elements\. .*Name all pairs of the tree",
        lambda: of_other_pairs({"lora_a": A[:, :0], "lora_b": B[:0]}),
    ),
    "no common size": Remedy(
        lambda: find_pairs({"m": PAIR, "q": {"lora_a": jnp.ones((9, 4)), "lora_b": B}}),
        r"share no rank.*not the two factors of one layer\. Name all pairs of the tree",
        lambda: of_other_pairs({"lora_a": jnp.ones((9, 4)), "lora_b": B}),
    ),
    "no common rank": Remedy(
        lambda: find_pairs(EXPERTS),
        r"`pairs=\[LoRAPair\('m/lora_a', 'm/lora_b', a_rank_axis=\.\.\., b_rank_axis=",
        lambda: find_pairs(
            EXPERTS,
            pairs=[LoRAPair("m/lora_a", "m/lora_b", a_rank_axis=1, b_rank_axis=1)],
        ),
    ),
    "experts or heads": Remedy(
        lambda: find_pairs(SQUARE),
        r"this one as `LoRAPair\('m/lora_a', 'm/lora_b', 1, 0\)` or `LoRAPair\(",
        lambda: written_out(SQUARE, {}),
    ),
    "heads": Remedy(
        lambda: find_pairs(SQUARE),
        r"with `stack_axis=`, .* of three axes or more, `\(\)` for none",
        lambda: find_pairs(SQUARE, stack_axis=())[0].b_rank_axis == 0,
    ),
    "a tie of stacks": Remedy(
        lambda: find_pairs(TIED),
        r"list all pairs of the tree, `pairs=\[\.\.\.\]`, this one as",
        lambda: written_out(TIED, {}),
    ),
    "a tie of stacks, stack_axis": Remedy(
        lambda: find_pairs(TIED),
        r"Say which with `stack_axis=`",
        lambda: find_pairs(TIED, stack_axis=1)[0].a_batch_axes == (1,),
    ),
    "stack_axis that does not fit": Remedy(
        lambda: find_pairs(STACK, stack_axis=1),
        r"`stack_axis=1` does not fit them\. .*this one as `LoRAPair\(",
        lambda: written_out(STACK, {"stack_axis": 1}),
    ),
    "wrong axes, corrected": Remedy(
        lambda: given_axes(a_rank_axis=0, b_rank_axis=1),
        r"the rank is 4 in A and 2 in B\. Correct its axes in `pairs=`",
        lambda: given_axes(
            a_rank_axis=2, b_rank_axis=1, a_batch_axes=(0,), b_batch_axes=(0,)
        ),
    ),
    "wrong axes, left out": Remedy(
        lambda: given_axes(a_rank_axis=2),
        r"go together.*leave all of them out, to have them read from the shapes",
        lambda: given_axes()[0].a_batch_axes == (0,),
    ),
    "an axis that is a bool": Remedy(
        lambda: given_axes(a_rank_axis=True, b_rank_axis=1),
        r"\(True,\) is no axis and no tuple of axes\. Correct its axes in `pairs=`",
        lambda: given_axes(),
    ),
    "wrong rank": Remedy(
        lambda: given_axes(rank=3),
        r"`m/lora_a` has rank 2 on axis 2, not the given `rank=3`\. Leave `rank` out",
        lambda: given_axes(),
    ),
    "no axis at all": Remedy(
        lambda: find_pairs(STACK, stack_axis="0"),
        r"`stack_axis='0'` has to be an axis, such as 0 or 1, a tuple of axes, or `",
        lambda: find_pairs(STACK, stack_axis=0),
    ),
}

SCALES = {
    "scale and alpha": Remedy(
        lambda: lorapro(scale=2.0, alpha=4.0),
        r"Pass the scale itself, or `alpha`",
        lambda: find_pairs(TWO, alpha=4.0)[0].scale == 2.0,
    ),
    "rslora without alpha": Remedy(
        lambda: lorapro(rslora=True),
        r"Pass `alpha=`",
        lambda: find_pairs(TWO, rslora=True, alpha=4.0)[0].scale == 4 / 2**0.5,
    ),
    "rslora without alpha, scale": Remedy(
        lambda: lorapro(rslora=True),
        r"or put the square root into `scale=`",
        lambda: find_pairs(TWO, scale=4 / 2**0.5)[0].scale == 4 / 2**0.5,
    ),
    "rslora that is no bool": Remedy(
        lambda: lorapro(rslora=16, alpha=None),
        r"`rslora=16` has to be True or False\. The number goes to `alpha=`",
        lambda: find_pairs(TWO, rslora=True, alpha=16)[0].scale == 16 / 2**0.5,
    ),
    "pattern of nothing, corrected": Remedy(
        lambda: find_pairs(TWO, scale={"qq/": 2.0, ".*": 1.0}),
        r"The pattern 'qq/' of `scale=.*Close to it: \['.*/lora_.*Correct it",
        lambda: find_pairs(TWO, scale={"q/": 2.0, ".*": 1.0})[1].scale == 2.0,
    ),
    "pattern of nothing, taken out": Remedy(
        lambda: find_pairs(TWO, alpha={"qq/": 2.0, ".*": 2.0}),
        r"The pattern 'qq/' of `alpha=.*or take it out",
        lambda: find_pairs(TWO, alpha={".*": 2.0})[1].scale == 1.0,
    ),
    "pair without a pattern": Remedy(
        lambda: find_pairs(TWO, scale={"m/": 2.0}),
        r"No pattern .* occurs in `q/lora_a` or `q/lora_b`\. Add one that does",
        lambda: find_pairs(TWO, scale={"m/": 2.0, "q/": 3.0})[1].scale == 3.0,
    ),
    "pair without a pattern, all others": Remedy(
        lambda: find_pairs(TWO, scale={"m/": 2.0}),
        r"or '\.\*' at the end for all other pairs",
        lambda: find_pairs(TWO, scale={"m/": 2.0, ".*": 1.0})[0].scale == 2.0,
    ),
    "scale of another shape": Remedy(
        lambda: find_pairs({**STACK, "q": PAIR}, scale=np.ones(4)),
        r"`q/lora_a` has shape \(4,\).*pass `scale=\{regex: number or array\}`",
        lambda: find_pairs({**STACK, "q": PAIR}, scale={"m/": np.ones(4), "q/": 1.0}),
    ),
    "scale that is a list": Remedy(
        lambda: find_pairs(STACK, scale=[1.0, 2.0, 3.0, 4.0]),
        r"an array with one for each, such as `np.array\(\[\.\.\.\]\)`",
        lambda: find_pairs(STACK, scale=np.array([1.0, 2.0, 3.0, 4.0])),
    ),
}

CASES = HALVES | NAMES | ADAPTERS | SHAPES | SCALES


@pytest.mark.parametrize("case", CASES)
def test_remedy_works_as_the_message_has_it(case):
    wrong, says, right = CASES[case]
    with pytest.raises((ValueError, TypeError), match=says):
        wrong()
    assert right()


def test_patterns_of_masked_pairs_are_of_use():
    """One mapping serves both what trains and what an `optax.partition` freezes."""
    tx = frozen(lorapro(scale={"m/": 1.0, "q/": 2.0}), FROZEN_B)
    assert of_m(updates(tx, TWO, TWO_GRADS))


def test_no_message_recommends_what_lets_gradients_pass():
    """`optax.masked` as a remedy would move frozen factors by their raw gradients."""
    for wrong, *_ in CASES.values():
        with pytest.raises((ValueError, TypeError)) as error:
            wrong()
        text = str(error.value)
        assert not re.search(r"(freeze|mask|exclude)[^.;]*`optax\.masked`", text)
        assert "mask both" not in text


def test_masked_passes_gradients_uphill():
    """Why it is no remedy: a negative control."""
    mask = {"m": True, "q": False}
    got = updates(optax.masked(lorapro(), mask), TWO, TWO_GRADS)
    assert close(got["q"]["lora_a"], OTHER_GRADS)
