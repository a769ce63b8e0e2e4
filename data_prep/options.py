"""The command line that all commands of data_prep share, and how their errors are told."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from data_prep.sources import TEST, TRAIN, Request
from data_prep.work import default_workers
from fastgen import __version__
from fastgen.arguments import Arguments, at_least_one
from fastgen.errors import MACHINE_FAULTS, MachineError, UserError, as_one_line, command

SHOWN = 50
SPLITS = {"train": TRAIN, "test": TEST, "val": TEST}
PACKAGES = ("numpy", "pillow", "simplejpeg")


def add_source(parser: Arguments) -> None:
    """Arguments that say which pictures, and how they are judged."""
    parser.add_argument("--source", type=Path, metavar="DIR", help="folder with the pictures")
    parser.add_argument(
        "--kind",
        help="folder, ilsvrc2012-val, cifar10, cifar100 or torchvision:NAME; found from the content if left out",
    )
    parser.add_argument(
        "--split", choices=SPLITS, default=TRAIN, help="of CIFAR, torchvision's sets and tar files; default train"
    )
    parser.add_argument(
        "--val-labels", type=Path, metavar="FILE", help="classes of ilsvrc2012-val: a text file, or the devkit's folder"
    )
    parser.add_argument(
        "--classes-from",
        type=Path,
        metavar="FILE",
        help="manifest or .beton of the training set, whose classes these must be",
    )
    parser.add_argument(
        "--unpack-to",
        type=Path,
        metavar="DIR",
        help="where to unpack ILSVRC2012's tar files to, if those are in --source",
    )
    parser.add_argument("--limit", type=at_least_one, metavar="N", help="the first N pictures, all classes alike")
    parser.add_argument("--download", action="store_true", help="let torchvision fetch the data set")
    parser.add_argument(
        "--on-error",
        choices=("error", "skip"),
        default="error",
        help="what a file does that cannot be read: ends the command (default), or is left out and listed",
    )
    parser.add_argument(
        "--damaged",
        choices=("keep", "refuse"),
        default="keep",
        help="files that are read with damage; default keep, and list",
    )
    parser.add_argument(
        "--exif",
        choices=("ignore", "apply"),
        default="ignore",
        help="turn pictures as their EXIF orientation says; ILSVRC2012 is used without (default)",
    )
    add_workers(parser)


def add_workers(parser: Arguments) -> None:
    """How many processes."""
    parser.add_argument(
        "--workers",
        type=at_least_one,
        default=default_workers(),
        metavar="N",
        help="processes; default one for each core",
    )


def request_of(arguments: argparse.Namespace) -> Request:
    """What `add_source`'s arguments ask for; unpacks tar files first where that was asked for.

    Raises:
        UserError: an argument is missing.
    """
    if arguments.source is None:
        raise UserError("--source is missing: name the folder with the pictures (--help lists all arguments)")
    request = Request(
        source=arguments.source,
        kind=arguments.kind,
        split=SPLITS[arguments.split],
        val_labels=arguments.val_labels,
        classes_from=arguments.classes_from,
        limit=arguments.limit,
        download=arguments.download,
    )
    if arguments.unpack_to is None:
        return request
    from data_prep.tars import unpack

    return unpack(request, arguments.unpack_to)


def run(main: Callable[[Sequence[str]], None], words: Sequence[str]) -> int:
    """`fastgen.errors.command`, with data preparation's words for a full disk or a place that may not be used."""

    def told(words: Sequence[str]) -> None:
        try:
            main(words)
        except BrokenPipeError:
            raise
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            reason = error.strerror or str(error)
            if error.errno in MACHINE_FAULTS:
                raise MachineError(
                    f"{place}{reason}: free some space, or name another place with --out; then run it again"
                ) from None
            if isinstance(as_one_line(error), UserError):
                raise UserError(f"{place}{reason}: name a place that you may use") from None
            raise MachineError(f"{place}{reason}") from None

    return command(told, words)


def versions() -> dict[str, str]:
    """Versions of what makes the pixels."""
    return {"fastgen": __version__, **{name: _version(name) for name in PACKAGES}}


def say(*lines: str) -> None:
    """Prints lines; file names need not be UTF-8."""
    for line in lines:
        print(line.encode(errors="backslashreplace").decode())


def shown(lines: Sequence[str]) -> list[str]:
    """The first lines of a list, and how many more there are."""
    more = len(lines) - SHOWN
    return [*lines[:SHOWN], *([f"... and {more:,} more"] if more > 0 else [])]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
