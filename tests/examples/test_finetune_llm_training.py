"""Data, loss, steps, checkpoints and answers of the language model example."""

import json
import shutil
import signal
import types
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from tests.support import processes
from tests.support.deprecations import LANGUAGE_MODELS
from tests.support.processes import free_port, wait_for

for name in ("tunix", "grain", "tokenizers", "transformers"):
    pytest.importorskip(name)

with warnings.catch_warnings():  # tunix imports what is deprecated in JAX
    warnings.simplefilter("ignore", DeprecationWarning)
    from tunix.models.llama3 import model as llama3

    from examples.finetune_llm import (
        checkpoints,
        data,
        evaluation,
        generation,
        models,
        optimizers,
        packing,
        scoring,
        step,
        training,
    )
    from examples.finetune_llm.chat import BadLine, Example, encode, question
    from examples.finetune_llm.errors import Refused
    from tests.support import tiny_lm

pytestmark = [*LANGUAGE_MODELS, pytest.mark.usefixtures("quick_compiles")]

EPS = 2.0**-23
BEGIN, END, USER, ASSISTANT, SYSTEM = range(5)
SPECIAL = ("<begin>", "<end>", "<user>", "<assistant>", "<system>")

# What the templates of the families do: Llama's trims, Gemma's has another name for the
# assistant, Qwen 3's drops the thoughts of earlier answers and thinks before the last.
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>\n{{ m.content | trim }}<end>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<user>' if m.role == 'user' else 'model:' }}\n{{ m.content | trim }}<end>\n"
    "{% endfor %}{% if add_generation_prompt %}model:\n{% endif %}"
)
QWEN = (
    "{% for m in messages %}<{{ m.role }}>\n"
    "{% if m.role == 'assistant' and loop.last %}think\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
STRICT = "{% for m in messages %}{{ raise_exception('only tools') }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Of bytes, with a text's begin put before it as Llama's does."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tokenizer")
    letters = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    new = Tokenizer(BPE({x: i for i, x in enumerate(letters)}, []))
    new.add_special_tokens(list(SPECIAL))
    new.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    new.decoder = decoders.ByteLevel()
    new.post_processor = processors.TemplateProcessing(
        single="<begin> $A", special_tokens=[("<begin>", BEGIN)]
    )
    names = {"bos_token": "<begin>", "eos_token": "<end>"}
    made = PreTrainedTokenizerFast(tokenizer_object=new, **names)
    made.chat_template = LLAMA
    made.save_pretrained(str(folder))
    return data.load_tokenizer(folder, len(letters))


def conversation(*texts, system=None):
    roles = ("user", "assistant") * len(texts)
    messages = [
        {"role": role, "content": text}
        for role, text in zip(roles, texts, strict=False)
    ]
    first = [{"role": "system", "content": system}] if system else []
    return {"messages": first + messages}


def learnt_text(example, tokenizer):
    return tokenizer.decode(example.tokens[example.answers])


# Reading


@pytest.mark.parametrize(
    ("template", "record", "whole", "learnt"),
    [
        pytest.param(
            LLAMA, conversation("hi", " yo ", "so?", "no", system="be"),
            "<begin><system>\nbe<end><user>\nhi<end><assistant>\nyo<end><user>\nso?<end>"
            "<assistant>\nno<end>",
            "yo<end>no<end>", id="two answers",
        ),
        pytest.param(
            GEMMA, conversation("hi", "yo", "hi", "yo"),
            "<begin><user>\nhi<end>\nmodel:\nyo<end>\n<user>\nhi<end>\nmodel:\nyo<end>\n",
            "yo<end>yo<end>", id="the same answer twice",
        ),
        pytest.param(
            QWEN, conversation("a", "b", "c", "d"),
            "<user>\na<end>\n<assistant>\nb<end>\n<user>\nc<end>\n<assistant>\n"
            "think\n\nd<end>\n",
            "b<end>think\n\nd<end>", id="the last answer is written otherwise",
        ),
        pytest.param(
            LLAMA, {"prompt": "2+2=", "completion": " 4"}, "<begin>2+2= 4<end>",
            " 4<end>", id="prompt and completion",
        ),
        pytest.param(
            LLAMA, {"text": "abc"}, "<begin>abc<end>", "abc<end>", id="text"
        ),
    ],
)  # fmt: skip
def test_of_a_line_the_answers_alone_are_learnt(
    template, record, whole, learnt, tokenizer, monkeypatch
):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    example = encode(record, tokenizer)
    assert tokenizer.decode(example.tokens) == whole
    assert learnt_text(example, tokenizer) == learnt
    assert example.tokens.dtype == np.int32


def test_training_sees_the_tokens_that_generation_starts_from(tokenizer):
    record = conversation("hi", "yo", "so?", "no")
    example, asked = encode(record, tokenizer), question(record, tokenizer)
    count = len(asked.prompt)
    assert example.tokens[:count].tolist() == asked.prompt
    assert example.answers[count:].all()
    assert not example.answers[count - 1]
    assert asked.answer == "no"
    plain = {"question": "hi", "answer": "yo"}
    assert question(plain, tokenizer) == question(conversation("hi", "yo"), tokenizer)


BAD = {
    2: ("nope", "not JSON"),
    3: (json.dumps([1]), "not an object"),
    5: (json.dumps({"x": 1, "y": 2}), "has x, y, not the form"),
    6: (json.dumps({"prompt": 1, "completion": "x"}), "prompt is no text"),
    7: (json.dumps({"prompt": "x", "completion": " "}), "completion is empty"),
    8: (json.dumps({"messages": []}), "messages is no list, or an empty one"),
    9: (json.dumps(conversation("only a question")), "no message of the assistant"),
    10: (json.dumps(conversation("a", " ")), "message 2: the assistant's answer is"),
    11: (json.dumps({"messages": [{"role": "user"}]}), "message 1 lacks role or"),
    12: (json.dumps({"prompt": "x" * 50, "completion": "y"}), "no answer within the"),
    13: (json.dumps({"text": "\udcff"}), "text is no text"),
}


def file_with_bad_lines(folder):
    lines = [json.dumps({"text": f"good {i}"}) for i in range(14)]
    for number, (line, _) in BAD.items():
        lines[number - 1] = line
    lines[3] = ""  # no line at all
    path = folder / "data.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_bad_lines_are_counted_named_and_skipped(tokenizer, tmp_path):
    path = file_with_bad_lines(tmp_path)
    path.write_bytes(path.read_bytes() + b'\n{"text": "\xff"}\n')
    BAD_BYTES = 15

    examples, problems = data.read_examples(path, tokenizer, length=32)

    assert len(examples) == 2
    assert problems.lines == 14
    assert problems.bad.keys() == {*BAD, BAD_BYTES}
    for number, (_, why) in BAD.items():
        assert why in problems.bad[number], number
    assert str(problems).startswith(f"{path}: 12 of 14 lines are bad (line 2: not JSON")
    assert str(problems).endswith("; and 7 more)")


def test_a_bad_line_stops_a_strict_run(tokenizer, tmp_path):
    path = file_with_bad_lines(tmp_path)
    with pytest.raises(Refused, match=r"data.jsonl, line 2: not JSON.*leave --strict"):
        data.read_examples(path, tokenizer, length=32, strict=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is no file"),
        ("\n", "is empty"),
        ("[]\n[]", "no line is of use.*2 of 2 lines are bad"),
    ],
)
def test_a_file_without_examples_is_refused(text, message, tokenizer, tmp_path):
    path = tmp_path / "data.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(Refused, match=message):
        data.read_examples(path, tokenizer, length=32)


