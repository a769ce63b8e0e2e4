"""Calls of the command for `benchmarks.soak`, each in a process of its own, and what is asked of other processes.

They are started from a process that has imported everything already: a start takes a third of a second instead of
three. What a call starts itself, for several processes, begins from nothing, as it always does.
"""

from __future__ import annotations

import multiprocessing.context
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastgen import train
from fastgen.errors import command
from fastgen.launch import exit_code_for

Program = Callable[[Sequence[str]], None]

PATIENCE_SECONDS = 300.0
POLL_SECONDS = 0.01


class Lost(Exception):
    """Something that was trained is gone, or the run ended in another way than it should have."""


class NotTried(Exception):
    """A fault that cannot be made here; the text says why."""


def demand(holds: bool, otherwise: str) -> None:
    """Raises Lost, with that text, where something does not hold."""
    if not holds:
        raise Lost(otherwise)


@dataclass(frozen=True)
class Ended:
    """How a command ended; its lines without the ends of progress bars."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """Its one line for the user.

        Raises:
            Lost: it has another number of lines.
        """
        lines = self.err.strip().splitlines()
        demand(len(lines) == 1, f"{len(lines)} lines on standard error, not 1: {' | '.join(lines)[:500]}")
        return lines[0]


class Session:
    """One call of the command."""

    def __init__(
        self, context: multiprocessing.context.ForkServerContext, folder: Path, main: Program, words: Sequence[str]
    ) -> None:
        self._out, self._err = (folder / f"{time.monotonic_ns()}.{name}" for name in ("out", "err"))
        self.started = time.time()
        arguments = (str(self._out), str(self._err), str(folder), main, list(words))
        self._process = context.Process(target=_run, args=arguments)
        self._process.start()

    @property
    def pid(self) -> int:
        """Of the process that was called."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.exitcode is None

    def rest(self, seconds: float) -> bool:
        """Waits, at most until it ends; tells whether it still runs."""
        self._process.join(seconds)
        return self.running

    def wait(self, seconds: float = PATIENCE_SECONDS) -> Ended:
        """Waits until it has ended.

        Raises:
            Lost: it does not end.
        """
        demand(not self.rest(seconds), f"the command did not end within {seconds:g} s")
        code = self._process.exitcode
        assert code is not None
        return Ended(code, *(_text(path) for path in (self._out, self._err)))

    def signal(self, number: int) -> bool:
        """Sends it a signal; False: it has ended before."""
        return self.running and send(self.pid, number)

    def wait_until(self, holds: Callable[[], bool], what: str) -> bool:
        """Waits for something; False: the command ended before.

        Raises:
            Lost: it does not come.
        """
        end = time.monotonic() + PATIENCE_SECONDS
        while not holds():
            demand(time.monotonic() < end, f"{what} did not come")
            if not self.rest(POLL_SECONDS):
                return holds()
        return True

    def close(self) -> None:
        """Ends it and its ranks, where they have not ended."""
        for pid in (self.pid, *ranks(self.pid).values()):
            if self.running or pid != self.pid:
                send(pid, 9)
        self._process.join()


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _run(out: str, err: str, folder: str, main: Program, words: Sequence[str]) -> None:
    """What the process of a session runs: as `python -m fastgen.train`."""
    for path, descriptor in ((out, 1), (err, 2)):
        with open(path, "wb") as file:
            os.dup2(file.fileno(), descriptor)
    # What a killed one leaves behind shall be found in its own folder.
    tempfile.tempdir = os.environ["TMPDIR"] = folder
    sys.argv = [train.__file__, *words]
    sys.exit(exit_code_for(command(main, words), os.environ))


def send(pid: int, number: int) -> bool:
    """Sends a signal; False: there is no such process."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def alive(pid: int) -> bool:
    """Whether a process runs, or is stopped; not one that has ended and was not waited for."""
    return _stat(pid)[:1] not in ([], ["Z"])


def ranks(launcher: int) -> dict[int, int]:
    """Processes that a launcher has started: rank -> number of the process."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and _stat(int(entry.name))[1:2] == [str(launcher)]:
            rank = _environment(int(entry.name)).get(b"RANK")
            if rank is not None:
                found[int(rank)] = int(entry.name)
    return found


def _stat(pid: int) -> list[str]:
    """State and parent of a process; empty: there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _environment(pid: int) -> dict[bytes, bytes]:
    try:
        content = Path(f"/proc/{pid}/environ").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {name: value for name, _, value in (line.partition(b"=") for line in content.split(b"\0"))}
