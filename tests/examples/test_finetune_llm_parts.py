"""Options, metrics, sweep, plan and output folder of the language model example."""

import dataclasses
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("tensorboardX")

from rich.console import Console

from examples.finetune_llm import folder, mesh, options, plan, presets, reports, sweep
from examples.finetune_llm.errors import Refused

DOCS = Path(__file__).parents[2] / "docs" / "language-models.md"
FILES = ["--model", "m", "--data", "d.jsonl"]


def parse(*more, files=FILES):
    return options.parse([*files, *more], "")


def test_the_command_line_is_before_the_preset_and_that_before_the_defaults():
    default, chosen = parse(), parse("--preset", "metamathqa", "--rank", "4")
    assert (default.rank, default.steps) == (16, None)
    assert (chosen.rank, chosen.alpha, chosen.steps) == (4, 64.0, 5000)
    assert chosen.targets == ("q_proj", "v_proj")
    assert parse("--rates", "1e-3", "3e-4").rates == (1e-3, 3e-4)


def test_the_demo_sweeps_unless_one_rate_is_asked_for():
    assert len(parse("--demo", files=[]).rates) > 1
    one = parse("--demo", "--quick", "--rate", "0.01", files=[])
    assert (one.rate, one.rates, one.steps) == (0.01, (), 20)
    assert one.settings() != parse("--demo", "--rate", "0.01", files=[]).settings()


def test_presets_have_only_options_and_say_where_they_are_from():
    names = {field.name for field in dataclasses.fields(options.Options)}
    for preset in presets.PRESETS.values():
        assert preset.settings.keys() <= names
        assert "https://" in preset.source
    assert (presets.DEMO | presets.QUICK_DEMO).keys() <= names


