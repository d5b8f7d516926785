"""The command that fine-tunes language models, from its options to its files."""

import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.support.processes import free_port, start, wait_for

for name in ("tunix", "transformers", "tensorboardX", "rich", "matplotlib"):
    pytest.importorskip(name)

with warnings.catch_warnings():  # tunix imports what is deprecated in JAX
    warnings.simplefilter("ignore", DeprecationWarning)
    from examples.finetune_llm import agreement, demo, job, models, options, planning
    from examples.finetune_llm.__main__ import main
    from examples.finetune_llm.inputs import hold_out, read_inputs, read_model
    from examples.finetune_llm.reports import Report, read_metrics

# What tunix, qwix and the context of a mesh use is deprecated in JAX and Flax.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.usefixtures("quick_compiles"),
]

SIZE = demo.Size(300, 32, 1, 3, 8, 32, modules=2)
SETTINGS = [
    "--rank", "2", "--alpha", "4", "--targets", "q_proj", "v_proj", "--dtype",
    "float32", "--optimizer", "lora", "--rate", "0.1", "--steps", "4", "--batch", "8",
    "--length", "64", "--evaluate-every", "2", "--save-every", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder as Hugging Face has it, pretrained for an instant."""
    folder = tmp_path_factory.mktemp("base")
    demo.new_base(folder, SIZE, 0)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Data of the demo, cut to what is quick."""
    folder = tmp_path_factory.mktemp("data")
    demo.corpus.write_data(folder)
    for path in folder.glob("*.jsonl"):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(sorted(lines, key=len)[:24]))
    return folder


@dataclasses.dataclass
class Command:
    """Runs the command in this process."""

    model: Path
    data: Path
    output: Path

    def line(self, *more, **changes):
        paths = dataclasses.asdict(self) | changes
        named = [x for name, path in paths.items() for x in (f"--{name}", path)]
        return [*map(str, named), *SETTINGS, *map(str, more)]

    def __call__(self, *more, **changes):
        return main(self.line(*more, **changes))


@pytest.fixture
def command(base, files, tmp_path):
    return Command(base, files / "train.jsonl", tmp_path / "out")


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_same_adapter(folder, other, atol=0.0):
    one, two = (
        load_file(x / "adapter" / "adapter_model.safetensors") for x in (folder, other)
    )
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=0, atol=atol)


def test_a_run_leaves_metrics_a_picture_and_folders_that_pytorch_agrees_with(
    command, base, files
):
    questions = files / "questions.jsonl"
    assert command(
        "--mesh", "fsdp=4,tensor=2", "--validation", files / "validation.jsonl",
        "--evaluate", "exact", "--questions", questions, "--answer-tokens", 4,
        "--sample-every", 4, "--diagnostics", "--packing",
    ) == 0  # fmt: skip

    out = command.output
    rows = read_metrics(out)
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == [1, 2, 3, 4]
    validation = [row["validation_loss"] for row in rows if "validation_loss" in row]
    result = json.loads((out / "result.json").read_text())
    assert len(validation) == 2
    assert result["validation_loss"] == pytest.approx(validation[-1])
    assert result["validation_loss"] < result["validation_loss_before"]
    assert 0 <= result["exact"] <= 1
    assert max(row.get("gradient_mismatch", 0) for row in rows) < 1e-4
    assert any("sample_0" in row for row in rows)
    assert len((out / "answers.jsonl").read_text().splitlines()) == 24
    assert (out / "picture.png").stat().st_size > 5_000
    assert (out / "merged" / "tokenizer.json").exists()
    if not agreement.can_compare():
        pytest.skip("no PyTorch here")
    tokens = np.arange(5, 45)[None]
    adapter, merged = (
        agreement.torch_logits(base, tokens, out / "adapter"),
        agreement.torch_logits(out / "merged", tokens),
    )
    np.testing.assert_allclose(adapter, merged, atol=1e-4)
    # Control: they are not the base's.
    assert np.abs(agreement.torch_logits(base, tokens) - merged).max() > 1e-2


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(
    command, tmp_path, monkeypatch
):
    whole = tmp_path / "whole"
    assert command(output=whole) == 0

    class Stops(Report):
        def write(self, step, **values):
            if step > 3:
                raise KeyboardInterrupt
            super().write(step, **values)

    monkeypatch.setattr(job, "Report", Stops)
    with pytest.raises(KeyboardInterrupt):
        command()
    monkeypatch.undo()
    assert not (command.output / "adapter").exists()
    assert command() == 0
    assert_same_adapter(command.output, whole)
    strip = lambda rows: [{k: v for k, v in x.items() if k != "seconds"} for x in rows]
    assert strip(read_metrics(command.output)) == strip(read_metrics(whole))


