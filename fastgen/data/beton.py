"""FFCV's file format, .beton version 2: reading its index, and writing it so that equal input gives equal bytes.

header | field descriptors | metadata, one row a sample | pages of pixels | allocation table, to the end

Written from the format's public description and FFCV 1.0.2's own types, and checked against its reader. FFCV
itself is needed to decode, not to read the index or to write. Ours hold these fields: `image`; `label`; `height`
and `width` of the original picture, in whose coordinates views are drawn; `crc32` of the stored bytes.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from fastgen.errors import UserError

VERSION = 2
JPEG, RAW = 0, 1  # values of an image's mode
MIN_PAGE_BYTES = 1 << 21
MAX_SIDE_PX = 0xFFFF
INT_FIELD, IMAGE_FIELD = 1, 2
OUR_FIELDS = ("image", "label", "height", "width", "crc32")

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD = np.dtype([("type_id", "<u1"), ("name", ("<u1", 16)), ("arguments", ("<u1", (1024,)))], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
# Bytes of one row of each kind of field that has one: float, int, image, bytes, array, JSON, tensor.
FIELD_TYPES = {
    0: np.dtype("<f8"),
    1: np.dtype("<i8"),
    2: IMAGE,
    3: np.dtype([("ptr", "<u8"), ("size", "<u8")]),
    4: np.dtype("<u8"),
    5: np.dtype([("ptr", "<u8"), ("size", "<u8")]),
    6: np.dtype("<u8"),
}

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
UInt8 = npt.NDArray[np.uint8]
UInt64 = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Beton:
    """Index of a .beton of N images; pixels stay in the file.

    Attributes:
        path: the file.
        pointers, stored_bytes: int64 (N,), where each image's bytes begin and how many they are.
        modes: uint8 (N,), JPEG or RAW.
        stored_sizes: int32 (N, 2), height and width of the stored image.
        sizes: int32 (N, 2), height and width of the original picture; the stored ones where the file does not tell.
        labels: int64 (N,).
        crc32: int64 (N,) of the stored bytes; None where the file does not tell.
        index_hash: SHA-256 of the metadata and the allocation table; with `crc32` among them it names the content.
    """

    path: Path
    pointers: Int64
    stored_bytes: Int64
    modes: UInt8
    stored_sizes: Int32
    sizes: Int32
    labels: Int64
    crc32: Int64 | None
    index_hash: str

    def __len__(self) -> int:
        return len(self.labels)

    def bytes_of(self, sample_id: int) -> UInt8:
        """Stored bytes of a sample, as a view of the file's pages."""
        begin = int(self.pointers[sample_id])
        return self.content()[begin : begin + int(self.stored_bytes[sample_id])]

    def content(self) -> UInt8:
        """The whole file, mapped and not read; all processes share the system's page cache."""
        return np.memmap(self.path, np.uint8, "r")


