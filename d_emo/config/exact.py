"""Snapshots by their exact names: a run folder stands for its newest, and which one that is changes."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from d_emo.config.base import Settings
from d_emo.config.paths import followed
from d_emo.errors import InputError
from d_emo.files import newest_snapshot, read_json

S = TypeVar("S", bound=Settings)


def with_exact_snapshots(settings: S) -> S:
    """The settings of a run, in which snapshots that are named by their run folders have names of their own.

    They are the newest of these folders; but a run that goes on has those that its ``config.yaml`` names, whatever has
    been written since.

    Args:
        settings: With ``output_dir``. Fields that are marked "snapshot" name a folder, or one behind a colon, as in
            emov2:FOLDER.

    Raises:
        InputError: The ``config.yaml`` of the run cannot be read; a snapshot that it was begun with is gone.
    """
    given = {name: getattr(settings, name) for name in settings.marked("snapshot")}
    named = {name: found for name, value in given.items() if value is not None and (found := _run_in(value))}
    if not named:
        return settings
    kept = _begun_with(settings.output_dir)
    return replace(settings, **{name: _exact(name, *found, kept.get(name)) for name, found in named.items()})


def _run_in(name: str) -> tuple[str, Path] | None:
    """What stands before the run folder with snapshots that a setting names, and that folder; None for others."""
    for start in (0, name.find(":") + 1):
        folder = Path(name[start:])
        if os.path.isdir(folder / "snapshots") and newest_snapshot(folder) != folder:
            return name[:start], folder
    return None


def _exact(name: str, before: str, run: Path, kept: Any) -> str:
    """The name of a run's newest snapshot, or ``kept``, where that is one of the same run."""
    if isinstance(kept, str) and kept.startswith(before):
        there = followed(kept[len(before) :])
        if followed(run) in (there, there.parent.parent):  # older versions kept the run folder
            if not there.exists():
                raise InputError(
                    f"`{name}` {kept}, which this run was begun with, does not exist; put it back, or choose another "
                    "`output_dir`"
                )
            return kept
    return f"{before}{newest_snapshot(run)}"


def _begun_with(output_dir: str | None) -> dict[str, Any]:
    """The settings of a run that has been trained already."""
    run = Path(output_dir or "")
    trained = output_dir and (any(run.glob("states/*")) or any(run.glob("snapshots/step-*")))
    return read_json(run / "config.yaml", dict) if trained and (run / "config.yaml").is_file() else {}
