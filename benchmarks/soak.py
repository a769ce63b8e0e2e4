"""What is lost when things fail? Small trainings are killed, stopped and starved, go on, and are compared.

python -m benchmarks.soak [--share=0.1 --minutes=5 --only="kill -9"]

Each is a run of `fastgen.train` on the CPU, disturbed once or several times and called again until it ends by itself.
Nothing was lost if all that it leaves is that of a run which nothing disturbed: the weights of every generation, the
losses of every epoch, the errors of the ensembles; and if it ended as it should, with one line that says why. What a
kill costs is the steps since the last save, which are taken again: they are counted. A stop costs none.

As many are disturbed at the same time as there are cores for their processes (--at_once). Needs no GPU and no data.
About 25 minutes on two quiet cores; after 28 nothing more is begun. The rows are appended to results/soak.csv; exit
code 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from benchmarks.common import RESULTS, append_rows, facts_line, machine_facts, positive_minutes
from benchmarks.soak_faults import FAULTS
from benchmarks.soak_runs import Rig
from benchmarks.soak_trials import Tally, here, in_workers, pattern, soak
from fastgen.arguments import Arguments, at_least_one
from fastgen.data.batch import usable_cores
from fastgen.errors import FastgenError, command
from fastgen.tables import print_table

# Shares of the table's width for its longer texts.
WIDTHS = {"fault": 4, "ended": 3, "says": 6, "lost": 4}
CPU = torch.device("cpu")


class SomethingLost(FastgenError):
    """At least one of the faults cost something; told line by line before."""


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
            "what": pattern(tally.lost[0]) if tally.lost else "",
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
    with in_workers(folder, arguments.at_once) if arguments.at_once > 1 else nullcontext(here(Rig(folder))) as trier:
        tallies = soak(chosen, trier, arguments.at_once, arguments.share, until, lambda text: print(text, flush=True))
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
    parser.add_argument("--minutes", type=positive_minutes, default=28.0, help="after which none is begun any more")
    parser.add_argument("--at_once", type=at_least_one, default=usable_cores(), help="processes; default one a core")
    parser.add_argument("--folder", type=Path, help="to train in; default: the system's for temporary files")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of soak.csv")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(command(main, sys.argv[1:]))
