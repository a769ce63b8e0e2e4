"""SIGTERM, SIGINT and SIGHUP (a lost connection) ask for a stop at the next step; another one later stops at once."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType

from fastgen.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# One request may come as several signals: a terminal tells its whole group and a launcher passes it on, and the system
# tells of a parent's end once for each of its threads.
SAME_REQUEST_SECONDS = 1.0


class StopRequest:
    """Notes a signal while it is entered as a context; asked by the training loop after each step."""

    def __init__(self) -> None:
        self._number: int | None = None
        self._asked_at = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        # Only the main thread may set handlers; elsewhere the caller's own stay in force.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return self._number is not None

    def check(self) -> None:
        """Raises Stopped if a signal came."""
        if self._number is not None:
            raise Stopped(self._number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._number is None:
            self._number, self._asked_at = number, time.monotonic()
        elif time.monotonic() - self._asked_at >= SAME_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
