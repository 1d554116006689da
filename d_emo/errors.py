"""What goes wrong, in one sentence for the user. A setting is named in backquotes, `` `batch_size` ``.

The command line writes such a name as a flag, the app as words; a Python user reads it as it is.
"""

import re
from collections.abc import Callable


class InputError(ValueError):
    """Something that the user gave cannot be used. The message is one clear sentence with a remedy; exit code 2."""


class RunError(RuntimeError):
    """A run that began well cannot go on: a sentence for the user; exit code 1. What was saved before stays."""


def fields_as(message: str, render: Callable[[str], str]) -> str:
    """A message with the settings that it names in backquotes written otherwise: as flags, as words."""
    return re.sub(r"`([a-z][a-z0-9_]*)`", lambda field: render(field[1]), message)
