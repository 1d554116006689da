"""What every verb needs of its settings: declaring, checking, reading, writing them, and ending on a bad one."""

import difflib
import os
import re
import sys
from argparse import SUPPRESS
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from d_emo.config.paths import Source, check_config, check_output, check_source, check_text
from d_emo.config.ranges import Colour, ColourName, Range, TrainedPart
from d_emo.errors import InputError, RunError, in_words_of, of_the_system, said
from d_emo.files import write_file

S = TypeVar("S", bound="Settings")


def setting(
    default: Any = MISSING, help: str = "", flag: str | None = None, nargs: int | Literal["+"] | None = None, *,
    group: str | None = None, choices: Mapping[str, Any] | None = None, source: Source = False,
    resumable: bool = False, decisive: bool | None = None, output: str | None = None, aliases: Sequence[str] = (),
    snapshot: bool = False,
) -> Any:
    """A field of a settings class.

    Args:
        default: Its default; without one it is required.
        help: The sentence that ``--help`` shows.
        flag: What it is called on the command line, where that is not ``--`` and its name; capitals: positional.
        nargs: How many values a list takes that may be left open; "+": one or more.
        group: Heading in ``--help``, also of the fields after it.
        choices: A table whose names it takes; of a list, the settings check them.
        source: Whether it is the path of an input, which the command line looks for before anything runs.
        resumable: Whether a run that is resumed may have another value.
        decisive: Whether it may change a run's result. Default: unless it is resumable.
        output: Of a path that is written, what it is: a "folder" or "file" that must not be there yet; a "picture",
            a file whose folder is made, or "pictures", a folder of them; a "run", a folder that the same command goes
            on with, or a "part" of one; a folder "shared" by processes that see to it themselves.
        aliases: Other flags that mean it.
        snapshot: Whether it may name a snapshot by the folder of its run; see `with_exact_snapshots`.
    """
    metadata = {"help": help, "flag": flag, "nargs": nargs, "group": group, "choices": choices, "source": source,
                "resumable": resumable, "decisive": not resumable if decisive is None else decisive, "output": output,
                "aliases": aliases, "snapshot": snapshot}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


OVERWRITE = "overwrite"


def overwrite_setting() -> Any:
    """The field ``overwrite`` of settings with outputs that must not be there yet."""
    return setting(False, "replace what is there already; without this it is left alone and the command refused")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of all settings: they do not change, and every value is checked when they are made.

    Raises:
        InputError: A value of a wrong type or outside of its range; settings that do not go together.
    """

    def __post_init__(self) -> None:
        for name, hint in type_hints(type(self)).items():
            _check_type(name, getattr(self, name), hint)
        for each in fields(self):
            value, table = getattr(self, each.name), each.metadata.get("choices")
            if table is not None and isinstance(value, str) and value not in table:
                raise InputError(_one_of(each.name, table, value))
        self.check()

    def check(self) -> None:
        """Refuse settings that do not go together."""

    def resolve(self: S, **facts: Any) -> S:
        """Settings in which nothing is left open that the others and ``facts`` decide."""
        return self

    def files_of(self, output: Path) -> list[Path]:
        """What is written for one of its outputs."""
        return [output]

    def to_record(self) -> dict[str, Any]:
        """The settings as they are written down: without the one that says what may be overwritten."""
        return {name: value for name, value in asdict(self).items() if name != OVERWRITE}

    @classmethod
    def from_mapping(cls: type[S], mapping: Mapping[str, Any]) -> S:
        """Resolved settings from a dictionary, as a YAML file would hold it.

        Raises:
            InputError: An unknown key, or a value that cannot be used; names fields.
        """
        return _read(cls, "", lambda parser: parser.parse_object(dict(mapping)), lambda name: f"`{name}`")

    @classmethod
    def marked(cls, mark: str) -> set[str]:
        """Names of the fields with a mark of `setting`: "resumable", "decisive", "snapshot"."""
        return {each.name for each in fields(cls) if each.metadata.get(mark)}


@dataclass(frozen=True, kw_only=True)
class ReadingSettings(Settings):
    """How stored images become RGB of 8 bits."""

    exif: bool = setting(
        True, "turn images upright as their EXIF tag says; with --no-exif they stay as the file has them, as ADM, DiT "
        "and timm train on them", group="Images"
    )
    background: Colour = setting("white", "colour behind what is transparent, a name or '#rrggbb'")


@cache
def type_hints(settings_class: type[Any]) -> dict[str, Any]:
    """Types of the fields by name, with their ranges."""
    return get_type_hints(settings_class, include_extras=True)


def check_paths(settings: Settings) -> None:
    """Refuse paths of inputs that cannot be read, and of outputs that cannot be written.

    Raises:
        InputError: There is one.
    """
    for each in fields(settings):
        value = getattr(settings, each.name)
        for path in [value] if isinstance(value, str) else value or [] if isinstance(value, list) else []:
            if each.metadata.get("source"):
                check_source(each.name, path, each.metadata["source"])
            if each.metadata.get("output"):
                check_output(each.name, path, each.metadata["output"])


def check_values(content: Any, hints: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping that a file holds, whose values have the types and ranges of their names; others pass.

    Raises:
        InputError: It is no mapping, or a value is of another kind.
    """
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise InputError("it is no mapping of names to values")
    for name in content.keys() & hints.keys():
        try:
            _check_type(name, content[name], hints[name])
        except InputError as error:  # in a file it is no flag, whatever it is called
            raise InputError(str(error).replace("`", "")) from None
    return content


