"""Trials of faults, one after the other or several at a time, and what came of them; for `benchmarks.soak`."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random

from benchmarks.soak_faults import FAULTS, Fault
from benchmarks.soak_runs import Outcome, Rig
from benchmarks.soak_sessions import Lost, NotTried

OVER = "no time left"
# A run may end before the fault reaches it; then it is tried again, up to so many times what was asked for.
MOST_TRIALS = 3


@dataclass(frozen=True)
class Tried:
    """What one trial came to: an outcome, what was lost, or why it was not made."""

    seconds: float
    outcome: Outcome | None = None
    lost: str = ""
    not_tried: str = ""


# Begins a trial of a fault, by its number.
Trier = Callable[[Fault, int], "Future[Tried]"]


@dataclass
class Tally:
    """What came of the trials of one fault.

    Attributes:
        lost: what was, a line a trial.
        not_tried: why it was not tried, or not as often as asked for.
        begun: trials, those under way, too.
    """

    fault: Fault
    wanted: int
    outcomes: list[Outcome] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    not_tried: str = ""
    seconds: float = 0.0
    begun: int = 0

    @property
    def tried(self) -> int:
        """Faults that there were."""
        return sum(outcome.disturbed for outcome in self.outcomes) + len(self.lost)

    @property
    def trials(self) -> int:
        """Trainings, also those that had ended before."""
        return len(self.outcomes) + len(self.lost)

    @property
    def left(self) -> int:
        """Faults that are still to come."""
        given_up = self.not_tried or self.trials >= MOST_TRIALS * self.wanted
        return 0 if given_up else max(0, self.wanted - self.tried)

    @property
    def open(self) -> bool:
        """Whether another trial of it is to be begun."""
        return self.left > self.begun - self.trials and self.begun < MOST_TRIALS * self.wanted

    def take(self, tried: Tried) -> None:
        """Counts a trial that is over."""
        self.outcomes += [tried.outcome] if tried.outcome else []
        self.lost += [tried.lost] if tried.lost else []
        self.not_tried = self.not_tried or tried.not_tried
        self.seconds += tried.seconds

    @property
    def ends(self) -> str:
        """Exit codes, and how often each."""
        counts = Counter[str]()
        for outcome in self.outcomes:
            counts[outcome.end] += outcome.disturbed
        return ", ".join(f"{end} x{count}" for end, count in counts.most_common() if count)

    @property
    def says(self) -> str:
        """What most of them told, with numbers left out where they differ; empty: nothing."""
        told = Counter(line for outcome in self.outcomes if outcome.disturbed and (line := pattern(outcome.says)))
        return told.most_common(1)[0][0] if told else ""

    @property
    def again(self) -> list[int]:
        """Steps that were taken twice, by trial."""
        return [outcome.again for outcome in self.outcomes if outcome.disturbed]


def pattern(text: str) -> str:
    """A line without what is of this run alone: paths, processes of this machine, and the program's name."""
    line = " ".join(text.split()).removeprefix("fastgen: ")
    line = re.sub(r"process \d+ on [^\s:]+", "process PID on HOST", line)
    return re.sub(r"(?<![\w.])/[^\s:,)]+", "PATH", line)[:100]


def soak(
    faults: Sequence[Fault], trier: Trier, at_once: int, share: float, until: float, say: Callable[[str], None]
) -> list[Tally]:
    """Tries faults, those of one process first.

    Args:
        faults: that are tried.
        trier: makes a trial of a fault, by its number.
        at_once: processes that are disturbed at the same time; of one training at least.
        share: of how often in full; each once at least.
        until: on the clock of `time.monotonic`; after it nothing is begun.
        say: takes lines: progress, and what was lost, at once.
    """
    tallies = [Tally(fault, max(1, round(share * fault.count))) for fault in faults]
    began = time.monotonic()
    for processes in sorted({fault.processes for fault in faults}):
        group = [tally for tally in tallies if tally.fault.processes == processes]
        for tally, tried in _try_all(group, trier, max(1, at_once // processes), until):
            if tried.lost:
                say(f"LOST  {tally.fault.name}, {tally.fault.processes} processes: {tried.lost}")
            say(_progress(tallies, tally, time.monotonic() - began))
    return tallies


def _try_all(tallies: Sequence[Tally], trier: Trier, places: int, until: float) -> Iterator[tuple[Tally, Tried]]:
    """Makes all trials, so many at the same time; gives each that is over, counted."""
    flying: dict[Future[Tried], Tally] = {}
    while True:
        for tally in tallies:
            while tally.open and len(flying) < places:
                if time.monotonic() > until:
                    tally.not_tried = OVER
                    break
                flying[trier(tally.fault, tally.begun)] = tally
                tally.begun += 1
        if not flying:
            return
        for future in wait(flying, return_when=FIRST_COMPLETED).done:
            tally, tried = flying.pop(future), future.result()
            tally.take(tried)
            yield tally, tried


def _progress(tallies: Sequence[Tally], now: Tally, seconds: float) -> str:
    done = sum(min(tally.tried, tally.wanted) for tally in tallies)
    wanted = sum(tally.wanted for tally in tallies)
    # What was guessed is corrected by how long the others took.
    worked = sum(tally.fault.seconds * min(tally.tried, tally.wanted) for tally in tallies)
    ahead = sum(tally.fault.seconds * tally.left for tally in tallies)
    left = f"{seconds * ahead / worked / 60:.1f}" if worked else "?"
    fault = f"{now.fault.name}, {now.fault.processes} processes" if now.fault.processes > 1 else now.fault.name
    return f"{done:4d} of {wanted} faults  {60 * done / seconds:5.1f} a minute  left {left} minutes  {fault}"


def attempt(rig: Rig, fault: Fault, number: int) -> Tried:
    """Makes one trial of a fault; what it leaves is kept only if something was lost."""
    start = time.monotonic()
    case = fault.make(rig, fault.processes, Random(f"{fault.name} {fault.processes} {number}"))
    lost = not_tried = ""
    outcome = None
    try:
        outcome = fault.trial(case)
    except NotTried as why:
        not_tried = str(why)
    except Lost as error:
        lost = f"{error} (see {case.folder})"
    finally:
        case.close()
    if not lost:
        shutil.rmtree(case.folder)
    return Tried(time.monotonic() - start, outcome, lost, not_tried)


def here(rig: Rig) -> Trier:
    """Makes trials in this process, one after the other."""

    def trier(fault: Fault, number: int) -> Future[Tried]:
        future = Future[Tried]()
        future.set_result(attempt(rig, fault, number))
        return future

    return trier


@contextmanager
def in_workers(folder: Path, count: int) -> Iterator[Trier]:
    """Makes trials of FAULTS in so many processes, each with a rig of its own.

    Not in threads: multiprocessing tells how a child has ended to the first one that asks.
    """
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as workers:
        yield lambda fault, number: workers.submit(_attempt_in_worker, folder, FAULTS.index(fault), number)


def _attempt_in_worker(folder: Path, fault: int, number: int) -> Tried:
    return attempt(_own_rig(folder), FAULTS[fault], number)


@cache
def _own_rig(folder: Path) -> Rig:
    """Of this process."""
    own = folder / f"worker{os.getpid()}"
    own.mkdir()
    return Rig(own)
