"""Language models in tunix, transformers and peft: one folder, the same logits."""

import dataclasses
import json
import sys
import types
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from lorapro_jax.peft import load_peft_adapter
from tests.support.deprecations import LANGUAGE_MODELS
from tests.support.torch_models import outputs_of, seeded

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("tunix")

with warnings.catch_warnings():  # tunix imports what is deprecated in JAX
    warnings.simplefilter("ignore", DeprecationWarning)
    from tunix.models.gemma3 import model as gemma3_config

    from examples.finetune_llm import (
        adapters,
        export,
        kernels,
        models,
        names,
        rotary,
        starts,
    )
    from examples.finetune_llm.data import Example
    from examples.finetune_llm.errors import Refused
    from examples.finetune_llm.rotary import Scaling, frequencies

pytestmark = [*LANGUAGE_MODELS, pytest.mark.usefixtures("quick_compiles")]

TOLERANCE = 1e-4  # of the largest logit, in float32: what the example promises
WORDS, LENGTH = 64, 40
TEXT = np.random.default_rng(0).integers(1, WORDS, (2, LENGTH)).astype(np.int32)
SIZES: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
# Llama 3.2's, but for the length that it had before, so that 40 tokens see it all.
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
GEMMA_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
GEMMA: dict[str, Any] = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5}
GEMMA |= {"rope_parameters": GEMMA_ROPE, "pad_token_id": 0}


def llama(**more):
    more = {"rope_parameters": LLAMA3, "head_dim": 8, "rms_norm_eps": 1e-5} | more
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | more))


def qwen2(**more):
    more = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}} | more
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES | more))


def qwen3(**more):  # 5e6 is Qwen3-4B-Instruct-2507's; tunix has 1e6 built in
    more = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}} | more
    config = transformers.Qwen3Config(**SIZES | {"head_dim": 16} | more)
    return transformers.Qwen3ForCausalLM(config)


def gemma3(**more):
    config = transformers.Gemma3TextConfig(**SIZES | GEMMA | more)
    return transformers.Gemma3ForCausalLM(config)


def gemma3_with_images():
    """As those from 4B on are; the part for images goes along as it is."""
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    marks = ("image_token_index", "boi_token_index", "eoi_token_index")
    config = transformers.Gemma3Config(
        text_config=SIZES | GEMMA, vision_config=vision, mm_tokens_per_image=4,
        **dict.fromkeys(marks, 0),
    )  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(config)


FAMILIES = {
    "llama": llama,
    "llama tied": lambda: llama(tie_word_embeddings=True),
    "qwen2": qwen2,
    "qwen3": lambda: qwen3(tie_word_embeddings=True),
    "gemma3": gemma3,  # keys and values in one array
    "gemma3 fused": lambda: gemma3(num_key_value_heads=4),
    "gemma3 narrow": lambda: gemma3(num_key_value_heads=1),
    "gemma3 with images": gemma3_with_images,
}
PLAIN = ("llama", "qwen2", "qwen3", "gemma3", "gemma3 fused")
EXPORTED = (*PLAIN, "gemma3 with images")
ALL = (*kernels.ATTENTION, *kernels.MLP)


def in_torch(name):
    norms = 0.0 if name.startswith("gemma") else 1.0
    return seeded(FAMILIES[name], norms=norms)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """The folder of each family, made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("base")
            in_torch(name).save_pretrained(made[name])
        return made[name]

    return get


def logits_of(spec, model):
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (len(TEXT), 1))
    mask = np.tril(np.ones((len(TEXT), LENGTH, LENGTH), bool))
    graph, state = nnx.split(model)

    @jax.jit
    def run(state):
        with jax.default_matmul_precision("highest"):
            return models.apply(spec, nnx.merge(graph, state), TEXT, positions, mask)

    return np.asarray(run(state))


def distance(got, want):
    return np.abs(got - want).max() / np.abs(want).max()


def in_transformers(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return outputs_of(model.eval().float(), TEXT)


# Loading


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_those_of_transformers(folder_of, name):
    spec = models.read_spec(folder_of(name))
    got = logits_of(spec, models.load(spec, None, jnp.float32))
    assert distance(got, outputs_of(in_torch(name), TEXT)) < TOLERANCE


def test_several_files_and_layers_that_see_everything_load(tmp_path):
    """Seven layers, of which Gemma's sixth has full attention and scaled positions."""
    make = lambda: gemma3(num_hidden_layers=7, num_key_value_heads=1)
    model = seeded(make, norms=0.0)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    spec = models.read_spec(tmp_path)
    got = logits_of(spec, models.load(spec, None, jnp.float32))
    assert distance(got, outputs_of(model, TEXT)) < TOLERANCE


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_tunix_alone_turns_by_another_base(folder_of, name):
    """Why `rotary.py` is there; if this fails, it can go."""
    spec = models.read_spec(folder_of(name))
    model = models.load(spec, None, jnp.float32)
    for layer in model.layers:
        layer.attn.__class__ = type(layer.attn).__mro__[1]
    got = logits_of(spec, model)
    assert distance(got, outputs_of(in_torch(name), TEXT)) > 1e2 * TOLERANCE


