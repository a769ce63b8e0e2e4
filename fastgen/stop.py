"""What asks for a stop at the next step: a signal, or the end of the time that was given.

SIGTERM, SIGINT, SIGHUP (a lost connection) and SIGUSR1 (how batch systems are told to announce the end); another one,
later, stops at once.
"""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Protocol

from fastgen.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# One request may come as several signals: a terminal tells its whole group and a launcher passes it on, and the system
# tells of a parent's end once for each of its threads.
SAME_REQUEST_SECONDS = 1.0


def heeded() -> tuple[signal.Signals, ...]:
    """Those of SIGNALS that are listened to: all, but for SIGHUP where `nohup` started us, which has it ignored."""
    nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return tuple(number for number in SIGNALS if number != signal.SIGHUP or not nohup)


class Checks(Protocol):
    """Something that can be asked whether to stop."""

    def check(self) -> None:
        """Raises Stopped where a stop is asked for."""
        ...


class StopRequest:
    """Notes a signal while it is entered as a context; asked by the training loop after each step.

    Args:
        deadline: time.monotonic(), in seconds, from when on a stop is asked for without a signal.
    """

    def __init__(self, deadline: float | None = None) -> None:
        self._deadline = deadline
        self._number: int | None = None
        self._asked_at = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        # Only the main thread may set handlers; elsewhere the caller's own stay in force.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in heeded()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

    @property
    def number(self) -> int:
        """Number of the signal that came; SIGALRM's once the deadline is over; 0: no stop is asked for."""
        if self._number is not None:
            return self._number
        over = self._deadline is not None and time.monotonic() >= self._deadline
        return int(signal.SIGALRM) if over else 0

    @property
    def requested(self) -> bool:
        """Whether a stop is asked for."""
        return self.number != 0

    def check(self) -> None:
        """Raises Stopped if a stop is asked for."""
        number = self.number
        if number:
            raise Stopped(number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._number is None:
            self._number, self._asked_at = number, time.monotonic()
        elif time.monotonic() - self._asked_at >= SAME_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
