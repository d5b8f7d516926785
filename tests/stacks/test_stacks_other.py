"""Trees of stacks that are not installed here: their keys, paths and layouts."""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import pytest

from lorapro_jax import LoRAPair, describe_pairs, lorapro
from tests.support.layouts import (
    DAMPING,
    Pair,
    assert_adjusted,
    assert_found,
    chain_rule_gradients,
    leaves_by_path,
    random_like,
)

pytestmark = pytest.mark.usefixtures("quick_compiles")

# A size for every letter of a layout, see `support.layouts`. Capitals are stacked axes.
SIZES = {"r": 2, "x": 1, "y": 1, "t": 2, "n": 3, "k": 4, "e": 4, "h": 5, "c": 6}
SIZES |= {"i": 7, "g": 7, "d": 8, "o": 9, "f": 11, "v": 13, "S": 3, "L": 10, "E": 12}


@jax.tree_util.register_pytree_with_keys_class
class Fields(dict):
    """A module of Equinox, Haliax or lorax: attributes instead of keys."""

    def tree_flatten_with_keys(self):
        key = jax.tree_util.GetAttrKey
        return [(key(name), x) for name, x in self.items()], tuple(self)

    @classmethod
    def tree_unflatten(cls, names, children):
        return cls(zip(names, children, strict=True))


class Case(NamedTuple):
    """The tree of a stack with layouts for leaves, and the pairs in it.

    A pair `q/lora_{a,b}` stands for the paths `q/lora_a` and `q/lora_b`.
    """

    tree: Any
    pairs: list[str]
    scale: float = 1.0
    options: Mapping[str, Any] = MappingProxyType({})


def ab(name, a, b):
    """Two leaves `name_a` and `name_b` with these layouts."""
    return {f"{name}_a": a, f"{name}_b": b}