@pytest.mark.parametrize("length", [32, 8192])
def test_frequencies_are_those_of_transformers(length):
    rope = LLAMA3 | {"original_max_position_embeddings": length}
    config = transformers.LlamaConfig(
        **SIZES, head_dim=64, rope_parameters=rope, max_position_embeddings=131_072
    )
    compute = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"]
    want, _ = compute(config, "cpu")
    got = frequencies(rope["rope_theta"], 64, Scaling(32.0, 1.0, 4.0, length))
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-6)
    plain = frequencies(rope["rope_theta"], 64, None)
    np.testing.assert_allclose(plain[-1] / want[-1], 32.0, rtol=1e-6)  # control


def test_configs_of_transformers_4_are_read_alike(folder_of, tmp_path):
    for name, old in {
        "llama": {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        "qwen3": {"rope_theta": 5e6, "rope_scaling": None},
        "gemma3": {
            "rope_theta": 1e6, "rope_local_base_freq": 1e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "sliding_window_pattern": 6,
        },
    }.items():  # fmt: skip
        new = models.read_spec(folder_of(name))
        config = new.config | old
        for entry in ("rope_parameters", "layer_types", "_sliding_window_pattern"):
            config.pop(entry, None)
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert models.read_spec(tmp_path).model_config == new.model_config, name


def test_the_config_of_gemma_3_4b_is_read(tmp_path):
    """As on the hub, where it leaves out what is transformers' default."""
    text: dict[str, Any] = {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
        "num_hidden_layers": 34, "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    }  # fmt: skip
    config: dict[str, Any] = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": text,
    }
    config |= {"vision_config": {"hidden_size": 1152}, "initializer_range": 0.02}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = models.read_spec(tmp_path).model_config
    want = gemma3_config.ModelConfig.gemma3_4b_it()
    for entry in dataclasses.fields(want):
        if entry.name not in ("vision_config", "num_embed"):
            got = getattr(found, entry.name), getattr(want, entry.name)
            assert got[0] == got[1], (entry.name, got)
    assert (found.num_embed, found.vision_config) == (262_208, None)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3"])
def test_logits_with_a_cache_are_those_without(folder_of, name):
    """As tunix's sampler calls a model: 30 tokens, then one by one."""
    spec = models.read_spec(folder_of(name))
    model, c = models.load(spec, None, jnp.float32), spec.model_config
    shape = (len(TEXT), LENGTH, c.num_kv_heads, c.head_dim)
    layer = {"k": jnp.zeros(shape), "v": jnp.zeros(shape)}
    layer["end_index"] = jnp.zeros(len(TEXT), jnp.int32)
    cache = {f"layer_{i}": layer for i in range(c.num_layers)}
    want, graph, state = logits_of(spec, model), *nnx.split(model)
    whole = np.tril(np.ones((len(TEXT), LENGTH, LENGTH), bool))

    @jax.jit
    def run(state, tokens, positions, cache, mask):
        with jax.default_matmul_precision("highest"):
            return nnx.merge(graph, state)(tokens, positions, cache, mask)

    done = 0
    for end in (30, 31, 32, 33):
        at = slice(done, end)
        positions = np.tile(np.arange(done, end, dtype=np.int32), (len(TEXT), 1))
        got, cache = run(state, TEXT[:, at], positions, cache, whole[:, at])
        assert distance(np.asarray(got), want[:, at]) < 1e-5, end
        done = end


# On a mesh


@pytest.fixture(scope="module")
def mesh():
    types = (AxisType.Auto,) * 2
    return jax.make_mesh((2, 2), ("fsdp", "tp"), types, devices=jax.devices()[:4])


def states(*some):
    """The arrays of models by path, side by side."""
    flat = [dict(nnx.to_flat_state(nnx.state(model))) for model in some]
    assert all(x.keys() == flat[0].keys() for x in flat)
    return {path: [jax.tree.leaves(x[path])[0] for x in flat] for path in flat[0]}


@pytest.mark.parametrize("name", PLAIN)
def test_weights_are_placed_as_tunix_annotates_them(folder_of, mesh, name):
    spec = models.read_spec(folder_of(name))
    base = models.load(spec, mesh, jnp.bfloat16)
    plan = models.abstract(spec, mesh, jnp.bfloat16)
    model = adapters.add_lora(spec, base, mesh, **LORA)
    plan = adapters.add_lora(spec, plan, mesh, **LORA)
    cut = 0
    for path, (x, y) in states(model, plan).items():
        lora = "lora" in path[-1]
        assert x.dtype == y.dtype == (jnp.float32 if lora else jnp.bfloat16), path
        assert x.shape == y.shape, path
        assert x.sharding == y.sharding, path
        share = np.prod(x.addressable_shards[0].data.shape) / x.size
        cut += share <= 1 / 4
        assert share <= 1 / 2 or path[-1] == "scale", path
    kernels_there = [x for x in jax.tree.leaves(nnx.state(base)) if x.ndim > 1]
    assert cut == len(kernels_there) > 10


def test_a_mesh_changes_no_logits(folder_of, mesh):
    spec = models.read_spec(folder_of("gemma3"))
    one, four = (models.load(spec, x, jnp.float32) for x in (None, mesh))
    assert distance(logits_of(spec, four), logits_of(spec, one)) < 1e-5


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3 narrow"])
def test_activations_can_be_divided_as_on_accelerators(
    folder_of, mesh, monkeypatch, name
):
    """On CPUs tunix leaves this out."""
    spec = models.read_spec(folder_of(name))
    model = models.load(spec, mesh, jnp.float32)
    want, seen = logits_of(spec, model), []

    def shard(x, axes, eager=False):
        seen.append(axes)
        spec = jax.sharding.PartitionSpec(*axes)
        where = jax.sharding.NamedSharding(mesh, spec)
        return jax.lax.with_sharding_constraint(x, where)

    if spec.family == "gemma3":
        monkeypatch.setattr(gemma3_config.sharding_utils, "shard", shard)
    else:
        at = sys.modules[f"tunix.models.{spec.family.replace('llama', 'llama3')}.model"]
        monkeypatch.setattr(at, "shard", shard)
    rotary._block.cache_clear()  # it has looked up names before
    assert distance(logits_of(spec, model), want) < 1e-5
    rotary._block.cache_clear()
    assert len(seen) > 4 * spec.model_config.num_layers


def test_new_weights_do_not_depend_on_the_mesh(folder_of, mesh):
    spec = models.read_spec(folder_of("qwen2"))
    one = models.random(spec, 0, jnp.float32)
    four = models.random(spec, 0, jnp.float32, mesh)
    kinds = {}
    for path, (x, y) in states(one, four).items():
        np.testing.assert_array_equal(x, y, err_msg=str(path))
        if x.ndim > 1:
            assert 0.015 < float(jnp.std(x)) < 0.025, path
        kinds[path[-1]] = float(x.reshape(-1)[0])
    assert kinds["q_bias"] == 0.0
    other = models.random(spec, 1, jnp.float32)
    assert distance(logits_of(spec, other), logits_of(spec, one)) > 0.1


def test_a_mesh_that_does_not_divide_a_model_is_refused(folder_of):
    spec = models.read_spec(folder_of("llama"))
    devices = np.array(jax.devices()[:4]).reshape(1, 4)
    mesh = jax.sharding.Mesh(devices, ("fsdp", "tp"))
    with pytest.raises(Refused, match=r"tensor=4 does not divide axis 1 of .*k_proj"):
        models.load(spec, mesh, jnp.float32)


# Adapters

LORA = {"rank": 2, "alpha": 6.0, "rslora": False, "targets": ALL}


def draw(model, seed=1):
    """New values for all factors, none of which is 0."""
    rng = np.random.default_rng(seed)
    new = lambda x: x + 0.2 * rng.standard_normal(x.shape).astype(np.float32)
    nnx.update(model, jax.tree.map(new, nnx.state(model, nnx.LoRAParam)))


def check_exports(spec, model, tmp_path, base, initial=None, **pair_options):
    """Both folders compute what the model does, and something else than the base."""
    want = logits_of(spec, model)
    export.save_adapter(spec, model, tmp_path / "a", initial=initial, **pair_options)
    export.save_merged(spec, model, tmp_path / "m", **pair_options)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "a")
    assert distance(outputs_of(adapted.eval(), TEXT), want) < TOLERANCE
    assert distance(in_transformers(tmp_path / "m"), want) < TOLERANCE
    assert distance(in_transformers(spec.folder), want) > 1e2 * TOLERANCE  # control


