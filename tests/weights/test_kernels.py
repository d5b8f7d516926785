"""Which leaf a pair adapts, and which of its axes are what, by names and sizes.

Layouts are in letters as in `support.layouts`: `r` is the rank, capitals are stacked
axes, equal letters are the same axis. A `*` in a factor means that all of its features
are flattened to one axis.
"""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorapro_jax import LoRAPair, find_pairs
from lorapro_jax.weights._find import Kernel, find_kernels
from lorapro_jax.weights._layout import as_factor, as_kernel, as_matrix
from lorapro_jax.weights._values import is_quantized

SIZES = {"r": 2, "d": 7, "f": 11, "n": 3, "h": 5, "k": 4, "c": 6, "t": 2, "e": 13}
SIZES |= {"x": 1, "y": 1, "L": 8, "E": 9}


def shape_of(letters, sizes=SIZES):
    """The shape of a layout; `Ldn*r` has the features d and n on one axis."""
    if "*" not in letters:
        return tuple(sizes[x] for x in letters)
    letters = letters.replace("*", "")
    flat = math.prod(sizes[x] for x in letters if x.islower() and x != "r")
    rank_last = letters.endswith("r")
    stack = [sizes[x] for x in letters if x.isupper()]
    return (*stack, flat, sizes["r"]) if rank_last else (*stack, sizes["r"], flat)


def zeros(letters, sizes=SIZES, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape_of(letters, sizes), dtype)


def tree_of(leaves, sizes=SIZES):
    return {path: zeros(letters, sizes) for path, letters in leaves.items()}


def read(paths, layouts):
    """The layouts of three leaves by their paths, and the `Kernel` that they mean."""
    factors, path = paths.split()
    names = [re.sub(r"{(\w*),(\w*)}", side, factors) for side in (r"\1", r"\2")]
    a, b, kernel = layouts.split()
    leaves = dict(zip((*names, path), (a, b, kernel), strict=True))
    return leaves, due(path.replace(".", "/"), kernel, a)


def due(path, kernel, a):
    """The `Kernel` whose letters say which axes it shares with A."""
    stack = [x for x in a if x.isupper()]
    inputs = [x for x in a if x in kernel and x.islower() and SIZES[x] > 1]
    outputs = [x for x in kernel if x not in (*stack, *inputs)]
    at = (tuple(map(kernel.index, letters)) for letters in (stack, inputs, outputs))
    return Kernel(path, *at)


def found(tree, kernels=None, **options):
    pairs = find_pairs(tree, **options)
    assert pairs
    return find_kernels(tree, pairs, kernels)


# From the names of factors and kernel to their layouts: A, B, kernel.
STACKS = {
    "Linen": ("q/lora_{a,b} q/kernel", "dr rf df"),
    "Linen, at the top": ("lora_{a,b} kernel", "dr rf df"),
    "nnx.LoRALinear": ("q/lora/lora_{a,b} q/kernel", "dr rf df"),
    "nnx.LoRA": ("q/lora_{a,b} q/base_module/kernel", "dr rf df"),
    "NNX on axis 1": ("q/lora/lora_{a,b} q/kernel", "dLr rLf dLf"),
    "scanned": ("q/lora_{a,b} q/kernel", "Ldr Lrf Ldf"),
    "qwix, flattened": ("q/kernel_lora_{a,b} q/kernel", "dr rnh* dnh"),
    "qwix, flattened inputs": ("o/kernel_lora_{a,b} o/kernel", "nh*r rd nhd"),
    "qwix, scanned and flattened": ("q/kernel_lora_{a,b} q/kernel", "Ldr Lrnh* Ldnh"),
    "qwix, experts": ("q/w_lora_{a,b} q/w", "Edr Erf Edf"),
    "qwix, experts with one B": ("q/w_lora_{a,b} q/w", "edr rf edf"),
    "qwix, scanned experts": ("q/moe_lora_{a,b} q/moe", "LEdr LErf LEdf"),
    "qwix, convolution": ("c/kernel_lora_{a,b} c/kernel", "nkcr rf nkcf"),
    "tunix, query": ("layers/0/q/w_lora_{a,b} layers/0/q/w", "dr rnh dnh"),
    "tunix, output": ("o/w_lora_{a,b} o/w", "nhr rd nhd"),
    "gemma, query": ("q/lora/{a,b} q/w", "dr rnh ndh"),
    "gemma, keys and values": ("kv/lora/{a,b} kv/w", "dr rtkh tkdh"),
    "gemma, one key head": ("kv/lora/{a,b} kv/w", "dr rtxh txdh"),
    "gemma, gate": ("mlp/lora/{a,b} mlp/w", "dr rtf tfd"),
    "gemma, wrapped": ("q/_LoRAEinsum_0/lora/{a,b} q/w", "dr rnh ndh"),
    "MaxText": ("wi/kernel_lora_{a,b} wi/kernel", "dLr rLf dLf"),
    "MaxText, output": ("out/kernel_lora_{a,b} out/kernel", "nLhr rLd nLhd"),
    "MaxText before NNX": ("q/lora_{a,b}.kernel q/kernel", "dLr rLnh dLnh"),
    "Keras": ("mha/query/lora_kernel_{a,b} mha/query/kernel", "dnr rh dnh"),
    "Keras, private": ("d/lora_kernel_{a,b} d/_kernel", "dr rf df"),
    "Keras, embedding": ("e/lora_embeddings_{a,b} e/embeddings", "er rd ed"),
    "EasyDeL": ("layers.0.q.lora_{a,b} layers.0.q.base_module.kernel", "dr rf df"),
    "PEFT": ("q.lora_{A,B}.default.weight q.base_layer.weight", "rd fr fd"),
    "PEFT file": ("q.lora_{A,B}.weight q.weight", "rd fr fd"),
    "PEFT, convolution": ("c.lora_{A,B}.weight c.weight", "rcnk frxy fcnk"),
    "PEFT, embedding": ("e.lora_embedding_{A,B} e.weight", "re dr ed"),
    "PEFT, GPT-2": ("c.lora_{A,B}.weight c.weight", "rd fr df"),
    "Levanter": ("q.lora.lora_{A,B}.weight q.wrapped.weight", "Lrd Lfr Lfd"),
    "AXLearn": ("q/adapter/lora_{down,up}/weight q/layer/weight", "dr rf df"),
}


