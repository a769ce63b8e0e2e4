"""The command `python -m fastgen.export`: see `command.py`."""

import sys

from fastgen.errors import command
from fastgen.export.command import main

if __name__ == "__main__":
    sys.exit(command(main, sys.argv[1:]))