@pytest.mark.parametrize("name", EXPORTED)
def test_peft_and_transformers_compute_what_the_adapted_model_does(
    folder_of, tmp_path, name
):
    spec = models.read_spec(folder_of(name))
    base = models.load(spec, None, jnp.float32)
    model = adapters.add_lora(spec, base, None, **LORA)
    assert distance(logits_of(spec, model), logits_of(spec, base)) < 1e-6  # B is 0
    draw(model)
    check_exports(spec, model, tmp_path, in_torch(name), alpha=6.0)
    (tmp_path / "wrong").mkdir()
    export.save_adapter(spec, model, tmp_path / "wrong", alpha=6.6)  # control
    wrong = peft.PeftModel.from_pretrained(in_torch(name), tmp_path / "wrong")
    assert distance(outputs_of(wrong, TEXT), logits_of(spec, model)) > 10 * TOLERANCE


@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama", "nf4"), ("qwen2", None), ("qwen3", None), ("gemma3", "int8")],
)
def test_remat_changes_no_gradient(folder_of, name, kind):
    found = []
    for remat in (False, True):
        spec = models.read_spec(folder_of(name), remat=remat)
        base = models.load(spec, None, jnp.float32)
        model = adapters.add_lora(spec, base, None, quantise=kind, **LORA)
        draw(model)
        graph, factors, frozen = nnx.split(model, nnx.LoRAParam, ...)

        def loss(factors, graph=graph, frozen=frozen, spec=spec):
            model = nnx.merge(graph, factors, frozen)
            rows = np.ones((2, 6), np.int32)
            mask = np.tril(np.ones((2, 6, 6), bool))
            return models.apply(
                spec, model, TEXT[:, :6], rows.cumsum(1) - 1, mask
            ).std()

        traced = jax.jit(jax.grad(loss)).trace(factors)
        gradient = traced.lower().compile()(factors)
        found.append((gradient, "remat" in str(traced.jaxpr)))
        assert all(np.abs(x).max() > 1e-4 for x in jax.tree.leaves(found[-1][0]))
    (plain, _), (again, _) = found
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), plain, again)
    assert [x[1] for x in found] == [False, True]