def _check_type(name: str, value: Any, hint: Any) -> None:
    arguments, origin = get_args(hint), get_origin(hint)
    if origin is Annotated:
        for limits in arguments[1:]:
            if isinstance(limits, Range | ColourName | TrainedPart):
                limits.check(name, value, arguments[0])
    elif origin in (Union, UnionType):
        if value is None and NoneType in arguments:
            return
        kinds = [kind for kind in arguments if kind is not NoneType]
        if not any(get_origin(kind) is Literal and value in get_args(kind) for kind in kinds):
            _check_type(name, value, kinds[0])
    elif origin is list and isinstance(value, list | tuple):
        for each in value:
            _check_type(name, each, arguments[0])
    elif origin is dict and isinstance(value, Mapping):
        for key, each in value.items():
            _check_type(name, key, arguments[0])
            _check_type(name, each, arguments[1])
    elif origin in (list, dict):
        raise InputError(f"`{name}` must be {'a list' if origin is list else 'a mapping'}, not {value!r}")
    elif origin is Literal and value not in arguments:
        raise InputError(_one_of(name, [str(each) for each in arguments], value))
    elif hint is str and isinstance(value, str):
        check_text(name, value)
    elif hint is bool and not isinstance(value, bool) or hint is str and not isinstance(value, os.PathLike):
        raise InputError(f"`{name}` must be {in_words(hint)}, not {value!r}")


def _one_of(name: str, known: Any, value: Any) -> str:
    near = difflib.get_close_matches(str(value), list(known), n=1)
    return f"`{name}` must be one of {', '.join(known)}, not {value}" + (f"; did you mean {near[0]}?" if near else "")


def parse_settings(
    settings_class: type[S], description: str, argv: Sequence[str] | None = None, *, prog: str | None = None
) -> S:
    """Read resolved settings from the command line; ``--config FILE`` reads YAML first, later flags override it.

    Args:
        settings_class: What to read.
        description: For ``--help``.
        argv: The arguments. Default: this process's.
        prog: What ``--help`` calls the command. Default: the file that runs.

    Raises:
        InputError: An unknown key or flag, or a value that cannot be used; names flags.
    """
    with in_flags(settings_class) as flags:
        return _read(settings_class, description, lambda parser: parser.parse_args(argv), flags.__getitem__,
                     " (--help lists what is accepted)", prog)  # fmt: skip


@contextmanager
def in_flags(settings_class: type[Any]) -> Iterator[dict[str, str]]:
    """What is said of settings names their flags instead, as a user of the command line knows them; gives the flags."""
    flags = {each.name: flag_of(each) for each in fields(settings_class)}
    before = in_words_of.set(lambda name: flags.get(name, name))
    try:
        yield flags
    except (InputError, RunError) as error:
        error.args = (said(str(error)), *error.args[1:])
        raise
    finally:
        in_words_of.reset(before)


def flag_of(one: Field) -> str:
    """What a setting is called on the command line."""
    return one.metadata.get("flag") or "--" + one.name.replace("_", "-")


