"""The label table: a teacher's logits for every view that a data set's crops can show, computed once.

Where crops are not resampled there are few views of an image: (2 pad + 1)^2 corners, mirrored or not, 162 for CIFAR's
usual augmentation. A frozen teacher gives the same logits for the same pixels every time, so one pass over all of them
replaces the teacher for every student that it will ever have.

<store>/labels/<key>/logits.safetensors   `logits` (views, images, classes) in the dtype of the teacher's pass, and
                                          `crc32` (views,), checksums of its blocks
<store>/labels/<key>/teacher.json         where the teacher's weights are, for the list of tables
<store>/labels/<key>/cost.json            seconds that it took, and the student that they are charged to

`labelling.py` makes it. The key is a hash of everything that decides the logits: the teacher's node, the images, the
crops, the normalisation, the precision and how the teacher was run. Which device made it is not in the key: devices
differ by rounding.
"""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastgen.config import hash_of
from fastgen.crops import Int64, ShiftCrop
from fastgen.errors import UserError
from fastgen.step import DTYPES
from fastgen.views import EpochViews

TABLE_FORMAT = 1
METADATA_KEY = "fastgen"
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
CRC_DTYPE, CRC_BYTES = "<i8", 8


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
        weights: `label_store.weights_hash` of the teacher; empty: nobody has looked.
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
    weights: str = ""

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
    def dtype(self) -> torch.dtype:
        """Of the logits."""
        return DTYPES[self.precision]

    @property
    def block_bytes(self) -> int:
        """Bytes of one view's logits."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def header(self) -> bytes:
        """The head of the safetensors file: its length, eight bytes, and JSON."""
        logits_bytes = self.block_bytes * self.views
        layout = {
            "__metadata__": {METADATA_KEY: json.dumps(self.description, sort_keys=True)},
            "logits": {
                "dtype": SAFETENSORS_DTYPES[self.dtype],
                "shape": list(self.shape),
                "data_offsets": [0, logits_bytes],
            },
            "crc32": {
                "dtype": "I64",
                "shape": [self.views],
                "data_offsets": [logits_bytes, logits_bytes + CRC_BYTES * self.views],
            },
        }
        text = json.dumps(layout, separators=(",", ":"), sort_keys=True).encode()
        # 64: so that the logits are aligned in memory when the file is mapped.
        text += b" " * (-(8 + len(text)) % 64)
        return len(text).to_bytes(8, "little") + text

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


def table_path(folder: Path) -> Path:
    """The file of the table that is kept in a folder."""
    return folder / "logits.safetensors"


def table_damage(folder: Path) -> str | None:
    """Reads a finished table of whatever kind; tells what is wrong with it, None: nothing is."""
    path = table_path(folder)
    try:
        with safe_open(path, framework="pt") as file:
            sums, logits = file.get_tensor("crc32").tolist(), file.get_slice("logits")
            blocks = (logits[number].contiguous().view(torch.uint8).numpy() for number in range(len(sums)))
            wrong = [number for number, block in enumerate(blocks) if zlib.crc32(block.data) != sums[number]]
    except (SafetensorError, KeyError) as error:
        return f"{path}: is damaged ({str(error).splitlines()[0][:200]})"
    return f"{path}: is damaged (the checksum of view {wrong[0]} differs)" if wrong else None


def read_table(folder: Path, kind: TableKind, device: torch.device) -> LabelTable | None:
    """A finished table of this kind; None where there is none.

    Raises:
        UserError: the file is damaged, or is of another kind.
    """
    path = table_path(folder)
    if not path.exists():
        return None
    header = kind.header
    expected = len(header) + kind.block_bytes * kind.views + CRC_BYTES * kind.views
    with path.open("rb") as file:
        if file.read(len(header)) != header or path.stat().st_size != expected:
            raise UserError(f"{path}: is not the label table of this teacher and these images: delete it")
    # Copy-on-write: read-only to the file, and torch asks for memory that may be written to.
    bytes_ = np.memmap(path, np.uint8, "c", len(header))
    blocks = bytes_[: kind.block_bytes * kind.views].reshape(kind.views, -1)
    sums = bytes_[kind.block_bytes * kind.views :].view(CRC_DTYPE)
    if any(zlib.crc32(block.data) != crc for block, crc in zip(blocks, sums, strict=True)):
        raise UserError(f"{path}: is damaged (a checksum differs): delete it, and it is made anew")
    logits_RC = torch.from_numpy(blocks.reshape(-1)).view(kind.dtype).view(-1, kind.classes)
    return LabelTable(kind, logits_RC.to(device))
