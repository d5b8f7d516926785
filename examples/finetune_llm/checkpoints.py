"""Checkpoints of a run: `examples/checkpointing.py`, and its errors as `Refused`.

A checkpoint holds the factors, the optimizer's state, the number of steps done, and
the settings. It does not hold the base, which is loaded again, nor a state of the data,
which is the number of steps.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from examples.checkpointing import open_checkpoints, restore, save
from examples.finetune_llm.errors import Refused
from examples.finetune_llm.folder import differences


def check(folder: Path, settings: dict[str, Any]) -> int:
    """The steps that a folder's latest checkpoint has done; before anything is loaded.

    Args:
      folder: Of checkpoints; it need not exist.
      settings: What makes this run what it is, as JSON has it.

    Raises:
      Refused: The checkpoints are of a run with other settings.
    """
    if not folder.is_dir():
        return 0
    with ocp.CheckpointManager(folder.absolute()) as manager:
        step = manager.latest_step()
        if step is None:
            return 0
        items = ocp.args.Composite(settings=ocp.args.JsonRestore())
        found = manager.restore(step, args=items)["settings"]
    other = differences(found, settings)
    if other:
        raise Refused(
            f"{folder} has checkpoints of another run ({other}). Repeat its "
            "options to go on with it, or name another --output."
        )
    return step


class Saver:
    """The checkpoints of one run, for use as a context; without a folder, none."""

    def __init__(
        self, folder: Path | None, every: int, steps: int, settings: dict[str, Any]
    ):
        self.steps, self.settings = steps, settings
        self.manager = open_checkpoints(folder, every) if folder else None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.manager:
            self.manager.close()  # waits for what is being written

    def __call__(self, step: int, run: Any) -> None:
        """Saves in the background, if it is time to or the last step."""
        if self.manager:
            save(self.manager, step, run, self.settings, last=step == self.steps)

    def resume(self, run: Any) -> Any:
        """The run of the latest complete checkpoint, placed as this one; or this."""
        if self.manager is None:
            return run
        where = jax.tree.map(lambda x: x.sharding, run)
        found = restore(self.manager, run, where, self.settings)
        return run if found is None else found
