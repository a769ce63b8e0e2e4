"""Ctrl-C while a command's modules are still imported. Needs the standard library alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Ctrl-C ends the process: what it raises would come out of libraries that are half imported as whatever they like.

    There is nothing to tidy up yet.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        # It is ignored, as in the background, or somebody else's.
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        os.write(2, b"fastgen: interrupted\n")
        os._exit(128 + number)

    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
