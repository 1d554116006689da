"""Files written whole: a temporary name, flushed to the disk, renamed; JSON read back; digests; locks of folders."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import yaml

from d_emo.errors import InputError, RunError, write_error

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

FORMAT = 1
"""What our JSON files say under "format"; a larger number is of a later D-EMO."""

META = "snapshot.json"
"""What a snapshot says of itself."""

LARGE = 2**24
"""Bytes from which on it is kept that a file was found to match its checksum; smaller ones are read within 0.05 s."""


@contextmanager
def replacing(path: Path, *, flush: bool = True) -> Iterator[Path]:
    """A temporary path beside ``path``, which takes its place when all went well, and goes when not.

    Whatever was made there, a file or a folder, is on the disk before it is renamed, so that readers, other processes
    and a power cut meet the old or the new. Each use has a name of its own. Many small files that can be made again
    need not wait for the disk (``flush``).

    Raises:
        OSError: It cannot be written; names ``path``, also where a library has an exception of its own for that.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        yield temporary
        for file in (*temporary.rglob("*"), temporary):
            _settle(file, flush=flush)
        if path.is_dir():
            old = _temporary(path)
            path.replace(old)
            temporary.replace(path)
            _remove(old)
        else:
            temporary.replace(path)
        if flush:
            _flush(path.parent)
    except BaseException as error:
        _remove(temporary)
        if isinstance(error, Exception) and (refused := write_error(error, path)):
            raise refused from error
        raise


@contextmanager
def filling(folder: Path, name: str = "") -> Iterator[Path]:
    """A temporary folder within ``folder``, whose files take their places there, each whole, when all went well.

    Raises:
        OSError: They cannot be written, also where a library has an exception of its own for that; names ``folder``,
            or the file ``name`` in it.
    """
    temporary = _temporary(folder / "files")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _settle(file)
        for file in sorted(temporary.iterdir()):
            place = folder / file.name
            if place.is_dir():
                shutil.rmtree(place)
            file.replace(place)
        _flush(folder)
    except Exception as error:
        if refused := write_error(error, folder / name):
            raise refused from error
        raise
    finally:
        _remove(temporary)


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Have ``write`` fill a new folder, all or nothing; nobody else may be writing it."""
    remove_left(folder)
    with replacing(folder) as temporary:
        temporary.mkdir()
        write(temporary)


def remove_left(path: Path) -> None:
    """Remove what processes that were killed while they wrote ``path`` have left; nobody may be writing it now.

    As the name of a path ``*`` is any.
    """
    name = ".*" if path.name == "*" else re.escape(path.name)
    for left in path.parent.glob(".tmp-*"):
        if re.fullmatch(rf"\.tmp-\d+-[0-9a-f]+-{name}", left.name):
            _remove(left)


def is_free(path: Path) -> bool:
    """Whether nothing is there, or a folder without anything in it but what `replacing` and claims leave."""
    if not path.is_dir():
        return not path.exists()
    return all(each.name.startswith((".tmp-", ".claim")) for each in path.iterdir())


def free_path(path: str | Path, files_of: Callable[[Path], list[Path]] = lambda path: [path]) -> Path:
    """The path, numbered if it is taken, or any of the files that are written for it."""
    free, number = Path(path), 1
    while not all(map(is_free, files_of(free))):
        number += 1
        free = Path(path).with_stem(f"{Path(path).stem}-{number}")
    return free


def write_file(path: Path, content: bytes | str, remedy: str = "") -> None:
    """Write a file, all or nothing.

    Raises:
        RunError: The disk is full, say; the sentence ends with ``remedy``: what stays, and what to do.
    """
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise RunError(f"cannot write {path} ({error.strerror})" + (f"; {remedy}" if remedy else "")) from None


def write_json(path: Path, value: Any, remedy: str = "") -> None:
    """`write_file` of a value as JSON."""
    write_file(path, json.dumps(value, indent=1) + "\n", remedy)


def read_json(path: Path, read: Callable[[Any], T] = lambda content: content, remedy: str = "") -> T:
    """What ``read`` makes of a JSON file, or of a YAML file if it is called so.

    Raises:
        InputError: The file is missing, damaged, of a later D-EMO, or lacks a key that ``read`` looks for; the sentence
            ends with ``remedy``.
    """
    try:
        content = (yaml.safe_load if path.suffix == ".yaml" else json.loads)(path.read_text())
        if isinstance(content, dict) and content.get("format", FORMAT) > FORMAT:
            problem = f"has format {content['format']}, which a later D-EMO wrote; this one reads {FORMAT}"
        else:
            return read(content)
    except InputError as error:
        problem = f"cannot be used: {error}"
    except FileNotFoundError:
        problem = "is missing"
    except KeyError as error:
        problem = f"lacks {error.args[0]!r}"
    except Exception as error:  # whatever ``read`` raises for content of another kind
        problem = f"is damaged ({type(error).__name__})"
    raise InputError(f"{path} {problem}" + (f"; {remedy}" if remedy else ""))


def digest(*parts: bytes | str) -> str:
    """SHA-256 in hexadecimal; of text, that of its UTF-8."""
    return _digest(parts)


def digest_of_file(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return _digest(iter(lambda: stream.read(1 << 22), b""))


def matches(file: Path, wanted: str) -> bool:
    """Whether a file's SHA-256 is ``wanted``; a large file is read once for that, until its size or time changes."""
    state = file.stat()
    known = [str(file.resolve()), state.st_size, state.st_mtime_ns, wanted]
    kept = cache_folder() / f"sha256-{digest(json.dumps(known))[:32]}"
    if state.st_size >= LARGE and kept.exists():
        return True
    intact = digest_of_file(file) == wanted
    if intact and state.st_size >= LARGE:
        with suppress(OSError):  # else it is read again next time
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.touch()
    return intact


