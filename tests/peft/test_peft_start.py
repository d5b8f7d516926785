"""PEFT files of adapters whose start was taken off the base weights."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from lorapro_jax import find_pairs, initialize_adapters
from lorapro_jax.initializers import lora_ga, pissa
from lorapro_jax.peft import load_peft_adapter, save_peft_adapter
from lorapro_jax.weights._find import find_kernels
from tests.support.layers import MODELS, RANK, TOLERANCE, gradients_of, normal, replaced
from tests.support.layouts import distance, leaves_by_path
from tests.support.peft_files import WEIGHTS, pair_tree, read

# What qwix still calls is deprecated in Flax.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:qwix.*"),
    pytest.mark.usefixtures("quick_compiles"),
]

KEY = jax.random.key(7)
LAYER = "base_model.model.{}.lora_{}.weight"
EMBEDDING = "base_model.model.{}.lora_embedding_{}"


def slashed(params):
    return {path.replace(".", "/"): x for path, x in leaves_by_path(params).items()}


def train(params, pairs, seed=11):
    """Some other factors; all else as it is."""
    leaves = slashed(params)
    move = lambda x, seed: x + (0.2 * jnp.std(x) * normal(*x.shape, seed=seed))
    paths = [path for pair in pairs for path in pair[:2]]
    moved = {path: move(leaves[path], seed + i) for i, path in enumerate(paths)}
    return replaced(params, {x: y.astype(leaves[x].dtype) for x, y in moved.items()})


def name_of(pair):
    """The path of A, without what PEFT calls it, and a place for each stacked axis."""
    layer = pair.a.replace("/", ".").removesuffix(".lora_A.default.weight")
    return layer + ".{}" * len(pair.a_batch_axes)


def change_in(folder, pair, kernel, letters, inputs, shape):
    """s B A of a file, in the axes of a kernel."""
    tensors, config = read(folder)
    sizes = dict(zip(letters, shape, strict=True))
    stack = "".join(x for x in letters if x.isupper())
    outputs = "".join(x for x in letters if x not in stack + inputs)
    if "conv" in kernel.lower() and kernel.endswith("kernel"):
        inputs = inputs[-1] + inputs[:-1]  # PyTorch has channels before the window
    layers = []
    for index in np.ndindex(*(sizes[x] for x in stack)):
        name = name_of(pair).format(*index)
        key = EMBEDDING if EMBEDDING.format(name, "A") in tensors else LAYER
        a, b = (np.float64(tensors[key.format(name, side)]) for side in "AB")
        assert len(a) == b.shape[1] == config["r"]
        product = b.reshape(b.shape[:2]) @ a.reshape(len(a), -1)
        layers.append(config["lora_alpha"] / config["r"] * product)
    dense = np.reshape(layers, [sizes[x] for x in stack + outputs + inputs])
    return jnp.asarray(np.einsum(f"{stack}{outputs}{inputs}->{letters}", dense))


@pytest.mark.parametrize("method", [lora_ga(), pissa()], ids=lambda x: x.name)
@pytest.mark.parametrize("layout", MODELS)
def test_the_file_makes_the_original_weights_those_of_the_trained_model(
    layout, method, tmp_path
):
    """W0 with the s B A of the file computes what the trained model computes."""
    params, apply, kernels, options = MODELS[layout]()
    pairs = find_pairs(params, **options)
    leaves = slashed(params)
    params = replaced(params, {pair.b: 0 * leaves[pair.b] for pair in pairs})
    gradients = gradients_of(params, kernels)
    initial = initialize_adapters(method, params, gradients, key=KEY, **options)
    after = train(initial, pairs)

    options = {**options, "module_names": name_of}
    if "conv" in str(pairs).lower():
        options["conv"] = "(?i)conv"
    save_peft_adapter(tmp_path / "with", after, initial=initial, **options)
    save_peft_adapter(tmp_path / "without", after, **options)

    outputs = {}
    for folder, rank in (("with", 2 * RANK), ("without", RANK)):
        assert read(tmp_path / folder)[1]["r"] == rank
        new = {}
        for pair, kernel in zip(pairs, find_kernels(params, pairs), strict=True):
            path, w = kernel.path, leaves[kernel.path]
            new[path] = w + change_in(
                tmp_path / folder, pair, path, *kernels[path], w.shape
            )
        outputs[folder] = apply(replaced(params, new))
    want = apply(after)
    assert distance(outputs["with"], want) < TOLERANCE
    # Negative controls: training moved the model, and the start counts.
    assert distance(apply(initial), want) > 20 * TOLERANCE
    assert distance(outputs["without"], want) > 20 * TOLERANCE


def layers_of(ranks, base=jnp.float32, factor=jnp.float32):
    """Dense layers of these ranks, after PiSSA and after training, at alpha 6."""
    params = {}
    for seed, (name, rank) in enumerate(ranks.items()):
        a, b = jnp.ones((16, rank), factor), jnp.zeros((rank, 12), factor)
        kernel = normal(16, 12, seed=seed).astype(base)
        params[name] = {"kernel": kernel, "lora_a": a, "lora_b": b}
    return params


@pytest.mark.parametrize("rslora", [False, True])
def test_mixed_ranks_keep_their_scales(rslora, tmp_path):
    """PEFT's own conversion cannot do this with rsLoRA."""
    ranks, options = {"q": 2, "k": 3, "v": 2}, {"alpha": 6.0, "rslora": rslora}
    params = layers_of(ranks)
    initial = initialize_adapters(pissa(), params, key=KEY, **options)
    after = train(initial, find_pairs(params))

    save_peft_adapter(tmp_path, after, initial=initial, **options)

    tensors, config = read(tmp_path)
    assert (config["r"], config["rank_pattern"]) == (4, {"^k": 6})
    divisor = math.sqrt if rslora else float
    for name, rank in ranks.items():
        a, b = (tensors[LAYER.format(name, side)] for side in "AB")
        alpha = config["alpha_pattern"].get(f"^{name}", config["lora_alpha"])
        scale = alpha / divisor(2 * rank)
        assert scale == pytest.approx(6.0 / divisor(rank), rel=1e-12)
        new = after[name]
        effective = new["kernel"] + scale * new["lora_a"] @ new["lora_b"]
        original = params[name]["kernel"]
        assert distance(original + scale * (b @ a).T, effective) < TOLERANCE
        # Negative control: alpha as it was, at twice the rank.
        wrong = 6.0 / divisor(2 * rank)
        assert distance(original + wrong * (b @ a).T, effective) > 20 * TOLERANCE