@pytest.mark.parametrize(
    ("template", "why"),
    [(None, "no chat template"), (STRICT, "refuses it: only tools")],
)
def test_messages_that_the_template_cannot_write_are_bad(
    template, why, tokenizer, monkeypatch
):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(BadLine, match=why):
        encode(conversation("a", "b"), tokenizer)


def test_an_answer_that_the_template_changes_is_bad(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", QWEN)
    thought = conversation("a", "x</think>b")
    with pytest.raises(BadLine, match="message 2: later messages change how it is"):
        encode(thought, tokenizer)


def test_long_texts_become_several_examples_and_long_answers_are_cut(
    tokenizer, tmp_path
):
    path = tmp_path / "data.jsonl"
    long = [{"text": "x" * 50}, {"prompt": "a", "completion": "b" * 50}]
    path.write_text("\n".join(map(json.dumps, long)))

    examples, problems = data.read_examples(path, tokenizer, length=20)

    assert [len(x.tokens) for x in examples] == [20, 20, 12, 20]
    assert [x.answers.sum() for x in examples] == [19, 19, 11, 18]
    assert problems.shortened == 1
    assert "1 examples are longer and were cut" in str(problems)


def test_a_tokenizer_that_is_not_the_models_is_refused(tokenizer, tmp_path):
    with pytest.raises(Refused, match=r"has no tokenizer\.json; copy"):
        data.load_tokenizer(tmp_path)
    tokenizer.save_pretrained(str(tmp_path))
    with pytest.raises(Refused, match="number 260, the model only 100 in all"):
        data.load_tokenizer(tmp_path, 100)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(Refused, match="the tokenizer cannot be read"):
        data.load_tokenizer(tmp_path)


# Rows and their order


@pytest.mark.parametrize("seed", [0, 1])
def test_packing_keeps_every_example_once_and_fills_rows(seed):
    lengths = np.random.default_rng(seed).integers(1, 65, 700)
    rows = packing.pack(lengths.tolist(), 64, seed)
    assert sorted(i for row in rows for i in row) == list(range(700))
    assert max(lengths[row].sum() for row in rows) <= 64
    assert lengths.sum() > 0.9 * 64 * len(rows)
    assert rows != packing.pack(lengths.tolist(), 64, seed + 1)


def test_a_row_has_its_examples_side_by_side_and_nothing_else():
    first, second = tiny_lm.new_examples(2)
    row = packing.fill([first, second], 64)
    a, b = len(first.tokens), len(second.tokens)
    count = lambda n: np.arange(n).tolist()
    assert row.tokens.tolist() == [*first.tokens, *second.tokens] + [0] * (64 - a - b)
    assert row.positions.tolist() == count(a) + count(b) + [0] * (64 - a - b)
    assert row.segments.tolist() == [1] * a + [2] * b + [0] * (64 - a - b)
    assert row.answers.tolist() == [*first.answers, *second.answers] + [False] * (
        64 - a - b
    )


def rows_in(batch):
    return {tuple(row.tolist()) for row in batch.tokens}


@pytest.mark.parametrize("pack", [False, True])
def test_each_epoch_has_every_row_once_in_an_order_of_its_own(pack):
    options = {"batch": 4, "length": 24, "seed": 3, "packing": pack}
    examples = tiny_lm.new_examples(32, longest=24 if pack else 12)
    count = len(data.rows_of(examples, 24, 3, pack))
    examples = examples if pack else examples[: count - count % 4]
    source = data.batches(examples, **options)
    stream = [tuple(x.tolist()) for _ in range(count) for x in next(source).tokens]
    epochs = [stream[i * count : (i + 1) * count] for i in range(4)]
    assert all(len(set(epoch)) == count for epoch in epochs)
    assert epochs[0] != epochs[1]
    again = data.batches(examples, **options)
    again.set_state({"next_index": 5})
    source = data.batches(examples, **options)
    for _ in range(5):
        next(source)
    assert source.get_state() == {"next_index": 5}
    chex.assert_trees_all_equal(next(again), next(source))


def test_the_shares_of_a_batch_are_the_batch():
    options = {"batch": 8, "length": 24, "seed": 3, "packing": True}
    examples = tiny_lm.new_examples()
    whole = data.batches(examples, **options)
    shares = [
        data.batches(examples, **options, process_index=i, process_count=4)
        for i in range(4)
    ]
    for _ in range(5):
        parts = [rows_in(next(share)) for share in shares]
        assert [len(part) for part in parts] == [2] * 4
        assert set.union(*parts) == rows_in(next(whole))
    assert {share.get_state()["next_index"] for share in shares} == {5}


@pytest.mark.parametrize(("fsdp", "tp"), [(4, 1), (2, 2), (1, 4)])
def test_one_process_has_all_rows(fsdp, tp):
    assert training.share_of_process(tiny_lm.new_mesh(fsdp, tp), 8) == (0, 1)


# The loss and its gradient


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model on one device."""
    spec = tiny_lm.read_spec(tmp_path_factory.mktemp("model"))
    mesh = tiny_lm.new_mesh()
    return spec, mesh, tiny_lm.new_model(spec, mesh)


def gradient_of(made, batch, accumulate=1):
    """Loss, number of tokens and gradient by path, of a batch."""
    spec, mesh, model = made
    graph, trainable, frozen = training.split(model)

    @jax.jit
    def run(trainable, frozen, batch):
        parts = step.Parts(graph, trainable, frozen)
        return step.loss_and_gradient(spec, parts, batch, accumulate, mesh)

    loss, count, grads = run(trainable, frozen, batch)
    return float(loss), int(count), jax.tree.map(np.asarray, grads)


def assert_close(found, wanted, factor=64):
    """Within so many roundings of the largest entry, as sums in another order are."""
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=factor * EPS * np.abs(y).max())


def apart(found, wanted):
    """The largest difference, in units of the largest entry."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return max(float(np.abs(x - y).max() / np.abs(y).max()) for x, y in pairs)


def test_loss_is_that_of_the_answers_by_hand(made):
    spec, _, model = made
    batch = packing.stack([packing.fill([x], 24) for x in tiny_lm.new_examples(3)])
    mask = packing.attention_mask(jnp.asarray(batch.segments))
    logits = models.apply(spec, model, batch.tokens, batch.positions, mask)
    logits = np.asarray(logits, np.float64)

    losses = {True: [], False: []}
    for row in range(3):
        for t in range(1, 24):
            if batch.segments[row, t]:
                before = logits[row, t - 1]
                surprise = np.log(np.exp(before).sum()) - before[batch.tokens[row, t]]
                losses[bool(batch.answers[row, t])].append(surprise)

    total, count = step.loss_and_count(spec, model, batch)
    assert count == len(losses[True]) == batch.answers.sum()
    np.testing.assert_allclose(total, sum(losses[True]), rtol=64 * EPS)
    assert abs(sum(losses[False]) / sum(losses[True]) - 1) > 0.01  # control
    np.testing.assert_allclose(
        step.mean_loss(spec, model, batch), np.mean(losses[True]), rtol=64 * EPS
    )


def test_packed_examples_have_the_loss_and_gradient_of_separate_ones(made):
    examples = tiny_lm.new_examples(6, longest=12)
    apart_ = packing.stack([packing.fill([x], 24) for x in examples])
    rows = packing.pack([len(x.tokens) for x in examples], 24, 0)
    packed = packing.stack([packing.fill([examples[i] for i in x], 24) for x in rows])
    assert len(rows) <= 3

    found, wanted = gradient_of(made, packed), gradient_of(made, apart_)

    assert_close(found, wanted)
    # Control: attention across examples. (Positions that go on would change nothing:
    # rotary ones are relative. `fill` has a test of its own.)
    wrong = packed._replace(segments=np.minimum(packed.segments, 1))
    assert apart(gradient_of(made, wrong)[2], wanted[2]) > 1e-3


def test_padding_does_not_count(made):
    rows = [packing.fill([x], 24) for x in tiny_lm.new_examples(3)]
    batch = packing.stack(rows)
    filled = packing.stack([*rows, packing.fill([], 24)])
    noise = np.random.default_rng(0).integers(0, tiny_lm.WORDS, filled.tokens.shape)
    tokens = np.where(filled.segments > 0, filled.tokens, noise.astype(np.int32))

    found = gradient_of(made, filled._replace(tokens=tokens, answers=filled.answers))

    assert_close(found, gradient_of(made, batch))


def test_accumulation_of_parts_is_the_gradient_of_the_whole(made):
    """Each token counts the same, though the parts have few and many."""
    sizes = (4, 4, 24, 24, 4, 4, 24, 24)
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(4, tiny_lm.WORDS, n, dtype=np.int32)
    examples = [Example(draw(n), np.arange(n) >= 1) for n in sizes]
    order = [0, 2, 1, 3, 4, 6, 5, 7]  # every other one is short
    batch = packing.stack([packing.fill([examples[i]], 24) for i in order])

    whole = gradient_of(made, batch)

    for parts in (2, 4):
        assert_close(gradient_of(made, batch, parts), whole)
    divided = [packing.Batch(*(x[i::2] for x in batch)) for i in (0, 1)]
    halves = [gradient_of(made, part) for part in divided]
    assert halves[0][1] < halves[1][1] / 5
    mean = jax.tree.map(lambda x, y: (x + y) / 2, halves[0][2], halves[1][2])
    assert apart(mean, whole[2]) > 1e-2  # control: the mean of means


# Steps


def test_the_rate_rises_and_then_falls_to_zero_after_the_last_step():
    rate = optimizers.schedule(2.0, 100, 0.1)
    values = np.array([rate(i) for i in range(101)])
    np.testing.assert_allclose(values[:11], 2.0 * np.arange(1, 12) / 11, rtol=1e-6)
    cosine = 1 + np.cos(np.pi * np.arange(91) / 90)
    np.testing.assert_allclose(values[10:], cosine, atol=1e-6)
    assert values[99] > 0
    assert optimizers.schedule(2.0, 10, 0.0)(0) == 2.0
    assert optimizers.schedule(2.0, 1, 0.5)(0) == 2.0


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_state_is_divided_as_the_factors_are(name, made):
    spec = made[0]
    mesh = tiny_lm.new_mesh(2, 2)
    tx, model = tiny_lm.new_tx(name), tiny_lm.new_model(spec, mesh)
    trainable = training.split(model).trainable
    run = training.begin(trainable, tx, mesh)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), trainable
    )
    planned = training.abstract_run(shapes, tx, mesh)
    chex.assert_trees_all_equal_shapes_and_dtypes(run, planned)
    where = lambda tree: [x.sharding for x in jax.tree.leaves(tree)]
    assert where(run) == where(planned)
    factors = {(x.shape, x.sharding) for x in jax.tree.leaves(trainable)}
    divided = [x for x in jax.tree.leaves(run.opt_state) if (x.shape, x.sharding) in
               factors and not x.sharding.is_fully_replicated]  # fmt: skip
    assert len(divided) >= 2 * len(jax.tree.leaves(trainable)) * 2 // 3
    # A copy: a step consumes the run, and the model stays.
    jax.tree.map(lambda x: x.delete(), run.trainable)
    assert not any(x.is_deleted() for x in jax.tree.leaves(trainable))


