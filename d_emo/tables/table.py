"""What comes in kinds is a row in a table: found by name, listed, and added to by any package. Free of torch.

A row names its implementation as ``"module:attribute"``, which is imported when it is first needed, or holds the object
itself. A package of somebody else adds rows when it is imported; to have it imported by the command line too, it
declares an entry point of the group ``d_emo.plugins``:

    [project.entry-points."d_emo.plugins"]
    anything = "its_module"
"""

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Protocol, TypeVar

from d_emo.errors import InputError

Reference = str | Callable[..., Any]
"""``"module:attribute"``, or the object that it would name."""


class Row(Protocol):
    """What every row has."""

    name: str


R = TypeVar("R", bound=Row)


class Table(Mapping[str, R]):
    """Rows by name, in the order in which they were added.

    Args:
        what: What a row is, for messages: "objective".
        rows: The rows to begin with.
    """

    def __init__(self, what: str, rows: Iterable[R] = ()):
        self.what = what
        self._rows: dict[str, R] = {}
        for row in rows:
            self.register(row)

    def register(self, row: R) -> R:
        """Add a row and return it; the same row may come again.

        Raises:
            ValueError: Another row has this name.
        """
        if self._rows.setdefault(row.name, row) != row:
            raise ValueError(f"there is another {self.what} called {row.name!r}; choose another name")
        return row

    def __getitem__(self, name: str) -> R:
        """The row of this name.

        Raises:
            InputError: There is none; names the nearest ones.
        """
        if name not in self._rows:
            load_plugins()
        if name not in self._rows:
            near = difflib.get_close_matches(str(name), self._rows, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(self._rows)}"
            raise InputError(f"unknown {self.what} {name!r}; {hint}")
        return self._rows[name]

    def __contains__(self, name: object) -> bool:
        if name not in self._rows:
            load_plugins()
        return name in self._rows

    def __iter__(self) -> Iterator[str]:
        load_plugins()
        return iter(tuple(self._rows))

    def __len__(self) -> int:
        load_plugins()
        return len(self._rows)


class SomeRows(Mapping[str, R]):
    """Those rows of a table that ``keep`` says, asked for when they are read: other packages may add to them.

    Args:
        table: All rows.
        keep: Whether a row is one of them.
    """

    def __init__(self, table: Table[R], keep: Callable[[R], bool]):
        self._table, self._keep = table, keep

    def __getitem__(self, name: str) -> R:
        if name not in self:
            raise KeyError(name)
        return self._table[name]

    def __contains__(self, name: object) -> bool:
        return name in self._table and self._keep(self._table[name])

    def __iter__(self) -> Iterator[str]:
        return (name for name, row in self._table.items() if self._keep(row))

    def __len__(self) -> int:
        return sum(1 for _ in self)


@cache
def load_plugins() -> None:
    """Import what other packages declare as entry points of the group ``d_emo.plugins``; once."""
    for plugin in entry_points(group="d_emo.plugins"):
        plugin.load()


def load(reference: Reference) -> Any:
    """The object that a row names."""
    if not isinstance(reference, str):
        return reference
    module, _, attribute = reference.partition(":")
    return getattr(import_module(module), attribute)