class Options:
    """Those of the command that adapters look at."""

    rank, alpha, rslora, targets = 2, 6.0, False, ALL
    start, rank_budget, start_batches, qlora = "lora", None, 2, None
    batch, accumulate, length, packing, seed = 4, 1, 24, False, 0

    def __init__(self, **given):
        vars(self).update(given)


def adapt(folder, dtype=jnp.float32, devices=1, **given):
    """A model with adapters as the command makes it, and what belongs to it."""
    spec, options = models.read_spec(folder), Options(**given)
    grid = np.array(jax.devices()[:devices]).reshape(-1, min(devices, 2))
    mesh = jax.sharding.Mesh(grid, ("fsdp", "tp"))
    rng = np.random.default_rng(2)
    train = [
        Example(rng.integers(1, WORDS, 24).astype(np.int32), np.arange(24) > 6)
        for _ in range(8)
    ]
    inputs = types.SimpleNamespace(spec=spec, mesh=mesh, train=train)
    base = models.load(spec, mesh, dtype)
    model, initial = adapters.adapted(base, options, inputs)
    return spec, model, initial, adapters.pair_options(options)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("llama", {"start": "pissa"}),
        ("gemma3", {"start": "olora", "rslora": True, "devices": 4}),
        ("gemma3 fused", {"start": "lora_ga", "rslora": True}),
        ("qwen2", {"start": "lora_ga", "rank_budget": 3}),
        ("qwen3", {"start": "gora", "rank_budget": 3, "rslora": True}),
        ("qwen2", {"start": "lora_one", "targets": ("q_proj", "v_proj")}),
    ],
)
def test_starts_scales_and_ranks_go_out_as_they_compute(
    folder_of, tmp_path, name, given
):
    spec, model, initial, scale = adapt(folder_of(name), **given)
    changes = starts.STARTS[given["start"]]().changes_weight
    assert (initial is not None) == changes
    if changes:  # the base has changed, and the model has not
        base = outputs_of(in_torch(name), TEXT)
        assert distance(logits_of(spec, model), base) < TOLERANCE
    draw(model)
    check_exports(spec, model, tmp_path, in_torch(name), initial, **scale)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert bool(config["rank_pattern"]) == ("rank_budget" in given)
    assert set(config["target_modules"]) <= set(names_of(spec, given))
    ranks = {
        x.shape[0]
        for path, x in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))
        if str(path[-1]).endswith("lora_b")
    }
    assert (len(ranks) > 1) == ("rank_budget" in given)