@pytest.mark.parametrize("name", STACKS)
def test_the_kernel_is_found_in_every_stack(name):
    """Its path, and the axes that its letters share with the factors."""
    leaves, kernel = read(*STACKS[name])
    tree = tree_of(leaves)
    tree["elsewhere/kernel"] = tree[list(leaves)[2]]  # another layer of the same size
    assert found(tree) == [kernel]


# Layers with features of equal size, in stacks that have one order: `test_orders.py`
# has the others.
SQUARE = {
    "nnx.LoRALinear": ("q/lora/lora_{a,b} q/kernel", "dr rf df"),
    "nnx.LoRALinear, stacked on axis 1": ("lora/lora_{a,b} kernel", "dLr rLf dLf"),
    "tunix": ("w_lora_{a,b} w", "dr rnh dnh"),
    "Keras": ("lora_kernel_{a,b} _kernel", "dr rf df"),
    "Keras, convolution": ("lora_kernel_{a,b} kernel", "nkcr rf nkcf"),
    "Keras, embedding": ("lora_embeddings_{a,b} embeddings", "er rd ed"),
    "PEFT, convolution": ("q.lora_{A,B}.weight q.weight", "rcxy frxy fcxy"),
    "PEFT, embedding": ("e.lora_embedding_{A,B} e.weight", "re dr ed"),
}
EQUAL = {"d": 6, "f": 6, "h": 6, "c": 6, "e": 6, "n": 3, "k": 3}


@pytest.mark.parametrize("name", SQUARE)
def test_square_kernels_of_stacks_with_one_order_are_read_so(name):
    leaves, kernel = read(*SQUARE[name])
    assert found(tree_of(leaves, SIZES | EQUAL)) == [kernel]


UNSETTLED = {
    "Linen": ("lora_{a,b} kernel", "dr rf df", {"f": 7}),
    "PEFT": ("q/lora_{A,B}/weight q/weight", "rd fr fd", {"f": 7}),
    "a bare weight": ("lora_{a,b} weight", "dr rf df", {"f": 7}),
    "gemma or tunix": ("w_lora_{a,b} w", "dr rnh dnh", {"n": 7}),
    "gemma's query": ("lora/{a,b} w", "dr rnh ndh", {"h": 7}),
    "gemma's gate": ("lora/{a,b} w", "dr rtf tfd", {"f": 7}),
    "a free name": ("q_lora_{a,b} q", "dr rf df", {"f": 7}),
}


@pytest.mark.parametrize("name", UNSETTLED)
def test_what_neither_sizes_nor_names_settle_is_an_error(name):
    *layer, sizes = UNSETTLED[name]
    leaves, kernel = read(*layer)
    tree = tree_of(leaves, SIZES | sizes)
    path = next(iter(leaves))
    with pytest.raises(ValueError, match="its axes can be inputs") as error:
        found(tree)
    assert f"kernels={{'{path}': (path, input axes, output axes)}}" in str(error)
    given = {path: (kernel.path, kernel.inputs, kernel.outputs)}
    assert found(tree, given) == [kernel]  # the remedy works
    assert found(tree_of(leaves)) == [kernel]  # control: other sizes settle it


