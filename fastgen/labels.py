"""The label table: a teacher's logits for every view that a data set's crops can show, computed once.

Where crops are not resampled there are few views of an image: (2 pad + 1)^2 corners, mirrored or not, 162 for CIFAR's
usual augmentation. A frozen teacher gives the same logits for the same pixels every time, so one pass over all of them
replaces the teacher for every student that it will ever have.

<store>/labels/<key>/logits.safetensors   `logits` (views, images, classes) in the dtype of the teacher's pass, and
                                          `crc32` (views,), checksums of its blocks

The key is a hash of everything that decides the logits: the teacher's node, the images, the crops, the normalisation,
the precision and how the teacher was run.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from fastgen.config import hash_of
from fastgen.crops import Int64, ShiftCrop
from fastgen.data.batch import Loader
from fastgen.errors import MachineError, UserError
from fastgen.nodes import locked
from fastgen.step import DTYPES, Prepare
from fastgen.stop import StopRequest
from fastgen.teacher import Teacher
from fastgen.views import EpochViews

TABLE_FORMAT = 1
TABLE_BATCH = 1024
METADATA_KEY = "fastgen"
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
CRC_BYTES = 8


@dataclass(frozen=True)
class TableKind:
    """What a label table is of; two tables of one kind are the same table.

    Attributes:
        teacher: id of its node, or of its weights file.
        images: `content_hash` of the training split.
        count: images in it.
        crop: how views are drawn.
        mean, std: of the normalisation.
        classes: of the data set.
        precision: of the teacher's pass, `fp32`, `bf16` or `fp16`.
        engine: how the teacher is run.
    """

    teacher: str
    images: str
    count: int
    crop: ShiftCrop
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: int
    precision: str
    engine: str

    @property
    def views(self) -> int:
        """Views of an image."""
        return (2 * self.crop.pad_px + 1) ** 2 * self._flips

    @property
    def shape(self) -> tuple[int, int, int]:
        """Views, images, classes."""
        return self.views, self.count, self.classes

    @property
    def description(self) -> dict[str, Any]:
        """All of it, as plain values."""
        return {"format": TABLE_FORMAT} | json.loads(json.dumps(asdict(self)))

    @property
    def key(self) -> str:
        """Sixteen hexadecimal digits."""
        return hash_of(self.description)[:16]

    @property
    def _flips(self) -> int:
        return 2 if self.crop.flip else 1

    def numbers(self, table: np.ndarray[Any, np.dtype[np.int32]]) -> Int64:
        """Numbers 0..views-1 of the rows of a view table."""
        corners = 2 * self.crop.pad_px + 1
        rows = table.astype(np.int64)
        top, left = rows[:, 0] + self.crop.pad_px, rows[:, 1] + self.crop.pad_px
        if ((top < 0) | (top >= corners) | (left < 0) | (left >= corners) | (rows[:, 4] >= self._flips)).any():
            raise ValueError("views lie outside the crops that the label table knows")
        return (top * corners + left) * self._flips + rows[:, 4]

    def views_of(self, number: int) -> EpochViews:
        """Every image, in order, in one and the same view."""
        corner, flip = divmod(number, self._flips)
        top, left = divmod(corner, 2 * self.crop.pad_px + 1)
        height_px, width_px = self.crop.height_px, self.crop.width_px
        row = np.array([top - self.crop.pad_px, left - self.crop.pad_px, height_px, width_px, flip], np.int32)
        return EpochViews(np.arange(self.count), np.tile(row, (self.count, 1)), height_px, width_px)


@dataclass(frozen=True)
class LabelTable:
    """A finished table.

    Attributes:
        kind: what it is of.
        logits_RC: (views * images, C), on the device; row number * images + position.
    """

    kind: TableKind
    logits_RC: Tensor

    def rows(self, views: EpochViews) -> Int64:
        """int64 (N,): the row of each position in an epoch's views."""
        return self.kind.numbers(views.table) * self.kind.count + np.arange(self.kind.count)


def read_table(folder: Path, kind: TableKind, device: torch.device) -> LabelTable | None:
    """A finished table of this kind; None where there is none.

    Raises:
        UserError: the file is damaged, or is of another kind.
    """
    path = _path(folder)
    if not path.exists():
        return None
    header = _header(kind)
    expected = len(header) + _block_bytes(kind) * kind.views + CRC_BYTES * kind.views
    with path.open("rb") as file:
        if file.read(len(header)) != header or path.stat().st_size != expected:
            raise UserError(f"{path}: is not the label table of this teacher and these images: delete it")
    # Copy-on-write: read-only to the file, and torch asks for memory that may be written to.
    bytes_ = np.memmap(path, np.uint8, "c", len(header))
    blocks = bytes_[: _block_bytes(kind) * kind.views].reshape(kind.views, -1)
    sums = bytes_[_block_bytes(kind) * kind.views :].view("<i8")
    if any(zlib.crc32(block.data) != crc for block, crc in zip(blocks, sums, strict=True)):
        raise UserError(f"{path}: is damaged (a checksum differs): delete it, and it is made anew")
    logits_RC = torch.from_numpy(blocks.reshape(-1)).view(_dtype(kind)).view(-1, kind.classes)
    return LabelTable(kind, logits_RC.to(device))


