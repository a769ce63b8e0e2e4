"""What an interrupted writing left: which pictures are in the unfinished .beton already.

    <out>.partial    the .beton, without its header and its end
    <out>.journal    a line of what is written, then one line for each picture of the listing, in order

The journal never runs ahead of the pictures: those are forced to the disk first.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from data_prep.judge import Refusal, Row
from fastgen.data.beton import BetonWriter, Sample
from fastgen.errors import UserError

FLUSH_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Stored:
    """A picture as it goes into the file.

    Attributes:
        row: what the manifest records of it.
        sample: what the .beton holds of it; without its bytes where it comes from a journal.
        stored_bytes: how many those are.
    """

    row: Row
    sample: Sample
    stored_bytes: int


@dataclass(frozen=True)
class Places:
    """Files of one writing."""

    out: Path

    @property
    def partial(self) -> Path:
        """The unfinished .beton."""
        return self.out.with_name(self.out.name + ".partial")

    @property
    def journal(self) -> Path:
        """What is in it."""
        return self.out.with_name(self.out.name + ".journal")

    @property
    def manifest(self) -> Path:
        """Of the finished .beton."""
        return self.out.with_name(self.out.name + ".manifest")


class Journal:
    """Writes an unfinished .beton and its journal, entered as a context; takes up a former session's.

    Args:
        places: the files.
        identity: what is written, as plain values; another identity's leftovers are refused.
        labels: of each picture of the listing.
        page_bytes: of the .beton.

    Raises:
        UserError: another process is writing this file, or something else was begun under its name.
    """

    def __init__(self, places: Places, identity: Mapping[str, Any], labels: list[int], page_bytes: int) -> None:
        self._places, self._labels, self._page_bytes = places, labels, page_bytes
        self._identity = json.dumps({**identity, "page_bytes": page_bytes}, sort_keys=True)
        self.entries: list[Stored | Refusal] = []
        self._unsaved: list[str] = []
        self._saved_at = time.monotonic()

    def __enter__(self) -> Journal:
        self._file = open(self._places.journal, "a+b")
        try:
            _lock(self._file, self._places)
            self._take_up()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.save()
        finally:
            self._close()

    def add(self, entry: Stored | Refusal) -> None:
        """Appends the next picture of the listing, or notes why it is left out."""
        if isinstance(entry, Stored):
            self._writer.add(entry.sample)
            entry = _without_bytes(entry)
        self.entries.append(entry)
        self._unsaved.append(_to_line(entry))
        if time.monotonic() - self._saved_at >= FLUSH_SECONDS:
            self.save()

    def save(self) -> None:
        """Forces everything to the disk, pictures first."""
        if self._unsaved:
            self._beton.flush()
            os.fdatasync(self._beton.fileno())
            self._file.write("".join(self._unsaved).encode())
            self._file.flush()
            os.fdatasync(self._file.fileno())
            self._unsaved.clear()
        self._saved_at = time.monotonic()

    def finish(self) -> None:
        """Completes the .beton, still under its unfinished name."""
        self.save()
        self._writer.finish()
        self._beton.flush()
        os.fsync(self._beton.fileno())

    def _take_up(self) -> None:
        self._file.seek(0)
        head, *lines = self._file.read().split(b"\n")[:-1] or [b""]
        entries = _read_entries(lines, self._labels)
        if head and head.decode(errors="replace") != self._identity:
            raise UserError(
                f"{self._places.journal}: what was begun there has other options, other versions or another source: "
                "start over with --redo, or name another --out"
            )
        whole = len(entries) == len(self._labels)
        if whole and not self._places.partial.exists() and self._places.out.exists():
            # Killed between the last two steps: it has its name already, but no manifest.
            os.replace(self._places.out, self._places.partial)
        if not self._places.partial.exists():
            entries = []
        self._begin(entries)
        if not head or len(entries) < len(lines):
            self._rewrite()

    def _begin(self, entries: list[Stored | Refusal]) -> None:
        """Opens the .beton behind the pictures that are in it."""
        # Closed with the journal, in `_close`.
        self._beton: BinaryIO = open(self._places.partial, "r+b" if entries else "w+b")  # noqa: SIM115
        self._writer = BetonWriter(self._beton, len(self._labels), self._page_bytes)
        for entry in entries:
            if isinstance(entry, Stored):
                self._writer.skip(entry.sample, entry.stored_bytes)
        try:
            self._writer.cut()
        except ValueError as error:
            raise UserError(f"{self._places.partial}: is damaged ({error}): start over with --redo") from None
        self.entries = entries

    def _rewrite(self) -> None:
        """Begins the journal, without a line that was torn, or whose picture is gone."""
        self._file.seek(0)
        self._file.truncate()
        self._file.write("".join([self._identity + "\n", *map(_to_line, self.entries)]).encode())
        self._file.flush()

    def _close(self) -> None:
        self._file.close()
        if hasattr(self, "_beton"):
            self._beton.close()


def remove_leftovers(places: Places) -> None:
    """Forgets what an interrupted writing left.

    Raises:
        UserError: it is not interrupted.
    """
    if places.journal.exists():
        with open(places.journal, "rb") as file:
            _lock(file, places)
            places.journal.unlink()
            places.partial.unlink(missing_ok=True)


def _lock(file: BinaryIO, places: Places) -> None:
    """Held until the file is closed, or its process ends, however it ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{places.out}: is being written by another process: wait for it, or name another --out"
        ) from None


def _without_bytes(entry: Stored) -> Stored:
    bare = replace(entry.sample, stored=b"")
    return Stored(entry.row, bare, entry.stored_bytes)


def _to_line(entry: Stored | Refusal) -> str:
    if isinstance(entry, Refusal):
        return json.dumps([entry.reason]) + "\n"
    row, sample = entry.row, entry.sample
    values = {**asdict(row), "digest": row.digest.hex()}
    return json.dumps([values, sample.mode, sample.stored_size, sample.crc32, entry.stored_bytes]) + "\n"


def _read_entries(lines: list[bytes], labels: list[int]) -> list[Stored | Refusal]:
    """Entries up to the first line that is damaged."""
    entries: list[Stored | Refusal] = []
    for line, label in zip(lines, labels, strict=False):
        try:
            entries.append(_from_line(line, label))
        except (ValueError, TypeError, KeyError):
            break
    return entries


def _from_line(line: bytes, label: int) -> Stored | Refusal:
    values, *rest = json.loads(line)
    if not rest:
        return Refusal(str(values))
    mode, stored_size, crc32, stored_bytes = rest
    row = Row(**{**values, "digest": bytes.fromhex(values["digest"]), "notes": tuple(values["notes"])})
    sample = Sample(b"", mode, (stored_size[0], stored_size[1]), (row.height, row.width), label, crc32)
    return Stored(row, sample, stored_bytes)