def names_of(spec, given):
    """All ways in which PEFT may call the targets."""
    layers = range(spec.model_config.num_layers)
    targets = given.get("targets", ALL)
    block = lambda x: "mlp" if x in kernels.MLP else "self_attn"
    ends = [f"layers.{i}.{block(x)}.{x}" for i in layers for x in targets]
    return [*targets, *ends, *(f"model.{x}" for x in ends)]


@pytest.mark.parametrize(("name", "kind"), [("llama", "nf4"), ("gemma3", "int8")])
def test_a_quantised_base_goes_out_dequantised(folder_of, tmp_path, name, kind):
    given = {"qlora": kind, "targets": ("q_proj", "down_proj")}
    spec, model, _, scale = adapt(folder_of(name), **given)
    said = export.save_merged(spec, model, tmp_path / "base", **scale)
    assert "dequantised" in said
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    there = {key: x.clone() for key, x in base.state_dict().items()}
    draw(model)
    check_exports(spec, model, tmp_path, base.eval(), **scale)
    # Kernels without adapters are quantised, too, and all others are not.
    full = in_torch(name).state_dict()
    for key, x in there.items():
        error = float((x - full[key]).abs().max())
        assert (error > 1e-3) == ("proj.weight" in key), key


@pytest.mark.parametrize("kind", [None, "nf4"])
def test_layers_keep_bfloat16_and_factors_float32(folder_of, kind):
    _, model, _, _ = adapt(folder_of("llama"), jnp.bfloat16, qlora=kind)
    factors = jax.tree.leaves(nnx.state(model, nnx.LoRAParam))
    assert {x.dtype for x in factors} == {jnp.dtype(jnp.float32)}
    graph, state = nnx.split(model)
    one, seen = jnp.zeros((1, 3), jnp.int32), []

    def run(state):
        found = nnx.merge(graph, state)
        found.final_norm = Spy(found.final_norm, seen)
        return found(one, one, None, jnp.ones((1, 3, 3), bool))[0]

    jax.eval_shape(run, state)
    assert seen == [jnp.bfloat16]


class Spy(nnx.Module):
    """Notes the dtype of what comes by."""

    def __init__(self, norm, seen):
        self.norm, self.seen = norm, nnx.static(seen)

    def __call__(self, x):
        self.seen.append(x.dtype)
        return self.norm(x)


