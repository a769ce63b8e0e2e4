"""The command: what runs on this machine, what each missing thing disables, and the line that installs it.

    python -m fastgen.doctor [--json] [--require=gpu,ffcv] [--runs=FOLDER] [--limit_seconds=S]

Exit code 0: training is possible. 1: it is not, or something that --require names is not ok. 2: a wrong argument.
Everything is tried in processes of their own, so a package that raises, crashes or hangs is one line.
"""

from __future__ import annotations

import argparse
import difflib
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fastgen import __version__
from fastgen.arguments import Arguments, at_least_one
from fastgen.doctor.findings import Finding, Mark
from fastgen.doctor.report import as_json, lines_of, width_and_colours
from fastgen.doctor.runner import run_trials
from fastgen.doctor.trials import TRIALS
from fastgen.errors import FastgenError, command

LIMIT_SECONDS = 120
PLAIN_SECONDS = 15.0
ESSENTIAL = ("python", "torch", "training")


class NotReady(FastgenError):
    """Nothing can be trained here, or something that is asked for is not ok; told in full before."""


def main(words: Sequence[str]) -> None:
    """The command.

    Raises:
        UserError: a wrong argument.
        NotReady: training is not possible, or something that is required is not ok.
    """
    options = _parser().parse_args(words)
    _end_by_signals()
    findings = run_trials(TRIALS, options.runs, options.limit_seconds, Progress().told)
    failures = failures_of(findings, options.require)
    if options.json:
        print(json.dumps(as_json(findings, failures), indent=1, allow_nan=False))
    else:
        _print(findings)
    if failures:
        raise NotReady("; ".join(failures))


def failures_of(findings: Sequence[Finding], required: Sequence[str]) -> list[str]:
    """Why the machine is not what is asked for, one text a finding.

    Args:
        findings: of all trials.
        required: names of those that must be ok, besides the essential ones.
    """
    essential = [finding for finding in findings if finding.name in ESSENTIAL and not finding.ok]
    # Torch that is missing breaks training; the first of them says enough.
    failures = [f"nothing can be trained: {_told(finding)}" for finding in essential[:1]]
    told = {finding.name for finding in essential[:1]}
    lacking = [finding for finding in findings if finding.name in required and not finding.ok]
    return failures + [f"--require: {_told(finding)}" for finding in lacking if finding.name not in told]


def _told(finding: Finding) -> str:
    return f"{finding.name} is {finding.answer.mark} ({finding.answer.seen})"


def _print(findings: Sequence[Finding]) -> None:
    width, colours = width_and_colours()
    print(f"fastgen {__version__}: what runs here, and [what it is for]")
    for line in lines_of(findings, width, colours=colours):
        print(line)
    counts = {mark: sum(finding.answer.mark is mark for finding in findings) for mark in Mark}
    trained = next(finding for finding in findings if finding.name == "training")
    print()
    print(", ".join(f"{count} {mark}" for mark, count in counts.items() if count))
    if trained.ok:
        print(f"Training is possible: {trained.answer.seen}.")


class Progress:
    """Tells on standard error how far it is: in a terminal one live line, elsewhere one now and then."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._started = self._printed = time.monotonic()

    def told(self, findings: Sequence[Finding], running: Sequence[str]) -> None:
        """See `runner.run_trials`."""
        now = time.monotonic()
        if len(findings) == len(TRIALS):
            print("\r\033[K" if self._live else "", end="", file=sys.stderr, flush=True)
        elif self._live or now - self._printed >= PLAIN_SECONDS:
            self._printed = now
            text = progress_line([finding.name for finding in findings], running, now - self._started)
            end = "" if self._live else "\n"
            print(f"\r\033[K{text}" if self._live else text, end=end, file=sys.stderr, flush=True)


def progress_line(found: Sequence[str], running: Sequence[str], seconds: float) -> str:
    """How far it is, by processes: trials that share one are over at once, or wait for one that is long.

    Args:
        found: names of the trials that are over.
        running: names of those that are under way.
        seconds: since the start.
    """
    sessions = {trial.session for trial in TRIALS}
    done = len(sessions - {trial.session for trial in TRIALS if trial.name not in found})
    rate = len(found) / max(seconds, 1e-9)
    left = f", about {seconds / done * (len(sessions) - done):.0f} s left" if done else ""
    return f"tried {len(found)} of {len(TRIALS)}, {rate:.1f} a second{left}; now {', '.join(running)}"


def _end_by_signals() -> None:
    """SIGTERM, and SIGHUP where `nohup` has not had it ignored, end the command as an exit does."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _ended)


def _ended(number: int, frame: object) -> NoReturn:
    """What was started is ended, too, and another signal does not break that off."""
    for other in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(other, signal.SIG_IGN)
    sys.exit(128 + number)


def _names(text: str) -> list[str]:
    """Type of --require."""
    known = [trial.name for trial in TRIALS]
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(known)}"
            raise argparse.ArgumentTypeError(f"'{name}' is nothing that is tried: {hint}")
    if not names:
        raise argparse.ArgumentTypeError("names nothing: leave it out, or name what must be ok, such as gpu,ffcv")
    return names


def _folder(text: str) -> Path:
    """Type of --runs."""
    path = Path(text)
    if any(part.exists() and not part.is_dir() for part in (path, *path.parents)):
        raise argparse.ArgumentTypeError(f"'{text}' is no folder, nor can it become one: name one")
    return path


def _parser() -> Arguments:
    parser = Arguments("fastgen.doctor", "Tells what runs on this machine, and the line that installs what does not.")
    parser.add_argument("--json", action="store_true", help="for machines: JSON on standard output")
    parser.add_argument(
        "--require", type=_names, default=[], metavar="NAMES",
        help=f"exit code 1 where one of these is not ok, separated by commas: {', '.join(t.name for t in TRIALS)}",
    )  # fmt: skip
    parser.add_argument(
        "--runs", type=_folder, default=Path("runs"), metavar="FOLDER", help="of the runs; default runs"
    )
    parser.add_argument(
        "--limit_seconds", type=at_least_one, default=LIMIT_SECONDS, metavar="S",
        help=f"that each trial may take; default {LIMIT_SECONDS}",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(command(main, sys.argv[1:]))
