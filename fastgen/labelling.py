"""Makes label tables: resumable, safe against kills and power failures, one process at a time.

While a table is made there are `.logits.safetensors.partial`, and beside it a journal of the checksums of finished
blocks, each written when its block is safe on the disk.
"""

from __future__ import annotations

import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch

from fastgen.data.batch import Loader
from fastgen.errors import MachineError, UserError
from fastgen.files import write_json
from fastgen.labels import CRC_BYTES, CRC_DTYPE, TableKind, table_path
from fastgen.locks import InUse, locked
from fastgen.nodes import read_json
from fastgen.step import Prepare
from fastgen.stop import Checks
from fastgen.teacher import Teacher

TABLE_BATCH = 1024
WAIT_SECONDS = 0.5


def build_table(
    folder: Path,
    kind: TableKind,
    loader: Loader,
    prepare: Prepare,
    teacher: Teacher,
    stop: Checks,
    passed: Callable[[int], None],
    say: Callable[[str], None],
) -> None:
    """Fills the table, a view of all images at a time; what an earlier session finished is kept.

    Where another process is at it, waits for that one.

    Args:
        folder: made if it is not there.
        kind: what it will be of.
        loader: of the training split.
        prepare: what the student will see of an image.
        teacher: see `teacher.make_teacher`.
        stop: asked after each view.
        passed: told how many views are done.
        say: told that another process is waited for.

    Raises:
        Stopped: a signal came; finished views are kept.
        MachineError: the disk has no room for it.
        UserError: an image cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked_in_turn(folder, stop, say):
        if not table_path(folder).exists():
            with _costing(folder):
                _fill(folder, kind, lambda number: _label_view(kind, number, loader, prepare, teacher), stop, passed)


def _fill(
    folder: Path, kind: TableKind, label: Callable[[int], bytes], stop: Checks, passed: Callable[[int], None]
) -> None:
    partial, journal = _partial(folder), _journal(folder)
    sums = _resume(partial, journal, kind)
    _require_room(folder, kind, len(sums))
    passed(len(sums))
    with partial.open("r+b") as file, journal.open("ab") as notes:
        file.seek(0, os.SEEK_END)
        for number in range(len(sums), kind.views):
            stop.check()
            block = label(number)
            _write_safely(file, block)
            sums.append(zlib.crc32(block))
            _write_safely(notes, np.array(sums[-1:], CRC_DTYPE).tobytes())
            passed(len(sums))
        _write_safely(file, np.array(sums, CRC_DTYPE).tobytes())
    os.replace(partial, table_path(folder))
    journal.unlink()


@contextmanager
def _locked_in_turn(folder: Path, stop: Checks, say: Callable[[str], None]) -> Iterator[None]:
    """Holds the folder, after whoever holds it now."""
    with ExitStack() as held:
        told = False
        while True:
            try:
                held.enter_context(locked(folder, "this label table", check=stop.check))
                break
            except InUse as holder:
                stop.check()
                if not told:
                    say(f"waiting: {str(holder).rpartition(': ')[0]}")
                told = True
                time.sleep(WAIT_SECONDS)
        yield


def _write_safely(file: IO[bytes], content: bytes) -> None:
    """What is noted afterwards is true even if the power fails then."""
    file.write(content)
    file.flush()
    os.fsync(file.fileno())


def _label_view(kind: TableKind, number: int, loader: Loader, prepare: Prepare, teacher: Teacher) -> bytes:
    parts = []
    for batch in loader.batches(kind.views_of(number), TABLE_BATCH):
        parts.append(teacher(prepare(batch.images_NCHW, None)))
    logits_NC = torch.cat(parts)
    if logits_NC.shape != kind.shape[1:] or logits_NC.dtype != kind.dtype:
        raise ValueError(f"the teacher gave {tuple(logits_NC.shape)} {logits_NC.dtype}, the table is {kind.shape}")
    if not bool(logits_NC.isfinite().all()):
        raise UserError(
            "the teacher's logits are not finite: its weights are broken, or train.precision=fp32 is needed"
        )
    return logits_NC.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _resume(partial: Path, journal: Path, kind: TableKind) -> list[int]:
    """Checksums of the views that are there; cuts off what a kill, or a power failure, left half written."""
    header, block = kind.header, kind.block_bytes
    noted = journal.read_bytes() if journal.exists() else b""
    wanted = np.frombuffer(noted[: len(noted) // CRC_BYTES * CRC_BYTES], CRC_DTYPE).tolist()
    sums: list[int] = []
    with partial.open("a+b") as file:
        file.seek(0)
        if file.read(len(header)) == header:
            for crc in wanted[: kind.views]:
                content = file.read(block)
                if len(content) != block or zlib.crc32(content) != crc:
                    break
                sums.append(crc)
        else:
            file.truncate(0)
            file.write(header)
        file.truncate(len(header) + len(sums) * block)
    journal.write_bytes(np.array(sums, CRC_DTYPE).tobytes())
    return sums


def _require_room(folder: Path, kind: TableKind, done: int) -> None:
    needed, free = kind.block_bytes * (kind.views - done), shutil.disk_usage(folder).free
    if needed > free:
        raise MachineError(
            f"{folder}: the label table needs {needed / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free: free some, "
            "name another place with run.nodes, or set teacher.labels=live"
        )


def _partial(folder: Path) -> Path:
    return folder / ".logits.safetensors.partial"


def _journal(folder: Path) -> Path:
    return folder / ".logits.safetensors.journal"


@contextmanager
def _costing(folder: Path) -> Iterator[None]:
    """Adds the seconds of this session to those of earlier ones."""
    began = time.monotonic()
    try:
        yield
    finally:
        seconds, student = _cost(folder)
        _note_cost(folder, seconds + time.monotonic() - began, student)


def claim_cost(folder: Path, student: str, stop: Checks, say: Callable[[str], None]) -> float:
    """Seconds that a table's sessions took, for the first student that asks, however often it asks; 0 for others.

    Args:
        folder: of a finished table.
        student: id of its node.
        stop: asked while another process holds the folder.
        say: told that it does.
    """
    with _locked_in_turn(folder, stop, say):
        seconds, charged = _cost(folder)
        if charged is None:
            _note_cost(folder, seconds, student)
        return seconds if charged in (None, student) else 0.0


def _cost(folder: Path) -> tuple[float, str | None]:
    path = folder / "cost.json"
    if not path.exists():
        return 0.0, None
    cost = read_json(path)
    return cost["seconds"], cost["student"]


def _note_cost(folder: Path, seconds: float, student: str | None) -> None:
    write_json(folder / "cost.json", {"seconds": seconds, "student": student})
