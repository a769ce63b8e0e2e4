"""The index of an image folder: one row a photograph, in one file, read in a tenth of a second.

`data_prep.manifest` and `data_prep.beton` write it; the loaders `folder` and `dali` read files by
it, and a .beton carries one beside it (FILE.beton.manifest) that tells where its samples came from.

The file is numpy's .npz: a header in JSON and one array a column. A sample's id is its row.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastgen.errors import UserError

MANIFEST_FORMAT = 1
DIGEST_BYTES = 16
READ, DAMAGED = 0, 1  # values of `conditions`; refused files have no row

Bytes = npt.NDArray[np.bytes_]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
UInt8 = npt.NDArray[np.uint8]

# Columns and the kind of their values.
_COLUMNS = {
    "paths": np.bytes_,
    "stand_ins": np.bytes_,
    "labels": np.int64,
    "heights": np.int32,
    "widths": np.int32,
    "modes": np.bytes_,
    "file_bytes": np.int64,
    "digests": np.uint8,
    "conditions": np.uint8,
}


@dataclass(frozen=True)
class Manifest:
    """Index of one split of photographs; N rows.

    Attributes:
        folder: what `paths` are relative to; "" where the pictures come from no files of their own.
        class_names: one for each class; for ILSVRC2012 the WordNet ids, sorted.
        paths: (N,) file names, UTF-8, below the folder.
        stand_ins: (N,) file names below the folder `stand_in_folder`, empty where the file itself is read.
            A stand-in is a lossless RGB copy of a file that decoders do not agree on: damaged,
            CMYK, with a palette or an alpha channel, turned by EXIF.
        labels: int64 (N,).
        heights, widths: int32 (N,), in pixels, of the picture that is read.
        modes: (N,) Pillow's mode of the original file, such as RGB, L or CMYK.
        file_bytes: int64 (N,), of the original file.
        digests: uint8 (N, 16), BLAKE2b of the original file's bytes.
        conditions: uint8 (N,), READ or DAMAGED (decoded, with warnings).
        refused: file name and reason of every file that is not in the table.
        header: everything else, as plain values: options, versions, counts, and for a .beton how it was written.
        stand_in_folder: where `stand_ins` are.
    """

    folder: Path | None
    class_names: tuple[str, ...]
    paths: Bytes
    stand_ins: Bytes
    labels: Int64
    heights: Int32
    widths: Int32
    modes: Bytes
    file_bytes: Int64
    digests: UInt8
    conditions: UInt8
    refused: tuple[tuple[str, str], ...] = ()
    header: Mapping[str, Any] = field(default_factory=dict)
    stand_in_folder: Path | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, sample_id: int) -> str:
        """The file a sample came from, for people."""
        return os.fsdecode(self.paths[sample_id])

    def file(self, sample_id: int) -> Path:
        """The file to decode for a sample: its own, or its stand-in.

        Raises:
            ValueError: the manifest names no files.
        """
        stand_in = self.stand_ins[sample_id]
        folder = self.stand_in_folder if stand_in else self.folder
        if folder is None:
            raise ValueError("this manifest names no files: its pictures are in a .beton")
        return folder / os.fsdecode(stand_in or self.paths[sample_id])

    @property
    def sizes(self) -> Int32:
        """int32 (N, 2): height and width of the picture that is read."""
        return np.stack([self.heights, self.widths], axis=1)

    @property
    def data_hash(self) -> str:
        """SHA-256 of what is learned: files' digests, sizes as read, turning, labels, in order. Names do not count."""
        digest = hashlib.sha256(b"photographs")
        for column, kind in ((self.digests, "u1"), (self.sizes, "<i4"), (self.labels, "<i8")):
            digest.update(np.ascontiguousarray(column, dtype=kind).data)
        if self.header.get("options", {}).get("exif") == "apply":
            # A turn by half leaves the size as it was.
            digest.update(b"turned as EXIF says")
        return digest.hexdigest()


def to_bytes(manifest: Manifest, path: Path) -> bytes:
    """Content of the file; the same manifest for the same place gives the same bytes.

    Args:
        manifest: what to write.
        path: where it will lie; folders at or below its own are written relative to it, so that the data can be
            moved as a whole.
    """
    header = {
        "format": MANIFEST_FORMAT,
        "folder": _relative(manifest.folder, path.parent),
        "stand_in_folder": _relative(manifest.stand_in_folder, path.parent),
        "class_names": list(manifest.class_names),
        "refused": [list(entry) for entry in manifest.refused],
        "header": dict(manifest.header),
    }
    text = np.frombuffer(json.dumps(header, sort_keys=True).encode(), np.uint8)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, header=text, **{name: getattr(manifest, name) for name in _COLUMNS})
    return buffer.getvalue()


def read_manifest(path: Path) -> Manifest:
    """Reads a manifest.

    Raises:
        UserError: there is none, or it is damaged or of another format.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such manifest: make it with python -m data_prep.manifest")
    if path.suffix == ".beton":
        raise UserError(f"{path}: is a .beton; its manifest is {path}.manifest")
    try:
        # Opened here, because numpy leaves a damaged file open.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            header = json.loads(arrays["header"].tobytes())
            columns = {name: arrays[name] for name in _COLUMNS}
        if header["format"] != MANIFEST_FORMAT:
            raise UserError(f"{path}: is of another version of fastgen: make it again with data_prep")
        manifest = Manifest(
            folder=_absolute(header["folder"], path.parent),
            class_names=tuple(header["class_names"]),
            refused=tuple((name, reason) for name, reason in header["refused"]),
            header=dict(header["header"]),
            stand_in_folder=_absolute(header["stand_in_folder"], path.parent),
            **columns,
        )
        _check(manifest)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 (zip, zlib, numpy and json trip over damage in every way)
        reason = (str(error).splitlines() or ["cut short"])[0]
        raise UserError(f"{path}: is damaged or no manifest ({reason}): make it again with data_prep") from None
    return manifest


def _check(manifest: Manifest) -> None:
    """Refuses rows that would lead a loader astray."""
    for name, dtype in _COLUMNS.items():
        column = getattr(manifest, name)
        shape = (len(manifest), DIGEST_BYTES) if name == "digests" else (len(manifest),)
        if column.shape != shape or not np.issubdtype(column.dtype, dtype):
            raise ValueError(f"column {name} is {column.dtype} {column.shape}")
    labels, classes = manifest.labels, len(manifest.class_names)
    if len(labels) and (labels.min() < 0 or labels.max() >= classes):
        raise ValueError(f"labels outside 0..{classes - 1}")
    if len(labels) and manifest.sizes.min() < 1:
        raise ValueError("a picture without pixels")


def _relative(folder: Path | None, base: Path) -> str | None:
    if folder is None:
        return None
    try:
        return str(folder.resolve().relative_to(base.resolve()))
    except ValueError:
        return str(folder.resolve())


def _absolute(text: str | None, base: Path) -> Path | None:
    # Joining an absolute path gives that path.
    return None if text is None else base / text
