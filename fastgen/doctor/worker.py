"""The process that trials run in: tells by a pipe what came of each, in their order."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fastgen.doctor.advice import install, package_of
from fastgen.doctor.findings import Answer, Mark, Place, Trial
from fastgen.errors import FastgenError
from fastgen.extras import PACKAGES
from fastgen.trainings import end_with

LONGEST_REASON = 300


def worker_command(parent: int, pipe: int, place: Place, names: Sequence[str]) -> list[str]:
    """Command line of a process that runs trials, and that dies with its parent.

    Args:
        parent: process number of this one.
        pipe: file number that the process tells its answers to.
        place: what the trials are told.
        names: of the trials, in order.
    """
    words = [str(parent), str(pipe), str(place.scratch), str(place.runs), *names]
    return [sys.executable, "-c", "from fastgen.doctor.worker import main; main()", *words]


def main() -> None:
    """What such a process runs."""
    parent, pipe, scratch, runs, *names = sys.argv[1:]
    # Nothing that libraries start may keep the pipe open.
    os.set_inheritable(int(pipe), False)
    end_with(int(parent), signal.SIGKILL)
    from fastgen.doctor.trials import TRIALS

    chosen = {trial.name: trial for trial in TRIALS}
    place = Place(Path(scratch), Path(runs))
    with open(int(pipe), "w") as answers:
        for name in names:
            answers.write(json.dumps(asdict(answer_of(chosen[name], place))) + "\n")
            answers.flush()
    # What happens as a library leaves is no longer asked for, and threads of some never end.
    os._exit(0)


def answer_of(trial: Trial, place: Place) -> Answer:
    """What a trial answers; an exception of whatever kind is an answer, too."""
    try:
        return trial.probe(place)
    except ModuleNotFoundError as error:
        return _not_found(trial, error)
    except FastgenError as error:
        return Answer(Mark.BROKEN, _line(str(error)))
    except (Exception, SystemExit) as error:  # noqa: BLE001 (packages raise what they like as they are imported)
        return Answer(Mark.BROKEN, f"raises {type(error).__name__}: {reason_of(error)}")


def _not_found(trial: Trial, error: ModuleNotFoundError) -> Answer:
    """A package that is not installed, or one that lacks another."""
    module = error.name or ""
    own = PACKAGES[trial.package].module if trial.package else ""
    if own and (own == module or own.startswith(f"{module}.")):
        return Answer(Mark.MISSING, "not installed", install(trial.package))
    package = package_of(module)
    if package is not None:
        return Answer(Mark.BROKEN, f"needs {package}, which is not installed", install(package))
    # What it needs and fastgen does not know comes with it, also where the package itself is there.
    mend = install(trial.package) if trial.package else ""
    return Answer(Mark.BROKEN, f"raises {type(error).__name__}: {reason_of(error)}", mend)


def reason_of(error: BaseException) -> str:
    """The first line that says something, cut where it is long."""
    return _line(next((line for line in str(error).splitlines() if line.strip()), "no reason given"))


def _line(text: str) -> str:
    whole = " ".join(text.split())
    return whole if len(whole) <= LONGEST_REASON else f"{whole[:LONGEST_REASON]} ..."
