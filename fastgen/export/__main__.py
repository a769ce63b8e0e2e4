"""The command `python -m fastgen.export`: see `command.py`."""

import sys
from collections.abc import Sequence

from fastgen.errors import command
from fastgen.interrupts import ending_at_once


def main(words: Sequence[str]) -> None:
    """The command; see `command.main`."""
    with ending_at_once():
        # Here, as it takes seconds: whoever interrupts it is told so in a line.
        from fastgen.export.command import main as export

    export(words)


if __name__ == "__main__":
    sys.exit(command(main, sys.argv[1:]))
