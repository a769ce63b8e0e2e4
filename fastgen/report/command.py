"""The command: what runs have shown, as one page, and as tables and figures beside it.

    python -m fastgen.report RUN... [--to FOLDER] [--title TEXT] [--baseline RUN] [--samples N] [--data.root=DIR]

RUN: run folders, several seeds of a recipe and several recipes, or folders that hold them (a sweep's, or `runs`). It
writes report.html, which opens from the file; report.md, tables.tex, results.csv, history.csv and figures/*.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fastgen.arguments import Arguments
from fastgen.progress import Display, PatientConsole, counted
from fastgen.report.contents import Wanted, report_of
from fastgen.report.document import plain
from fastgen.report.files import count_of, files_of
from fastgen.report.groups import groups_of
from fastgen.report.place import put, require_own
from fastgen.report.runs import read_runs

SAMPLES = 8
MOST_SAMPLES = 200


def main(words: Sequence[str]) -> None:
    """The command.

    Raises:
        UserError: a folder holds no run, runs cannot be compared, a file of theirs is damaged, or the report may not be
            written there.
        MachineError: the disk is full.
    """
    options = _parser().parse_args(list(words))
    folder = options.to if options.to is not None else _default_folder(options.runs)
    found = read_runs(options.runs)
    require_own(folder)
    document = report_of(found, Wanted(options.title, options.samples, options.root, options.baseline))
    with Display(PatientConsole()).passes("writing the report", count_of(document), 1, unit="files") as passed:
        files = files_of(document, groups_of(found.runs), counted(passed))
    written = put(folder, files)
    print(plain(document.headline))
    print(f"{_shown(written[0])}  ({len(written) - 1} files beside it)")


def _default_folder(places: Sequence[Path]) -> Path:
    """Of one run, or one sweep, inside it; of several in the current folder."""
    return places[0] / "report" if len(places) == 1 else Path("report")


def _shown(path: Path) -> str:
    """Names on a disk need not be UTF-8; what is printed does."""
    return str(path).encode(errors="replace").decode()


def _folder(text: str) -> Path:
    """As of a variable that is not set, an empty name would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("is empty: name a folder")
    return Path(text)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _samples(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) > MOST_SAMPLES:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number from 0 to {MOST_SAMPLES}")
    return int(text)


def _parser() -> Arguments:
    parser = Arguments("fastgen.report", "Writes what runs have shown as a page, with tables and figures beside it.")
    parser.add_argument("runs", nargs="+", type=_folder, metavar="RUN", help="run folders, or folders that hold them")
    parser.add_argument(
        "--to", type=_folder, metavar="FOLDER", help="where to; default RUN/report, of several runs ./report"
    )
    parser.add_argument(
        "--title", type=_one_line, metavar="TEXT", help="of the page; default the networks and the data set"
    )
    parser.add_argument(
        "--baseline", type=_folder, metavar="RUN", help="one of them: its recipe is what others are compared with; "
        "default plain runs, else born-again ones, else each recipe's own patriarch",
    )  # fmt: skip
    parser.add_argument(
        "--samples", type=_samples, default=SAMPLES, metavar="N", help=f"images that are shown; default {SAMPLES}"
    )
    parser.add_argument(
        "--data.root", dest="root", metavar="DIR", help="folder of the data, for the samples; default the recipe's"
    )
    return parser