def test_a_complete_run_is_not_repeated_and_no_other_takes_its_folder(command, capsys):
    assert command() == 0
    before = contents(command.output)
    metrics = read_metrics(command.output)

    assert command("--rank", 3) == 2
    assert "--rank 2 there, 3 here" in capsys.readouterr().err
    assert contents(command.output) == before
    shutil.copytree(command.output, before_folder := command.output.with_name("copy"))

    assert command() == 0
    assert_same_adapter(command.output, before_folder)
    assert read_metrics(command.output) == metrics


def test_a_sweep_exports_its_best_run(command, tmp_path, capsys):
    rates = ["--rates", "0.1", "1e-6"]
    assert command(*rates, "--weight-decay", "0.01") == 0
    alone, other = tmp_path / "alone", tmp_path / "other"
    assert command("--weight-decay", "0.01", output=alone) == 0
    assert command("--rate", "1e-6", output=other) == 0

    result = json.loads((command.output / "result.json").read_text())
    losses = dict(map(tuple, result["sweep"]))
    assert result["rate"] == min(losses, key=losses.get) == 0.1
    assert_same_adapter(command.output, alone)
    with pytest.raises(AssertionError):  # control: the other run's checkpoint
        assert_same_adapter(command.output, other)
    assert "at the edge: try higher" in capsys.readouterr().out


def test_two_processes_do_what_one_does(command, tmp_path):
    """Two devices each, the model divided over all four."""
    one, two = tmp_path / "one", command.output
    assert command(output=one) == 0
    where = "--mesh", "fsdp=2,tensor=2", "--coordinator", f"localhost:{free_port()}"
    lines = [command.line(*where, "--processes", 2, "--process", i) for i in range(2)]
    program = "-W", "ignore", "-m", "examples.finetune_llm"

    wait_for(*(start(*program, *line, devices=2) for line in lines))

    names = lambda out: {x.name for x in out.iterdir()}
    assert names(two) == names(one) >= {"adapter", "merged", "checkpoints"}
    # Four steps of AdamW in float32, sums in another order. Seen: 2e-7.
    assert_same_adapter(two, one, atol=1e-5)
    losses = lambda out: [x["loss"] for x in read_metrics(out) if "loss" in x]
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)
    # Control: another order of the rows.
    assert command("--seed", 1, output=tmp_path / "other") == 0
    with pytest.raises(AssertionError):
        assert_same_adapter(tmp_path / "other", one, atol=1e-5)


@pytest.mark.parametrize("is_demo", [False, True])
def test_no_process_writes_before_all_have_looked_at_the_folder(
    is_demo, command, tmp_path, monkeypatch
):
    """Or one that comes late could find what is half written, and refuse it."""
    happened = []

    def watch(name):
        plain = getattr(job, name)
        then = lambda *args: happened.append(name) or plain(*args)
        monkeypatch.setattr(job, name, then)

    for name in ("check_output", "_wait", "claim"):
        watch(name)
    stop = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    monkeypatch.setattr(job.demo, "prepare", stop)
    monkeypatch.setattr(job, "Job", stop)
    line = ["--demo", "--output", str(tmp_path)] if is_demo else command.line()

    with pytest.raises(KeyboardInterrupt):
        main(line)

    assert happened[:3] == ["check_output", "_wait", "claim"]


def altered(folder, tmp_path, **changes):
    """A copy of a model's folder with another config.json."""
    copy = tmp_path / "altered"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text()) | changes
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def without(name):
    def change(folder, tmp_path):
        copy = altered(folder, tmp_path)
        (copy / name).unlink()
        return copy

    return change


MODELS = {
    "no folder": (lambda _, tmp: tmp / "none", "none is no folder"),
    "no config": (without("config.json"), "config.json does not exist"),
    "no weights": (without("model.safetensors"), "no *.safetensors"),
    "no tokenizer": (without("tokenizer.json"), "no tokenizer.json"),
    "an architecture": (
        lambda x, tmp: altered(x, tmp, architectures=["MambaForCausalLM"]),
        "MambaForCausalLM, which is not supported. Supported are LlamaForCausalLM",
    ),
    "a tokenizer that does not fit": (
        lambda x, tmp: altered(x, tmp, vocab_size=256),
        "",  # the weights do not fit either; see the next test
    ),
    "other shapes": (lambda x, tmp: altered(x, tmp, head_dim=16), "has shape"),
}


@pytest.fixture
def loads_nothing(monkeypatch):
    """For errors: the weights must not be asked for."""

    def load(*_):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(models, "load", load)


