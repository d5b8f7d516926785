"""The order of square kernels: what in a tree proves it, and what does not.

Layouts are in letters as in `test_kernels.py`: `d` and `f` are features of a layer, of
equal size where it is square; `r` is the rank, `L` stacked layers.
"""

import ast
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorapro_jax import estimate_gradients, find_pairs
from lorapro_jax.weights._find import find_kernels

RANK, DEPTH = 2, 3


def struct(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def layer(inputs, outputs, order="in,out", name="kernel", *, adapted=True, bias=True):
    """A layer as Flax has it: its kernel in either order, A `(in, r)`, B `(r, out)`."""
    sides = (inputs, outputs) if order == "in,out" else (outputs, inputs)
    leaves = {name: struct(*sides)}
    if bias:
        leaves["bias"] = struct(outputs)
    if adapted:
        leaves |= {"lora_a": struct(inputs, RANK), "lora_b": struct(RANK, outputs)}
    return leaves


def torch_layer(inputs, outputs, order, *, adapted=True):
    """The same as PEFT has it: A `(r, in)`, B `(out, r)`."""
    sides = (inputs, outputs) if order == "in,out" else (outputs, inputs)
    leaves = {"weight": struct(*sides), "bias": struct(outputs)}
    if adapted:
        leaves["lora_A"] = {"weight": struct(RANK, inputs)}
        leaves["lora_B"] = {"weight": struct(outputs, RANK)}
    return leaves


def gpt2(order, make=layer, width=8, **options):
    """The layers of one block of GPT-2; `attn/c_proj` is square."""
    return {
        "attn": {
            "c_attn": make(width, 3 * width, order, **options),
            "c_proj": make(width, width, order),
        },
        "mlp": {
            "c_fc": make(width, 4 * width, order, **options),
            "c_proj": make(4 * width, width, order, **options),
        },
    }


def read(tree, kernels=None, **options):
    """The order in which each kernel was read, by path."""
    found = find_kernels(tree, find_pairs(tree), kernels, **options)
    return {
        x.path: "in,out" if x.inputs < x.outputs else "out,in"
        for x in found
        if len(x.inputs) == len(x.outputs) == 1
    }


ORDERS = ["in,out", "out,in"]
MAKES = {"Flax": layer, "PEFT": torch_layer}


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("adapted", [True, False])
def test_every_layer_of_gpt_2_is_read_alike(order, make, adapted):
    """Flax's Conv1D is (out, in), PyTorch's is (in, out); Dense and Linear reverse it.

    The others are adapted, or frozen with a bias.
    """
    tree = {str(i): gpt2(order, MAKES[make], adapted=adapted) for i in range(2)}
    orders = read(tree)
    assert set(orders.values()) == {order}
    assert len(orders) == (8 if adapted else 2)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("adapted", [True, False])
def test_stacked_layers_are_witnesses_of_stacked_layers(order, axis, adapted):
    def stacked(x):
        # As `nn.scan` has it; all that has one axis only has the layers behind it.
        return struct(*np.insert(x.shape, min(axis, len(x.shape)), DEPTH).tolist())

    tree = jax.tree.map(stacked, gpt2(order, adapted=adapted))
    found = find_kernels(tree, find_pairs(tree))
    assert all(x.batch == (axis,) for x in found)
    assert set(read(tree).values()) == {order}


@pytest.mark.parametrize("seed", range(30))
def test_random_trees_of_one_order_are_read_in_it(seed):
    """Square and other layers, any names, biases and adapters, if anything proves."""
    rng = np.random.default_rng(seed)
    order, name = ORDERS[seed % 2], str(rng.choice(["kernel", "w", "weight", "free"]))
    tree, proven = {}, False
    for i in range(int(rng.integers(2, 7))):
        inputs, outputs = (int(x) for x in rng.choice([6, 10], 2))
        adapted, bias = i == 0 or rng.integers(2), bool(rng.integers(2))
        made = layer(inputs, outputs, order, name, adapted=adapted, bias=bias)
        if name == "free":  # qwix calls its factors like the kernel
            made = {f"free_{k}" if "lora" in k else k: v for k, v in made.items()}
        tree[f"layer{i}"] = made
        proven |= inputs != outputs and bool(adapted or bias)
    squares = [
        x for x in tree.values() if {6} == {*x[name].shape} or {10} == {*x[name].shape}
    ]
    if proven or not any(len(x) > 2 for x in squares):
        assert set(read(tree).values()) == {order}
    else:
        with pytest.raises(ValueError, match=f"no other leaf called `{name}` proves"):
            read(tree)


UNPROVEN = {
    "Linen": {"q": layer(8, 8)},
    "scanned": {"q": jax.tree.map(lambda x: struct(DEPTH, *x.shape), layer(8, 8))},
    "a weight": {"q": layer(8, 8, name="weight")},
    "an einsum": {"q": layer(8, 8, name="w")},
    "PEFT": {"q": torch_layer(8, 8, "out,in")},
    "nnx.LoRA": {"q": layer(8, 8) | {"base_module": {"kernel": struct(8, 8)}}},
    "another name": {"q": layer(8, 8), "up": layer(8, 16, name="weight")},
    "no witness": {"q": layer(8, 8), "up": layer(8, 16, adapted=False, bias=False)},
    "a bias of another size": {
        "q": layer(8, 8),
        "up": {"kernel": struct(8, 16), "bias": struct(4)},
    },
}
del UNPROVEN["nnx.LoRA"]["q"]["kernel"]


@pytest.mark.parametrize("name", UNPROVEN)
def test_what_nothing_proves_is_an_error_whose_remedy_works(name):
    """The key and either entry of the message, to the letter; then others follow."""
    tree = {"one": UNPROVEN[name], "two": UNPROVEN[name]}
    with pytest.raises(ValueError, match="is not clear") as error:
        read(tree)
    found = re.search(
        r"tells: (.*) or (.*)\. Said of.* `kernels={(.*): \(path, input",
        str(error.value),
    )
    assert found
    first, second, key = map(ast.literal_eval, found.groups())
    for order, entry in zip(ORDERS, (first, second), strict=True):
        orders = read(tree, {key: entry})
        assert orders[entry[0]] == order
        assert orders[entry[0].replace("one", "two")] == order


@pytest.mark.parametrize("make", MAKES)
def test_layers_that_disagree_are_an_error_that_names_both(make):
    """GPT-2 beside a model with the usual layers: the square ones may be either's."""
    make = MAKES[make]
    tree = {"text": gpt2("out,in", make), "image": gpt2("in,out", make)}
    with pytest.raises(ValueError, match="disagree") as error:
        read(tree)
    witnesses = str(error.value).split("disagree: ")[1]
    before, after = witnesses.split(", outputs in ")
    assert "`image/" in before
    assert "`text/" in after
    name = "kernel" if make is layer else "weight"
    factor = "lora_a" if make is layer else "lora_A/weight"
    given = {
        f"{model}/(.*)/{factor}": (rf"{model}/\1/{name}", *axes)
        for model, axes in (("text", (1, 0)), ("image", (0, 1)))
    }
    orders = read(tree, given)
    assert {x: y for x, y in orders.items() if x.startswith("text")} == dict.fromkeys(
        read({"text": tree["text"]}), "out,in"
    )
    assert set(orders.values()) == set(ORDERS)


def test_kernels_with_as_many_axes_count_first():
    """A convolution does not speak for a matrix, unless there is nothing else."""
    conv = {
        "kernel": struct(3, 5, 7), "bias": struct(7),
        "lora_a": struct(3, 5, RANK), "lora_b": struct(RANK, 7),
    }  # fmt: skip
    square = layer(8, 8)
    assert read({"conv": conv, "q": square})["q/kernel"] == "in,out"
    text = gpt2("out,in")
    assert set(read({"conv": conv, "q": square, **text}).values()) == {"out,in"}


def test_a_bias_of_heads_proves_the_order_of_its_own_kernel():
    """What qwix flattens in attention: 12 = 3 · 4 on either side."""
    query = {"kernel": struct(12, 3, 4), "bias": struct(3, 4)}
    out = {"kernel": struct(3, 4, 12), "bias": struct(12)}
    factors = {"kernel_lora_a": struct(12, RANK), "kernel_lora_b": struct(RANK, 12)}
    tree = {"query": query | factors, "out": out | factors}
    by_path = {x.path: x for x in find_kernels(tree, find_pairs(tree))}
    assert by_path["query/kernel"].inputs == (0,)
    assert by_path["out/kernel"].inputs == (0, 1)
    # Negative control: without them nothing does.
    for name in tree:
        del tree[name]["bias"]
    with pytest.raises(ValueError, match="no other leaf called `kernel` proves"):
        find_kernels(tree, find_pairs(tree))


def test_tables_and_convolutions_of_pytorch_do_not_speak_for_its_layers():
    """PEFT calls all of them `weight`; each has its own order."""
    table = {"weight": struct(50, 8)}
    table |= {"lora_embedding_A": struct(RANK, 50), "lora_embedding_B": struct(8, RANK)}
    conv = {"weight": struct(6, 8, 3, 3), "bias": struct(6)}
    conv["lora_A"] = {"weight": struct(RANK, 8, 3, 3)}
    conv["lora_B"] = {"weight": struct(6, RANK, 1, 1)}
    for others in ({"wte": table}, {"conv": conv}, {"wte": table, "conv": conv}):
        tree = {**others, "q": torch_layer(8, 8, "out,in", adapted=True)}
        with pytest.raises(ValueError, match="no other leaf called `weight` proves"):
            read(tree)
        tree |= gpt2("in,out", torch_layer)
        orders = read(tree)
        assert orders["q/weight"] == orders["attn/c_proj/weight"] == "in,out"


def test_what_lies_like_a_lora_linear_is_one_unless_others_contradict():
    """`lora/lora_a` beside `kernel`, all square; then beside a Conv1D."""
    factors = {"lora_a": struct(8, RANK), "lora_b": struct(RANK, 8)}
    alone = {"q": {"kernel": struct(8, 8), "lora": factors}}
    assert read(alone) == {"q/kernel": "in,out"}
    with pytest.raises(ValueError, match="disagree"):
        read(alone | gpt2("out,in"))


def test_estimates_need_no_order():
    """Where a gradient is wanted, the path of its kernel is all there is to know."""
    params = {"q": {"kernel": jnp.eye(4), "lora_a": jnp.ones((4, 1))}}
    params["q"]["lora_b"] = jnp.zeros((1, 4))
    loss = lambda p, x: jnp.sum(x @ p["q"]["kernel"])
    found = estimate_gradients(loss, params, [jnp.ones(4)], progress=False)
    np.testing.assert_array_equal(found["q/kernel"], np.ones((4, 4)))
    with pytest.raises(ValueError, match="is not clear"):
        find_kernels(params, find_pairs(params))


def test_known_layers_prove_their_own_order_and_that_of_others():
    """What `initialize_model` knows of the classes of an NNX model."""
    tree = {"q": layer(8, 8), "k": layer(8, 8)}
    for order in ORDERS:
        assert set(read(tree, known={"q/kernel": order}).values()) == {order}


def test_axes_of_size_one_leave_nothing_to_prove():
    tree = {"q": layer(1, 8), "k": layer(8, 1)}
    assert len(find_kernels(tree, find_pairs(tree))) == 2
    model = nnx.LoRALinear(1, 1, lora_rank=1, rngs=nnx.Rngs(0))
    state = nnx.state(model)
    assert len(find_kernels(state, find_pairs(state))) == 1


def test_the_bias_of_an_adapter_is_no_witness():
    """PEFT's `lora_bias`: B is a `weight` with a `bias`, and no kernel."""
    other = torch_layer(8, 16, "in,out")
    other["lora_B"]["bias"] = struct(16)
    del other["weight"], other["bias"]
    tree = {"q": torch_layer(8, 8, "in,out"), "gone": other}
    pairs = [("q/lora_A/weight", "q/lora_B/weight")]
    with pytest.raises(ValueError, match="no other leaf called `weight` proves"):
        find_kernels(tree, find_pairs(tree, pairs=pairs))
