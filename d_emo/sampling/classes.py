"""From what people call classes to the labels that a denoiser takes."""

import difflib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from d_emo.errors import InputError
from d_emo.models.contract import DenoiserFrame

Labels = str | int | Sequence[str | int] | torch.Tensor | np.ndarray
"""Ids or names of classes as people give them: one or several, as numbers, a tensor or an array."""


def as_list(values: Labels) -> list[Any]:
    """One or several ids, names or seeds as a list of Python's own numbers and texts. Shape: tensors () or (N,)."""
    values = values.tolist() if hasattr(values, "tolist") else values
    values = [values] if isinstance(values, (str, int)) else values
    return [value.item() if hasattr(value, "item") else value for value in values]


def find_classes(wanted: Sequence[str], class_names: Sequence[str]) -> list[int]:
    """Class ids for ids or names; where there is only one class, it need not be named.

    Raises:
        InputError: No class named, an id out of range or an unknown name; says what there is.
    """
    ids, last = [], len(class_names) - 1
    if not wanted and last == 0:
        return [0]
    known = f"this snapshot knows {last + 1} classes, 0 ({class_names[0]}) to {last} ({class_names[last]})"
    if not wanted:
        raise InputError(f"name at least one class, e.g. `classes` {last // 2}: {known}")
    for name in map(str, wanted):
        number = int(name) if re.fullmatch(r"-?[0-9]+", name) else None
        if number is not None and (0 <= number <= last or name not in class_names):
            if not 0 <= number <= last:
                raise InputError(f"class {name} is out of range: {known}")
            ids.append(number)
        elif name in class_names:
            ids.append(class_names.index(name))
        else:
            near = difflib.get_close_matches(name, class_names, n=3)
            guess = f"did you mean {', '.join(near)}? " if near else ""
            raise InputError(f"no class is called {name!r}: {guess}{known}")
    return ids


@torch.no_grad()
def mix_classes(denoiser: DenoiserFrame, first: int, last: int, count: int) -> list[int]:
    """Labels that lead from one class to another in even steps, both ends included.

    The denoiser gets the labels between; do not save it afterwards.
    """
    rows = denoiser.label_rows()
    fractions = torch.linspace(0, 1, count, device=rows.device, dtype=rows.dtype)[:, None]
    return denoiser.append_label_rows(torch.lerp(rows[first], rows[last], fractions))
