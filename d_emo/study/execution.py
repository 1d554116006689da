"""Running other scripts for a study: one child at a time, stopped as this process is stopped, runs claimed by locks."""

from __future__ import annotations

import fcntl
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from d_emo.config import RunError


def run_script(script: Path, arguments: Sequence[str], *, launch: Sequence[str] = ()) -> None:
    """Run a script of this project to its end, on one process or through ``accelerate launch``.

    Ctrl-C reaches the script by itself, SIGTERM is passed on to it; it saves its state, and this process ends too.

    Raises:
        RunError: It failed.
        SystemExit: It was stopped; with its exit code.
    """
    launcher = ["-m", "accelerate.commands.launch", "--quiet", *launch] if launch else []
    print(f"$ python {script.name} {' '.join(arguments)}", flush=True)
    child = subprocess.Popen([sys.executable, *launcher, str(script), *arguments])
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
        raise RunError(f"{script.name} ended with exit code {code}; what it had saved stays, the same command goes on")


@contextmanager
def claim(folder: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether a folder is this process's to work in, at once or after others have left it.

    So several processes on one machine share a study.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