def read_beton(path: Path) -> Beton:
    """Reads the index of a .beton, ours or one that FFCV's own writer made.

    Raises:
        UserError: there is none, it is cut short or damaged, or it holds no image with a label.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file: make it with python -m data_prep.beton")
    file_bytes = path.stat().st_size
    with open(path, "rb") as file:
        header = _take(file, HEADER, 1, path)[0]
        if header["version"] != VERSION:
            raise UserError(f"{path}: is no .beton of version {VERSION}: make it with python -m data_prep.beton")
        table_at, samples = int(header["alloc_table_ptr"]), int(header["num_samples"])
        if not HEADER.itemsize < table_at < file_bytes or (file_bytes - table_at) % ALLOCATION.itemsize:
            raise UserError(f"{path}: is cut short (or was never finished): make it again")
        fields = _take(file, FIELD, int(header["num_fields"]), path)
        row_type, names = _row_type(fields, path)
        rows = _take(file, row_type, samples, path)
        file.seek(table_at)
        table = _take(file, ALLOCATION, (file_bytes - table_at) // ALLOCATION.itemsize, path)
    image_column = _column(fields, names, IMAGE_FIELD, "image", path)
    images = rows[image_column]
    label_column = _column(fields, names, INT_FIELD, "label", path)
    beton = Beton(
        path=path,
        pointers=images["data_ptr"].astype(np.int64),
        stored_bytes=_stored_bytes(images["data_ptr"], table, path),
        modes=np.ascontiguousarray(images["mode"]),
        stored_sizes=np.stack([images["height"], images["width"]], axis=1).astype(np.int32),
        sizes=_original_sizes(rows, names, images),
        labels=rows[label_column].astype(np.int64),
        crc32=rows[names["crc32"]].astype(np.int64) if _is_int(rows, names, "crc32") else None,
        index_hash=hashlib.sha256(rows.tobytes() + table.tobytes()).hexdigest(),
    )
    _check(beton, table_at)
    return beton


@dataclass(frozen=True, slots=True)
class Sample:
    """One image as it will lie in the file.

    Attributes:
        stored: its bytes: a JPEG stream, or RGB pixels row by row.
        mode: JPEG or RAW.
        stored_size, size: (height, width) as stored, and of the original picture.
        label: of its class.
        crc32: of `stored`.
    """

    stored: bytes
    mode: int
    stored_size: tuple[int, int]
    size: tuple[int, int]
    label: int
    crc32: int


class BetonWriter:
    """Writes samples one after the other, in order; the file is complete after `finish`.

    Args:
        file: open for writing and seeking, empty.
        samples: how many there will be at most (room for their rows is left at the start).
        page_bytes: a power of two; an image must fit into a page.
    """

    def __init__(self, file: BinaryIO, samples: int, page_bytes: int) -> None:
        if page_bytes < MIN_PAGE_BYTES or page_bytes & (page_bytes - 1):
            raise ValueError(f"page_bytes = {page_bytes}: must be a power of two of at least {MIN_PAGE_BYTES}")
        self._file, self._page_bytes = file, page_bytes
        self._rows = np.zeros(samples, our_row_type())
        self._table = np.zeros(samples, ALLOCATION)
        self._count = 0
        rows_end = HEADER.itemsize + len(OUR_FIELDS) * FIELD.itemsize + self._rows.nbytes
        self._at = -(-rows_end // page_bytes) * page_bytes
        file.seek(self._at)

    def add(self, sample: Sample) -> None:
        """Appends an image.

        Raises:
            ValueError: it does not fit into a page, or into 65,535 pixels a side.
        """
        at = self._place(sample, len(sample.stored))
        self._file.write(bytes(at - self._at))
        self._file.write(sample.stored)
        self._at = at + len(sample.stored)

    def skip(self, sample: Sample, stored_bytes: int) -> None:
        """Notes an image that lies in the file already, where `add` put it in a former session.

        Args:
            sample: without its bytes.
            stored_bytes: how many those are.
        """
        self._at = self._place(sample, stored_bytes) + stored_bytes

    def cut(self) -> None:
        """Drops whatever lies behind the last image, and goes on there.

        Raises:
            ValueError: the file ends before.
        """
        if self._count and self._file.seek(0, os.SEEK_END) < self._at:
            raise ValueError("the file ends before its last image")
        self._file.seek(self._at)
        self._file.truncate()

    def _place(self, sample: Sample, stored_bytes: int) -> int:
        """Enters an image into the rows and gives the place of its bytes: never across the end of a page."""
        if stored_bytes > self._page_bytes or max(sample.stored_size) > MAX_SIDE_PX:
            raise ValueError(
                f"{stored_bytes:,} bytes, {sample.stored_size[1]}x{sample.stored_size[0]} pixels: too large"
            )
        left_in_page = -self._at % self._page_bytes
        at = self._at + (left_in_page if stored_bytes > left_in_page else 0)
        image = (sample.mode, sample.stored_size[1], sample.stored_size[0], at)
        self._rows[self._count] = (image, sample.label, *sample.size, sample.crc32)
        self._table[self._count] = (self._count, at, stored_bytes)
        self._count += 1
        return at

    def finish(self) -> None:
        """Fills the last page, then writes allocation table, rows, field descriptors and header."""
        self._file.write(bytes(-self._at % self._page_bytes))
        table_at = self._file.tell()
        self._file.write(self._table[: self._count].tobytes())
        header = np.zeros(1, HEADER)
        header[0] = (VERSION, len(OUR_FIELDS), self._page_bytes, self._count, table_at)
        self._file.seek(0)
        self._file.write(header.tobytes() + _our_fields().tobytes() + self._rows[: self._count].tobytes())


def page_bytes_for(largest_bytes: int) -> int:
    """Smallest page, at least FFCV's usual 8 MiB, that holds an image of so many bytes."""
    return max(4 * MIN_PAGE_BYTES, 1 << (max(largest_bytes, 1) - 1).bit_length())


