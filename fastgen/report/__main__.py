"""The command: what runs have shown, as one page, and as tables and figures beside it.

    python -m fastgen.report RUN... [--to FOLDER] [--title TEXT] [--samples N] [--data.root=DIR]

RUN: run folders, several seeds of a recipe and several recipes, or folders that hold them (a sweep's, or `runs`). It
writes report.html, which opens from the file; report.md, tables.tex, results.csv, history.csv and figures/*.png.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from fastgen.arguments import Arguments
from fastgen.errors import UserError, command
from fastgen.progress import Display, PatientConsole
from fastgen.report.contents import Wanted, report_of
from fastgen.report.document import plain
from fastgen.report.files import files_of, write_report
from fastgen.report.groups import groups_of
from fastgen.report.runs import read_runs

SAMPLES = 8
MOST_SAMPLES = 200


def main(words: Sequence[str]) -> None:
    """The command.

    Raises:
        UserError: a folder holds no run, runs cannot be compared, or a file of theirs is damaged.
        OSError: the report cannot be written.
    """
    options = _parser().parse_args(list(words))
    places = [Path(place) for place in options.runs]
    found = read_runs(places)
    folder = Path(options.to) if options.to is not None else _default_folder(places)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--to {folder}: is a file: name a folder")
    document = report_of(found, Wanted(options.title, options.samples, options.root))
    with _progress(PatientConsole(), files_of(document)) as done:
        written = write_report(folder, document, groups_of(found.runs), done)
    print(plain(document.headline))
    print(f"{written[0]}  ({len(written) - 1} files beside it)")


def _default_folder(places: Sequence[Path]) -> Path:
    """Of one run, or one sweep, inside it; of several in the current folder."""
    return places[0] / "report" if len(places) == 1 else Path("report")


@contextmanager
def _progress(console: Console, files: int) -> Iterator[Callable[[], None]]:
    """Yields what is told of each file."""
    count = 0
    with Display(console).passes("writing the report", files, 1, unit="files") as passed:
        passed(count)

        def done() -> None:
            nonlocal count
            count += 1
            passed(count)

        yield done


def _samples(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) > MOST_SAMPLES:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number from 0 to {MOST_SAMPLES}")
    return int(text)


def _parser() -> Arguments:
    parser = Arguments("fastgen.report", "Writes what runs have shown as a page, with tables and figures beside it.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or folders that hold them")
    parser.add_argument("--to", metavar="FOLDER", help="where to; default RUN/report, of several runs ./report")
    parser.add_argument("--title", metavar="TEXT", help="of the page; default the networks and the data set")
    parser.add_argument(
        "--samples", type=_samples, default=SAMPLES, metavar="N", help=f"images that are shown; default {SAMPLES}"
    )
    parser.add_argument(
        "--data.root", dest="root", metavar="DIR", help="folder of the data, for the samples; default the recipe's"
    )
    return parser


if __name__ == "__main__":
    sys.exit(command(main, sys.argv[1:]))
