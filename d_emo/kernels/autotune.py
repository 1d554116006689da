"""Which of several equal forms is the fastest here: timed once for every shape, and kept on the disk by machine.

No list of instruction sets can know: one library's product is twice as fast as another's on one CPU, and slower on the
next. Equal forms differ in their last bits, so a choice is kept: in ``~/.cache/d-emo`` (or ``$XDG_CACHE_HOME/d-emo``),
one file for each machine and PyTorch, and in every training state. Where no file can be written nothing is timed.

The environment variable D_EMO_KERNELS says otherwise: "plain" takes every operator's plain form, "fixed" the first form
of each table that can run, and "OPERATOR=FORM" (several with ";" between) a form by its name.
"""

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from d_emo.errors import InputError, RunError
from d_emo.files import cache_folder, digest, write_json

ROUNDS = 3
"""How often each form is timed at least, in turns, after one run that is not; the best counts."""

BUDGET = 0.02
"""Seconds that small forms are timed for, beyond those rounds: a busy machine interrupts most of them."""

MARGIN = 0.9
"""A form lower in its table has to take less than this fraction of the first one's time."""


class Choice(NamedTuple):
    """The form that was taken, and what each took, in milliseconds; nothing where it was not timed here."""

    form: str
    times: dict[str, float]


class Preferences(NamedTuple):
    """What D_EMO_KERNELS asks for: all forms plain, none timed, and operators' forms by name."""

    plain: bool
    fixed: bool
    forms: dict[str, str]


def read_preferences(text: str) -> Preferences:
    """Read the value of D_EMO_KERNELS.

    Raises:
        InputError: It is nothing that can be asked for.
    """
    text = text.strip()
    if text in ("", "plain", "fixed"):
        return Preferences(text == "plain", text == "fixed", {})
    pairs = [pair.partition("=") for pair in text.split(";")]
    if not all(operator.strip() and form.strip() for operator, _, form in pairs):
        raise InputError(f"D_EMO_KERNELS is 'plain', 'fixed' or 'OPERATOR=FORM', not {text!r}")
    return Preferences(False, False, {operator.strip(): form.strip() for operator, _, form in pairs})


class Autotuner:
    """The choices of a process.

    Args:
        folder: where the file of this machine lies.
        fixed: time nothing, and take the first form of each table unless a choice is `keep`-ed.
    """

    def __init__(self, folder: Path, *, fixed: bool = False) -> None:
        self.fixed = fixed
        self.machine = {"cpu": cpu_name(), "torch": torch.__version__}
        self.path = folder / f"kernels-{digest(json.dumps(self.machine))[:12]}.json"
        self.choices: dict[str, Choice] = {}
        self.used: dict[str, str] = {}
        """Form by question, as they were answered or are to be answered: what a training state keeps."""
        self.memo: dict[Any, Any] = {}
        """What the asker remembers of its questions, as long as no choice is taken back."""

    def choose(self, key: str, forms: Sequence[str], trial: Callable[[str], None]) -> Choice:
        """The choice among the forms of one table, the first one's first.

        Args:
            key: what the choice is for: operator, threads, shapes, precision.
            forms: names of the forms that can run.
            trial: runs the form of that name once.
        """
        if self.used.get(key) not in forms:
            choice = self._measured(key, forms, trial)
            self.used[key] = choice.form
            return choice
        known = self.choices.get(key)
        return known if known is not None and known.form == self.used[key] else Choice(self.used[key], {})

    def _measured(self, key: str, forms: Sequence[str], trial: Callable[[str], None]) -> Choice:
        """What the file says or the clock; the first form where neither is asked."""
        if self.fixed or len(forms) == 1:
            return Choice(forms[0], {})
        if key not in self.choices:
            self._load()
        if key in self.choices and self.choices[key].form in forms and set(forms) <= set(self.choices[key].times):
            return self.choices[key]  # else there are forms that it was not measured against
        times = {form: 1000 * seconds for form, seconds in timed(forms, trial).items()}
        best = min(forms, key=times.__getitem__)
        choice = Choice(best if times[best] < MARGIN * times[forms[0]] else forms[0], times)
        self.choices[key] = choice
        return choice if self._save() else Choice(forms[0], {})

    def keep(self, choices: dict[str, str] | None) -> None:
        """Go by the choices of a training state; by none and the first forms, where it is older than such choices."""
        self.memo.clear()
        if choices is None:
            self.fixed = True
        else:
            self.used |= choices  # not `choices`: they say nothing of this machine

    def agree(self, broadcast: Callable[[list[Any]], list[Any]]) -> None:
        """Let all processes of a run go by the first one's choices; from now on none times anything by itself."""
        if not self.fixed:
            self._load()
        self.keep(broadcast([{key: choice.form for key, choice in self.choices.items()} | self.used])[0])
        self.fixed = True

    def _load(self) -> None:
        """Take over what the file has and this process has not; a file that is none is passed over, and replaced."""
        try:
            stored = json.loads(self.path.read_text())["choices"]
            found = {key: Choice(one["form"], one["ms"]) for key, one in stored.items()}
        except Exception:
            found = {}
        self.choices = found | self.choices

    def _save(self) -> bool:
        self._load()
        choices = {key: {"form": choice.form, "ms": choice.times} for key, choice in sorted(self.choices.items())}
        try:
            write_json(self.path, {"machine": self.machine, "choices": choices})
        except (OSError, RunError):  # the next process could not know of a choice, and images would change
            self.fixed, self.choices = True, {}
            self.memo.clear()
        return not self.fixed


def timed(forms: Sequence[str], trial: Callable[[str], None]) -> dict[str, float]:
    """The best time of each form in seconds, in turns."""
    for form in forms:
        trial(form)
    best, start, rounds = dict.fromkeys(forms, float("inf")), time.perf_counter(), 0
    while rounds < ROUNDS or time.perf_counter() - start < BUDGET:
        for form in forms:
            began = time.perf_counter()
            trial(form)
            best[form] = min(best[form], time.perf_counter() - began)
        rounds += 1
    return best


def in_words(key: tuple) -> str:
    """A question as the file has it: operator, threads, whether gradients are on, autocast, inputs.

    Shape: of an input that is a tensor there are (shape, dtype, whether it is contiguous, whether it has a gradient).
    """
    operator, threads, gradients, low, *inputs = key
    words = [operator, f"threads {threads}", "gradients" if gradients else "no gradients", f"autocast {low}"]
    for one in inputs:
        if isinstance(one, tuple) and len(one) == 4 and isinstance(one[0], torch.Size):
            shape, dtype, contiguous, _ = one
            one = f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}{'' if contiguous else ' strided'}"
        words.append(str(one))
    return ", ".join(words)


def cpu_name() -> str:
    """Vendor, family, model and name of the CPU, as Linux knows them; elsewhere what Python says."""
    wanted = ("vendor_id", "cpu family", "model", "model name", "CPU implementer", "CPU part")
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    except OSError:
        lines = []
    found = {key.strip(): value.strip() for key, _, value in reversed(lines) if key.strip() in wanted}
    return " ".join(found[key] for key in wanted if key in found) or platform.processor() or platform.machine()


preferences = read_preferences(os.environ.get("D_EMO_KERNELS", ""))
tuner = Autotuner(cache_folder(), fixed=preferences.fixed)
