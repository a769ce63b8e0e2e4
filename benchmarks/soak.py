"""What is lost when things fail? Small trainings are killed, stopped and starved, go on, and are compared.

python -m benchmarks.soak [--share=0.1 --minutes=5 --only="kill -9"]

Each is a run of `fastgen.train` on the CPU, disturbed once or several times and called again until it ends by itself.
Nothing was lost if all that it leaves is that of a run which nothing disturbed: the weights of every generation, the
losses of every epoch, the errors of the ensembles; and if it ended as it should, with one line that says why. What a
kill costs is the steps since the last save, which are taken again: they are counted. A stop costs none.

Needs no GPU and no data. About 25 minutes on two quiet cores, after which nothing more is begun. The rows are appended
to results/soak.csv; exit code 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from rich import box
from rich.table import Table

from benchmarks.common import RESULTS, append_rows, facts_line, machine_facts, positive_minutes
from benchmarks.soak_faults import FAULTS, Fault
from benchmarks.soak_runs import Outcome, Rig
from benchmarks.soak_sessions import Lost, NotTried
from fastgen.arguments import Arguments
from fastgen.errors import FastgenError, command
from fastgen.tables import print_table

# Shares of the table's width for its longer texts.
WIDTHS = {"fault": 4, "ended": 3, "says": 6, "lost": 4}
CPU = torch.device("cpu")
OVER = "no time left"
# A run may end before the fault reaches it; then it is tried again, up to so many times what was asked for.
MOST_TRIALS = 3


class SomethingLost(FastgenError):
    """At least one of the faults cost something; told line by line before."""


@dataclass
class Tally:
    """What came of the trials of one fault.

    Attributes:
        lost: what was, a line a trial.
        not_tried: why it was not tried, or not as often as asked for.
    """

    fault: Fault
    wanted: int
    outcomes: list[Outcome] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    not_tried: str = ""
    seconds: float = 0.0

    @property
    def tried(self) -> int:
        """Faults that there were."""
        return sum(outcome.disturbed for outcome in self.outcomes) + len(self.lost)

    @property
    def trials(self) -> int:
        """Trainings, also those that had ended before."""
        return len(self.outcomes) + len(self.lost)

    @property
    def open(self) -> bool:
        """Whether more of it is wanted."""
        return not self.not_tried and self.tried < self.wanted and self.trials < MOST_TRIALS * self.wanted

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
        told = Counter(
            pattern for outcome in self.outcomes if outcome.disturbed and (pattern := _pattern(outcome.says))
        )
        return told.most_common(1)[0][0] if told else ""

    @property
    def again(self) -> list[int]:
        """Steps that were taken twice, by trial."""
        return [outcome.again for outcome in self.outcomes if outcome.disturbed]


def _pattern(text: str) -> str:
    """A line without what is of this run alone: paths, processes of this machine, and the program's name."""
    line = " ".join(text.split()).removeprefix("fastgen: ")
    line = re.sub(r"process \d+ on [^\s:]+", "process PID on HOST", line)
    return re.sub(r"(?<![\w.])/[^\s:,)]+", "PATH", line)[:100]


def soak(rig: Rig, faults: Sequence[Fault], share: float, until: float, say: Callable[[str], None]) -> list[Tally]:
    """Tries faults one after the other.

    Args:
        rig: where.
        faults: that are tried.
        share: of how often in full; each once at least.
        until: on the clock of `time.monotonic`; after it nothing is begun.
        say: takes lines: progress, and what was lost, at once.
    """
    tallies = [Tally(fault, max(1, round(share * fault.count))) for fault in faults]
    began = time.monotonic()
    for tally in tallies:
        while tally.open:
            if time.monotonic() > until:
                tally.not_tried = OVER
                break
            start = time.monotonic()
            _try(rig, tally, say)
            tally.seconds += time.monotonic() - start
            say(_progress(tallies, tally, time.monotonic() - began))
    return tallies


def _try(rig: Rig, tally: Tally, say: Callable[[str], None]) -> None:
    """Makes one trial of a fault; what it leaves is kept only if something was lost."""
    fault = tally.fault
    case = fault.make(rig, fault.processes, Random(f"{fault.name} {fault.processes} {tally.trials}"))
    try:
        tally.outcomes.append(fault.trial(case))
    except NotTried as why:
        tally.not_tried = str(why)
    except Lost as lost:
        tally.lost.append(str(lost))
        say(f"LOST  {fault.name}, {fault.processes} processes: {lost} (see {case.folder})")
        return
    finally:
        case.close()
    shutil.rmtree(case.folder)