@pytest.mark.parametrize("seed", range(40))
def test_any_order_of_axes_is_read_from_sizes_that_differ(seed):
    """One to three features a side, up to two stacked axes, flattened or not."""
    rng = np.random.default_rng(seed)
    inputs, outputs, stack = (
        letters[:count]
        for letters, count in zip(
            ("dnh", "fkc", "LE"), (*rng.integers(1, 4, 2), rng.integers(3)), strict=True
        )
    )
    flat = ["*" if rng.integers(2) and len(x) > 1 else "" for x in (inputs, outputs)]
    factors = f"{stack}{inputs}{flat[0]}r", f"{stack}r{outputs}{flat[1]}"
    # Any interleaving that keeps the order within each group.
    groups = [list(inputs), list(outputs), list(stack)]
    kernel = ""
    while any(groups):
        kernel += groups[rng.choice([i for i, x in enumerate(groups) if x])].pop(0)
    # Products of different primes are equal for equal sets of axes only.
    sizes = SIZES | dict(
        zip("dnhfkcLE", (2, 3, 5, 7, 11, 13, 17, 19), strict=True), r=1
    )
    tree = tree_of({"q_lora_a": factors[0], "q_lora_b": factors[1], "q": kernel}, sizes)
    ends = len(shape_of(factors[0])) - 1, len(stack)
    axes = tuple(range(len(stack)))
    pairs = [LoRAPair("q_lora_a", "q_lora_b", *ends, axes, axes)]
    (result,) = found(tree, pairs=pairs)
    assert result == due("q", kernel, stack + inputs)


def test_kernels_go_to_the_papers_layout_and_back():
    """Against `einsum`, for stacked interleaved heads."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal(shape_of("nLdh")), jnp.float32)
    kernel = Kernel("q", (1,), (2,), (0, 3))
    matrix = as_matrix(kernel, x)
    want = jnp.einsum("nLdh->Lnhd", x).reshape(8, 15, 7)
    np.testing.assert_array_equal(matrix, want)
    np.testing.assert_array_equal(as_kernel(kernel, matrix, x.shape), x)
    # Negative control: outputs in another order are another matrix.
    other = as_matrix(kernel._replace(outputs=(3, 0)), x)
    assert not np.array_equal(other, want)


@pytest.mark.parametrize("layouts", ["nLhr rLd", "Lrd Lfr", "rcnk frxy"])
def test_factors_leave_the_papers_layout_for_their_own(layouts):
    """The stacked `(r, features)` of either factor is put where its leaf has it."""
    a, b = layouts.split()
    names = ("lora_A.weight", "lora_B.weight") if a[-1] != "r" else ("lora_a", "lora_b")
    (pair,) = find_pairs(tree_of({names[0]: a, names[1]: b}))
    for letters, axes in zip((a, b), pair.factor_axes, strict=True):
        leaf = np.arange(math.prod(shape_of(letters))).reshape(shape_of(letters))
        paper = sorted(letters, key=lambda x: (not x.isupper(), x != "r"))
        matrix = np.einsum(f"{letters}->{''.join(paper)}", leaf)
        stack = [SIZES[x] for x in letters if x.isupper()]
        matrix = jnp.asarray(matrix.reshape(*stack, SIZES["r"], -1))
        np.testing.assert_array_equal(as_factor(matrix, axes, leaf.shape), leaf)


def test_kernels_of_other_names_are_given_by_regex():
    """Groups of the regex go into the path; what no regex matches is searched for."""
    leaves = {"r": ("lora_a", "lora_b"), "s": ("lora_a", "lora_b")}
    tree = {
        f"layers/{i}/{x}/{name}": zeros("dr" if name == "lora_a" else "rf")
        for i, (x, names) in itertools.product(range(2), leaves.items())
        for name in names
    }
    tree |= {f"layers/{i}/weights_of/r": zeros("df") for i in range(2)}
    tree |= {f"layers/{i}/s/kernel": zeros("df") for i in range(2)}
    result = found(tree, {r"(.*)/(r)/lora_a": r"\1/weights_of/\2"})
    assert [x.path for x in result] == [
        f"layers/{i}/{x}" for i in range(2) for x in ("weights_of/r", "s/kernel")
    ]


def test_a_regex_has_to_match_the_whole_path():
    """In a list, "4" is not "14"."""
    leaves = [zeros("df"), *[zeros("d")] * 3, zeros("dr"), zeros("rf")]
    tree = leaves + [zeros("d")] * 7 + [zeros("df"), zeros("dr"), zeros("rf")]
    pairs = [("4", "5"), ("14", "15")]
    result = found(tree, {"4": "0", "14": "13"}, pairs=pairs)
    assert [x.path for x in result] == ["0", "13"]


def test_the_nearest_kernel_that_fits_counts():
    """An adapter of an adapter's base; a layer within a layer called lora."""
    leaves = {"q/lora/lora_a": "dr", "q/lora/lora_b": "rf", "q/kernel": "df"}
    assert found(tree_of(leaves))[0].path == "q/kernel"
    leaves["q/lora/kernel"] = "df"
    assert found(tree_of(leaves))[0].path == "q/lora/kernel"
    leaves["q/lora/kernel"] = "fd"  # it reads the other way round, but fits
    assert found(tree_of(leaves))[0].path == "q/lora/kernel"
    leaves["q/lora/kernel"] = "de"
    assert found(tree_of(leaves))[0].path == "q/kernel"


