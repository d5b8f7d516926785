"""What is refused: other adapters than plain LoRA, and numbers that mean nothing."""

import enum
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from lorapro_jax.peft import load_peft_adapter, save_peft_adapter
from tests.support.peft_files import (
    CONFIG,
    WEIGHTS,
    pair_tree,
    read,
    written_by_another,
)

pytestmark = pytest.mark.usefixtures("quick_compiles")

# With each of them PEFT computes something else than W0 + s B A: the option, a value
# that turns it on, what would be lost; and then values that turn it off.
MORE = {
    "use_dora": (True, "trained magnitudes"),
    "kasa_config": ({"beta": 1e-4}, "diagonal between B and A"),
    "lora_bias": (True, "bias behind B"),
    "use_qalora": (True, "groups of inputs"),
    "use_bdlora": ({"nblocks": 2}, "block-diagonal"),
    "monteclora_config": ({"num_samples": 8}, "noise"),
    "layer_replication": ([[0, 4], [2, 5]], "repeated"),
    "trainable_token_indices": ([1, 2], "rows of an embedding"),
    "arrow_config": ({"top_k": 2}, "router"),
    "alora_invocation_tokens": ([3], "middle of the text"),
    "use_tomorrows_variant": (True, "not known here"),
    "tomorrows_config": ({"x": 1}, "not known here"),
    "init_lora_weights": ("OLoRA", "changes the base weights"),
    "peft_type": ("LOHA", "not 'LORA'"),
    "bias": ("some", "its `bias` is 'some'"),
}
STARTS = ["PiSSA", "pissa_niter_4", "olora", "CorDA", "LoftQ", "lora_ga", "tomorrows"]
HARMLESS = {
    "init_lora_weights": ("eva", "Gaussian", "orthogonal", False, True, "MiCA", None),
    "eva_config": ({"rho": 2.0},), "velora_config": ({"num_groups": 8},),
    "lora_dropout": (0.1,), "fan_in_fan_out": (True,),
    "megatron_core": ("megatron.core",), "kasa_config": (None, {}), "custom": ("x",),
}  # fmt: skip


@pytest.mark.parametrize("option", MORE)
def test_what_computes_something_else_is_refused_in_and_out(option, tmp_path):
    value, lost = MORE[option]
    save_peft_adapter(tmp_path, pair_tree())
    written_by_another(tmp_path, {option: value})
    with pytest.raises(ValueError, match=lost) as error:
        load_peft_adapter(tmp_path, pair_tree(), ignore="lora_")
    assert f"`{option}`" in str(error.value)
    assert str(tmp_path) in str(error.value)
    config = {option: value}
    with pytest.raises(ValueError, match=r"`config` (would make|has).*" + option):
        save_peft_adapter(tmp_path / "x", pair_tree(), config=config)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("start", STARTS)
def test_starts_that_may_change_the_base_weights_are_refused(start, tmp_path):
    """However they are spelled: PEFT lower-cases some."""
    for spelled in (start, start.upper(), start.lower()):
        save_peft_adapter(tmp_path, pair_tree())
        written_by_another(tmp_path, {"init_lora_weights": spelled})
        with pytest.raises(ValueError, match=f"`init_lora_weights` is '{spelled}'"):
            load_peft_adapter(tmp_path, pair_tree())


@pytest.mark.parametrize("option", HARMLESS)
def test_what_changes_nothing_is_read(option, tmp_path):
    for value in HARMLESS[option]:
        save_peft_adapter(tmp_path, pair_tree(), config={option: value})
        assert read(tmp_path)[1][option] == value
        load_peft_adapter(tmp_path, pair_tree())


@pytest.mark.parametrize(
    ("ending", "array"),
    [
        ("lora_magnitude_vector", np.ones(5, np.float32)),
        ("lora_magnitude_vector.default.weight", np.ones(5, np.float32)),
        ("lora_diag", np.ones(2, np.float32)),
        ("lora_B.bias", np.ones(5, np.float32)),
        ("lora_B.default.bias", np.ones(5, np.float32)),
    ],
)
def test_what_is_more_shows_in_the_keys_too(ending, array, tmp_path):
    """DoRA without its flag: `ignore=` cannot lose a part of a layer."""
    save_peft_adapter(tmp_path, {**pair_tree(), "q": pair_tree()})
    tensors, _ = read(tmp_path)
    key = f"base_model.model.mlp.up.{ending}"
    safetensors.numpy.save_file(tensors | {key: array}, tmp_path / WEIGHTS)
    others = r"q\.mlp"
    for ignore in (others, f"{others}|{ending}"):
        with pytest.raises(ValueError, match=f"more than a factor: `{key}`") as error:
            load_peft_adapter(tmp_path, pair_tree(), ignore=ignore)
        assert "merge the adapter" in str(error.value)
    # A layer that is left out as a whole may have it.
    load_peft_adapter(tmp_path, {"q": pair_tree()}, ignore=r"model\.mlp")


