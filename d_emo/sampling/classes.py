"""From what people call classes to the labels that a denoiser takes."""

import difflib
import operator
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from d_emo.errors import InputError
from d_emo.models.contract import DenoiserFrame

Labels = str | int | Sequence[str | int] | torch.Tensor | np.ndarray
"""Ids or names of classes as people give them: one or several, as numbers, a tensor or an array."""
FEW = 5
"""So many classes and fewer are all named in a message."""


def as_list(values: Labels) -> list[Any]:
    """One or several ids, names or seeds as a list of Python's own numbers and texts. Shape: tensors () or (N,)."""
    values = values.tolist() if hasattr(values, "tolist") else values
    values = [values] if isinstance(values, (str, bytes)) or not isinstance(values, Iterable) else values
    return [value.item() if hasattr(value, "item") else value for value in values]


def find_classes(wanted: Sequence[str | int], class_names: Sequence[str]) -> list[int]:
    """Class ids for ids or names; where there is only one class, it need not be named.

    Numbers are ids; text is an id or a name, in capitals or not where that makes no difference. What can be both, as
    where classes 0 and 1 are called "1" and "0", has to say which: ``id:1`` or ``name:1``.

    Raises:
        InputError: No class named, an id out of range, an unknown name, or more than one class that can be meant; says
            what there is.
    """
    ids, last = [], len(class_names) - 1
    if not wanted and last == 0:
        return [0]
    named = [f"{label} ({name})" for label, name in enumerate(class_names)]
    named = ", ".join(named) if len(named) <= FEW else f"{named[0]} to {named[-1]}"
    known = f"this snapshot knows {last + 1} classes, {named}"
    if not wanted:
        raise InputError(f"name at least one class, e.g. `classes` {last // 2}: {known}")
    for each in wanted:
        each = f"id:{operator.index(each)}" if hasattr(each, "__index__") else str(each)
        kind, text = re.fullmatch("((?:id|name):)?(.*)", each, re.DOTALL).groups()
        number = int(text) if kind != "name:" and re.fullmatch(r"-?[0-9]{1,18}", text) else None
        named = [] if kind == "id:" else _called(text, class_names)
        meant = {*named, *([number] if number is not None and 0 <= number <= last else [])}
        if len(meant) > 1:
            raise InputError(_ambiguous(text, number if number in meant else None, named, class_names))
        if not meant and number is not None:
            raise InputError(f"class {text} is out of range: {known}")
        if not meant:
            near = difflib.get_close_matches(text, class_names, n=3)
            guess = f"did you mean {', '.join(near)}? " if near else ""
            raise InputError(f"no class is called {text!r}: {guess}{known}")
        ids += meant
    return ids


def _called(text: str, class_names: Sequence[str]) -> list[int]:
    """Classes of this name; where there is none, of this name in other cases."""
    exact = [label for label, name in enumerate(class_names) if name == text]
    folded = text.casefold()
    return exact or [label for label, name in enumerate(class_names) if name.casefold() == folded]


def some_classes(class_names: Sequence[str], count: int = 4) -> list[int]:
    """Classes from all over their order, for who names none."""
    count = min(count, len(class_names))
    return [(2 * number + 1) * len(class_names) // (2 * count) for number in range(count)]


def caption(label: int, class_names: Sequence[str]) -> str:
    """A class for people: "207: red triangle on sky", or the name alone where it is the number."""
    name = class_names[label]
    return name if name == str(label) else f"{label}: {name}"


def spell_class(label: int, class_names: Sequence[str]) -> str:
    """What `find_classes` takes for this class alone: its id, with ``id:`` where another class is called so."""
    return str(label) if str(label) not in class_names or class_names[label] == str(label) else f"id:{label}"


def _ambiguous(text: str, number: int | None, named: list[int], class_names: Sequence[str]) -> str:
    ids = " or ".join(f"id:{label}" for label in named[:5])
    if number is None:
        return f"{len(named)} classes are called {text!r}, {', '.join(map(str, named[:5]))}; write {ids}"
    other = f"name:{text}" if len(named) == 1 else ids
    return (
        f"class {text} can be the one with this id, which is called {class_names[number]!r}, or the one of this name, "
        f"whose id is {named[0]}; write id:{text} or {other}"
    )


@torch.no_grad()
def mix_classes(denoiser: DenoiserFrame, first: int, last: int, count: int) -> list[int]:
    """Labels that lead from one class to another in even steps, both ends included.

    The denoiser gets the labels between; do not save it afterwards.
    """
    rows = denoiser.label_rows()
    fractions = torch.linspace(0, 1, count, device=rows.device, dtype=rows.dtype)[:, None]
    return denoiser.append_label_rows(torch.lerp(rows[first], rows[last], fractions))