CASES = {
    "tunix llama": Case(
        {
            "layers": {
                0: {
                    "attn": {"q_proj": ab("w_lora", "dr", "rnh")},
                    "mlp": {"up": ab("kernel_lora", "dr", "rf")},
                },
                1: {"attn": {"o_proj": ab("w_lora", "nhr", "rd")}},
            }
        },
        [
            "layers/0/attn/q_proj/w_lora_{a,b}",
            "layers/0/mlp/up/kernel_lora_{a,b}",
            "layers/1/attn/o_proj/w_lora_{a,b}",
        ],
        scale=3.0,
        options={"alpha": 6.0},
    ),
    "qwix experts": Case(
        {
            "dot": ab("kernel_lora", "Eir", "Ero"),
            "einsum": ab("kernel_lora", "eir", "ro"),
            "scanned": ab("kernel_lora", "LEir", "LEro"),
        },
        [f"{x}/kernel_lora_{{a,b}}" for x in ("dot", "einsum", "scanned")],
        scale=4.0,
        options={"alpha": 8.0},
    ),
    "gemma": Case(
        {
            "layer_0": {
                "q": {"w": "ndh", "lora": {"a": "dr", "b": "rnh"}},
                "kv": {"w": "tkdh", "lora": {"a": "dr", "b": "rtkh"}},
                "attn_vec": {"w": "nhd", "lora": {"a": "nhr", "b": "rd"}},
                "moe": {"w": "edf", "lora": {"a": "edr", "b": "rf"}},
                "norm": {"scale": "d"},
            }
        },
        [f"layer_0/{x}/lora/{{a,b}}" for x in ("q", "kv", "attn_vec", "moe")],
    ),
    "MaxText, stacked on axis 1": Case(
        {
            "decoder": {
                "layers": {
                    "wi_0": ab("kernel_lora", "dLr", "rLf"),
                    "query": ab("kernel_lora", "dLr", "rLnh"),
                    "out": ab("kernel_lora", "nLhr", "rLd"),
                }
            }
        },
        [f"decoder/layers/{x}/kernel_lora_{{a,b}}" for x in ("wi_0", "query", "out")],
        scale=2.0,
        options={"alpha": 4.0},
    ),
    "MaxText before NNX": Case(
        {
            "query": {"lora_a.kernel": "dLr", "lora_b.kernel": "rLnh"},
            "mlp": {"wi": {"kernel": None}},
        },
        ["query/lora_{a,b}/kernel"],
        scale=0.5,
        options={"scale": 0.5},
    ),
    "EasyDeL": Case(
        {
            "layers": {
                0: {"q": {"base_module": "io", **ab("lora", "ir", "ro")}},
                1: {"q": {"base_module": "io", **ab("lora", "ir", "ro")}},
            }
        },
        ["layers/0/q/lora_{a,b}", "layers/1/q/lora_{a,b}"],
    ),
    "Keras, by path": Case(
        {
            **ab("mha/query/lora_kernel", "dnr", "rh"),
            **ab("mha/attention_output/lora_kernel", "nhr", "rd"),
            **ab("conv/lora_kernel", "nkcr", "ro"),
            **ab("embedding/lora_embeddings", "vr", "rd"),
            "dense/bias": "f",
        },
        [
            "mha/query/lora_kernel_{a,b}",
            "mha/attention_output/lora_kernel_{a,b}",
            "conv/lora_kernel_{a,b}",
            "embedding/lora_embeddings_{a,b}",
        ],
    ),
    "Keras, as a list": Case(
        ["d", "f", "nh", "d", "dnr", "rh"], ["{4,5}"], options={"pairs": [("4", "5")]}
    ),
    "AXLearn": Case(
        {
            "adapter": {"lora_down": {"weight": "ir"}, "lora_up": {"weight": "ro"}},
            "square": {"lora_down": {"weight": "ir"}, "lora_up": {"weight": "rg"}},
        },
        ["adapter/lora_{down,up}/weight", "square/lora_{down,up}/weight"],
    ),
    "AXLearn attention": Case(
        {
            "o": {"lora_down": "rnh", "lora_up": "rd"},
            "qkv": {"lora_down": "dSr", "lora_up": "Srnh"},
        },
        ["o/lora_{down,up}", "qkv/lora_{down,up}"],
        scale=2.0,
        options={
            "alpha": 4.0,
            "pairs": [
                LoRAPair("o/lora_down", "o/lora_up", 0, 0),
                LoRAPair("qkv/lora_down", "qkv/lora_up", -1, 1, (1,), (0,)),
            ],
        },
    ),
    "Levanter": Case(
        Fields(
            lora=Fields(
                lora_A=Fields(weight=Fields(array="Lri")),
                lora_B=Fields(weight=Fields(array="Lor")),
            )
        ),
        ["lora/lora_{A,B}/weight"],
        scale=2.0,
        options={"alpha": 4.0},
    ),
    "PEFT file": Case(
        {
            "base_model.model.q_proj.lora_A.weight": "ri",
            "base_model.model.q_proj.lora_B.weight": "or",
            "base_model.model.q_proj.lora_magnitude_vector": "o",
            "base_model.model.conv.lora_A.weight": "rcnk",
            "base_model.model.conv.lora_B.weight": "orxy",
            "base_model.model.embed.lora_embedding_A": "rv",
            "base_model.model.embed.lora_embedding_B": "dr",
        },
        [
            "base_model/model/q_proj/lora_{A,B}/weight",
            "base_model/model/conv/lora_{A,B}/weight",
            "base_model/model/embed/lora_embedding_{A,B}",
        ],
        scale=8 / 2**0.5,
        options={"alpha": 8.0, "rslora": True},
    ),
    "PEFT module": Case(
        {
            "lora_A": {"default": {"weight": "ri"}},
            "lora_B": {"default": {"weight": "gr"}},
        },
        ["lora_{A,B}/default/weight"],
    ),
    "lorax": Case(
        {
            "dense": {"kernel": Fields(w="io", a="ro", b="ir")},
            "conv": {"kernel": Fields(w="nkco", a="xyro", b="nkcr")},
        },
        ["dense/kernel/{b,a}", "conv/kernel/{b,a}"],
        scale=0.5,
        options={
            "scale": 0.5,
            "pairs": [
                LoRAPair("dense/kernel/b", "dense/kernel/a"),
                LoRAPair("conv/kernel/b", "conv/kernel/a", 3, 2),
            ],
        },
    ),
    "Equinox": Case(
        [
            Fields(lora_a=Fields(weight="ri"), lora_b=Fields(weight="or")),
            Fields(lora_a=Fields(weight="ri"), lora_b=Fields(weight="gr")),
        ],
        ["0/lora_{a,b}/weight", "1/lora_{a,b}/weight"],
    ),
    "DoRA and latent attention": Case(
        {
            "wq_a": {"kernel": "dk"},
            "wq_b": {"kernel": "kf"},
            "q_lora": {"kernel": "dk"},
            "kv_lora": {"norm": {"scale": "k"}},
            "kv_lora_rank": "dk",
            "q_lora_rank": {"kernel": "dk"},
            "o": {**ab("lora", "ir", "ro"), "dora_magnitude": "o", "bias": "o"},
        },
        ["o/lora_{a,b}"],
    ),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture
def params(case):
    shaped = lambda axes: jnp.zeros([SIZES[x] for x in axes], jnp.float32)
    return random_like(jax.tree.map(shaped, case.tree), seed=0)


@pytest.fixture
def pairs(case):
    """The pairs in full: paths written out, layouts read from the tree."""
    layouts = leaves_by_path(case.tree)
    paths = [
        [re.sub(r"{(\w+),(\w+)}", side, pair) for side in (r"\1", r"\2")]
        for pair in case.pairs
    ]
    return [Pair(a, b, layouts[a], layouts[b], case.scale) for a, b in paths]


def test_the_pairs_are_found_with_their_axes(case, params, pairs):
    """Paths, ranks, stacked axes and scales, and no leaf more."""
    assert_found(params, pairs, **case.options)
    table = describe_pairs(params, **case.options).splitlines()
    rows = [x for x in table if not x.startswith(("not in", "other leaves"))]
    assert len(rows) == 1 + len(pairs)


def test_the_gradients_are_adjusted_layer_by_layer(case, params, pairs):
    """The chain-rule gradients of a random G become those of the dense oracle."""
    grads = chain_rule_gradients(params, pairs, seed=1)
    tx = lorapro(damping=DAMPING, **case.options)

    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)

    chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
    assert_adjusted(updates, grads, params, pairs)


def test_leaves_that_are_no_factors_are_the_same_objects(case, params, pairs):
    """Biases, magnitudes and kernels pass through, factors do not."""
    changed = set()

    def update(grads):
        tx = lorapro(**case.options)
        updates, _ = tx.update(grads, tx.init(params), params)
        before, after = leaves_by_path(grads), leaves_by_path(updates)
        changed.update(path for path in before if after[path] is not before[path])

    jax.eval_shape(update, params)  # traced only: identity is settled by then
    assert changed == {path for pair in pairs for path in pair[:2]}
