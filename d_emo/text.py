"""Markdown tables, commands and small words, for all that is printed."""

import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]], *, words: int = 1) -> str:
    """A Markdown table; its first ``words`` columns are words, the others numbers."""
    rule = "|" + "---|" * words + "---:|" * (len(head) - words)
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def plural(count: int, what: str) -> str:
    """ "1 seed", "3 seeds"."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def command(verb: str, script: str) -> str:
    """How whoever runs this process would run a verb: by ``d-emo``, or by its file beside the script that runs."""
    running = Path(sys.argv[0])
    is_script = running.suffix == ".py" and running.parent.name == "scripts"
    return shlex.join(["python", str(running.with_name(script))]) if is_script else f"d-emo {verb}"
