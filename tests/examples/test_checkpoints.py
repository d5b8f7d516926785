"""Orbax checkpoints: what goes on from them, on which mesh, and after which change."""

import functools
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from examples.checkpointing import open_checkpoints, restore, save
from lorapro_jax import lorapro, lorapro_adamw
from tests.support.processes import environment

ROOT = Path(__file__).parents[2]
OPTIMIZERS = {
    "lorapro": lambda: optax.chain(lorapro(), optax.adamw(1e-2)),
    "factored": lambda: lorapro_adamw(1e-2),
    "dense": lambda: lorapro_adamw(1e-2, moments="dense"),
}


def make_params():
    """Two pairs and a bias."""
    keys = jax.random.split(jax.random.key(0), 4)
    up = {"lora_a": (8, 2), "lora_b": (2, 12)}
    down = {"lora_a": (12, 2), "lora_b": (2, 8)}
    draw = lambda key, shape: 0.5 * jax.random.normal(key, shape)
    factors = [draw(*x) for x in zip(keys, [*up.values(), *down.values()], strict=True)]
    up, down = (dict(zip(up, x, strict=True)) for x in (factors[:2], factors[2:]))
    return {"up": up, "down": down, "bias": jnp.zeros(8)}


def loss_fn(params, step):
    """Of two layers on data that the step number draws."""
    x = jax.random.normal(jax.random.fold_in(jax.random.key(1), step), (16, 8))
    hidden = jnp.tanh(x @ params["up"]["lora_a"] @ params["up"]["lora_b"])
    y = hidden @ params["down"]["lora_a"] @ params["down"]["lora_b"] + params["bias"]
    return jnp.mean((y - jnp.sin(x)) ** 2)


def begin(tx):
    """The run of a program that has just started."""
    params = make_params()
    return {"adapters": params, "optimizer": tx.init(params), "step": jnp.int32(0)}


@functools.cache
def step_of(tx):
    @jax.jit
    def step(run):
        loss, grads = jax.value_and_grad(loss_fn)(run["adapters"], run["step"])
        updates, state = tx.update(grads, run["optimizer"], run["adapters"])
        adapters = optax.apply_updates(run["adapters"], updates)
        run = {"adapters": adapters, "optimizer": state, "step": run["step"] + 1}
        return run, loss

    return step


def train(tx, run, steps):
    losses = []
    for _ in range(steps):
        run, loss = step_of(tx)(run)
        losses.append(float(loss))
    return run, losses


def on_one_device(tree):
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda _: one, tree)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_restored_run_goes_on_to_the_same_bits(name, tmp_path, quick_compiles):
    """From abstract trees: nothing is initialized to restore into."""
    tx = OPTIMIZERS[name]()
    with open_checkpoints(tmp_path, 2) as manager:
        run = begin(tx)
        for step in range(1, 6):
            run, _ = train(tx, run, 1)
            save(manager, step, run, {"name": name}, last=step == 5)
        manager.wait_until_finished()
        assert manager.all_steps() == [4, 5]
    expected = train(tx, run, 3)

    with open_checkpoints(tmp_path, 2) as manager:
        abstract = jax.eval_shape(lambda: begin(tx))
        restored = restore(manager, abstract, on_one_device(abstract), {"name": name})

    assert int(restored["step"]) == 5
    chex.assert_trees_all_equal(train(tx, restored, 3), expected)
    forgetful = {**restored, "optimizer": tx.init(restored["adapters"])}  # control
    assert train(tx, forgetful, 3)[1] != expected[1]


def test_another_setting_than_the_saved_one_is_an_error(tmp_path):
    run = {"x": jnp.zeros(3)}
    with open_checkpoints(tmp_path, 1) as manager:
        save(manager, 1, run, {"seed": 0}, last=True)
        manager.wait_until_finished()
        with pytest.raises(ValueError, match=r"'seed': 0.*Repeat them.*'seed': 1"):
            restore(manager, run, on_one_device(run), {"seed": 1})


