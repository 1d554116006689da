"""What every script needs of its settings: declaring, reading, writing them, and ending on a bad one."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml

S = TypeVar("S")


class InputError(ValueError):
    """Something that the user gave cannot be used. The message is one clear sentence with a remedy; exit code 2."""


class RunError(RuntimeError):
    """A run that began well cannot go on: a sentence for the user; exit code 1. What was saved before stays."""


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
        flag = each.metadata.get("flag") or "--" + each.name.replace("_", "-")
        if flag.isupper():  # the word for a positional argument in --help
            options.pop("required", None)
            parser.add_argument(each.name, metavar=flag, **options)
        else:
            parser.add_argument(flag, dest=each.name, **options)
    try:
        values = parser.parse_args(argv)
    except ArgumentError as error:
        message = " ".join(str(error).split())
        message = re.sub(r'Parser key "(\w+)":', lambda key: f"--{key[1].replace('_', '-')}:", message)
        message = re.sub(r"<class '(\w+)'>", r"\1", message)
        raise InputError(f"{message} (--help lists what is accepted)") from None
    return settings_class(**{each.name: values[each.name] for each in fields(settings_class)})


def check_image_side(image_size: int | None) -> None:
    """Refuse a size below the stride of a classifier's last map."""
    if image_size is not None and image_size < 32:
        raise InputError(f"--image-size must be at least 32 px, as classifiers halve it five times, not {image_size}")


def write_yaml(settings: Any, path: Path) -> None:
    """Write resolved settings (a dataclass) for ``--config`` to read back; a kill leaves the old file or the new."""
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(yaml.safe_dump(asdict(settings), sort_keys=False))
    temporary.replace(path)


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