def test_a_merged_folder_keeps_files_dtypes_and_all_else(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    seeded(llama).to(torch.bfloat16).save_pretrained(source, max_shard_size="10KB")
    (source / "tokenizer.json").write_text("{}")
    spec, model, _, scale = adapt(source)
    draw(model)
    export.save_merged(spec, model, target, **scale)
    assert {x.name for x in source.iterdir()} == {x.name for x in target.iterdir()}
    assert len(list(target.glob("*.safetensors"))) > 2
    for path in source.glob("*.safetensors"):
        old, new = (names.read_header(x / path.name) for x in (source, target))
        assert old == new
    assert not list(tmp_path.glob("*.partial"))
    assert distance(in_transformers(target), logits_of(spec, model)) < 0.05


def test_a_new_base_is_a_folder_of_transformers(folder_of, tmp_path):
    for name in ("llama", "gemma3"):
        config = (folder_of(name) / "config.json").read_text()
        (tmp_path / "config.json").write_text(config)
        spec = models.read_spec(tmp_path)
        model = models.random(spec, 0, jnp.float32)
        export.save_base(spec, model, tmp_path)
        names.check_files(spec)
        want = logits_of(spec, model)
        assert distance(in_transformers(tmp_path), want) < TOLERANCE, name


def test_an_adapter_comes_back(folder_of, tmp_path):
    spec, model, _, scale = adapt(folder_of("gemma3"))
    draw(model)
    export.save_adapter(spec, model, tmp_path, **scale)
    state = nnx.state(model, nnx.LoRAParam)
    zeros = jax.tree.map(jnp.zeros_like, state)
    names_there = kernels.module_names(kernels.modules_of(spec))
    back = load_peft_adapter(tmp_path, zeros, module_names=names_there, **scale)
    jax.tree.map(np.testing.assert_array_equal, back, state)


# What is refused


def spec_with(tmp_path, base, **entries):
    config = json.loads((base / "config.json").read_text()) | entries
    (tmp_path / "config.json").write_text(json.dumps(config))
    return models.read_spec(tmp_path)


@pytest.mark.parametrize(
    ("name", "entries", "says"),
    [
        ("llama", {"architectures": ["MistralForCausalLM"]}, "Supported are Llama"),
        ("llama", {"attention_bias": True}, "attention_bias = True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'.*'silu'"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "type 'yarn'.*llama3"),
        ("llama", {"hidden_size": None}, "no hidden_size"),
        ("llama", {"head_dim": 7}, "has to be even"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen3", {"rope_parameters": LLAMA3}, "type 'llama3'.*only default"),
        ("gemma3", {"tie_word_embeddings": False}, "untied"),
        ("gemma3", {"query_pre_attn_scalar": 5}, "query_pre_attn_scalar = 5"),
        ("gemma3", {"layer_types": ["full_attention"] * 2}, "every 6th is full"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ],
)
def test_what_tunix_lacks_is_refused(folder_of, tmp_path, name, entries, says):
    spec_with(tmp_path, folder_of(name))  # control: it is read otherwise
    with pytest.raises(Refused, match=says):
        spec_with(tmp_path, folder_of(name), **entries)


def test_folders_that_do_not_fit_are_refused(folder_of, tmp_path):
    with pytest.raises(Refused, match=r"config\.json does not exist"):
        models.read_spec(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(Refused, match="no JSON"):
        models.read_spec(tmp_path)
    base = folder_of("llama")
    spec = spec_with(tmp_path, base)
    with pytest.raises(Refused, match=r"has no \*\.safetensors"):
        models.load(spec, None, jnp.float32)
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(Refused, match="no safetensors file"):
        models.load(spec, None, jnp.float32)
    (tmp_path / "model.safetensors").write_bytes(
        (base / "model.safetensors").read_bytes()
    )
    models.load(spec, None, jnp.float32)  # control
    for entries, says in (
        ({"num_hidden_layers": 3}, r"lack model\.layers\.2.* and 8 more"),
        ({"num_hidden_layers": 1}, r"unknown model\.layers\.1"),
        ({"intermediate_size": 40}, r"gate_proj\.weight .*by config"),
    ):
        with pytest.raises(Refused, match=says):
            models.load(spec_with(tmp_path, base, **entries), None, jnp.float32)


def test_files_of_several_dtypes_are_refused(tmp_path):
    """Else tunix 0.1.7 would read the second dtype as if it were the first."""
    model = seeded(llama)
    model.lm_head.to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    with pytest.raises(Refused, match="BF16 and F32"):
        models.load(models.read_spec(tmp_path), None, jnp.float32)


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("gemma3", {"targets": ("q_proj", "v_proj")}, "add k_proj to --targets"),
        ("llama", {"targets": ("c_attn",)}, "has no c_attn"),
        ("llama", {"start": "pissa", "qlora": "nf4"}, "lora or gora or lora_one"),
        ("llama", {"start": "lora_ga", "rank": 9}, "at most 8 for k_proj, 16×32"),
        ("llama", {"start": "olora", "rank": 17}, "at most 16"),
        ("llama", {"qlora": "fp3"}, "fp3 is not among nf4, int8"),
    ],
)
def test_adapters_that_cannot_be_are_refused(folder_of, name, given, says):
    spec = models.read_spec(folder_of(name))
    adapters.check(spec, Options())  # control
    with pytest.raises(Refused, match=says):
        adapters.check(spec, Options(**given))
