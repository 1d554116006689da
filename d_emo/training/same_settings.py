"""Whether a run that goes on has the settings that it was begun with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from typing import Any

from d_emo.config import RunSettings
from d_emo.config.base import ReadingSettings


def changes(settings: RunSettings, begun: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """Settings that a run must keep and does not, each with both values in words.

    Args:
        settings: Of now, resolved.
        begun: Those that the run had. What an older version did not know of was as it is by default; but for how
            stored images are read, which was another way then, so that it may be given.
        facts: What the settings are resolved with.
    """
    kept_apart = settings.marked("resumable") | {each.name for each in fields(ReadingSettings)}
    added = {
        each.name: each.default_factory() if each.default is MISSING else each.default
        for each in fields(settings)
        if each.name not in begun.keys() | kept_apart and not each.default is each.default_factory is MISSING
    }
    plain, now = vars(replace(settings, **added).resolve(**facts)) if added else {}, vars(settings)
    before = {**begun, **{name: plain[name] for name in added}}
    return [f"{name} was {old}, now {now[name]}" for name, old in before.items()
            if name in now.keys() - settings.marked("resumable") and old != now[name]]