def _progress(tallies: Sequence[Tally], now: Tally, seconds: float) -> str:
    done = sum(min(tally.tried, tally.wanted) for tally in tallies)
    wanted = sum(tally.wanted for tally in tallies)
    # What was guessed is corrected by how long the others took.
    worked = sum(tally.fault.seconds * min(tally.tried, tally.wanted) for tally in tallies)
    ahead = sum(tally.fault.seconds * (tally.wanted - tally.tried) for tally in tallies if tally.open)
    left = f"{seconds * ahead / worked / 60:.1f}" if worked else "?"
    fault = f"{now.fault.name}, {now.fault.processes} processes" if now.fault.processes > 1 else now.fault.name
    return f"{done:4d} of {wanted} faults  {60 * done / seconds:5.1f} a minute  left {left} minutes  {fault}"


def table(tallies: Sequence[Tally]) -> Table:
    """A row a fault."""
    title = "what is lost when things fail; steps taken twice: median, most"
    shown = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", expand=True)
    for heading in ("fault", "ranks", "tried", "ended", "says", "twice", "lost"):
        right = heading in ("ranks", "tried", "twice")
        shown.add_column(heading, justify="right" if right else "left", overflow="fold", ratio=WIDTHS.get(heading))
    for tally in tallies:
        again = f"{_median(tally.again):g}, {max(tally.again)}" if tally.again else ""
        tried = f"{tally.tried} of {tally.wanted}" if tally.tried < tally.wanted else str(tally.tried)
        lost = f"{len(tally.lost)} x: {tally.lost[0]}" if tally.lost else "nothing" if tally.tried else ""
        if tally.not_tried:
            lost = f"{lost} not tried ({tally.not_tried})".strip()
        fault = tally.fault
        # As they are: what stands in brackets is no markup.
        texts = (fault.name, str(fault.processes), tried, tally.ends, tally.says[:70], again, lost)
        shown.add_row(*(text.replace("[", r"\[") for text in texts))
    return shown


def rows(tallies: Sequence[Tally]) -> list[dict[str, Any]]:
    """A row a fault, for soak.csv."""
    machine = machine_facts(CPU)
    return [
        {
            **machine,
            "fault": tally.fault.name,
            "processes": tally.fault.processes,
            "wanted": tally.wanted,
            "tried": tally.tried,
            "not_tried": tally.not_tried,
            "ends": tally.ends,
            "says": tally.says,
            "steps_again_median": _median(tally.again) if tally.again else None,
            "steps_again_most": max(tally.again, default=None),
            "lost": len(tally.lost),
            "what": _pattern(tally.lost[0]) if tally.lost else "",
            "seconds": round(tally.seconds, 1),
        }
        for tally in tallies
    ]


def _median(numbers: Sequence[int]) -> int:
    return sorted(numbers)[len(numbers) // 2]


def main(words: Sequence[str]) -> None:
    """The command.

    Raises:
        SomethingLost: what its name says.
    """
    arguments = _parse(words)
    folder = Path(tempfile.mkdtemp(prefix="fastgen_soak_", dir=arguments.folder))
    chosen = [fault for fault in FAULTS if fault.name in (arguments.only or fault.name)]
    print(facts_line(CPU), flush=True)
    until = time.monotonic() + 60 * arguments.minutes
    tallies = soak(Rig(folder), chosen, arguments.share, until, lambda text: print(text, flush=True))
    print_table(table(tallies))
    append_rows(arguments.results / "soak.csv", rows(tallies))
    lost = sum(len(tally.lost) for tally in tallies)
    if lost:
        raise SomethingLost(f"something was lost in {lost} trials; what they left is in {folder}")
    shutil.rmtree(folder)


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no share above 0, up to 1")
    return value


def _parse(words: Sequence[str]) -> Any:
    parser = Arguments("benchmarks.soak", "Disturbs small trainings in every way, and tells what was lost.")
    names = list(dict.fromkeys(fault.name for fault in FAULTS))
    parser.add_argument("--only", action="append", choices=names, help="may be given several times")
    parser.add_argument("--share", type=_share, default=1.0, help="of the trials; each fault is tried once at least")
    parser.add_argument("--minutes", type=positive_minutes, default=25.0, help="after which none is begun any more")
    parser.add_argument("--folder", type=Path, help="to train in; default: the system's for temporary files")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of soak.csv")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(command(main, sys.argv[1:]))
