"""Paths that a user names, looked at before anything runs: what cannot be read or written is told in one sentence."""

import os
import stat
import tempfile
from glob import has_magic
from pathlib import Path
from typing import Any, Literal

import yaml

from d_emo.errors import InputError
from d_emo.files import expand_home

Source = bool | Literal["or a name", "or a pattern"]
"""Whether a setting is the path of an input; "or a name" of something that may also be known by a name, "or a pattern"
such as ``photos/*.jpg``."""

LONGEST_NAME = 200
"""Bytes of a file name that is written; file systems take 255, and a temporary name is longer than the final one."""
LARGEST_CONFIG, MOST_NODES = 2**20, 100_000
"""Bytes of a YAML file of settings, and values in it once its aliases are written out."""


def is_folder(data_dir: str) -> bool:
    """Whether ``--data-dir`` names an image folder, not tar shards or a data set of the library ``datasets``."""
    return data_dir.partition(":")[0] not in ("wds", "hf")


def folder_of(data_dir: str) -> Path:
    """The image folder that ``--data-dir`` names; ``folder:`` before it says that train, val, ... in it are classes."""
    return expand_home(data_dir.removeprefix("folder:"))


def followed(path: str | Path) -> Path:
    """The absolute path that links lead to; of a link to itself, at which `Path.resolve` fails, the link."""
    return Path(os.path.realpath(path))


def check_source(name: str, path: str, kind: Source = True) -> None:
    """Refuse the path of an input where nothing is, or nothing that can be read.

    Raises:
        InputError: So it is; names the setting ``name``.
    """
    if not is_folder(path):
        return
    place = folder_of(path) if name in ("data_dir", "validate_dir") or kind == "or a name" else Path(path)
    try:
        mode = place.stat().st_mode
    except FileNotFoundError:
        if (kind == "or a name" and path[0] != "~") or (kind == "or a pattern" and has_magic(path)):
            return
        raise InputError(f"`{name}` {path} does not exist") from None
    except OSError as error:
        raise InputError(f"`{name}` {_shown(path)} cannot be read: {error.strerror}") from None
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise InputError(f"`{name}` {path} is neither a file nor a folder")
    if not os.access(place, os.R_OK | (os.X_OK if stat.S_ISDIR(mode) else 0)):
        raise InputError(f"`{name}` {path} cannot be read: no permission")


def check_output(name: str, path: str, kind: str) -> None:
    """Refuse a path that cannot be written to; nothing is left there. ``kind`` is what `setting` says of it.

    Raises:
        InputError: So it is; names the setting ``name``.
    """
    if path.startswith("~"):
        raise InputError(f"`{name}` {path}: ~ stands for your home folder in a shell only; write its full path")
    if long := [part for part in Path(path).parts if len(os.fsencode(part)) > LONGEST_NAME]:
        raise InputError(f"`{name}` {_shown(path)} cannot be written: {_shown(long[0])} is too long for a name")
    target = place = Path(path)
    wanted = "a folder" if kind in ("folder", "run", "shared") else "a file"
    try:
        if (mode := _mode(target)) is not None:
            found = "a folder" if stat.S_ISDIR(mode) else "a file" if stat.S_ISREG(mode) else "neither file nor folder"
            own = kind == "pictures" and found == "a folder"  # claims refuse it, unless it is the command's own
            if wanted != found and not own:
                wanted += " or a new folder" if kind == "picture" else ""
                raise InputError(f"`{name}` {path} is {found}, where {wanted} is to be written")
            place = target if stat.S_ISDIR(mode) else target.parent
        while _mode(place) is None:
            place = place.parent
        with tempfile.TemporaryFile(dir=place):  # nothing else tells of a read-only disk, of /proc, of a quota
            pass
    except OSError as error:
        raise InputError(f"`{name}` {_shown(path)} cannot be written: {error.strerror}") from None


def check_config(path: str) -> None:
    """Refuse a YAML file of settings that would never end to be read; all else of it is the parser's to judge.

    Raises:
        InputError: It is no file, too large, not UTF-8, or names itself or others within it too often.
    """
    if not os.path.lexists(path):
        return  # the parser says so, or takes it for YAML itself
    check_source("config", path)
    file = Path(path)
    if not file.is_file():
        raise InputError(f"`config` {path} is a folder, not a YAML file")
    if file.stat().st_size > LARGEST_CONFIG:
        raise InputError(f"`config` {path} is larger than {LARGEST_CONFIG:,} bytes; settings are a few lines of YAML")
    try:
        node = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        large = _count(node, {}) > MOST_NODES
    except UnicodeDecodeError:
        raise InputError(f"`config` {path} is not UTF-8 text") from None
    except RecursionError:
        raise InputError(f"`config` {path} is nested too deeply, or within itself") from None
    except yaml.YAMLError as error:
        raise InputError(f"`config` {path} is not YAML: {' '.join(str(error).split())[:200]}") from None
    if large:
        raise InputError(f"`config` {path} holds more than {MOST_NODES:,} values once its aliases are written out")


def check_text(name: str, text: str) -> None:
    """Refuse text that says nothing, or that no file name and no terminal can hold; else InputError."""
    if not text.strip():
        raise InputError(f"`{name}` must not be empty")
    if "\0" in text or any("\ud800" <= each <= "\udfff" for each in text):
        raise InputError(f"`{name}` must be text in UTF-8 without null characters, not {text!r}")


def _mode(path: Path) -> int | None:
    """What is there, as `os.stat` says it; None for nothing. OSError for a link to itself, a name too long."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None


def _count(node: Any, known: dict[int, int]) -> int:
    """Values below a node of YAML; RecursionError where it is within itself."""
    if id(node) not in known:
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        each = [one for part in parts for one in (part if isinstance(part, tuple) else (part,))]
        known[id(node)] = 1 + sum(_count(one, known) for one in each)
    return known[id(node)]


def _shown(path: str) -> str:
    return path if len(path) <= 100 else f"{path[:60]}...{path[-20:]}"
