"""What goes wrong, in one sentence for the user. A setting is named in backquotes, `` `batch_size` ``.

The command line writes such a name as a flag, the app as words; a Python user reads it as it is.
"""

import errno
import os
import re
import sys
from collections.abc import Callable
from contextvars import ContextVar
from importlib import import_module
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any


class InputError(ValueError):
    """Something that the user gave cannot be used. The message is one clear sentence with a remedy; exit code 2."""


class OtherRunError(InputError):
    """A run folder holds a run of other settings or of another network, which cannot be resumed as this one."""


class PackageError(InputError):
    """A package that only some of d-emo needs is not installed, or cannot be imported."""


class RunError(RuntimeError):
    """A run that began well cannot go on: a sentence for the user; exit code 1. What was saved before stays."""


in_words_of: ContextVar[Callable[[str], str] | None] = ContextVar("in_words_of", default=None)
"""What writes the name of a setting for whoever reads now; None: in backquotes, for a Python user."""


def said(text: str) -> str:
    """A text that is printed, with its settings named for whoever reads."""
    render = in_words_of.get()
    return text if render is None else fields_as(text, render)


def fields_as(message: str, render: Callable[[str], str]) -> str:
    """A message with the settings that it names in backquotes written otherwise: as flags, as words."""
    return re.sub(r"`([a-z][a-z0-9_]*)`", lambda field: render(field[1]), message)


FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE}
"""What the operating system says where a disk, a quota, memory or the number of open files is at its end."""


def of_the_system(error: BaseException) -> tuple[str, int] | None:
    """What the operating system refused, in a sentence, and an exit code; None for what may be a bug of ours.

    2 for a path that cannot be used, which is the user's; 1 where there is no room left on a disk or in memory, and
    where a process that shares the work is gone.
    """
    if isinstance(error, MemoryError) or "OutOfMemoryError" in type(error).__name__ or "allocate memory" in str(error):
        reason = " ".join(str(error).partition("allocate memory: ")[2].split()) or "none is left"
        return f"there is not enough memory for this ({reason}); choose less at a time, or a smaller model", 1
    if type(error).__name__.startswith("Dist") or re.search(r"\b(gloo|NCCL)\b", str(error)):
        return "another process of this run ended, which its own message explains; re-run the same command to resume", 1
    if not isinstance(error, OSError) or error.errno is None:
        return None
    path, reason = error.filename, error.strerror or str(error)
    if error.errno in FULL:
        return f"cannot {'write' if path is None else f'write {_text(path)}'}: {reason}", 1
    if not isinstance(path, str | bytes | os.PathLike) or Path(_text(path)).is_relative_to(sys.prefix):
        return None
    return f"cannot use {_text(path)}: {reason}", 2


def imported(module: str, need: str, install: str) -> Any:
    """A module that only some of d-emo needs.

    Args:
        module: Its name, such as "mlxtend.data".
        need: The beginning of the sentence that refuses: what needs the package.
        install: What to give to ``pip install``.

    Raises:
        PackageError: The package is not installed; or it is, and its own import fails, such as for want of another.
    """
    try:
        return import_module(module)
    except Exception as error:
        package, reason = module.partition(".")[0], " ".join(str(error).split())[:200] or type(error).__name__
        lacks = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
        if lacks and f"{module}.".startswith(f"{lacks}."):
            raise PackageError(f"{need}: pip install '{install}'") from None
        lacks = lacks.partition(".")[0]
        again = f"--force-reinstall {packages_distributions().get(package, [package])[0]}"
        remedy = again if lacks in ("", package) else lacks
        because = f"{package} is there, but its import fails: {reason}"
        raise PackageError(f"{need} ({because}): pip install {remedy}") from None


def unmet(error: ImportError) -> PackageError:
    """An import that failed within a library, such as PEFT's of transformers within diffusers, in a sentence."""
    package, _, inner = (error.name or "").partition(".")
    reason, missing = " ".join(str(error).split()), isinstance(error, ModuleNotFoundError)
    broken = f"{package or 'a package'} cannot be imported"
    begin = "the installed libraries need another package" if missing else broken
    upgrade = "" if missing and not inner else "-U "
    return PackageError(f"{begin} ({reason})" + (f": pip install {upgrade}{package}" if package else ""))


def write_error(error: Exception, path: Path) -> OSError | None:
    """An exception of whatever writes files as an OSError that names the file; None for one of another kind.

    safetensors, torch and Core ML have exceptions of their own for a full disk, NumPy an OSError without a number.
    """
    if isinstance(error, OSError):
        number, reason = error.errno or errno.EIO, error.strerror or str(error)
    elif told := re.search(r"(?:I/O error: )?([^:]*) \(os error (\d+)\)", str(error)):
        reason, number = told[1].strip(), int(told[2])
    elif re.search("PytorchStreamWriter|inline_container|MIL FileWriter", str(error)):
        number, reason = errno.EIO, "the disk is full, or the file may not grow"
    else:
        return None
    return OSError(number, reason, str(path))


def _text(path: str | bytes | os.PathLike) -> str:
    text = os.fsdecode(path)
    return text if len(text) <= 200 else f"{text[:100]}...{text[-40:]}"
