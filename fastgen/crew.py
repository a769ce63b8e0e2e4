"""Trainings side by side: each in a process of its own, whose lines are shown with its name before them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Thread
from typing import IO, Generic, Protocol, TypeVar

from fastgen.progress import PatientConsole
from fastgen.trainings import STOPPED_CODES, stop_trainings, training_command

# For the last lines of a process that is over: a process of its own that it left behind may hold the pipe for ever.
LAST_LINES_SECONDS = 5.0


class Task(Protocol):
    """What a process trains."""

    @property
    def name(self) -> str:
        """Stands before its lines."""
        ...

    @property
    def words(self) -> Sequence[str]:
        """Command line of `fastgen.train`."""
        ...


T = TypeVar("T", bound=Task)


@dataclass(frozen=True)
class Running(Generic[T]):
    """A task whose process was started, and the threads that show its lines."""

    task: T
    process: subprocess.Popen[str]
    readers: tuple[Thread, ...]


@dataclass(frozen=True)
class Ended(Generic[T]):
    """A task whose process is over; a negative code is the signal that ended it."""

    task: T
    code: int

    @property
    def how(self) -> str:
        """For the person."""
        if self.code in STOPPED_CODES:
            return "was stopped"
        if self.code < 0:
            return f"was ended by {signal.Signals(-self.code).name}"
        return f"ended with exit code {self.code}"


class Crew(Generic[T]):
    """The processes that run now. Start them from the main thread: they save and end when it does."""

    def __init__(self) -> None:
        self._consoles = (PatientConsole(), PatientConsole(stderr=True))
        self._running: list[Running[T]] = []

    def __len__(self) -> int:
        return len(self._running)

    @property
    def tasks(self) -> list[T]:
        """What they train."""
        return [one.task for one in self._running]

    def start(self, task: T, environment: Mapping[str, str]) -> None:
        """Starts a process.

        Args:
            task: for it.
            environment: added to that of this process.
        """
        # A session of its own: a Ctrl-C in the terminal reaches this process alone, which passes it on once.
        process = subprocess.Popen(
            training_command(task.words), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            encoding="utf-8", errors="replace", env={**os.environ, **environment}, start_new_session=True,
        )  # fmt: skip
        readers = []
        for pipe, console in zip((process.stdout, process.stderr), self._consoles, strict=True):
            assert pipe is not None
            readers.append(Thread(target=show_lines, args=(pipe, f"{task.name} | ", console), daemon=True))
            readers[-1].start()
        self._running.append(Running(task, process, tuple(readers)))

    def reap(self) -> list[Ended[T]]:
        """Those that have ended since this was asked before; told."""
        over = [one for one in self._running if one.process.poll() is not None]
        for one in over:
            self._running.remove(one)
        return [self._end(one) for one in over]

    def stop(self) -> None:
        """Has all of them save and end, and waits for that; `reap` then gives them."""
        stop_trainings([one.process for one in self._running])

    def _end(self, one: Running[T]) -> Ended[T]:
        ended = Ended(one.task, one.process.wait())
        for reader in one.readers:
            reader.join(LAST_LINES_SECONDS)
        _say(self._consoles[0], f"{one.task.name}: {'done' if ended.code == 0 else ended.how}")
        return ended


def show_lines(pipe: IO[str], prefix: str, console: PatientConsole) -> None:
    """Prints each line of a pipe once it is whole, until the pipe ends. A console prints one line at a time."""
    with pipe:
        for line in pipe:
            # Whatever becomes of the reader of ours: a pipe that nobody empties would hold the training up.
            with contextlib.suppress(OSError):
                _say(console, prefix + line.rstrip("\n"))


def _say(console: PatientConsole, text: str) -> None:
    console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)