def refused(code, command, capsys, text):
    """Whether it was one line that says so, before anything was written."""
    err = capsys.readouterr().err
    assert code == 2
    assert err.startswith("finetune_llm: ")
    assert len(err.splitlines()) == 1
    assert text in err
    assert not command.output.exists()


@pytest.mark.parametrize("case", MODELS)
def test_a_model_that_cannot_be_used_is_refused(
    case, command, base, tmp_path, capsys, loads_nothing
):
    change, text = MODELS[case]
    refused(command(model=change(base, tmp_path)), command, capsys, text)


def test_a_tokenizer_of_another_model_is_refused(
    command, base, tmp_path, capsys, loads_nothing
):
    copy = altered(base, tmp_path)
    demo.corpus.write_tokenizer(copy, demo.corpus.sources(2), 400)
    refused(command(model=copy), command, capsys, "a token of number 399")


OPTIONS = {
    "no data": (["--data", "none.jsonl"], "none.jsonl is no file"),
    "no validation": (["--validation", "none.jsonl"], "--validation none.jsonl"),
    "no questions": (
        ["--evaluate", "exact", "--questions", "none.jsonl"], "--questions none.jsonl",
    ),
    "a mesh for other devices": (["--mesh", "fsdp=3"], "there are 8"),
    "a mesh that does not divide the heads": (
        ["--mesh", "tensor=8"], "tensor=8 does not divide",
    ),
    "a mesh that does not divide the batch": (["--batch", "6"], "fsdp=8"),
    "too high a rank": (["--rank", "64", "--start", "pissa"], "rank"),
    "too little memory": (["--memory", "0.0001"], "too little memory per device"),
    "an unknown topology": (["--plan", "--topology", "v0:1x1"], "--topology v0:1x1"),
}  # fmt: skip


@pytest.mark.parametrize("case", OPTIONS)
def test_what_cannot_work_is_refused(case, command, capsys, loads_nothing):
    more, text = OPTIONS[case]
    refused(command(*more), command, capsys, text)


def test_bad_lines_are_said_or_refused(command, files, tmp_path, capsys, loads_nothing):
    bad = tmp_path / "bad.jsonl"
    lines = (files / "train.jsonl").read_text().splitlines()
    bad.write_text("\n".join([lines[0], "{", *lines[1:]]))
    refused(command("--strict", data=bad), command, capsys, "line 2: not JSON")
    with pytest.raises(AssertionError, match="weights were loaded"):
        command(data=bad)
    assert "1 of 25 lines are bad (line 2: not JSON" in capsys.readouterr().out


def test_another_folder_is_left_alone(command, capsys, loads_nothing):
    command.output.mkdir()
    (command.output / "thesis.tex").write_text("x")
    assert command() == 2
    assert "none of a run" in capsys.readouterr().err
    assert contents(command.output).keys() == {
        (command.output / "thesis.tex").relative_to(command.output)
    }


def test_a_plan_is_printed_and_nothing_is_written(
    command, base, tmp_path, capsys, loads_nothing
):
    """It needs no weights either: config.json is enough."""
    copy = without("model.safetensors")(base, tmp_path)
    assert command("--plan", "--mesh", "fsdp=4,tensor=2", model=copy) == 0
    out = capsys.readouterr().out
    for name in ("parameters", "activations", "optimizer", "temporaries", "together"):
        assert name in out
    assert not command.output.exists()


def plan_for(base, files, mesh, *more):
    chosen = options.parse(
        ["--model", str(base), "--data", str(files), "--mesh", mesh, *SETTINGS, *more],
        "",
    )
    return planning.plan_of(chosen, *read_model(chosen))


def test_a_plan_counts_what_each_device_has(base, files):
    whole = plan_for(base, files, "fsdp=8")
    # Adam has two numbers for each of A and B; the count is one more.
    assert whole.optimizer - 2 * whole.adapters in (0, 4, 8)
    more = plan_for(base, files, "fsdp=8", "--batch", "32")
    assert more.activations >= 3 * whole.activations
    assert more.batch == 4 * whole.batch
    assert more.parameters == whole.parameters


def test_what_is_held_out_is_not_learnt_from():
    train, held = hold_out(list(range(50)), 0.1, 0)
    assert len(held) == 5
    assert sorted(train + held) == list(range(50))
    assert hold_out(list(range(50)), 0.1, 1)[1] != held


def test_epochs_count_rows(base, files):
    chosen = options.parse(
        ["--model", str(base), "--data", str(files / "train.jsonl"), "--epochs", "2",
         "--batch", "8", "--length", "64", "--dtype", "float32"], "",
    )  # fmt: skip
    found = read_inputs(chosen, print)
    assert len(found.train) == 23
    assert found.steps == 6
    assert jax.device_count() == found.mesh.size
