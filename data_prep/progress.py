"""Progress of work on many pictures, on standard error: one living line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

PLAIN_SECONDS = 15.0
LIVE_SECONDS = 0.25


class Progress:
    """Counts what is done, entered as a context.

    Args:
        what: is being done, such as "inspected".
        total: pictures.
        done: of them, by a former session.
    """

    def __init__(self, what: str, total: int, done: int = 0) -> None:
        self._what, self._total, self._before, self._done = what, total, done, done
        self._bytes = 0
        self._live = sys.stderr.isatty()
        self._started = self._told = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            # Clears the line: what follows is the summary, or the error.
            sys.stderr.write("\r\033[K")

    @property
    def seconds(self) -> float:
        """Since this session began."""
        return max(time.monotonic() - self._started, 1e-9)

    @property
    def pace(self) -> str:
        """Pictures and megabytes a second, of this session."""
        done = self._done - self._before
        return f"{done / self.seconds:,.0f} images/s, {self._bytes / 1e6 / self.seconds:,.1f} MB/s"

    def add(self, images: int, size_bytes: int = 0) -> None:
        """Notes that so many more are done."""
        self._done += images
        self._bytes += size_bytes
        now = time.monotonic()
        if now - self._told >= (LIVE_SECONDS if self._live else PLAIN_SECONDS):
            self._told = now
            self._tell()

    def _tell(self) -> None:
        done = self._done - self._before
        left = clock((self._total - self._done) * self.seconds / done) if done else "?"
        text = f"{self._what} {self._done:,} of {self._total:,}  {self.pace}  left {left}"
        sys.stderr.write(f"\r\033[K{text}" if self._live else f"{text}\n")
        sys.stderr.flush()


def clock(seconds: float) -> str:
    """h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def gigabytes(size_bytes: float) -> str:
    """A size for people."""
    if size_bytes < 1e8:
        return f"{size_bytes / 1e6:.1f} MB"
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes < 1e11 else f"{size_bytes / 1e9:.0f} GB"