def make_parser(settings_class: type[Any], description: str, prog: str | None = None) -> Any:
    """The parser of a settings class; ``prog`` is what its usage calls the command."""
    from jsonargparse import ActionConfigFile, ArgumentParser

    class Config(ActionConfigFile):
        def __call__(self, parser: Any, cfg: Any, values: str, option_string: str | None = None) -> None:
            check_config(values)
            super().__call__(parser, cfg, values, option_string)

    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action=Config, help="YAML file of settings; flags after it override it")
    hints, group, groups = get_type_hints(settings_class), parser, {}
    for each in fields(settings_class):
        if each.metadata.get("group"):
            title = each.metadata["group"]
            group = groups[title] = groups.get(title) or parser.add_argument_group(title)
        flag, options = flag_of(each), {"type": hints[each.name], "help": each.metadata.get("help", "")}
        if each.metadata.get("choices") is not None:
            options["help"] += f" ({', '.join(map(_choice, each.metadata['choices'].values()))})"
        if each.default is not MISSING:
            options["default"] = each.default
        elif each.default_factory is not MISSING:
            options["default"] = each.default_factory()
            options["nargs"] = "+"
            options["type"] = options["type"].__args__[0]
        elif flag.isupper() and get_origin(hints[each.name]) is list:
            options |= {"nargs": "+", "type": options["type"].__args__[0]}
        else:
            options["required"] = True
        switch = bool in (options["type"], *get_args(options["type"]))
        if switch:
            options |= {"nargs": "?", "const": True}  # --compile means --compile true
        if "no" in _names(hints[each.name], None):
            options["type"] = options["type"] | bool  # YAML reads a plain no as false
        if each.metadata.get("nargs"):
            options["nargs"], options["type"] = each.metadata["nargs"], get_args(get_args(options["type"])[0])[0]
        if flag.isupper():  # the word for a positional argument in --help
            options.pop("required", None)
            action = group.add_argument(each.name, metavar=flag, **options)
        else:
            action = group.add_argument(flag, *each.metadata.get("aliases", ()), dest=each.name, **options)
        if switch and each.default is not False:
            group.add_argument(flag.replace("--", "--no-", 1), dest=each.name, action="store_const", const=False,
                               default=SUPPRESS, help=f"the same as {flag} false")
        names = _names(hints[each.name], each.metadata.get("choices"))
        action.completer = lambda names=names, **_: names  # for shells; none: they offer files
    return parser


def _read(
    settings_class: type[S], description: str, read: Callable[[Any], Any], called: Callable[[str], str],
    advice: str = "", prog: str | None = None,
) -> S:  # fmt: skip
    from jsonargparse import ArgumentError

    parser = make_parser(settings_class, description, prog)
    try:
        values = read(parser)
    except ArgumentError as error:
        names, hints = {each.name: called(each.name) for each in fields(settings_class)}, get_type_hints(settings_class)
        choices = {each.name: list(each.metadata.get("choices") or ()) for each in fields(settings_class)}
        raise InputError(_sentence(str(error), names, hints, choices) + advice) from None
    except InputError:
        raise
    except Exception as error:  # the parser at its ends: numbers of 400 digits, mappings where a list belongs
        raise InputError(f"the settings cannot be read ({type(error).__name__}: {error}){advice}") from None
    given = {each.name: values[each.name] for each in fields(settings_class)}
    words = [name for name, hint in get_type_hints(settings_class).items() if "no" in _names(hint, None)]
    return settings_class(**{**given, **{name: "no" for name in words if given[name] is False}}).resolve()


def _names(hint: Any, table: Mapping[str, Any] | None) -> list[str]:
    """The words that a setting takes, where they can be listed."""
    if table is not None or bool in (hint, *get_args(hint)):
        return list(table or ("true", "false"))
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else [hint]
    return [str(word) for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]


def _choice(row: Any) -> str:
    """A row of a table as help shows it: its name, and its title where it has one."""
    return f"{row.name}: {row.title}" if hasattr(row, "title") else row.name


def _sentence(complaint: str, flags: dict[str, str], hints: dict[str, Any], choices: dict[str, list[str]]) -> str:
    """What the parser complains of, in words; the settings' flags, types and choices are by name."""
    complaint = " ".join(complaint.split())
    if missing := re.match(r"the following arguments are required: ([\w, ]+)$", complaint):
        words = [flags[name] + (f", one of {', '.join(choices[name])}" if choices[name] else "")
                 for name in missing[1].split(", ")]  # fmt: skip
        return f"this is missing: {'; '.join(words)}"
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


def write_yaml(settings: Settings, path: Path) -> None:
    """Write resolved settings for ``--config`` to read back; a kill leaves the old file or the new."""
    write_file(path, yaml.safe_dump(settings.to_record(), sort_keys=False))


def run_cli(main: Callable[[], None]) -> None:
    """Run a script's ``main``; an `InputError` becomes one sentence on stderr and exit code 2.

    So does a path that the operating system refuses, in whatever layer; a full disk or memory ends with exit code 1.
    Any other exception is a bug of ours and stays a traceback.
    """
    try:
        main()
    except InputError as error:
        sentence = str(error).splitlines()[-1]  # from a data worker it arrives below that worker's traceback
        _end(sentence.removeprefix(f"{InputError.__module__}.InputError: "), 2)
    except RunError as error:
        _end(str(error), 1)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if (refusal := of_the_system(error)) is None:
            raise
        _end(*refusal)


def _end(sentence: str, code: int) -> NoReturn:
    print(f"error: {' '.join(sentence.split())}", file=sys.stderr)
    sys.exit(code)
