"""Puts an export into its folder: all of its files, or none; and never over others unless that is asked for.

Files are written, and checked, in a folder of their own beside their place, and renamed at the end, the card last. So
where there is a card, its files are whole and those that it speaks of.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from fastgen.errors import Stopped, UserError, written_to
from fastgen.files import write_atomically
from fastgen.stop import heeded


class _Signal(BaseException):
    """Ends the work at once; not an Exception, which libraries catch and go on from."""


class Ending:
    """What a signal asks for: the end of the work, wherever it is.

    Libraries catch even what is no Exception, or make one of it, so the request is noted, too, and holds until it is
    met.
    """

    def __init__(self) -> None:
        self._number: int | None = None
        self._deaf = False

    def hear(self, number: int, frame: FrameType | None) -> None:
        """Handler of the signals. Each of them ends the work anew, as the one before may have been swallowed."""
        if self._deaf:
            return
        if self._number is None:
            self._number = number
        raise _Signal

    def ignore(self) -> None:
        """From here on signals are not heard: tidying up, and putting in place, shall not be broken off."""
        self._deaf = True

    def check(self) -> None:
        """Raises Stopped if a signal came."""
        if self._number is not None:
            raise Stopped(self._number)


@dataclass(frozen=True)
class Stage:
    """Where files are until all of them are checked.

    Attributes:
        path: a folder.
        ending: tells whether a signal came.
    """

    path: Path
    ending: Ending


def require_free(folder: Path, stem: str, cards: Sequence[str], force: bool) -> None:
    """Checks that an export can be put there: it replaces all files of its stem, those of the other format, too.

    Args:
        folder: where it goes.
        stem: of its files' names.
        cards: their names.
        force: whether files that are there may be replaced.

    Raises:
        UserError: there is no folder to make it in; or a file of these names is there, and may not be replaced.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--to={folder}: is a file: name a folder")
    if not folder.parent.is_dir():
        raise UserError(f"--to={folder}: {folder.parent} is not there: make it first, or name another")
    there = [path for path in [*(folder / name for name in cards), *_networks(folder, stem)] if os.path.lexists(path)]
    if there and not force:
        raise UserError(f"{there[0]}: is there already: give --force to replace all of {stem}, or --to=FOLDER")


@contextmanager
def staged(folder: Path, stem: str) -> Iterator[Stage]:
    """An empty folder in the target folder, on the same file system; gone at the end, however that comes.

    What a killed process of this host has left of the same export is removed, too.

    Args:
        folder: the target, made if it is not there; unmade where nothing came of it.
        stem: of the export's files.

    Raises:
        MachineError: the disk is full.
        UserError: nothing may be written there.
        Stopped: a signal came.
    """
    with _ending_at_once() as ending, written_to(folder), _made(folder, ending):
        _remove_left_over(folder, stem)
        path = folder / f".{stem}.{socket.gethostname()}-{os.getpid()}.partial"
        path.mkdir()
        try:
            yield Stage(path, ending)
        finally:
            ending.ignore()
            shutil.rmtree(path)


def put_in_place(stage: Stage, folder: Path, stem: str, names: Sequence[str], card: str) -> None:
    """Renames checked files to their places.

    Args:
        stage: where they are.
        folder: where they go; what an older export of the same stem had there and this one has not, is removed: see
            `require_free`.
        stem: of their names.
        names: of all files but the card.
        card: its name; it is the last to come.

    Raises:
        Stopped: a signal came before; one that comes now is not heard.
    """
    stage.ending.ignore()
    stage.ending.check()
    # An old card does not speak of new files.
    (folder / card).unlink(missing_ok=True)
    for path in _networks(folder, stem):
        if path.name not in names:
            path.unlink(missing_ok=True)
    for name in [*names, card]:
        os.replace(stage.path / name, folder / name)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _networks(folder: Path, stem: str) -> list[Path]:
    """Where an export of this stem has its networks, in any format."""
    return [folder / f"{stem}.onnx", folder / f"{stem}.safetensors", *folder.glob(f"{stem}.generation_*.safetensors")]


def write(stage: Stage, name: str, content: bytes) -> Path:
    """Writes a file, through to the disk.

    Raises:
        Stopped: a signal came.
    """
    stage.ending.check()
    write_atomically(stage.path / name, content)
    return stage.path / name


@contextmanager
def _made(folder: Path, ending: Ending) -> Iterator[None]:
    """A folder that is there; where it was not and nothing is put in it, it is gone at the end."""
    made = not folder.exists()
    folder.mkdir(exist_ok=True)
    try:
        yield
    finally:
        ending.ignore()
        if made:
            # Not where something is in it: this export, or another one's.
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def _ending_at_once() -> Iterator[Ending]:
    """A signal ends the work where it is, and not the process before it has tidied up."""
    ending = Ending()
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may set handlers.
        yield ending
        return
    before = {number: signal.signal(number, ending.hear) for number in heeded()}
    try:
        yield ending
    except BaseException:
        # Whatever a library made of the signal.
        ending.check()
        raise
    finally:
        ending.ignore()
        for number, handler in before.items():
            signal.signal(number, handler)


def _remove_left_over(folder: Path, stem: str) -> None:
    own = re.compile(re.escape(f".{stem}.{socket.gethostname()}-") + r"([0-9]+)\.partial")
    for path in folder.iterdir():
        found = own.fullmatch(path.name)
        if found and not _lives(int(found[1])):
            shutil.rmtree(path)


def _lives(process: int) -> bool:
    if process == os.getpid():
        # Numbers come again: this process has not begun yet.
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
