"""Markdown tables and small words, shared by all reports."""

from collections.abc import Iterable, Sequence


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1) -> str:
    """A markdown table; its first ``words`` columns are words, the others numbers."""
    rule = "|" + "".join("---|" if number < words else "---:|" for number in range(len(head)))
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)])


def plural(count: int, what: str) -> str:
    """ "1 seed", "3 seeds"."""
    return f"{count} {what}{'' if count == 1 else 's'}"