def placed(tree, mesh):
    """Every array on the last mesh axis, by its first axis that this divides."""
    axis = mesh.axis_names[-1]

    def place(x):
        fits = [i for i in range(x.ndim) if x.shape[i] % mesh.shape[axis] == 0]
        spec = [axis if [i] == fits[:1] else None for i in range(x.ndim)]
        return NamedSharding(mesh, P(*spec))

    return jax.tree.map(place, tree)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_restored_on_another_mesh_all_values_are_bit_equal(
    name, tmp_path, quick_compiles
):
    tx = OPTIMIZERS[name]()
    run, _ = train(tx, begin(tx), 2)
    old = jax.make_mesh((4,), ("x",), devices=jax.devices()[:4])
    new = jax.make_mesh((2, 2), ("y", "z"), devices=jax.devices()[4:])
    run = jax.device_put(run, placed(run, old))
    abstract = jax.eval_shape(lambda: begin(tx))
    wanted = placed(abstract, new)
    with open_checkpoints(tmp_path, 1) as manager:
        save(manager, 2, run, {}, last=True)
        manager.wait_until_finished()
        restored = restore(manager, abstract, wanted, {})

    chex.assert_trees_all_equal_structs(restored, run)
    chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(run))
    for x, sharding in zip(*map(jax.tree.leaves, (restored, wanted)), strict=True):
        assert x.sharding == sharding
    moments = jax.tree.leaves(restored["optimizer"])
    divided = [x for x in moments if not x.sharding.is_fully_replicated]
    assert len(divided) >= 4  # control: there was something to divide


def saved_by(tx, folder, steps=3):
    """Adapters after some steps, and the state that was saved then."""
    run, _ = train(tx, begin(tx), steps)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, run["optimizer"])
    return run


def next_step(tx, run, state):
    return step_of(tx)({**run, "optimizer": state})[0]


def test_plain_chain_finds_no_state_after_lorapro_was_added(tmp_path):
    """The places in the state are numbers; the error names the one it wants."""
    adamw = optax.adamw(1e-2)
    saved_by(adamw, tmp_path / "state")
    tx = optax.chain(lorapro(), adamw)
    template = jax.eval_shape(tx.init, make_params())

    with (
        ocp.StandardCheckpointer() as checkpointer,
        pytest.raises(ValueError, match="mismatch"),
    ):
        checkpointer.restore(tmp_path / "state", template)


def test_moments_move_into_and_out_of_a_plain_chain_by_hand(tmp_path, quick_compiles):
    params, adamw = make_params(), optax.adamw(1e-2)
    chain = optax.chain(lorapro(), adamw)
    without = saved_by(adamw, tmp_path / "without")
    with_it = saved_by(chain, tmp_path / "with")

    with ocp.StandardCheckpointer() as checkpointer:
        read = checkpointer.restore  # each as what it was
        old = read(tmp_path / "without", jax.eval_shape(adamw.init, params))
        added = (optax.EmptyState(), old)
        _, removed = read(tmp_path / "with", jax.eval_shape(chain.init, params))

    chex.assert_trees_all_equal_structs(added, chain.init(params))
    chex.assert_trees_all_equal_structs(removed, adamw.init(params))
    chex.assert_trees_all_equal(added[1], without["optimizer"])
    chex.assert_trees_all_equal(removed, with_it["optimizer"][1])
    moved = next_step(chain, without, added)["adapters"]["bias"]
    fresh = next_step(chain, without, chain.init(params))["adapters"]["bias"]
    assert jnp.abs(moved - fresh).max() > 1e-4  # control: the moments matter
    np.testing.assert_array_equal(  # lorapro leaves a bias and its moments alone
        moved, next_step(adamw, without, without["optimizer"])["adapters"]["bias"]
    )


def named(with_lorapro):
    parts = [("lorapro", lorapro())] if with_lorapro else []
    return optax.named_chain(*parts, ("adamw", optax.adamw(1e-2)))


def read_by_name(old, tx, params, folder):
    """Reads it as what it was, and takes the moments by their name."""
    state = tx.init(params)
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.restore(folder, jax.eval_shape(old.init, params))
    state["adamw"] = saved["adamw"]
    return state


def read_partially(old, tx, params, folder):
    """Reads what has the same name; need not know what it was."""
    like = jax.eval_shape(tx.init, params)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        partial = ocp.args.PyTreeRestore(like, partial_restore=True)
        return checkpointer.restore(folder, args=partial)


@pytest.mark.filterwarnings("ignore:Sharding info not provided")  # read from the file
@pytest.mark.parametrize("read", [read_by_name, read_partially])
@pytest.mark.parametrize("adding", [True, False])
def test_named_chain_keeps_its_moments_when_lorapro_comes_or_goes(
    adding, read, tmp_path, quick_compiles
):
    old, tx, folder = named(not adding), named(adding), tmp_path / "state"
    run = saved_by(old, folder)

    state = read(old, tx, run["adapters"], folder)

    chex.assert_trees_all_equal_structs(state, tx.init(run["adapters"]))
    chex.assert_trees_all_equal(state["adamw"], run["optimizer"]["adamw"])
    bias = next_step(tx, run, state)["adapters"]["bias"]
    expected = next_step(old, run, run["optimizer"])["adapters"]["bias"]
    np.testing.assert_array_equal(bias, expected)