def test_a_bfloat16_file_lacks_only_the_rounding_of_the_base_weights(tmp_path):
    """Its factors are exact; the trained model's W0 - s B0 A0 is rounded, up to 2⁻⁸."""
    params = layers_of({"q": 2}, jnp.bfloat16, jnp.bfloat16)
    initial = initialize_adapters(pissa(), params, key=KEY, scale=2.0)
    after = train(initial, find_pairs(params))

    save_peft_adapter(tmp_path, after, initial=initial, scale=2.0)

    tensors, _ = read(tmp_path)
    a, b = (tensors[LAYER.format("q", side)] for side in "AB")
    assert a.dtype == b.dtype == jnp.bfloat16
    old, new = initial["q"], after["q"]
    np.testing.assert_array_equal(a.T, np.hstack([new["lora_a"], old["lora_a"]]))
    np.testing.assert_array_equal(b.T, np.vstack([new["lora_b"], -old["lora_b"]]))

    wide = lambda x: np.asarray(x, np.float64)
    effective = wide(new["kernel"]) + 2 * wide(new["lora_a"]) @ wide(new["lora_b"])
    exact = wide(params["q"]["kernel"]) + 2 * (wide(b) @ wide(a)).T
    rounding = np.abs(effective - exact)
    assert (rounding <= 2.0**-8 * np.abs(wide(new["kernel"])) + 1e-6).all()
    assert rounding.max() > 1e-4  # control: it is there


def test_factors_of_two_precisions_are_saved_in_the_wider_one(tmp_path):
    tree, start = pair_tree(), pair_tree(1, jnp.bfloat16)
    save_peft_adapter(tmp_path, tree, initial=start)
    tensors = safetensors.numpy.load_file(tmp_path / WEIGHTS)
    a = tensors[LAYER.format("mlp.up", "A")]
    assert a.dtype == np.float32
    np.testing.assert_array_equal(a[2:], start["mlp"]["up"]["lora_a"].T)


def test_it_comes_back_into_a_tree_of_twice_the_rank(tmp_path):
    tree, start = pair_tree(), pair_tree(1)
    save_peft_adapter(tmp_path, tree, initial=start, scale=3.0)
    wide = {"lora_a": jnp.zeros((6, 4)), "lora_b": jnp.zeros((4, 5))}
    back = load_peft_adapter(tmp_path, {"mlp": {"up": wide}}, scale=3.0)["mlp"]["up"]
    new, old = tree["mlp"]["up"], start["mlp"]["up"]
    want = new["lora_a"] @ new["lora_b"] - old["lora_a"] @ old["lora_b"]
    np.testing.assert_allclose(back["lora_a"] @ back["lora_b"], want, atol=1e-5)
    with pytest.raises(ValueError, match=r"`mlp\.up` has rank 4 .* here 2"):
        load_peft_adapter(tmp_path, tree, scale=3.0)


def test_a_state_of_nnx_that_followed_its_model_is_an_error(tmp_path):
    """In training it changes with the model; a copy does not."""
    model = nnx.LoRALinear(6, 5, lora_rank=2, rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.LoRAParam)
    unstarted = jax.device_get(state)
    model.lora.lora_b[...] += 1.0
    copy = jax.device_get(state)
    model.lora.lora_b[...] += 1.0
    after = nnx.state(model, nnx.LoRAParam)
    save = lambda initial: save_peft_adapter(
        tmp_path / "adapter", after, initial=initial, module_names={"": "up"}
    )
    with pytest.raises(ValueError, match=r"same values .* `jax\.device_get\(params\)`"):
        save(state)
    with pytest.raises(ValueError, match="B is 0 everywhere in `initial`"):
        save(unstarted)
    assert not (tmp_path / "adapter").exists()
    save(copy)


@pytest.mark.parametrize(
    ("initial", "match"),
    [
        ({}, r"no \['mlp/up/lora_a', 'mlp/up/lora_b'\], which `params` has"),
        ({"mlp": {"up": {"lora_a": jnp.ones((6, 2))}}}, r"no \['mlp/up/lora_b'\]"),
        (
            {"mlp": {"up": {"lora_a": jnp.ones((6, 3)), "lora_b": jnp.ones((3, 5))}}},
            r"`mlp/up/lora_a` has shape \(6, 3\) in `initial` and \(6, 2\)",
        ),
        (jax.eval_shape(pair_tree), "ShapeDtypeStruct"),
    ],
)
def test_a_start_that_does_not_fit_is_an_error(initial, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        save_peft_adapter(tmp_path / "adapter", pair_tree(), initial=initial)
    assert not (tmp_path / "adapter").exists()
