"""Command lines of the tools beside training: argparse, with mistakes told as everywhere in fastgen."""

from __future__ import annotations

import argparse
from typing import NoReturn

from fastgen.errors import UserError


class Arguments(argparse.ArgumentParser):
    """Reads --name=value; a mistake is one line and exit code 2, as everywhere in fastgen."""

    def __init__(self, program: str, purpose: str) -> None:
        super().__init__(prog=f"python -m {program}", description=purpose, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raises UserError instead of printing the usage."""
        raise UserError(f"{message} (--help lists all arguments)")


def at_least_one(text: str) -> int:
    """Type of arguments that count something."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is below 1")
    return value