def test_checkpoints_of_another_run_are_refused_before_anything_is_loaded(tmp_path):
    assert checkpoints.check(tmp_path / "none", {"seed": 0}) == 0
    run = {"x": jnp.zeros(3)}
    with checkpoints.Saver(tmp_path, 1, 1, {"seed": 0, "rank": 4}) as saver:
        saver(1, run)
    assert checkpoints.check(tmp_path, {"seed": 0, "rank": 4}) == 1
    message = r"another run \(--rank 4 there, 8 here\).*name another --output"
    with pytest.raises(Refused, match=message):
        checkpoints.check(tmp_path, {"seed": 0, "rank": 8})


def test_fit_reports_each_step_and_calls_what_watches(made, tmp_path):
    spec, mesh, _ = made
    model, seen, told = tiny_lm.new_model(spec, mesh), [], []
    before = jax.tree.map(np.array, nnx.state(model, nnx.LoRAParam))

    def fit(steps):
        return training.fit(
            spec, model, tiny_lm.new_tx(), tiny_lm.new_examples(), mesh=mesh,
            steps=steps, batch=4, length=24, seed=0, folder=tmp_path, save_every=2,
            settings={}, report=lambda step, metrics: told.append((step, metrics)),
            watch=[(2, lambda step, model: seen.append((step, len(told))))],
        )  # fmt: skip

    assert fit(3) == 0
    assert [step for step, _ in told] == [1, 2, 3]
    assert seen == [(2, 2), (3, 3)]  # after the metrics of the step
    assert told[0][1].keys() == {"loss", "tokens", "gradient_norm", "seconds"}
    assert fit(5) == 3
    assert [step for step, _ in told] == [1, 2, 3, 4, 5]
    assert apart(nnx.state(model, nnx.LoRAParam), before) > 1e-3