NUMBERS = [
    ({"r": 0}, "`r` is 0, no whole number above 0"),
    ({"r": -2}, "`r` is -2"),
    ({"r": 2.5}, "`r` is 2.5"),
    ({"r": True}, "`r` is True"),
    ({"r": "2"}, "`r` is '2'"),
    ({"r": 10**400}, r"`r` is 1000.*\(401 characters\), no whole number above 0"),
    ({"rank_pattern": {"up": 10**400}}, r"`rank_pattern\['up'\]` is 1000"),
    ({"rank_pattern": {"up": 1.5}}, r"`rank_pattern\['up'\]` is 1.5"),
    ({"rank_pattern": {"r": None}}, r"`rank_pattern\['r'\]` is None"),
    # A key in both patterns, and one that is called like an option.
    ({"rank_pattern": {"up": "x"}, "alpha_pattern": {"up": 2}}, r"rank_pattern\['up'"),
    ({"rank_pattern": {"up": 2}, "alpha_pattern": {"up": "x"}}, r"alpha_pattern\['up'"),
    ({"r": None, "rank_pattern": {"r": 2}}, "`r` is None"),
    ({"lora_alpha": 10**400}, r"`lora_alpha` is 1000.*\(401 characters\), no finite"),
    ({"lora_alpha": math.inf}, "`lora_alpha` is inf"),
    ({"lora_alpha": [1]}, r"`lora_alpha` is \[1\]"),
    ({"lora_alpha": False}, "`lora_alpha` is False"),
    ({"lora_alpha": 1e308}, r"`lora_alpha` is 1e\+308, no finite .* float32 can hold"),
    ({"alpha_pattern": {"up": -1e39}}, r"`alpha_pattern\['up'\]` is -1e\+39"),
    ({"lora_alpha": 3e38}, "`mlp/up/lora_b` does not fit float32"),
    ({"rank_pattern": "x"}, "`rank_pattern` is 'x', no mapping"),
    # Of a module that is not even there.
    ({"alpha_pattern": {"else(": 2}}, r"`alpha_pattern` has 'else\(', .* no regex"),
    ({"rank_pattern": {"*": 2}}, r"`rank_pattern` has '\*'"),
]


@pytest.mark.parametrize(("entries", "match"), NUMBERS)
def test_numbers_that_mean_nothing_are_one_error(entries, match, tmp_path):
    save_peft_adapter(tmp_path, pair_tree())
    written_by_another(tmp_path, entries)
    with pytest.raises(ValueError, match=match) as error:
        load_peft_adapter(tmp_path, pair_tree())
    assert str(tmp_path) in str(error.value)


def test_a_rank_that_the_tensors_do_not_have_is_one_error(tmp_path):
    for entries in ({"r": 3}, {"rank_pattern": {"up": 3}}):
        save_peft_adapter(tmp_path, pair_tree())
        written_by_another(tmp_path, entries)
        match = r"`mlp\.up` has rank 3 in the configuration, and 2 in its A"
        with pytest.raises(ValueError, match=match):
            load_peft_adapter(tmp_path, pair_tree())
    wide = {"lora_a": jnp.ones((6, 3)), "lora_b": jnp.ones((3, 5))}
    save_peft_adapter(tmp_path, pair_tree())
    with pytest.raises(ValueError, match=r"`mlp\.up` has rank 2 in the file, here 3"):
        load_peft_adapter(tmp_path, {"mlp": {"up": wide}})


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, '{"r": ' + "9" * 5000]
)
def test_json_that_no_one_wrote_is_one_error(text, tmp_path):
    save_peft_adapter(tmp_path, pair_tree())
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(ValueError, match=r"adapter_config\.json` is damaged"):
        load_peft_adapter(tmp_path, pair_tree())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float8_e5m2])
