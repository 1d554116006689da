"""What a verb writes: claimed for it alone, and nothing is written over that another run wrote."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import Any

from d_emo.claims import claimed, is_first_rank
from d_emo.errors import InputError
from d_emo.files import digest, free_path, is_free

_GONE_ON_WITH = ("run", "part")


@contextmanager
def claimed_outputs(verb: str, settings: Any) -> Iterator[Any]:
    """Claim what the settings name to write; a launch of several ranks is one writer.

    Yields:
        The settings; ``overwrite`` is true where what lies there was left by the same command, unfinished, and where
        a default path is taken it is numbered.

    Raises:
        InputError: Another process writes there, or something lies there that is not to be overwritten.
    """
    if getattr(settings, "dry_run", False):
        yield settings  # nothing is written there
        return
    outputs = (each for each in fields(settings) if each.metadata.get("output") not in (None, "shared"))
    named = [each for each in outputs if getattr(settings, each.name) is not None]
    named.sort(key=lambda each: each.metadata["output"] in _GONE_ON_WITH)  # the others are let go last: all is done
    with ExitStack() as stack:
        for each in named if is_first_rank() else ():
            settings = _claim(stack, verb, settings, each, each.default)
        yield settings


@contextmanager
def claimed_default(verb: str, settings: Any, default: str) -> Iterator[Path]:
    """The path of the setting ``output``; where it is not given, ``default``, claimed, and numbered if it is taken.

    Raises:
        InputError: Another process writes to the default.
    """
    output = next(each for each in fields(settings) if each.name == "output")
    with ExitStack() as stack:
        if settings.output is None:
            settings = _claim(stack, verb, replace(settings, output=default), output, default)
        yield Path(settings.output)


def _claim(stack: ExitStack, verb: str, settings: Any, each: Field, default: Any) -> Any:
    """Claim one path for as long as the stack lives; returns the settings with what follows.

    The default path is numbered if it is taken.
    """
    kind, path = each.metadata["output"], Path(getattr(settings, each.name))
    if kind in ("part", "file") and not path.parent.is_dir():
        raise InputError(f"`{each.name}` {path} cannot be written: the folder {path.parent} does not exist")
    cut_off = False

    def written() -> bool:
        return not all(map(is_free, settings.files_of(path)))

    def accept(unfinished: bool) -> None:
        nonlocal cut_off
        if kind in _GONE_ON_WITH or not written():
            return
        cut_off = unfinished
        if not unfinished and not settings.overwrite:
            raise FileExistsError

    record = digest(verb, json.dumps(settings.to_record(), sort_keys=True, default=str))
    mark = "" if kind in _GONE_ON_WITH else record
    try:
        stack.enter_context(
            claimed(path, folder=kind in ("run", "folder"), settings=mark, accept=accept, is_written=written)
        )
    except FileExistsError:
        if str(path) != default:
            raise InputError(
                f"`{each.name}` {path} exists and is not overwritten; name another, or give `overwrite`"
            ) from None
        free = str(free_path(path, settings.files_of))
        return _claim(stack, verb, replace(settings, **{each.name: free}), each, free)
    return replace(settings, overwrite=True) if cut_off else settings