# Processes, meshes and restarts


def start(folder, **more):
    """A run in a process of its own."""
    asked = json.dumps({"folder": str(folder), "fsdp": 1, "tp": 1, **more})
    program = "-W", "ignore", "-m", "tests.support.tiny_lm"
    return processes.start(*program, asked, devices=2 if "port" in more else 1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing has happened to, in a process, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    wait_for(start(folder))
    return tiny_lm.read(folder / "tuned0.npz"), folder


def assert_same_run(found, wanted):
    """Within rounding: float32, six steps, sums in another order."""
    assert_close(found.factors, wanted.factors, 4096)
    steps = range(1, tiny_lm.STEPS + 1)
    for i in steps:
        np.testing.assert_allclose(found.losses[i], wanted.losses[i], rtol=512 * EPS)
    np.testing.assert_allclose(found.validation, wanted.validation, rtol=512 * EPS)
    assert found.texts == wanted.texts


def test_a_killed_run_ends_with_the_bits_of_one_never_killed(whole, tmp_path):
    """Killed in its second save, then in a step; each time it goes on."""
    for event, number in (("rename", 5), ("step", 2)):
        killed = start(tmp_path, kill=[event, number])
        wait_for(killed, code=-signal.SIGKILL)
    wait_for(start(tmp_path))

    found = tiny_lm.read(tmp_path / "tuned0.npz")

    assert 1 < min(found.losses) <= tiny_lm.STEPS  # it did not begin anew
    for i, loss in found.losses.items():
        assert loss == whole[0].losses[i]
    for x, y in zip(found.factors, whole[0].factors, strict=True):
        np.testing.assert_array_equal(x, y)
    assert found.texts == whole[0].texts


def test_two_processes_are_one(whole, tmp_path):
    """Two devices each, the model divided over all four."""
    where = {"fsdp": 2, "tp": 2, "port": free_port()}
    wait_for(*(start(tmp_path, process=i, **where) for i in range(2)))

    for i in range(2):
        assert_same_run(tiny_lm.read(tmp_path / f"tuned{i}.npz"), whole[0])


def test_a_run_goes_on_on_another_mesh(whole, tmp_path, monkeypatch):
    """Saved by one device at step 4, gone on by four."""
    shutil.copytree(whole[1], tmp_path / "on")
    shutil.rmtree(tmp_path / "on" / "checkpoints" / str(tiny_lm.STEPS))

    found = tiny_lm.tune(tmp_path / "on", 2, 2)

    assert found.losses.keys() == {5, 6}
    before = {i: whole[0].losses[i] for i in range(1, 5)}
    assert_same_run(found._replace(losses={**before, **found.losses}), whole[0])
    # Control: the optimizer's state is part of it.
    begin = training.Saver.resume
    forget = lambda saver, run: begin(saver, run)._replace(opt_state=run.opt_state)
    monkeypatch.setattr(training.Saver, "resume", forget)
    shutil.rmtree(tmp_path / "on" / "checkpoints" / str(tiny_lm.STEPS))
    wrong = tiny_lm.tune(tmp_path / "on", 2, 2)
    assert apart(wrong.factors, whole[0].factors) > 1e-3


class Accelerator:
    """JAX for tunix's Llama, with devices of another kind than "cpu"."""

    def __getattr__(self, name):
        return getattr(jax, name)

    def devices(self):
        return [types.SimpleNamespace(platform="tpu")]


def test_activations_that_are_divided_change_nothing(whole, tmp_path, monkeypatch):
    """tunix divides them on GPUs and TPUs alone; here it believes to be on one."""
    placed = []
    place = jax.lax.with_sharding_constraint
    count = lambda x, where: placed.append(where) or place(x, where)
    monkeypatch.setattr(jax.lax, "with_sharding_constraint", count)
    monkeypatch.setattr(llama3, "jax", Accelerator())

    assert_same_run(tiny_lm.tune(tmp_path, 2, 2), whole[0])

    assert {where.spec for where in placed} >= {P("fsdp", None, "tp")}


# Evaluation


def test_perplexity_counts_every_token_once_however_it_is_batched(made):
    spec, mesh, model = made
    examples = tiny_lm.new_examples(7, longest=12)
    sums = [
        step.loss_and_count(spec, model, packing.stack([packing.fill([x], 24)]))
        for x in examples
    ]
    total, count = (float(sum(x)) for x in zip(*sums, strict=True))

    for batch, pack in ((4, False), (2, True)):
        options = {"mesh": mesh, "batch": batch, "length": 24, "packing": pack}
        found = evaluation.perplexity(spec, examples, **options)(model)
        assert found.tokens == count
        np.testing.assert_allclose(found.loss, total / count, rtol=64 * EPS)
        np.testing.assert_allclose(found.perplexity, np.exp(total / count), rtol=1e-5)


def logits_after(spec, model, tokens):
    """Without a cache: the whole text again."""
    row = packing.stack([packing.fill([Example(np.array(tokens), np.ones(1))], 16)])
    mask = packing.attention_mask(jnp.asarray(row.segments))
    logits = models.apply(spec, model, row.tokens, row.positions, mask)
    return np.asarray(logits[0, len(tokens) - 1], np.float64)


def short_of_the_best(spec, model, prompt, text):
    """By how much the tokens of an answer are less likely than the best, at most."""
    tokens, short = list(prompt), 0.0
    for token in map(int, text.split()):
        logits = logits_after(spec, model, tokens)
        short = max(short, (logits.max() - logits[token]) / np.abs(logits).max())
        tokens.append(token)
    return short


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_generation_is_the_most_likely_token_each_time(dtype, made):
    """With prompts of three lengths, by one program for all models alike."""
    spec, mesh, _ = made
    model, prompts = tiny_lm.new_model(spec, mesh, dtype), tiny_lm.PROMPTS
    options = {"mesh": mesh, "tokens": 5, "batch": 2}
    ask = evaluation.new_generator(spec, tiny_lm.Numbers(), prompts, **options)
    tolerance = 8 * float(jnp.finfo(dtype).eps)
    first = ask(model)
    factors = nnx.state(model, nnx.LoRAParam)
    nnx.update(model, jax.tree.map(lambda x: -2 * x, factors))
    second = ask(model)
    assert all(len(text.split()) == 5 for text in first)
    assert first != second
    short = lambda texts: [
        short_of_the_best(spec, model, *pair)
        for pair in zip(prompts, texts, strict=True)
    ]
    assert max(short(second)) < tolerance
    assert max(short(first)) > 0.1  # control: what another model has said


def test_an_answer_ends_where_the_folder_or_the_tokenizer_says(made, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    named = {"eos_token_id": [9, 8]}
    (tmp_path / "generation_config.json").write_text(json.dumps(named))
    assert generation.stop_tokens(tmp_path, tiny_lm.Numbers()) == [3, 7, 8, 9]

    spec, mesh, model = made
    options = {"mesh": mesh, "tokens": 5, "batch": 1}
    prompts = tiny_lm.PROMPTS[-1:]

    def ask(spec):
        new = evaluation.new_generator(spec, tiny_lm.Numbers(), prompts, **options)
        return new(model)[0].split()

    *_, last = free = ask(spec)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": int(last)}))
    expected = free[: free.index(last)]
    assert ask(spec._replace(folder=tmp_path)) == expected
    assert 0 < len(expected) < len(free)


def test_answers_are_scored_in_order(made):
    spec, mesh, model = made
    options = {"kind": "exact", "mesh": mesh, "tokens": 5, "batch": 2}

    def ask(*answers):
        pairs = zip(tiny_lm.PROMPTS, answers, strict=True)
        asked = [evaluation.Question(*pair) for pair in pairs]
        return evaluation.answers(spec, tiny_lm.Numbers(), asked, **options)(model)

    said = ask("", "", "").texts
    found = ask("", said[1] + "\n", said[2] + " 1")
    assert found == evaluation.Answers(pytest.approx(1 / 3), said, [False, True, False])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 7 - 4 = 3.\n#### 3", "3"),
        ("He has $1,234.50 left.\nThe answer is: 1234.5", "1234.5"),
        ("#### 5\nand then 9 more", "5"),
        ("the final answer is -12%", "-12"),
        ("6 apples cost 18 dollars.", "18"),
        ("The answer is: unknown, but 4", "4"),
        ("about .5", "0.5"),
        ("no number", None),
    ],
)
def test_the_number_that_a_solution_ends_with(text, number):
    found = scoring.final_number(text)
    assert found == (None if number is None else scoring.Decimal(number))


def test_gsm8k_compares_numbers_and_exact_compares_texts():
    assert scoring.gsm8k("I think 2 + 2 is 4.0", "2 + 2 = 4\n#### 4")
    assert not scoring.gsm8k("#### 4", "no number")
    assert not scoring.gsm8k("5", "#### 4")
    assert scoring.exact(" yes\n", "yes")
    assert not scoring.exact("Yes", "yes")


def test_questions_are_read_like_data(tokenizer, tmp_path):
    path = tmp_path / "questions.jsonl"
    lines = [{"question": "a", "answer": "b"}, {"prompt": "c", "completion": "d"}, {}]
    path.write_text("\n".join(map(json.dumps, lines)))
    found, problems = evaluation.read_questions(path, tokenizer)
    assert [x.answer for x in found] == ["b", "d"]
    assert tokenizer.decode(found[0].prompt) == "<begin><user>\na<end><assistant>\n"
    assert tokenizer.decode(found[1].prompt) == "<begin>c"
    assert "line 3: lacks question and answer" in str(problems)