def test_tensors_that_are_not_finite_are_named(value, dtype, tmp_path):
    save_peft_adapter(tmp_path, pair_tree())
    tensors, _ = read(tmp_path)
    key = "base_model.model.mlp.up.lora_B.weight"
    tensors[key] = tensors[key].copy()
    tensors[key][1, 1] = value
    spoilt = {name: x.astype(dtype) for name, x in tensors.items()}
    safetensors.numpy.save_file(spoilt, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=f"`{key}` has entries that are not finite"):
        load_peft_adapter(tmp_path, pair_tree())
    tree = pair_tree(dtype=jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32)
    tree["mlp"]["up"]["lora_b"] = tree["mlp"]["up"]["lora_b"].at[1, 1].set(value)
    with pytest.raises(ValueError, match="`mlp/up/lora_b` has entries that are not fi"):
        save_peft_adapter(tmp_path / "x", tree)
    assert not (tmp_path / "x").exists()


def test_a_dtype_that_is_not_known_is_named(tmp_path):
    save_peft_adapter(tmp_path, pair_tree())
    head = json.dumps(
        {"odd": {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [0, 2]}}
    )
    size = len(head).to_bytes(8, "little")
    (tmp_path / WEIGHTS).write_bytes(size + head.encode() + b"\0\0")
    with pytest.raises(ValueError, match=r"`odd` of .* has the unknown dtype F8_E8M0"):
        load_peft_adapter(tmp_path, pair_tree())


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"target_modules": ["q"]}, r"leave out `mlp\.up`"),
        ({"target_modules": "p"}, r"leave out `mlp\.up`"),
        ({"target_modules": r".*\.down"}, r"leave out `mlp\.up`"),
        ({"exclude_modules": ["up"]}, r"leave out `mlp\.up`"),
        ({"layers_to_transform": [1]}, "`layers_to_transform`, which chooses layers"),
        ({"modules_to_save": ["x"]}, r"\['modules_to_save'\], which follow"),
        ({"bias": "all"}, r"\['bias'\], which follow"),
        ({"target_parameters": ["x"]}, r"\['target_parameters'\], which follow"),
        ({"target_modules": "All-Linear"}, "'all-linear', with which PEFT leaves out"),
        ({"target_modules": None}, "None, for which PEFT has a list of its own"),
    ],
)
def test_a_configuration_that_loses_a_module_is_refused(config, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        save_peft_adapter(tmp_path / "x", pair_tree(), config=config)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["up"]},
        {"target_modules": r"mlp\.(up|down)"},
        {"exclude_modules": r"vision.*", "layers_to_transform": None},
        {"modules_to_save": None, "bias": "none", "target_parameters": None},
    ],
)
def test_a_configuration_that_loses_nothing_is_written(config, tmp_path):
    save_peft_adapter(tmp_path, pair_tree(), config=config)
    assert read(tmp_path)[1].items() >= config.items()


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (
            {"target_modules": "(q|up"},
            r"`target_modules` '\(q\|up', which is no regular",
        ),
        ({"target_modules": 3}, "`target_modules` 3. It is a regular expression or a"),
        ({"target_modules": ["up", 3]}, r"`target_modules` \['up', 3\]. It is a reg"),
        ({"exclude_modules": "(q"}, r"`exclude_modules` '\(q', which is no regular"),
        ({"exclude_modules": 3}, "`exclude_modules` 3. It is a regular expression"),
        ({1: 2}, "`config` has the key 1. Names of entries are strings"),
        ({"x": float("nan")}, "'x': nan, which JSON cannot hold"),
        ({"x": object()}, "'x': <object .* which JSON cannot hold"),
        ({"task_type": "seq_cls"}, "`task_type` 'seq_cls', which PEFT does not know"),
        ({"ensure_weight_tying": True}, "`ensure_weight_tying`, .* another adapter"),
        *(
            ({"init_lora_weights": x}, f"`init_lora_weights` '{x}', which PEFT does")
            for x in ("none", "True", "False", "EVA", "Orthogonal")
        ),
    ],
)
def test_entries_that_peft_refuses_are_refused_and_the_remedy_is_to_leave_them_out(
    config, match, tmp_path
):
    with pytest.raises(ValueError, match=match) as error:
        save_peft_adapter(tmp_path / "x", pair_tree(), config=config)
    assert not (tmp_path / "x").exists()
    if "eave it out" in str(error.value):
        save_peft_adapter(tmp_path / "x", pair_tree(), config={})
        load_peft_adapter(tmp_path / "x", pair_tree())