def build_table(
    folder: Path,
    kind: TableKind,
    loader: Loader,
    prepare: Prepare,
    teacher: Teacher,
    stop: StopRequest,
    passed: Callable[[int], None],
) -> None:
    """Fills the table, a view of all images at a time; what an earlier session finished is kept.

    Args:
        folder: made if it is not there.
        kind: what it will be of.
        loader: of the training split.
        prepare: what the student will see of an image.
        teacher: see `teacher.make_teacher`.
        stop: asked after each view.
        passed: told how many views are done.

    Raises:
        Stopped: a signal came; finished views are kept.
        MachineError: the disk has no room for it.
        UserError: another process makes it, or an image cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, "this label table"):
        path, header = _path(folder), _header(kind)
        partial = path.with_name(f".{path.name}.partial")
        sums = _resume(partial, header, kind)
        _require_room(folder, kind, len(sums))
        passed(len(sums))
        with partial.open("r+b") as file:
            file.seek(0, os.SEEK_END)
            for number in range(len(sums), kind.views):
                stop.check()
                block = _label_view(kind, number, loader, prepare, teacher)
                file.write(block)
                file.flush()
                sums.append(zlib.crc32(block))
                passed(len(sums))
            file.write(np.array(sums, "<i8").tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)


def _label_view(kind: TableKind, number: int, loader: Loader, prepare: Prepare, teacher: Teacher) -> bytes:
    parts = []
    for batch in loader.batches(kind.views_of(number), TABLE_BATCH):
        parts.append(teacher(prepare(batch.images_NCHW, None)))
    logits_NC = torch.cat(parts)
    if logits_NC.shape != kind.shape[1:] or logits_NC.dtype != _dtype(kind):
        raise ValueError(f"the teacher gave {tuple(logits_NC.shape)} {logits_NC.dtype}, the table is {kind.shape}")
    if not bool(logits_NC.isfinite().all()):
        raise UserError(
            "the teacher's logits are not finite: its weights are broken, or train.precision=fp32 is needed"
        )
    return logits_NC.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _resume(partial: Path, header: bytes, kind: TableKind) -> list[int]:
    """Checksums of the views that are there; cuts off what a kill left half written."""
    block = _block_bytes(kind)
    with partial.open("a+b") as file:
        file.seek(0)
        done = (partial.stat().st_size - len(header)) // block if file.read(len(header)) == header else -1
        if done < 0:
            file.truncate(0)
            file.write(header)
            return []
        done = min(done, kind.views)
        file.truncate(len(header) + done * block)
        return [zlib.crc32(_read_exactly(file, block)) for _ in range(done)]


def _read_exactly(file: IO[bytes], count: int) -> bytes:
    content = file.read(count)
    if len(content) != count:
        raise ValueError(f"{count} bytes were there a moment ago, {len(content)} were read")
    return content


def _require_room(folder: Path, kind: TableKind, done: int) -> None:
    needed, free = _block_bytes(kind) * (kind.views - done), shutil.disk_usage(folder).free
    if needed > free:
        raise MachineError(
            f"{folder}: the label table needs {needed / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free: free some, "
            "name another place with run.nodes, or set teacher.labels=live"
        )


def _path(folder: Path) -> Path:
    return folder / "logits.safetensors"


def _dtype(kind: TableKind) -> torch.dtype:
    return DTYPES[kind.precision]


def _block_bytes(kind: TableKind) -> int:
    return math.prod(kind.shape[1:]) * _dtype(kind).itemsize


def _header(kind: TableKind) -> bytes:
    """The head of a safetensors file: its length, eight bytes, and JSON."""
    logits_bytes = _block_bytes(kind) * kind.views
    layout = {
        "__metadata__": {METADATA_KEY: json.dumps(kind.description, sort_keys=True)},
        "logits": {
            "dtype": SAFETENSORS_DTYPES[_dtype(kind)],
            "shape": list(kind.shape),
            "data_offsets": [0, logits_bytes],
        },
        "crc32": {
            "dtype": "I64",
            "shape": [kind.views],
            "data_offsets": [logits_bytes, logits_bytes + CRC_BYTES * kind.views],
        },
    }
    text = json.dumps(layout, separators=(",", ":"), sort_keys=True).encode()
    # 64: so that the logits are aligned in memory when the file is mapped.
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text
