"""When a run should end before its last step: signals and the time limit."""

from __future__ import annotations

import enum
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any


class Stop(enum.IntEnum):
    """Why to stop before the last step; when processes disagree the largest wins."""

    NO = 0
    TIME_UP = 1
    INTERRUPTED = 2
    TERMINATED = 3

    @property
    def exit_code(self) -> int:
        """0, or 143 after SIGTERM."""
        return 143 if self is Stop.TERMINATED else 0

    @property
    def reason(self) -> str:
        """What stopped the run, in words."""
        return {Stop.TIME_UP: "the time limit", Stop.INTERRUPTED: "Ctrl-C", Stop.TERMINATED: "SIGTERM"}[self]


class StopSignal:
    """A context that remembers SIGINT and SIGTERM instead of dying of them; a second SIGINT interrupts at once.

    Outside of the main thread signals are left to whoever has that: the time limit alone is kept.

    Args:
        max_minutes: Time limit from now on, or None.
        say: Is told of a signal as it comes.
    """

    def __init__(self, max_minutes: float | None = None, say: Callable[[str], None] = lambda line: None):
        self.say = say
        self.deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.received = Stop.NO

    @property
    def wish(self) -> Stop:
        """What this process wants."""
        late = self.deadline is not None and time.monotonic() >= self.deadline
        return max(self.received, Stop.TIME_UP if late else Stop.NO)

    def _receive(self, number: int, frame: Any) -> None:
        wish = Stop.TERMINATED if number == signal.SIGTERM else Stop.INTERRUPTED
        if wish == self.received == Stop.INTERRUPTED:
            raise KeyboardInterrupt
        self.received = max(self.received, wish)
        with suppress(RuntimeError):  # the signal came in the middle of a print
            self.say(f"{wish.reason}: stopping after the images at work, then the state is saved; Ctrl-C"
                     f"{' again' * (wish == Stop.INTERRUPTED)} stops at once, without saving")

    def __enter__(self) -> StopSignal:
        main = threading.current_thread() is threading.main_thread()  # Python lets no other set handlers
        numbers = (signal.SIGINT, signal.SIGTERM) if main else ()
        self._before = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def ignore_interrupts(worker: int) -> None:
    """For data workers: Ctrl-C reaches the whole process group, but only the training process decides to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
