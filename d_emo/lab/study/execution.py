"""Running other verbs for a study: one child at a time, stopped as this process is stopped, runs claimed by locks."""

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import yaml

from d_emo.errors import RunError
from d_emo.files import remove_left, write_file


class VerbError(RunError):
    """Another verb failed."""


def run_verb(
    verb: str, settings: dict[str, Any], config: Path, *, launch: Sequence[str] = (), lock: TextIO | None = None
) -> None:
    """Run ``d-emo VERB --config FILE`` to its end, with these settings, and arguments of ``accelerate launch`` or none.

    The child holds the ``lock`` as well, so that its folder stays claimed if this process is killed and it is not.

    Raises:
        VerbError: It failed.
        SystemExit: It was stopped; with its exit code.
    """
    remove_left(config)
    write_file(config, yaml.safe_dump(settings, sort_keys=False))
    launcher = ["-m", "accelerate.commands.launch", "--quiet", *launch] if launch else []
    arguments = [verb, "--config", str(config)]
    print(f"$ d-emo {' '.join(arguments)}", flush=True)
    run_child([sys.executable, *launcher, "-m", "d_emo", *arguments], f"d-emo {verb}", lock)


def run_child(command: Sequence[str], called: str, lock: TextIO | None = None) -> None:
    """Run a command to its end. Ctrl-C reaches it by itself, SIGTERM is passed on; it saves its state, and both end."""
    child = subprocess.Popen(command, pass_fds=[] if lock is None else [lock.fileno()])
    before = signal.signal(signal.SIGTERM, lambda number, frame: child.terminate())
    try:
        code = child.wait()
    except KeyboardInterrupt:
        raise SystemExit(child.wait()) from None
    finally:
        signal.signal(signal.SIGTERM, before)
    if code in (143, -signal.SIGTERM):
        raise SystemExit(143)
    if code:
        raise VerbError(
            f"{called} ended with exit code {code}; what it had saved stays, re-run the same command to resume"
        )


@contextmanager
def writing(what: str) -> Iterator[None]:
    """A RunError says in a sentence what could not be written, for want of room or of permission."""
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise RunError(
            f"{what} cannot be written ({where}{error.strerror or error}); nothing that was measured is lost; re-run "
            "the same command to resume"
        ) from None
