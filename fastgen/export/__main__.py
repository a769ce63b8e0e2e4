"""The command `python -m fastgen.export`: see `command.py`."""

import sys
from collections.abc import Sequence

from fastgen.errors import command


def main(words: Sequence[str]) -> None:
    """The command; its modules are imported here, so that an interrupt meanwhile is one line, too."""
    from fastgen.export.command import main as export

    export(words)


if __name__ == "__main__":
    sys.exit(command(main, sys.argv[1:]))
