"""A training whose rank is killed in the middle of a save, for `benchmarks.soak`: this is what its processes run."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

from fastgen import train


def die_at(name: str, call: int) -> None:
    """Has this process killed right before the given call of one of the `os` functions that saving is made of.

    Args:
        name: of the function: `replace`, `fsync` or `unlink`.
        call: counted from 1.
    """
    original, calls = getattr(os, name), iter(range(1, call + 1))

    def fatal(*arguments: object, **named: object) -> object:
        if next(calls, None) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **named)

    setattr(os, name, fatal)


def main(words: Sequence[str]) -> None:
    """Trains in one of several processes; the first word is `<rank>:<name>:<call>` of the one that is killed."""
    rank, name, call = words[0].split(":")
    if rank == os.environ["RANK"]:
        die_at(name, int(call))
    train.main(words[1:])
