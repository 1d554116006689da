"""One writer at a time: a process claims the folder or file that it is about to write.

A claim is a small file there that names its process. It is locked, and the lock ends with the process, however that
ends. Where locks do not reach other machines, the claim's time of change tells: the holder renews it every few seconds,
and a newcomer on another machine looks for a while whether that happens. What a killed process leaves is a claim that
nobody holds: it tells the next process of the same settings that what lies there is its own, unfinished.
"""

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from d_emo.errors import InputError

BEAT, PATIENCE = 5.0, 20.0
"""Seconds between signs of life, and how long a process on another machine looks for one before it takes over."""

_held: dict[Path, int] = {}  # descriptors


def is_first_rank() -> bool:
    """Whether this process is the one of its launch (accelerate, torchrun, MPI) that claims and writes."""
    ranks = (os.environ.get(name) for name in ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"))
    return next((rank for rank in ranks if rank), "0") == "0"


def is_claimed(folder: Path) -> bool:
    """Whether a process is writing a folder, or was killed while it did."""
    return (folder / ".claim").exists()


@contextmanager
def claimed(
    path: Path, *, folder: bool, settings: str = "", accept: Callable[[bool], None] = lambda unfinished: None,
    is_written: Callable[[], bool] = lambda: False,
) -> Iterator[None]:
    """Hold a path for this process alone; with one that it holds already, nothing happens.

    Args:
        path: What is to be written.
        folder: Whether that is a folder. It, or the folder of a file, is made, and goes again if it stays empty.
        settings: A digest of what decides the content.
        accept: Called with whether a process of the same settings was cut off here; may refuse what lies there.
        is_written: Whether something lies there that a run which fails now leaves unfinished.

    Raises:
        InputError: Another process holds it, which is named; or it cannot be written there.
    """
    within = path if folder else path.parent
    made = [each for each in (within, *within.parents) if not each.exists()]
    try:
        within.mkdir(parents=True, exist_ok=True)
        file = within.resolve() / (".claim" if folder else f".{path.name}.claim")
        descriptor, locks = (None, True) if file in _held else _lock(file, path)
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror or error}") from None
    if descriptor is None:
        yield
        return
    stays = True
    try:
        before = _read(file)
        elsewhere = before.get("host") != socket.gethostname() or not locks
        if before.get("held") and elsewhere and _beats(file, before):
            raise InputError(_refusal(path, file, before))
        stays = bool(before)
        accept(stays and before.get("settings") == settings)
        for left in _left_by(before, within, path):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
        record = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S"),
                  "settings": settings}  # fmt: skip
        _write(descriptor, {**record, "held": True})
        with _beating(file, descriptor):
            stays = False
            try:
                yield
            except BaseException:
                stays = bool(settings) and is_written()
                if stays:
                    _write(descriptor, {**record, "held": False})
                raise
    finally:
        if not stays:
            with suppress(OSError):  # the folder is gone
                file.unlink()
        os.close(descriptor)
        for each in made:
            with suppress(OSError):
                if not os.listdir(each):
                    each.rmdir()


def _lock(file: Path, path: Path) -> tuple[int, bool]:
    """A descriptor that holds the lock of a claim, and whether the file system has locks."""
    import fcntl

    while True:
        descriptor, locks = os.open(file, os.O_RDWR | os.O_CREAT, 0o666), True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise InputError(_refusal(path, file, _read(file))) from None
        except OSError:  # a file system without locks
            locks = False
        with suppress(FileNotFoundError):  # its holder may have removed it since it was opened
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor, locks
        os.close(descriptor)


@contextmanager
def _beating(file: Path, descriptor: int) -> Iterator[None]:
    """Show that the process lives, as long as it holds a claim."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT):
            with suppress(OSError):
                os.utime(descriptor)

    heart = threading.Thread(target=beat, daemon=True)
    heart.start()
    _held[file] = descriptor
    try:
        yield
    finally:
        del _held[file]
        ended.set()
        heart.join()


def _left_by(before: dict[str, Any], within: Path, path: Path) -> list[Path]:
    """What a process that was killed had begun to write by `d_emo.files.replacing`."""
    pattern = f".tmp-{before.get('pid')}-*"
    return [*within.glob(pattern), *path.rglob(pattern)] if before.get("held") else []


def _write(descriptor: int, record: dict[str, Any]) -> None:
    """One line in one piece over what is there, so that a kill leaves the old line or the new."""
    line = json.dumps(record).encode() + b"\n"
    os.pwrite(descriptor, line, 0)
    os.ftruncate(descriptor, len(line))
    os.fsync(descriptor)


def _read(file: Path) -> dict[str, Any]:
    """What a claim says; nothing if it says nothing yet."""
    try:
        found = json.loads(file.read_bytes().partition(b"\n")[0])
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _beats(file: Path, record: dict[str, Any]) -> bool:
    """Whether a claim that nobody here holds is being renewed; clocks of machines are not compared."""
    holder = f"process {record.get('pid')} on {record.get('host')}"
    print(f"{holder} has begun to write here; looking for {PATIENCE:.0f} s whether it still lives", flush=True)
    first, until = file.stat().st_mtime_ns, time.monotonic() + PATIENCE
    while time.monotonic() < until:
        time.sleep(PATIENCE / 20)
        with file.open("rb") as stream:  # opening asks a network's file system for the newest
            if os.fstat(stream.fileno()).st_mtime_ns != first:
                return True
    return False


def _refusal(path: Path, file: Path, record: dict[str, Any]) -> str:
    holder = "another process"
    if record:
        holder = f"process {record.get('pid')} on {record.get('host')} since {record.get('since')}"
    return f"{path} is being written by {holder}; wait for it or stop it; to write there all the same, remove {file}"


def _forget() -> None:
    """A child does not hold what its parent holds."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
