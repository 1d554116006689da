"""The command line: ``d-emo VERB``, ``python -m d_emo VERB``, and the scripts of the checkout, which are thin shims."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from d_emo.cli.verbs import VERBS, Verb
from d_emo.config import in_flags, parse_settings, run_cli
from d_emo.errors import InputError
from d_emo.tables import load

__all__ = ["VERBS", "Verb", "command_line", "main", "run_verb"]


def main(verb: str | None = None, argv: Sequence[str] | None = None) -> None:
    """Run a verb, or the one that the first argument names; bad input ends in one sentence and exit code 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if verb is None and (not arguments or arguments[0] in ("-h", "--help", "--version")):
        print(_version() if arguments[:1] == ["--version"] else overview())
        return
    if verb is None:
        run_cli(lambda: run_verb(arguments[0], arguments[1:], prog=f"d-emo {arguments[0]}"))
    else:
        run_cli(lambda: run_verb(verb, arguments))


def run_verb(name: str, argv: Sequence[str], *, prog: str | None = None) -> None:
    """Read a verb's settings and do what it does.

    Args:
        name: Of the verb.
        argv: Its arguments.
        prog: What ``--help`` calls the command. Default: the file that runs.

    Raises:
        InputError: There is no such verb, or its settings cannot be used.
    """
    verb, arguments = VERBS[name], list(argv)
    settings = verb.settings
    if not isinstance(settings, str) and hasattr(settings, "keys"):
        kind = arguments.pop(0) if arguments else ""
        if kind not in settings:
            choices = " or ".join(f"{name} {each}" for each in settings)
            raise InputError(f"say which: {choices} (--help after it)")
        settings = settings[kind]
    settings = load(settings)
    values = parse_settings(settings, verb.help, arguments, prog=prog)
    with in_flags(settings):
        load(verb.run)(values)  # imported after parsing: help and typing errors need no torch


def overview() -> str:
    """What ``d-emo --help`` prints."""
    lines = ["usage: d-emo VERB ...    (d-emo VERB --help lists its flags)"]
    for group in dict.fromkeys(verb.group for verb in VERBS.values()):
        lines += ["", f"{group}:"]
        lines += [f"  {name:<17} {verb.help.splitlines()[0]}" for name, verb in VERBS.items() if verb.group == group]
    return "\n".join(lines)


def command_line() -> str:
    """The command that this process runs, for records: ``python scripts/judge.py ...`` or ``d-emo judge ...``."""
    program, *arguments = sys.argv
    words = ["python", program] if program.endswith(".py") and Path(program).name != "__main__.py" else ["d-emo"]
    return shlex.join([*words, *arguments])


def _version() -> str:
    from d_emo import __version__

    return f"d-emo {__version__}"
