"""`examples/train_sharded.py`: devices and processes change nothing but roundings."""

import json
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from examples import train_sharded
from tests.support.processes import free_port, start, wait_for

STEPS = 6
SMALL = ("--steps", str(STEPS), "--depth", "1", "--save-every", "2")
# Other devices add the same float32 numbers in another order. A loss is a mean over
# 1024 bytes: at most log2(1024) eps = 1.2e-6 from one evaluation, which each of the
# 12 steps can add anew and pass on. Seen: 4e-7.
TOLERANCE = 12 * 1.2e-6


def in_this_process(folder, devices, fsdp, *flags):
    """The losses with some of the eight devices of pytest's process."""
    args = train_sharded.parse([*SMALL, "--output", str(folder), *flags])
    mesh = train_sharded.make_mesh(jax.devices()[:devices], fsdp, args.batch)
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        return train_sharded.run_phases(args, mesh)
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


def difference(losses, others):
    """The largest one over both phases and all steps, relative."""
    assert [len(x) for x in losses.values()] == [STEPS, STEPS]
    pairs = zip(losses.values(), others.values(), strict=True)
    return max(np.max(np.abs(np.divide(x, y) - 1)) for x, y in pairs)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The folder of two processes with two devices each."""
    folder = tmp_path_factory.mktemp("two") / "output"
    where = f"--cpu-devices 2 --fsdp 2 --coordinator localhost:{free_port()}"
    flags = [*where.split(), "--processes", "2", "--process"]
    program = "-m", "examples.train_sharded", "--output", folder, *SMALL, *flags
    wait_for(*(start(*program, i) for i in range(2)), seconds=240)
    return folder


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    return in_this_process(tmp_path_factory.mktemp("one"), 1, None)


def losses_of(folder):
    return json.loads((folder / "losses.json").read_text())


def test_two_processes_have_the_losses_of_one_device(two_processes, one_device):
    assert difference(losses_of(two_processes), one_device) < TOLERANCE


def test_one_process_with_four_devices_has_the_losses_of_one_device(
    one_device, tmp_path
):
    assert difference(in_this_process(tmp_path, 4, None), one_device) < TOLERANCE


def test_control_a_process_with_wrong_rows_would_be_seen(
    one_device, tmp_path, monkeypatch
):
    """As if the second of two processes repeated the rows of the first."""
    load = train_sharded.load_batch

    def repeated(data, phase, step, mesh):
        half = phase._replace(batch=phase.batch // 2)
        rows = load(data, half, step, mesh)
        return jax.tree.map(lambda x: np.concatenate([x, x]), rows)

    monkeypatch.setattr(train_sharded, "load_batch", repeated)

    losses = in_this_process(tmp_path, 1, None)

    assert difference(losses, one_device) > 100 * TOLERANCE


def test_checkpoint_of_two_processes_goes_on_in_one_on_another_mesh(
    two_processes, one_device, tmp_path, monkeypatch
):
    before = losses_of(two_processes)
    shutil.copytree(two_processes, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "fine-tuning" / str(STEPS))  # the last; 4 remains
    load, loaded = train_sharded.load_batch, []

    def recorded(data, phase, step, mesh):
        loaded.append((phase.name, step))
        return load(data, phase, step, mesh)

    monkeypatch.setattr(train_sharded, "load_batch", recorded)

    losses = in_this_process(tmp_path, 4, 4)

    assert loaded == [("fine-tuning", 4), ("fine-tuning", 5)]
    assert losses["pretraining"] == before["pretraining"]
    assert losses["fine-tuning"][:4] == before["fine-tuning"][:4]
    assert difference(losses, one_device) < TOLERANCE


def test_all_but_the_rank_is_divided_over_fsdp():
    """The weights, the factors, and both moments of either kind of optimizer."""
    mesh = train_sharded.make_mesh(jax.devices()[:4], 2, 16)
    shape = jax.ShapeDtypeStruct
    tree = {
        "kernel": shape((64, 256), np.float32),
        "odd": shape((3, 5), np.float32),
        "query": {"lora_a": shape((64, 4), np.float32)},
        "mu": {"query": {"lora_b": shape((4, 64), np.float32)}},
        "nu": {"query": {"lora_a": shape((64, 1), np.float32)}},
    }
    run = train_sharded.Run(tree, (), shape((), np.int32), shape((8,), np.float32))

    found = jax.tree.map(lambda x: x.spec, train_sharded.shardings(run, mesh))

    assert found.losses == found.step == P()
    assert found.trainable == {
        "kernel": P(None, "fsdp"),
        "odd": P(None, None),
        "query": {"lora_a": P("fsdp", None)},
        "mu": {"query": {"lora_b": P(None, "fsdp")}},
        "nu": {"query": {"lora_a": P("fsdp", None)}},
    }


def test_other_settings_than_the_checkpoints_are_an_error(two_processes, tmp_path):
    shutil.copytree(two_processes, tmp_path, dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"other settings.*'seed': 0.*'seed': 1"):
        in_this_process(tmp_path, 1, None, "--seed", "1")


@pytest.mark.parametrize(("devices", "fsdp", "batch"), [(4, 3, 16), (4, 2, 6)])
def test_numbers_that_do_not_divide_are_an_error(devices, fsdp, batch):
    message = f"found 4 devices: --fsdp {fsdp} has to divide 4, and 4 --batch {batch}"
    with pytest.raises(ValueError, match=message):
        train_sharded.make_mesh(jax.devices()[:devices], fsdp, batch)