def sealed(folder: Path) -> dict[str, Path]:
    """The files of a snapshot that have checksums, by what its ``snapshot.json`` calls them."""
    files = [*folder.rglob("*.safetensors"), *folder.glob("*/*.json"), *folder.glob("config.json")]
    return {file.relative_to(folder).as_posix(): file for file in sorted(files)}


def check_sums(folder: Path) -> None:
    """Refuse a snapshot's files that are not what they were written as; older ones and others do not say what that was.

    Raises:
        InputError: A file has another checksum.
    """
    if not (folder / META).exists():
        return
    known = read_json(folder / META, lambda content: {**content.get("sha256", {})})
    if odd := [name for name, file in sealed(folder).items() if name in known and not matches(file, known[name])]:
        raise InputError(
            f"the checksum of {', '.join(odd)} is not the one in {META}; if it was changed on purpose, remove "
            "\"sha256\" there"
        )


def digest_of_tensors(named: Iterable[tuple[str, torch.Tensor]], start: str = "") -> str:
    """SHA-256, in hexadecimal, of ``start`` and of each name followed by the bytes of its tensor.

    Shape: tensors of any shape.
    """
    import torch

    def parts() -> Iterator[Any]:
        yield start
        for name, tensor in named:
            yield name
            yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()

    return _digest(parts())


def expand_home(path: str) -> Path:
    """A path whose ``~`` or ``~NAME`` is written out.

    Raises:
        InputError: Nobody knows that home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise InputError(f"the home folder in {path} cannot be found; write the whole path") from None


def cache_folder() -> Path:
    """Where what can be made again is kept for this user; of a user without a home, among the temporary files."""
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache) / "d-emo"
    try:
        return Path.home() / ".cache" / "d-emo"
    except RuntimeError:  # in a container, a user whom its list of users does not have
        return Path(tempfile.gettempdir()) / f"d-emo-{os.getuid()}"


def step_of(folder: Path) -> int:
    """The step in a folder name such as ``step-500``; -1 for other names."""
    number = folder.name.removeprefix("step-")
    return int(number) if number.isdigit() else -1


def newest_snapshot(folder: Path) -> Path:
    """The newest snapshot of a run folder; a folder that is a snapshot or a VAE itself, or has none, as it is."""
    if any((folder / name).exists() for name in (META, "config.json")):
        return folder
    return max(folder.glob("snapshots/step-*"), key=step_of, default=folder)


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[TextIO | None]:
    """The lock of a folder that is this process's to work in, at once or after others have left it; else None.

    It ends with the process, however that ends; a child that inherits the file holds it too.
    """
    import fcntl

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


def _temporary(path: Path) -> Path:
    return path.with_name(f".tmp-{os.getpid()}-{secrets.token_hex(4)}-{path.name}")


def _remove(path: Path) -> None:
    with suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _digest(parts: Iterable[Any]) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part.encode() if isinstance(part, str) else part)
    return total.hexdigest()


def _settle(path: Path, *, flush: bool = True) -> None:
    """Flush a file and let those read it who may read the user's other new files: safetensors shuts all others out."""
    if path.is_file():
        path.chmod(path.stat().st_mode | (0o666 & ~_umask()))
    if flush:
        _flush(path)


@cache
def _umask() -> int:
    """Permissions that this process's new files lack; they can be asked for only by setting them."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _flush(path: Path) -> None:
    """Have the file system write a file, or a folder's list of names, to the disk, so that a power cut spares it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