@pytest.mark.parametrize("config", [[("a", 1)], "x", 3])
def test_a_configuration_that_is_no_mapping_is_an_error(config, tmp_path):
    with pytest.raises(TypeError, match="has to be a mapping of entries, such as"):
        save_peft_adapter(tmp_path / "x", pair_tree(), config=config)
    assert not (tmp_path / "x").exists()


class Task(enum.StrEnum):
    """As PEFT has its own."""

    CAUSAL_LM = "CAUSAL_LM"


def test_sets_scalars_and_enums_of_a_configuration_are_what_json_has(tmp_path):
    """`target_modules` of PEFT's `to_dict` is a set."""
    given = {
        "target_modules": {"up", "down"}, "exclude_modules": ("q",),
        "lora_dropout": jnp.float32(0.5), "x": np.int64(3), "task_type": Task.CAUSAL_LM,
        "inner": {"y": np.arange(2)},
    }  # fmt: skip
    due = {
        "target_modules": ["down", "up"], "exclude_modules": ["q"],
        "lora_dropout": 0.5, "x": 3, "task_type": "CAUSAL_LM", "inner": {"y": [0, 1]},
    }  # fmt: skip
    save_peft_adapter(tmp_path, pair_tree(), config=given)
    assert read(tmp_path)[1].items() >= due.items()


@pytest.mark.parametrize(
    ("entries", "option"),
    [
        ({"exclude_modules": ["up"]}, "exclude_modules"),
        ({"exclude_modules": r"mlp\..*"}, "exclude_modules"),
        ({"target_modules": ["down"]}, "target_modules"),
        ({"target_modules": "up"}, "target_modules"),
        ({"layers_to_transform": [0, 2]}, "layers_to_transform"),
        ({"layers_to_transform": 3}, "layers_to_transform"),
    ],
)
def test_factors_that_the_configuration_leaves_out_are_not_read(
    entries, option, tmp_path
):
    """PEFT would drop them; the message's two ways out work."""
    tree, names = (
        {"h": pair_tree(), "q": pair_tree(1)},
        {"q.*": "k", "h/(.*)": "mlp.up"},
    )
    if "layers" in option:
        names["h/(.*)"] = "mlp.h.1.up"
    save_peft_adapter(tmp_path, tree, module_names=names)
    given = {"target_modules": ["up", "k"]} | entries
    if given["target_modules"] == ["down"]:
        given["target_modules"] = ["down", "k"]
    elif given["target_modules"] == "up":
        given["target_modules"] = "up|k"
    written_by_another(tmp_path, given)
    match = (
        rf"its `{option}` leaves out `mlp\.(h\.1\.)?up`, whose factors PEFT would dr"
    )
    with pytest.raises(ValueError, match=match):
        load_peft_adapter(tmp_path, tree, module_names=names)
    rest = load_peft_adapter(
        tmp_path, {"q": pair_tree()}, module_names=names, ignore=r"mlp\."
    )
    assert (rest["q"]["mlp"]["up"]["lora_a"] == tree["q"]["mlp"]["up"]["lora_a"]).all()
    written_by_another(tmp_path, {option: None})
    load_peft_adapter(tmp_path, tree, module_names=names)


def test_a_quantised_start_has_another_remedy_than_conversion(tmp_path):
    """PEFT converts PiSSA's, not LoftQ's."""
    remedies = {
        "pissa": "path_initial_model_for_weight_conversion",
        "loftq": "merge it into the model that it was trained on",
    }
    for start, remedy in remedies.items():
        save_peft_adapter(tmp_path, pair_tree())
        written_by_another(tmp_path, {"init_lora_weights": start})
        with pytest.raises(ValueError, match=remedy) as error:
            load_peft_adapter(tmp_path, pair_tree())
        others = set(remedies.values()) - {remedy}
        assert not any(x in str(error.value) for x in others)


@pytest.mark.parametrize("text", ['{"mlp.up": [Infinity, 1]}', '{"mlp.up": [2, {}]}'])
def test_numbers_of_the_metadata_that_mean_nothing_are_one_error(text, tmp_path):
    save_peft_adapter(tmp_path, pair_tree())
    tensors, _ = read(tmp_path)
    safetensors.numpy.save_file(tensors, tmp_path / WEIGHTS, {"lora_modules": text})
    with pytest.raises(ValueError, match=r"'lora_modules' of the metadata .* damaged"):
        load_peft_adapter(tmp_path, pair_tree())
