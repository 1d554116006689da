"""The command line: ``d-emo VERB``, ``python -m d_emo VERB``, and the scripts of the checkout, which are thin shims."""

import argparse
import atexit
import gc
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from d_emo.cli.outputs import claimed_outputs
from d_emo.cli.verbs import VERBS, Verb
from d_emo.config import check_paths, in_flags, parse_settings, run_cli
from d_emo.errors import InputError
from d_emo.tables import load


def main(verb: str | None = None, argv: Sequence[str] | None = None) -> None:
    """Run a verb, or the one that the first argument names; bad input ends in one sentence and exit code 2."""
    atexit.register(gc.freeze)  # else the interpreter looks for garbage in all of PyTorch before it ends, for a second
    arguments = list(sys.argv[1:] if argv is None else argv)
    if verb is None and "_ARGCOMPLETE" in os.environ:
        arguments = completed_words()
    if verb is None and (not arguments or arguments[0] in ("-h", "--help", "--version")):
        print(_version() if arguments[:1] == ["--version"] else overview())
        return
    if verb is None:
        run_cli(lambda: run_verb(arguments[0], arguments[1:], prog=f"d-emo {arguments[0]}"))
    else:
        run_cli(lambda: run_verb(verb, arguments))


def run_verb(name: str, argv: Sequence[str], *, prog: str | None = None) -> None:
    """Read a verb's settings and do what it does; its help calls the command ``prog`` (default: the file that runs).

    Raises:
        InputError: There is no such verb, or its settings cannot be used.
    """
    verb, arguments, kind = VERBS[name], list(argv), ""
    kinds = verb.kinds()
    if kind not in kinds:
        kind = arguments.pop(0) if arguments else ""
    if kind not in kinds:
        raise InputError(f"say which: {' or '.join(f'{name} {each}' for each in kinds)} (--help after it)")
    settings = load(kinds[kind])
    values = parse_settings(settings, verb.help, arguments, prog=prog)
    with in_flags(settings):
        check_paths(values)
        with claimed_outputs(name, values) as values:
            verb.run(values)


def completed_words() -> list[str]:
    """Verb (and kind) in the line that the shell wants completed; while one is missing, offer them all and exit."""
    import argcomplete

    *words, _ = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])].split()[1:] + [""]
    chosen: list[str] = []
    choices = VERBS
    while "" not in choices:
        os.environ["_ARGCOMPLETE"] = str(len(chosen) + 1)  # so many words belong to the command
        if not words or words[0] not in choices:
            parser = argparse.ArgumentParser(add_help=False)
            parser.add_argument("word", choices=list(choices))
            argcomplete.autocomplete(parser)
        chosen.append(words.pop(0))
        choices = VERBS[chosen[0]].kinds() if len(chosen) == 1 else {""}
    os.environ["_ARGCOMPLETE"] = str(len(chosen) + 1)
    return chosen  # jsonargparse offers the flags


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
