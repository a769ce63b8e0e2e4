"""Command lines of the tools beside training: argparse, with mistakes told as everywhere in fastgen."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
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


def split_words(words: Sequence[str], names: Sequence[str], many: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """Parts a command line into a command's own words, `--seeds=0` or `--seeds 0`, and those of the recipe.

    Args:
        words: without the program's name.
        names: of the command's own arguments, such as `--seeds`.
        many: those of them that may be given several times.

    Raises:
        UserError: one of its own is given twice.
    """
    own: list[str] = []
    rest: list[str] = []
    left = iter(words)
    for word in left:
        if word in names:
            # Its value is the next word.
            own += [word, *itertools.islice(left, 1)]
        else:
            (own if word.partition("=")[0] in names else rest).append(word)
    for name in {*names} - {*many}:
        if sum(word.partition("=")[0] == name for word in own) > 1:
            raise UserError(f"{name} is given twice: keep one")
    return own, rest
