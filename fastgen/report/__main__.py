"""The command `python -m fastgen.report`: see `command.py`."""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from fastgen.errors import command


def main(words: Sequence[str]) -> None:
    """The command; see `command.main`."""
    with _ending_at_once():
        # Here, as it takes seconds: whoever interrupts it is told so in a line.
        from fastgen.report.command import main as report

    report(words)


@contextmanager
def _ending_at_once() -> Iterator[None]:
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


if __name__ == "__main__":
    sys.exit(command(main, sys.argv[1:]))