@pytest.mark.parametrize("adding", [True, False])
def test_control_named_chain_alone_does_not_change_what_is_in_it(adding, tmp_path):
    """Orbax records the empty state of lorapro() by name, and misses it."""
    saved_by(named(not adding), tmp_path / "state")
    template = jax.eval_shape(named(adding).init, make_params())
    message = r"(?s)do not match.*lorapro.*partial_restore=True"
    with (
        ocp.StandardCheckpointer() as checkpointer,
        pytest.raises(ValueError, match=message),
    ):
        checkpointer.restore(tmp_path / "state", template)


def test_partial_restore_leaves_what_is_missing_as_it_was_given(tmp_path):
    """Hence an abstract template: real values would pass for restored ones."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", {"other": jnp.zeros(2)})

    state = read_partially(None, named(True), make_params(), tmp_path / "state")

    leaves = jax.tree.leaves(state)
    assert leaves
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in leaves)


@pytest.mark.parametrize("name", ["factored", "dense"])
def test_moments_of_adamw_are_no_moments_of_lorapro_adamw(name, tmp_path):
    """They are of A and B, not of W: Orbax does not take one for the other."""
    saved_by(optax.adamw(1e-2), tmp_path / "state")
    template = jax.eval_shape(OPTIMIZERS[name]().init, make_params())
    with (
        ocp.StandardCheckpointer() as checkpointer,
        pytest.raises(ValueError, match="mismatch"),
    ):
        checkpointer.restore(tmp_path / "state", template)


# One process that has imported all of it forks one for each run, as long as it has no
# threads. That kills itself when it comes to the given step, or to the given renaming
# of a file by which Orbax completes a checkpoint, in whichever thread that is.
KILLED = """
import json, os, signal, sys
from pathlib import Path
from examples import train_sharded

FLAGS = "--optimizer lorapro --steps 6 --depth 1 --save-every 2 --output"
load_batch = train_sharded.load_batch

def train_until(event, left, folder):
    def count(seen):
        nonlocal left
        left -= seen == event
        if seen == event and not left:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(*args):
        count("step")
        return load_batch(*args)

    def audit(name, args):
        if name == "os.rename" and "orbax-checkpoint-tmp" in str(args[0]):
            count("rename")

    train_sharded.load_batch = counted
    sys.addaudithook(audit)
    sys.argv[1:] = [*FLAGS.split(), folder]
    train_sharded.main()

for event, left, folder in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        code = 1
        try:
            train_until(event, left, folder)
            code = 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print("run", code, len(list(Path(folder).glob("*/*tmp*"))), flush=True)
"""


def train_until(*runs):
    """Runs of the example, each killed at the n-th of an event; the 0th is never.

    Returns the exit code of each, and how many files it left unfinished.
    """
    done = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(runs)],
        cwd=ROOT, env=environment(), timeout=360, capture_output=True, text=True,
    )  # fmt: skip
    found = re.findall(r"^run (-?\d+) (\d+)$", done.stdout, re.M)
    assert len(found) == len(runs), done.stderr[-8000:]
    codes, unfinished = zip(*(map(int, x) for x in found), strict=True)
    assert set(codes) <= {0, -signal.SIGKILL}, done.stderr[-8000:]
    return codes, unfinished


def final(folder):
    """The losses of all steps, and adapters and optimizer state of the last one."""
    with ocp.StandardCheckpointer() as checkpointer:
        run = checkpointer.restore(folder / "fine-tuning" / "6" / "run")
    return json.loads((folder / "losses.json").read_text()), jax.device_get(run)


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
@pytest.mark.filterwarnings("ignore:`StandardCheckpointHandler` expects a target")
def test_killed_training_ends_with_the_bits_of_one_never_killed(tmp_path):
    """Killed at random steps and at random moments of a save, one of each here."""
    rng, killed, whole = np.random.default_rng(0), tmp_path / "killed", tmp_path / "one"
    # A save renames three times, and the first process makes one at least.
    kills = [("rename", rng.integers(4, 7)), ("step", rng.integers(5, 9))]
    kills += [("rename", rng.integers(1, 4))]
    stops = [(event, int(number), str(killed)) for event, number in kills]
    never = "step", 0

    codes, unfinished = train_until((*never, str(whole)), *stops, (*never, str(killed)))

    assert codes == (0, *[-signal.SIGKILL] * 3, 0)
    assert sum(unfinished[1:4]) >= 2  # both were hit in a save
    assert unfinished[0] == unfinished[4] == 0
    chex.assert_trees_all_equal(final(killed), final(whole))
