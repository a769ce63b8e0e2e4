"""Judges pictures, one after the other, in worker processes: what both a manifest and a .beton record of each."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.options import versions
from data_prep.sources import Picture, Source, UInt8, is_ilsvrc2012
from fastgen.data.manifest import DAMAGED, DIGEST_BYTES, READ, Manifest
from fastgen.data.photos import Inspected, Refused, examine
from fastgen.errors import UserError

# Pictures of ILSVRC2012 that are not what their names say; github.com/cytsai/ilsvrc-cmyk-image-list.
KNOWN_CMYK = frozenset(
    f"{name}.JPEG"
    for name in (
        "n01739381_1309", "n02077923_14822", "n02447366_23489", "n02492035_15739", "n02747177_10752",
        "n03018349_4028", "n03062245_4620", "n03347037_9675", "n03467068_12171", "n03529860_11437",
        "n03544143_17228", "n03633091_5218", "n03710637_5125", "n03961711_5286", "n04033995_2932",
        "n04258138_17003", "n04264628_27969", "n04336792_7448", "n04371774_5854", "n04596742_4225",
        "n07583066_647", "n13037406_4650", "ILSVRC2012_val_00019877",
    )
)  # fmt: skip
KNOWN_PNG = frozenset(("n02105855_2933.JPEG",))
ILSVRC2012_COUNTS = {"ilsvrc2012-train": 1_281_167, "ilsvrc2012-val": 50_000}


@dataclass(frozen=True)
class Rules:
    """How pictures are judged.

    Attributes:
        skip_refused: whether what cannot be read is left out; else it ends the command.
        keep_damaged: whether what is read with damage is kept.
        exif: whether pictures are turned as EXIF says.
    """

    skip_refused: bool
    keep_damaged: bool
    exif: bool

    def as_options(self) -> dict[str, str]:
        """As on the command line."""
        return {
            "on-error": "skip" if self.skip_refused else "error",
            "damaged": "keep" if self.keep_damaged else "refuse",
            "exif": "apply" if self.exif else "ignore",
        }


@dataclass(frozen=True, slots=True)
class Row:
    """What is recorded of a picture; the columns of a manifest.

    Attributes:
        height, width, mode, condition: as `Inspected`.
        file_bytes, digest: of the original file, or of the pixels where there is none.
        stand_in: file name of its stand-in, "" if it needs none.
        notes: what is unusual.
    """

    height: int
    width: int
    mode: str
    condition: int
    file_bytes: int
    digest: bytes
    stand_in: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refusal:
    """Why a picture is left out."""

    reason: str


@dataclass(frozen=True)
class Judged:
    """A picture that may be used: its row, its pixels, and its bytes where they may stand as they are.

    Attributes:
        row: what is recorded.
        pixels: RGB.
        content: the file's bytes; None where the picture came as pixels.
        inspected: None likewise.
    """

    row: Row
    pixels: UInt8
    content: bytes | None
    inspected: Inspected | None


def judge(picture: Picture, rules: Rules) -> Judged | Refusal:
    """Reads a picture and judges it."""
    if not isinstance(picture, Path):
        height, width = picture.shape[:2]
        row = Row(height, width, "RGB", READ, picture.nbytes, digest_of(picture.tobytes()))
        return Judged(row, picture, None, None)
    try:
        content = picture.read_bytes()
        inspected, pixels = examine(content, exif=rules.exif)
    except OSError as error:
        return Refusal(f"cannot be opened ({error.strerror or error})")
    except Refused as refused:
        return Refusal(str(refused))
    if inspected.condition == DAMAGED and not rules.keep_damaged:
        return Refusal(inspected.notes[-1] if inspected.notes else "damaged")
    notes = inspected.notes
    if inspected.format == "PNG" and picture.suffix.lower() in (".jpeg", ".jpg"):
        notes = ("PNG named JPEG", *notes)
    row = Row(
        inspected.height,
        inspected.width,
        inspected.mode,
        inspected.condition,
        len(content),
        digest_of(content),
        notes=notes,
    )
    return Judged(row, pixels, content, inspected)


def as_png(pixels: UInt8) -> bytes:
    """The same pixels as a PNG file."""
    buffer = io.BytesIO()
    # Barely larger than with Pillow's usual level, in a fraction of the time.
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def make_manifest(
    source: Source, results: Sequence[Row | Refusal], header: dict[str, Any], stand_in_folder: Path | None
) -> Manifest:
    """A manifest of what was judged, in the order of the listing.

    Raises:
        UserError: nothing is left, or a class lost all its pictures.
    """
    kept = [position for position, result in enumerate(results) if isinstance(result, Row)]
    rows = [result for result in results if isinstance(result, Row)]
    refused = tuple(
        (source.names[position], result.reason)
        for position, result in enumerate(results)
        if isinstance(result, Refusal)
    )
    labels = source.labels[kept]
    _check_classes(source, labels)
    manifest = Manifest(
        folder=source.folder,
        class_names=source.class_names,
        paths=np.asarray([os.fsencode(source.names[position]) for position in kept]),
        stand_ins=np.asarray([row.stand_in.encode() for row in rows]),
        labels=labels,
        heights=np.asarray([row.height for row in rows], np.int32),
        widths=np.asarray([row.width for row in rows], np.int32),
        modes=np.asarray([row.mode.encode() for row in rows]),
        file_bytes=np.asarray([row.file_bytes for row in rows], np.int64),
        digests=np.frombuffer(b"".join(row.digest for row in rows), np.uint8).reshape(-1, DIGEST_BYTES),
        conditions=np.asarray([row.condition for row in rows], np.uint8),
        refused=refused,
        stand_in_folder=stand_in_folder,
    )
    named = zip(kept, rows, strict=True)
    full_header = {
        "source": source.kind,
        "ignored": list(source.ignored),
        "notes": [[source.names[position], note] for position, row in named for note in row.notes],
        "counts": np.bincount(labels, minlength=len(source.class_names)).tolist(),
        "versions": versions(),
        **header,
    }
    told = replace(manifest, header=full_header)
    return replace(told, header={**full_header, "data_hash": told.data_hash})


def _check_classes(source: Source, labels: np.typing.NDArray[np.int64]) -> None:
    if not len(labels):
        raise UserError("no picture of the source can be read: see the reasons with --on-error=error")
    before = np.bincount(source.labels, minlength=len(source.class_names))
    empty = np.flatnonzero((np.bincount(labels, minlength=len(before)) == 0) & (before > 0))
    if len(empty):
        raise UserError(
            f"class {source.class_names[empty[0]]}: none of its pictures can be read: mend or remove that class"
        )


def check_count(found: int, expected: str | None) -> None:
    """Compares a count with what the person expects.

    Args:
        found: pictures in the source.
        expected: a name of ILSVRC2012_COUNTS, or a number.

    Raises:
        UserError: they differ, or `expected` is neither.
    """
    if expected is None:
        return
    if expected not in ILSVRC2012_COUNTS and not expected.isdigit():
        raise UserError(f"--expect={expected}: is neither {', '.join(ILSVRC2012_COUNTS)} nor a number")
    wanted = ILSVRC2012_COUNTS.get(expected) or int(expected)
    if found != wanted:
        raise UserError(
            f"the source holds {found:,} pictures, {wanted:,} are expected ({expected}): complete it, or drop --expect"
        )


def summary(manifest: Manifest) -> list[str]:
    """What is in a manifest, in lines for people."""
    counts = manifest.header.get("counts") or [0]
    damaged = int((manifest.conditions == DAMAGED).sum())
    lines = [
        f"{len(manifest):,} pictures of {len(manifest.class_names):,} classes "
        f"({min(counts):,} to {max(counts):,} each), "
        f"{int(manifest.file_bytes.sum()) / 1e6:,.1f} MB",
        f"read {len(manifest) - damaged:,}, read with damage {damaged:,}, refused {len(manifest.refused):,}, "
        f"other files ignored {len(manifest.header.get('ignored', ())):,}",
        f"sizes {_range(manifest.widths)} x {_range(manifest.heights)} pixels; data hash {manifest.data_hash[:16]}",
    ]
    if manifest.stand_in_folder is not None:
        lines.append(f"{int((manifest.stand_ins != b'').sum()):,} stand-ins in {manifest.stand_in_folder}")
    return [*lines, *_about_ilsvrc2012(manifest)]


def findings(manifest: Manifest) -> list[str]:
    """Every file that is unusual, refused or ignored, by name."""
    return [
        *(f"{name}: refused: {reason}" for name, reason in manifest.refused),
        *(f"{name}: {note}" for name, note in manifest.header.get("notes", ())),
        *(f"{name}: ignored: no picture by its name" for name in manifest.header.get("ignored", ())),
    ]


def _range(column: Iterable[int]) -> str:
    values = np.asarray(column)
    return f"{values.min():,}" if values.min() == values.max() else f"{values.min():,}-{values.max():,}"


def _about_ilsvrc2012(manifest: Manifest) -> list[str]:
    """Its counts, and its known odd files: which of them were found as such."""
    if not is_ilsvrc2012(manifest.class_names):
        return []
    lines = []
    listed = len(manifest) + len(manifest.refused)
    if listed not in ILSVRC2012_COUNTS.values() and manifest.header.get("options", {}).get("limit") is None:
        lines.append(f"ILSVRC2012 has 1,281,167 training and 50,000 validation pictures; these are {listed:,}")
    notes = manifest.header.get("notes", ())
    cmyk = {os.path.basename(os.fsdecode(path)) for path in manifest.paths[manifest.modes == b"CMYK"]}
    png = {os.path.basename(name) for name, note in notes if note.startswith("PNG named JPEG")}
    present = {os.path.basename(os.fsdecode(path)) for path in manifest.paths}
    for what, known, found in (("CMYK", KNOWN_CMYK, cmyk), ("PNG named JPEG", KNOWN_PNG, png)):
        lines.append(
            f"known odd files, {what}: {len(known & found)} of the {len(known & present)} that are there "
            f"found as such, {len(found - known)} others"
        )
    return lines


def digest_of(content: bytes) -> bytes:
    """BLAKE2b, as manifests hold it."""
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()
