"""The output folder: it belongs to one run, which may go on in it."""

import json
from pathlib import Path
from typing import Any

from examples.finetune_llm.errors import Refused
from examples.finetune_llm.options import Options
from examples.finetune_llm.reports import SETTINGS, write_json


def check_output(options: Options) -> None:
    """Refuses a folder with another run's files, or with anything else.

    Settings of a run that has to give the same result are compared; the mesh and the
    number of processes may be others.
    """
    folder = options.output
    if folder.exists() and not folder.is_dir():
        raise Refused(f"--output {folder} is a file; name a folder.")
    if not folder.exists() or not any(folder.iterdir()):
        return
    found = _read(folder)
    if found is None:
        raise Refused(
            f"--output {folder} has files, but none of a run ({SETTINGS}); name a new "
            "folder, or empty this one."
        )
    other = differences(found, options.settings())
    if other:
        raise Refused(
            f"--output {folder} is another run's: {other}. Repeat its "
            "options to go on with it, or name a new folder."
        )


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The settings that two runs do not share, as options of the command."""
    return "; ".join(
        f"--{name.replace('_', '-')} {_shown(found.get(name))} there, "
        f"{_shown(wanted.get(name))} here"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    )


def claim(options: Options) -> None:
    """Writes the settings that `check_output` compares."""
    write_json(options.output / SETTINGS, options.settings())


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / SETTINGS).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return "not given" if value in (None, False) else str(value)