@pytest.mark.parametrize("parts", [("array/qvalue", "array/scale"), ("codes", "scale")])
def test_a_quantised_kernel_has_the_path_of_its_parts(parts):
    tree = tree_of({"q/kernel_lora_a": "dr", "q/kernel_lora_b": "rf"})
    tree[f"q/kernel/{parts[0]}"] = zeros("df", dtype=jnp.int8)
    tree[f"q/kernel/{parts[1]}"] = zeros("xf")
    assert found(tree) == [Kernel("q/kernel", (), (0,), (1,))]


def test_codes_are_integers_and_tiny_floats():
    quantized = ["int8", "uint4", "int4", "float8_e4m3fn", "int32"]
    values = ["float32", "bfloat16", "float16"]
    assert all(is_quantized(zeros("df", dtype=jnp.dtype(x))) for x in quantized)
    assert not any(is_quantized(zeros("df", dtype=jnp.dtype(x))) for x in values)
    assert not is_quantized(jax.random.key(0))


ERRORS = {
    "missing": (
        {"q/lora_a": "dr", "q/lora_b": "rf", "k/kernel": "df"},
        None,
        r"No base weight of `q/lora_a` \(7, 2\) .*'q/kernel'.*nnx\.state\(model\).*"
        r"kernels={'q/lora_a': path}",
    ),
    "another size": (
        {"q/lora_a": "dr", "q/lora_b": "rf", "q/kernel": "de"},
        None,
        r"`q/kernel` \(7, 13\): the sizes do not fit",
    ),
    "two of them": (
        {"q/lora_a": "dr", "q/lora_b": "rf", "q/kernel": "df", "q/weight": "df"},
        None,
        r"`q/kernel` fits; `q/weight` fits",
    ),
    "a wrong path": (
        {"q/lora_a": "dr", "q/lora_b": "rf", "q/kernel": "df"},
        {"q/lora_a": "q/kernl"},
        r"no such leaf. Close to it: \['q/kernel'",
    ),
    "given, but of another size": (
        {"q/lora_a": "dr", "q/lora_b": "rf", "q/kernel": "de"},
        {"q/lora_.": "q/kernel"},
        r"`q/kernel` \(7, 13\): the sizes do not fit",
    ),
    "wrong axes": (
        {"q/lora_a": "dr", "q/lora_b": "rf", "q/kernel": "df"},
        {"q/lora_a": ("q/kernel", 1, 0)},
        r"inputs \(1,\) and outputs \(0,\) have sizes \(\(\), 11, 7\), not",
    ),
    "one axis twice": (
        {"q/lora_a": "dr", "q/lora_b": "rf", "q/kernel": "df"},
        {"q/lora_a": ("q/kernel", 0, -2)},
        r"are no inputs and outputs of 2 axes",
    ),
    "no regex": (
        {"q/lora_a": "dr", "q/lora_b": "rf", "q/kernel": "df"},
        {"(": "q/kernel"},
        r"is no regular expression",
    ),
    "no such group": (
        {"q/lora_a": "dr", "q/lora_b": "rf", "q/kernel": "df"},
        {".*": r"\1/kernel"},
        r"is no regular expression with its template",
    ),
    "no entry": (
        {"q/lora_a": "dr", "q/lora_b": "rf", "q/kernel": "df"},
        {".*": ("q/kernel", 0)},
        r"It maps to a path, or to",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_pair_and_the_remedy(name):
    leaves, kernels, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        found(tree_of(leaves), kernels)


def test_pairs_with_names_of_their_own_need_to_be_told():
    """lorax's `b` is the factor on the input side; nothing says so in the tree."""
    tree = tree_of(
        {"dense/kernel/w": "df", "dense/kernel/b": "dr", "dense/kernel/a": "rf"}
    )
    pairs = [LoRAPair("dense/kernel/b", "dense/kernel/a")]
    with pytest.raises(ValueError, match="its name is no help"):
        found(tree, pairs=pairs)
    assert found(tree, {"(.*)/b": r"\1/w"}, pairs=pairs)[0].path == "dense/kernel/w"
