"""Puts a report into its folder: all of its files, or none; over an earlier report, and over nothing else."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from fastgen.errors import UserError, written_to
from fastgen.files import write_atomically

FIGURES = "figures"
PAGE = "report.html"
# In every page: by it a folder is known as a report's.
MAKER = "Made by fastgen.report"
BESIDE = ("report.md", "tables.tex", "results.csv", "history.csv")
# Pictures of any report.
_OWN_PICTURE = re.compile(r"(errors|confidence|scores|reliability|(training|second-best)-[0-9]+)\.png")


def require_own(folder: Path) -> None:
    """Checks that a report replaces nothing but an earlier one.

    Raises:
        UserError: the folder is a file; or it has files of a report's names, and no page of a report.
    """
    with written_to(folder):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--to {folder}: is a file: name a folder")
        if _is_report(folder):
            return
        named = [folder / name for name in (PAGE, *BESIDE) if (folder / name).exists()]
        there = [*named, *_own_pictures(folder)]
    if there:
        raise UserError(f"{there[0]}: is there already, and of no report: name another folder with --to")


def put(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Writes a report's files, and removes pictures that an earlier report had and this one has not.

    They are written beside their place and renamed at the end. Where that does not come about, whatever the reason,
    what was made is removed.

    Args:
        files: content by name, `figures/errors.png`; the page first.

    Returns:
        their paths.

    Raises:
        MachineError: the disk is full.
        UserError: nothing may be written there, or files would be replaced that are of no report.
    """
    require_own(folder)
    made = [path for path in (*reversed(folder.parents), folder, folder / FIGURES) if not path.exists()]
    fresh = [folder / name for name in files if not (folder / name).exists()]
    stage = folder / f".report-{os.getpid()}.partial"
    with written_to(folder):
        try:
            _move_in(stage, folder, files)
        except BaseException:
            _undo(fresh, made)
            raise
        written = [folder / name for name in files]
        for path in _own_pictures(folder):
            if path not in written:
                path.unlink()
    return written


def _is_report(folder: Path) -> bool:
    page = folder / PAGE
    return page.is_file() and MAKER.encode() in page.read_bytes()


def _own_pictures(folder: Path) -> list[Path]:
    return [path for path in sorted((folder / FIGURES).glob("*.png")) if _OWN_PICTURE.fullmatch(path.name)]


def _move_in(stage: Path, folder: Path, files: Mapping[str, bytes]) -> None:
    try:
        (stage / FIGURES).mkdir(parents=True)
        for name, content in files.items():
            write_atomically(stage / name, content)
        (folder / FIGURES).mkdir(exist_ok=True)
        for name in files:
            os.replace(stage / name, folder / name)
    finally:
        # It may not have come to be; what went wrong then is told already.
        shutil.rmtree(stage, ignore_errors=True)


def _undo(fresh: list[Path], made: list[Path]) -> None:
    """Removes what was not there before: files, then the folders, the innermost first."""
    for path in fresh:
        if path.is_file():
            path.unlink()
    for path in reversed(made):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
