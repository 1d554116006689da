"""What every script needs of its settings: declaring, reading, writing them, and ending on a bad one."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, asdict, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from d_emo.errors import InputError, RunError, fields_as
from d_emo.files import write_file

S = TypeVar("S")


def setting(default: Any = MISSING, help: str = "", flag: str | None = None, nargs: int | None = None) -> Any:
    """A field of a settings class: its default and the sentence that ``--help`` shows."""
    metadata = {"help": help, "flag": flag, "nargs": nargs}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def parse_settings(settings_class: type[S], description: str, argv: Sequence[str] | None = None) -> S:
    """Read settings from the command line; ``--config FILE`` reads YAML first, later flags override it.

    Raises:
        InputError: An unknown key or flag, or a value of a wrong type.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file of settings; flags after it override it")
    hints = get_type_hints(settings_class)
    for each in fields(settings_class):
        options: dict[str, Any] = {"type": hints[each.name], "help": each.metadata.get("help", "")}
        if each.default is not MISSING:
            options["default"] = each.default
        elif each.default_factory is not MISSING:
            options["default"] = each.default_factory()
            options["nargs"] = "+"
            options["type"] = options["type"].__args__[0]
        elif each.metadata.get("flag") == each.name:  # without dashes: positional
            parser.add_argument(each.name, nargs="+", type=options["type"].__args__[0], help=options["help"])
            continue
        else:
            options["required"] = True
        if options["type"] is bool:
            options |= {"nargs": "?", "const": True}  # --compile means --compile true
        if each.metadata.get("nargs"):
            options["nargs"], options["type"] = each.metadata["nargs"], str
        flag = _flag(each)
        if flag.isupper():  # the word for a positional argument in --help
            options.pop("required", None)
            parser.add_argument(each.name, metavar=flag, **options)
        else:
            parser.add_argument(flag, dest=each.name, **options)
    try:
        values = parser.parse_args(argv)
    except ArgumentError as error:
        flags = {each.name: _flag(each) for each in fields(settings_class)}
        raise InputError(f"{_sentence(str(error), flags, hints)} (--help lists what is accepted)") from None
    with in_flags(settings_class):
        return settings_class(**{each.name: values[each.name] for each in fields(settings_class)})


@contextmanager
def in_flags(settings_class: type[Any]) -> Iterator[None]:
    """Errors that name settings name their flags instead, as a user of the command line knows them."""
    flags = {each.name: _flag(each) for each in fields(settings_class)}
    try:
        yield
    except (InputError, RunError) as error:
        error.args = (fields_as(str(error), lambda name: flags.get(name, name)), *error.args[1:])
        raise


def _flag(one: Field) -> str:
    """What a setting is called on the command line."""
    return one.metadata.get("flag") or "--" + one.name.replace("_", "-")


def _sentence(complaint: str, flags: dict[str, str], hints: dict[str, Any]) -> str:
    """What the parser complains of, in words; ``flags`` and ``hints`` are the settings' flags and types by name."""
    complaint = " ".join(complaint.split())
    if wrong := re.match(r'Parser key "(\w+)"(?: element \d+)?:.*(?:Got value|Given value): (.*)', complaint):
        name, value = wrong.groups()
        return f"{flags[name]} must be {in_words(hints[name])}, not {value}"
    if unknown := re.match(r"(?:unrecognized arguments: -*|Option ')([\w-]+)", complaint):
        near = difflib.get_close_matches(f"--{unknown[1].replace('_', '-')}", flags.values(), 1)
        return f"there is no setting {unknown[1]!r}" + (f"; did you mean {near[0]}?" if near else "")
    return re.sub(r'Parser key "([\w-]+)"', r"--\1", complaint)


def in_words(kind: Any) -> str:
    """A type as a user would say it, such as "a whole number" or "one of grid, png"."""
    arguments = [each for each in get_args(kind) if each is not NoneType]
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(in_words, arguments))
    if get_origin(kind) is list:
        return in_words(arguments[0])  # of each of several values
    words = {int: "a whole number", float: "a number", bool: "true or false", dict: "a mapping such as '{depth: 8}'"}
    return words.get(get_origin(kind) or kind, "text")


def check_image_side(image_size: int | None) -> None:
    """Refuse a size below the stride of a classifier's last map."""
    if image_size is not None and image_size < 32:
        raise InputError(f"`image_size` must be at least 32 px, as classifiers halve it five times, not {image_size}")


def write_yaml(settings: Any, path: Path) -> None:
    """Write resolved settings (a dataclass) for ``--config`` to read back; a kill leaves the old file or the new."""
    write_file(path, yaml.safe_dump(asdict(settings), sort_keys=False))


def run_cli(main: Callable[[], None]) -> None:
    """Run a script's ``main``; an :class:`InputError` becomes one sentence on stderr and exit code 2."""
    try:
        main()
    except InputError as error:
        sentence = str(error).splitlines()[-1]  # from a data worker it arrives below that worker's traceback
        print(f"error: {sentence.removeprefix(f'{InputError.__module__}.InputError: ')}", file=sys.stderr)
        sys.exit(2)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(1)