def our_row_type() -> np.dtype[np.void]:
    """dtype of a row of the files that we write."""
    return _aligned([IMAGE_FIELD, *[INT_FIELD] * (len(OUR_FIELDS) - 1)])


def _our_fields() -> npt.NDArray[np.void]:
    fields = np.zeros(len(OUR_FIELDS), FIELD)
    for number, name in enumerate(OUR_FIELDS):
        fields[number]["type_id"] = IMAGE_FIELD if name == "image" else INT_FIELD
        fields[number]["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
    return fields


def _aligned(type_ids: list[int]) -> np.dtype[np.void]:
    return np.dtype([("", FIELD_TYPES[type_id]) for type_id in type_ids], align=True)


def _take(file: BinaryIO, kind: np.dtype[np.void], count: int, path: Path) -> npt.NDArray[np.void]:
    wanted_bytes = kind.itemsize * count
    # Asked before anything is allocated: a damaged header may claim any count.
    if wanted_bytes > path.stat().st_size:
        raise UserError(f"{path}: is damaged or cut short: make it again with python -m data_prep.beton")
    content = file.read(wanted_bytes)
    if len(content) < wanted_bytes:
        raise UserError(f"{path}: is cut short: make it again with python -m data_prep.beton")
    return np.frombuffer(content, kind)


def _row_type(fields: npt.NDArray[np.void], path: Path) -> tuple[np.dtype[np.void], dict[str, str]]:
    """dtype of a row, and the name of each field's column in it."""
    unknown = [int(type_id) for type_id in fields["type_id"] if int(type_id) not in FIELD_TYPES]
    if unknown:
        raise UserError(f"{path}: holds a field of an unknown kind ({unknown[0]}): make it with data_prep.beton")
    names = [bytes(name).partition(b"\0")[0].decode("ascii", "replace") for name in fields["name"]]
    if len(set(names)) != len(names) or not names:
        raise UserError(f"{path}: is damaged (its fields have no names of their own): make it again")
    row_type = _aligned([int(type_id) for type_id in fields["type_id"]])
    return row_type, dict(zip(names, row_type.names or (), strict=True))


def _column(fields: npt.NDArray[np.void], names: dict[str, str], type_id: int, name: str, path: Path) -> str:
    """The column of that name, or the only one of that kind."""
    of_kind = [column for column, kind in zip(names, fields["type_id"], strict=True) if kind == type_id]
    if name in of_kind:
        return names[name]
    if len(of_kind) == 1:
        return names[of_kind[0]]
    raise UserError(f"{path}: has no field '{name}' (found {', '.join(names)}): make it with data_prep.beton")


def _is_int(rows: npt.NDArray[np.void], names: dict[str, str], name: str) -> bool:
    return name in names and rows.dtype[names[name]] == FIELD_TYPES[INT_FIELD]


def _original_sizes(rows: npt.NDArray[np.void], names: dict[str, str], images: npt.NDArray[np.void]) -> Int32:
    if _is_int(rows, names, "height") and _is_int(rows, names, "width"):
        return np.stack([rows[names["height"]], rows[names["width"]]], axis=1).astype(np.int32)
    return np.stack([images["height"], images["width"]], axis=1).astype(np.int32)


def _stored_bytes(pointers: UInt64, table: npt.NDArray[np.void], path: Path) -> Int64:
    by_place = np.sort(table, order="ptr")
    found = np.searchsorted(by_place["ptr"], pointers)
    if len(pointers) and (
        not len(by_place) or (by_place["ptr"][np.minimum(found, len(by_place) - 1)] != pointers).any()
    ):
        raise UserError(f"{path}: is damaged (an image has no place in the allocation table): make it again")
    return by_place["size"][found].astype(np.int64)


def _check(beton: Beton, table_at: int) -> None:
    """Refuses an index that would let a decoder read or write outside its memory."""
    area = beton.stored_sizes[:, 0].astype(np.int64) * beton.stored_sizes[:, 1]
    # Compared so that no sum can overflow.
    bad = (
        (beton.pointers < 0) | (beton.stored_bytes < 1) | (beton.stored_bytes > table_at - beton.pointers) | (area < 1)
    )
    bad |= (beton.modes == RAW) & (beton.stored_bytes != 3 * area)
    bad |= (beton.modes != RAW) & (beton.modes != JPEG)
    bad |= (beton.sizes < 1).any(axis=1)
    if bad.any():
        raise UserError(
            f"{beton.path}: is damaged: the entry of sample {int(np.flatnonzero(bad)[0])} is impossible: make it again"
        )