PRESETS = {
    "metamathqa": {
        "rank": 32, "alpha": 64, "batch": 4, "steps": 5000, "length": 768,
        "max_grad_norm": 1, "optimizer": "lora", "rate": 1e-4, "weight_decay": 0.1,
    },
    "lora-pro": {
        "rank": 8, "alpha": 16, "batch": 32, "epochs": 1, "length": 1024,
        "rate": 2e-5, "warmup": 0.03, "targets": options.KERNELS,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_what_the_publications_say(name):
    chosen = dataclasses.asdict(parse("--preset", name))
    assert {k: chosen[k] for k in PRESETS[name]} == PRESETS[name]


WRONG = {
    "nothing": ([], "give --model and --data"),
    "no data": (["--model", "m"], "give --data"),
    "an unknown option": ([*FILES, "--foo"], "unrecognized arguments: --foo"),
    "a short form": ([*FILES, "--ra", "1"], "unrecognized"),
    "no number": ([*FILES, "--rank", "many"], "--rank: invalid int value"),
    "no rank": ([*FILES, "--rank", "0"], "--rank 0 is not positive"),
    "no rate": ([*FILES, "--rate", "nan"], "--rate nan is not positive"),
    "no rate of a sweep": ([*FILES, "--rates", "1", "0"], "--rates 0 is not"),
    "an unknown optimizer": ([*FILES, "--optimizer", "sgd"], "lorapro_adamw"),
    "uneven parts": ([*FILES, "--batch", "6", "--accumulate", "4"], "does not divide"),
    "all held out": ([*FILES, "--held-out", "1"], "no share between 0 and 1"),
    "no questions": ([*FILES, "--evaluate", "gsm8k"], "needs --questions"),
    "a topology to train": ([*FILES, "--topology", "v5e:8x8"], "for --plan"),
    "a plan of the demo": (["--demo", "--plan"], "--plan is for"),
    "quick without demo": ([*FILES, "--quick"], "--quick is for --demo"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_one_line(case):
    argv, text = WRONG[case]
    with pytest.raises(Refused, match=re.escape(text)) as caught:
        options.parse(argv, "")
    assert "\n" not in str(caught.value)


def test_every_option_is_on_the_page():
    page = DOCS.read_text()
    named = set(re.findall(r"`--([a-z-]+)", page))
    there = {x.name.replace("_", "-") for x in dataclasses.fields(options.Options)}
    assert there - named == set()
    assert named - there <= {"help"}


def test_optimizers_and_starts_of_the_options_are_those_that_there_are():
    pytest.importorskip("tunix")
    from examples.finetune_llm import optimizers
    from lorapro_jax import initializers

    assert set(options.OPTIMIZERS) == set(optimizers.OPTIMIZERS)
    assert all(hasattr(initializers, name) for name in options.STARTS)


def write(report, steps):
    for step in steps:
        report.write(step, loss=1 / step)


def test_metrics_of_a_run_that_goes_on_are_those_of_one_that_did_not_stop(tmp_path):
    with reports.Report(tmp_path / "whole") as report:
        write(report, range(1, 8))
    with reports.Report(tmp_path / "parts") as report:
        write(report, range(1, 6))
    with (tmp_path / "parts" / reports.METRICS).open("a") as file:
        file.write('{"step": 6, "lo')  # killed
    with reports.Report(tmp_path / "parts", step=4) as report:  # its checkpoint
        write(report, range(5, 8))

    whole, parts = (reports.read_metrics(tmp_path / x) for x in ("whole", "parts"))
    assert [row["step"] for row in whole] == list(range(1, 8))
    assert parts == whole


def test_metrics_are_json_that_other_readers_take(tmp_path):
    with reports.Report(tmp_path) as report:
        report.write(1, loss=math.nan, sample="ünï\nx")
    text = (tmp_path / reports.METRICS).read_text()
    assert "NaN" not in text
    assert json.loads(text) == {"step": 1, "loss": None, "sample": "ünï\nx"}


def test_tensorboard_has_the_metrics(tmp_path):
    with reports.Report(tmp_path) as report:
        write(report, range(1, 4))
    (events,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    assert events.read_bytes().count(b"loss") == 3


def test_only_an_active_report_writes(tmp_path):
    with reports.Report(tmp_path, active=False) as report:
        write(report, range(1, 4))
    assert not any(tmp_path.iterdir())


def test_the_picture_shows_runs_and_sweep_also_where_losses_are_missing(tmp_path):
    rows: list[dict] = [{"step": i, "loss": 1 / i} for i in range(1, 50)]
    rows += [{"step": 49, "validation_loss": 0.5}, {"step": 50, "loss": None}]
    one, both = tmp_path / "one.png", tmp_path / "both.png"
    reports.save_picture(one, {"run": rows, "empty": []})
    reports.save_picture(both, {"run": rows}, [(1e-4, 2.0), (1e-3, math.nan)])
    assert 5_000 < one.stat().st_size < both.stat().st_size


LOSSES = {1e-4: 2.0, 3e-4: 1.5, 1e-3: math.nan, 3e-3: 1.7}


def test_a_sweep_keeps_the_rate_of_the_lowest_loss_that_is_a_number(tmp_path):
    seen = []
    runs = sweep.sweep(
        [3e-4, 1e-4, 3e-3, 1e-3, 1e-4],
        tmp_path,
        lambda rate, at: seen.append(at) or LOSSES[rate],
    )
    assert [run.rate for run in runs] == sorted(LOSSES)
    assert len(set(seen)) == 4
    assert sweep.best(runs).rate == 3e-4
    with pytest.raises(Refused, match=r"every rate of 0\.001 diverged"):
        sweep.best([run for run in runs if math.isnan(run.loss)])


@pytest.mark.parametrize(
    ("rates", "says"),
    [([1e-4, 3e-4], "higher"), ([3e-4, 3e-3], "lower"), ([1e-4, 3e-4, 3e-3], "")],
)
def test_a_best_rate_at_the_edge_is_said(rates, says, tmp_path, capsys):
    runs = sweep.sweep(rates, tmp_path, lambda rate, _: LOSSES[rate])
    sweep.print_sweep(runs, Console(width=80, markup=False))
    out = capsys.readouterr().out
    assert "best" in out
    assert (f"try {says} ones" if says else "edge") in out or not says
    assert ("at the edge" in out) == bool(says)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [("", (8, 1)), ("fsdp=2,tensor=4", (2, 4)), ("tensor=8", (1, 8))],
)
def test_a_mesh_is_read(text, sizes):
    assert tuple(mesh.read_sizes(text, 8).values()) == sizes


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("fsdp=3", "there are 8"),
        ("data=8", "'data=8' is none of fsdp and tensor"),
        ("fsdp", "'fsdp' has no positive size"),
        ("fsdp=0,tensor=8", "no positive size"),
        ("8", "has the form"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(text, says):
    with pytest.raises(Refused, match=says):
        mesh.read_sizes(text, 8)


def test_a_batch_that_the_mesh_does_not_divide_is_refused():
    sizes = {"fsdp": 4, "tp": 2}
    mesh.check_batch(parse("--batch", "8", "--accumulate", "2"), sizes)
    with pytest.raises(Refused, match="in 4 parts cannot be divided among fsdp=4"):
        mesh.check_batch(parse("--batch", "8", "--accumulate", "4"), sizes)


def test_a_folder_belongs_to_one_run(tmp_path):
    first = parse("--output", str(tmp_path / "out"))
    folder.check_output(first)
    assert not first.output.exists()  # a check writes nothing
    folder.claim(first)
    folder.check_output(first)
    folder.check_output(dataclasses.replace(first, mesh="fsdp=8", memory=3.0))
    folder.check_output(dataclasses.replace(first, evaluate="gsm8k", save_every=7))
    with pytest.raises(Refused, match="another run's: --rank 16 there, 4 here"):
        folder.check_output(dataclasses.replace(first, rank=4))
    with pytest.raises(Refused, match="--rates"):
        folder.check_output(dataclasses.replace(first, rates=(1e-3,)))


def test_a_sweep_may_get_more_rates_in_its_folder(tmp_path):
    first = parse("--output", str(tmp_path / "out"), "--rates", "1e-3", "3e-3")
    folder.claim(first)
    folder.check_output(dataclasses.replace(first, rates=(1e-2,)))
    with pytest.raises(Refused, match="--seed"):
        folder.check_output(dataclasses.replace(first, rates=(1e-2,), seed=1))


def test_a_folder_with_other_files_or_a_file_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(Refused, match="none of a run"):
        folder.check_output(parse("--output", str(tmp_path)))
    with pytest.raises(Refused, match="is a file"):
        folder.check_output(parse("--output", str(tmp_path / "thesis.tex")))


def placed(shape, spec, dtype=jnp.float32):
    grid = jax.make_mesh((4, 2), ("fsdp", "tp"), (jax.sharding.AxisType.Auto,) * 2)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(grid, spec))


def test_bytes_are_those_of_one_device():
    tree = [placed((8, 6), P("fsdp", "tp")), placed((8,), P(), jnp.bfloat16)]
    assert plan.bytes_of(tree) == 8 * 6 * 4 // 8 + 8 * 2
    assert plan.bytes_of(jax.ShapeDtypeStruct((3, 3), jnp.int4)) == 5


def test_what_is_kept_for_the_backward_pass_is_counted_without_the_arguments():
    """exp keeps its result, a product its factors: here x is an argument."""
    x = placed((64, 32), P("fsdp"))
    f = lambda w, x: jnp.sum(jnp.exp(x @ w))
    w = placed((32, 16), P())
    assert plan.kept_for_backward(f, w, x) == 64 * 16 * 4 // 4
    # Control: a second nonlinearity keeps another array.
    g = lambda w, x: jnp.sum(jnp.exp(jnp.exp(x @ w)))
    assert plan.kept_for_backward(g, w, x) == 2 * 64 * 16 * 4 // 4


def test_too_little_memory_is_refused_with_the_numbers():
    needs = plan.Plan(*(i * plan.GIB for i in range(6)))
    plan.check_plan(needs, 15 * plan.GIB)
    plan.check_plan(needs, None)
    says = r"needs 15\.00 GiB of 14\.00 GiB .*optimizer 2\.00 GiB.*--remat"
    with pytest.raises(Refused, match=says):
        plan.check_plan(needs, 14 * plan.GIB)


def test_a_plan_is_the_compiled_programs(tmp_path):
    x = placed((64, 32), P("fsdp"))
    step = jax.jit(lambda w, x: jnp.sum(jnp.sort(x @ w, axis=0)))
    w = placed((32, 16), P("tp"))
    compiled = plan.compile_step(step, w, x)
    found = plan.make_plan(
        compiled, 0, parameters=w, adapters={}, optimizer=[], batch=x
    )
    assert found.parameters == 32 * 16 * 4 // 2
    assert found.temporaries == compiled.memory_analysis().temp_size_in_bytes > 0
    assert found.total == sum(found)
    assert np.isfinite(found.total)
