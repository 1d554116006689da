"""Files written whole: a temporary name, flushed to the disk, renamed; and digests of what is in them."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from d_emo.errors import RunError


def digest_of_file(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill a temporary folder beside ``folder``, then put it in its place, so that readers see all or nothing."""
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        for file in (*temporary.rglob("*"), temporary):
            _flush(file)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    _flush(folder.parent)


def _flush(path: Path) -> None:
    """Have the file system write a file, or a folder's list of names, to the disk, so that a power cut spares it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes, comfort: str) -> None:
    """Write a file under a temporary name, down to the disk, and rename it."""
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise RunError(f"cannot write {path} ({error.strerror}); {comfort}") from None
