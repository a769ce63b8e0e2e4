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
from pathlib import Path
from types import FrameType

from fastgen.errors import FastgenError, MachineError, Stopped, UserError, as_one_line
from fastgen.files import write_atomically
from fastgen.stop import heeded


class _Signal(BaseException):
    """Ends the work at once; not an Exception, which libraries catch and go on from."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def require_free(folder: Path, names: Sequence[str], force: bool) -> None:
    """Checks that files can be put there.

    Raises:
        UserError: there is no folder to make it in; or a file of these names is there, and may not be replaced.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--to={folder}: is a file: name a folder")
    if not folder.parent.is_dir():
        raise UserError(f"--to={folder}: {folder.parent} is not there: make it first, or name another")
    there = [name for name in names if (folder / name).exists()]
    if there and not force:
        raise UserError(f"{folder / there[0]}: is there already: give --force to replace it, or --to=FOLDER")


@contextmanager
def staged(folder: Path, stem: str) -> Iterator[Path]:
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
    made = not folder.exists()
    try:
        with _ending_at_once(), _told_of(folder):
            folder.mkdir(exist_ok=True)
            _remove_left_over(folder, stem)
            stage = folder / f".{stem}.{socket.gethostname()}-{os.getpid()}.partial"
            stage.mkdir()
            try:
                yield stage
            finally:
                shutil.rmtree(stage)
    finally:
        if made:
            # Not where something is in it: this export, or another one's.
            with suppress(OSError):
                folder.rmdir()


def put_in_place(stage: Path, folder: Path, stem: str, names: Sequence[str], card: str) -> None:
    """Renames checked files to their places.

    Args:
        stage: where they are.
        folder: where they go; what an older export of the same stem had there and this one has not, is removed.
        stem: of their names.
        names: of all files but the card.
        card: its name; it is the last to come.
    """
    # An old card does not speak of new files.
    (folder / card).unlink(missing_ok=True)
    older = [folder / f"{stem}.onnx", folder / f"{stem}.safetensors", *folder.glob(f"{stem}.generation_*.safetensors")]
    for path in older:
        if path.name not in names:
            path.unlink(missing_ok=True)
    for name in [*names, card]:
        os.replace(stage / name, folder / name)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(stage: Path, name: str, content: bytes) -> Path:
    """Writes a file, through to the disk."""
    write_atomically(stage / name, content)
    return stage / name


@contextmanager
def _told_of(folder: Path) -> Iterator[None]:
    """The system's errors as one line that names what can be changed here."""
    try:
        yield
    except OSError as error:
        kind = type(as_one_line(error))
        raise _cannot_write(kind, folder, error) from error


def _cannot_write(kind: type[FastgenError], folder: Path, error: OSError) -> FastgenError:
    told = f"{error.filename or folder}: {error.strerror or error}"
    if kind is UserError:
        return UserError(f"{told}: name a folder that you may write to with --to")
    return MachineError(f"{told}: free some space, or name another folder with --to")


@contextmanager
def _ending_at_once() -> Iterator[None]:
    """A signal ends the work where it is, and not the process before it has tidied up."""

    def end(number: int, frame: FrameType | None) -> None:
        # One request may come as several signals, and tidying up shall not be broken off.
        for other in heeded():
            signal.signal(other, signal.SIG_IGN)
        raise _Signal(number)

    if threading.current_thread() is not threading.main_thread():
        # Only the main thread may set handlers.
        yield
        return
    before = {number: signal.signal(number, end) for number in heeded()}
    try:
        yield
    except _Signal as caught:
        raise Stopped(caught.number) from None
    finally:
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
