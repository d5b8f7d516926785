"""Orbax checkpoints of a training run, and how it goes on from them.

A checkpoint holds the run (adapters, optimizer state, step) and the settings that it
was made with. Orbax writes it in a temporary folder and renames that at the end, so
that a process may be killed at any time.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp


def open_checkpoints(folder: Path, save_every: int) -> ocp.CheckpointManager:
    """A manager that keeps the last two, and removes what was left unfinished."""
    options = ocp.CheckpointManagerOptions(
        save_interval_steps=save_every, max_to_keep=2, cleanup_tmp_directories=True
    )
    return ocp.CheckpointManager(folder.absolute(), options=options)


def save(
    manager: ocp.CheckpointManager, step: int, run: Any, settings: dict, last: bool
) -> None:
    """Saves in the background, if the step is one to save at or the last one."""
    items = ocp.args.Composite(
        run=ocp.args.StandardSave(run), settings=ocp.args.JsonSave(settings)
    )
    manager.save(step, args=items, force=last)


def restore(
    manager: ocp.CheckpointManager, abstract: Any, shardings: Any, settings: dict
) -> Any:
    """The run of the latest complete checkpoint, or None.

    Args:
      manager: From `open_checkpoints`.
      abstract: The run as `jax.eval_shape` gives it: nothing is initialized.
      shardings: Where to put it; the mesh may be another than when it was saved.
      settings: Those of this program, which have to be those of the checkpoint.
    """
    step = manager.latest_step()
    if step is None:
        return None
    items = ocp.args.Composite(settings=ocp.args.JsonRestore())
    found = manager.restore(step, args=items)["settings"]
    if found != settings:
        raise ValueError(
            f"{manager.directory} has checkpoints of a run with other settings: "
            f"{found}. Repeat them or name another folder; asked for: {settings}."
        )
    template = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract,
        shardings,
    )
    items = ocp.args.Composite(run=ocp.args.StandardRestore(template))
    return manager.restore(step, args=items)["run"]
