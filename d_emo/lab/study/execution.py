"""Running other scripts for a study: one child at a time, stopped as this process is stopped, runs claimed by locks."""

from __future__ import annotations

import fcntl
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from d_emo.errors import RunError


class ScriptError(RunError):
    """Another script failed."""


def run_script(
    script: Path, arguments: Sequence[str], *, launch: Sequence[str] = (), lock: TextIO | None = None
) -> None:
    """Run a script of this project to its end, on one process or through ``accelerate launch``.

    Ctrl-C reaches the script by itself, SIGTERM is passed on to it; it saves its state, and this process ends too.
    The script holds the lock as well, so that its folder stays claimed if this process is killed and it is not.

    Raises:
        ScriptError: It failed.
        SystemExit: It was stopped; with its exit code.
    """
    launcher = ["-m", "accelerate.commands.launch", "--quiet", *launch] if launch else []
    print(f"$ python {script.name} {' '.join(arguments)}", flush=True)
    held = [] if lock is None else [lock.fileno()]
    child = subprocess.Popen([sys.executable, *launcher, str(script), *arguments], pass_fds=held)
    before = signal.signal(signal.SIGTERM, lambda number, frame: child.terminate())
    try:
        code = child.wait()
    except KeyboardInterrupt:
        code = child.wait()
        raise SystemExit(code) from None
    finally:
        signal.signal(signal.SIGTERM, before)
    if code in (143, -signal.SIGTERM):
        raise SystemExit(143)
    if code:
        ending = f"{script.name} ended with exit code {code}"
        raise ScriptError(f"{ending}; what it had saved stays, the same command goes on")


def as_flags(options: dict[str, Any]) -> list[str]:
    """Settings as flags of a script; None is the script's default."""
    flags = []
    for key, value in options.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            flags += [f"--{key.replace('_', '-')}", *map(str, values)]
    return flags


@contextmanager
def claim(folder: Path, *, wait: bool = False) -> Iterator[TextIO | None]:
    """The lock of a folder that is this process's to work in, at once or after others have left it; else None.

    So several processes on one machine share a study.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                yield None
                return
            print(f"waiting for another process that works on {folder}", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Say in a sentence what could not be written, for want of room or of permission.

    Raises:
        RunError: So.
    """
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise RunError(
            f"{what} cannot be written ({where}{error.strerror or error}); nothing that was measured is lost, and the "
            "same command goes on"
        ) from None
