"""Checks a .beton or a manifest: decodes everything, and lists whatever is wrong.

    python -m data_prep.verify FILE

Exit code 0 where nothing is wrong, 1 where something is, 2 where the file cannot be read at all.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from data_prep.beton import sha256_of
from data_prep.judge import Refusal, Row, Rules, digest_of, judge
from data_prep.options import add_workers, run, say, shown
from data_prep.progress import Progress, gigabytes
from data_prep.work import Workers
from fastgen.arguments import Arguments
from fastgen.data.beton import JPEG, Beton, read_beton
from fastgen.data.manifest import DAMAGED, Manifest, read_manifest
from fastgen.data.photos import Refused, decode_plain
from fastgen.errors import FastgenError, UserError
from fastgen.stop import StopRequest

CONDITIONS = ("read", "read with damage")


class Wrong(FastgenError):
    """The file is not what it should be."""


@dataclass(frozen=True)
class StoredTask:
    """One picture of a .beton to check.

    Attributes:
        path: of the .beton.
        begin, stored_bytes: where it lies.
        mode, height, width: as the index says.
        crc32: likewise; None where the index does not tell.
    """

    path: Path
    begin: int
    stored_bytes: int
    mode: int
    height: int
    width: int
    crc32: int | None


@dataclass(frozen=True)
class FileTask:
    """One picture file to check against its row.

    Attributes:
        path: the file; None where the picture came from none.
        stand_in: of the file; None where the file itself is read.
        rules: how it was judged.
        row: what the manifest tells of it.
    """

    path: Path | None
    stand_in: Path | None
    rules: Rules
    row: Row


@dataclass(frozen=True)
class Checked:
    """What was found of one picture.

    Attributes:
        wrong: all that is wrong; nothing where all is well.
        read_bytes: bytes that were read.
    """

    wrong: tuple[str, ...]
    read_bytes: int


def main(words: Sequence[str]) -> None:
    """The command."""
    arguments = _read_arguments(words)
    with StopRequest() as stop, Workers(arguments.workers) as pool:
        check = _check_beton if _is_beton(arguments.file) else _check_manifest
        wrong = check(arguments.file, pool, stop)
    if arguments.report is not None:
        arguments.report.write_text("".join(f"{line}\n" for line in wrong), errors="surrogateescape")
    if wrong:
        say(*shown(wrong))
        raise Wrong(f"{arguments.file}: {len(wrong):,} things are wrong: make it again with data_prep")
    print(f"{arguments.file}: nothing is wrong")


def _is_beton(path: Path) -> bool:
    if not path.is_file():
        raise UserError(f"{path}: there is no such file: name a .beton or a manifest")
    with open(path, "rb") as file:
        # A manifest is a zip file.
        return file.read(2) != b"PK"


def _check_beton(path: Path, pool: Workers, stop: StopRequest) -> list[str]:
    beton = read_beton(path)
    beside = path.with_name(path.name + ".manifest")
    manifest = read_manifest(beside) if beside.exists() else None
    if manifest is None:
        print(f"{beside}: is not there: labels, sizes and names are not checked")
    wrong = [] if manifest is None else _compare(beton, manifest, stop)
    comparable = manifest is not None and len(manifest) == len(beton)

    def name(sample_id: int) -> str:
        return manifest.name(sample_id) if manifest is not None and comparable else f"sample {sample_id}"

    def tasks() -> Iterator[tuple[int, StoredTask]]:
        for number in range(len(beton)):
            height, width = beton.stored_sizes[number].tolist()
            yield (
                number,
                StoredTask(
                    path=path,
                    begin=int(beton.pointers[number]),
                    stored_bytes=int(beton.stored_bytes[number]),
                    mode=int(beton.modes[number]),
                    height=height,
                    width=width,
                    crc32=None if beton.crc32 is None else int(beton.crc32[number]),
                ),
            )

    return [*wrong, *_check_all(check_stored, tasks(), len(beton), name, pool, stop)]


def _compare(beton: Beton, manifest: Manifest, stop: StopRequest) -> list[str]:
    """Index and whole file against the manifest beside it."""
    header = manifest.header
    if len(beton) != len(manifest):
        return [f"holds {len(beton):,} samples, its manifest {len(manifest):,}"]
    wrong = [
        f"{manifest.name(int(number))}: {what} is {found[number].tolist()}, {told[number].tolist()} by the manifest"
        for what, found, told in (("label", beton.labels, manifest.labels), ("size", beton.sizes, manifest.sizes))
        for number in np.flatnonzero((found != told).reshape(len(beton), -1).any(axis=1))
    ]
    wrong += _compare_header(manifest)
    if header.get("beton_index_hash") != beton.index_hash:
        wrong.append("the hash of its index is not the manifest's")
    if header.get("beton_sha256") != sha256_of(beton.path, stop):
        wrong.append("its SHA-256 is not the manifest's")
    return wrong


def _compare_header(manifest: Manifest) -> list[str]:
    """What a manifest says of itself: counts, hash, labels."""
    classes = len(manifest.class_names)
    wrong = []
    if np.bincount(manifest.labels, minlength=classes).tolist() != manifest.header.get("counts"):
        wrong.append("the counts of its classes are not those of its rows")
    if manifest.header.get("data_hash") != manifest.data_hash:
        wrong.append("its data hash is not that of its rows")
    return wrong


def _check_manifest(path: Path, pool: Workers, stop: StopRequest) -> list[str]:
    manifest = read_manifest(path)
    wrong = _compare_header(manifest)
    if manifest.header.get("kind") == "beton":
        raise UserError(f"{path}: is the manifest of a .beton: give the .beton itself")
    options = manifest.header.get("options", {})
    tasks = ((number, _file_task(manifest, number, options)) for number in range(len(manifest)))
    wrong += _check_all(check_file, tasks, len(manifest), manifest.name, pool, stop)
    return wrong + _check_refused(manifest, options)


def _file_task(manifest: Manifest, number: int, options: Mapping[str, Any]) -> FileTask:
    path = None if manifest.folder is None else manifest.folder / manifest.name(number)
    return FileTask(
        path=path,
        stand_in=manifest.file(number) if manifest.stand_ins[number] else None,
        rules=_rules(options),
        row=Row(
            height=int(manifest.heights[number]),
            width=int(manifest.widths[number]),
            mode=manifest.modes[number].decode(errors="replace"),
            condition=int(manifest.conditions[number]),
            file_bytes=int(manifest.file_bytes[number]),
            digest=manifest.digests[number].tobytes(),
        ),
    )


def _rules(options: Mapping[str, Any]) -> Rules:
    return Rules(
        skip_refused=True, keep_damaged=options.get("damaged") != "refuse", exif=options.get("exif") == "apply"
    )


def _check_refused(manifest: Manifest, options: Mapping[str, Any]) -> list[str]:
    """What was refused must still be refused, or gone."""
    if manifest.folder is None:
        return []
    return [
        f"{name}: was refused ({reason}) and can be read now: make the manifest again"
        for name, reason in manifest.refused
        if (path := manifest.folder / name).exists() and not isinstance(judge(path, _rules(options)), Refusal)
    ]


def _check_all(
    check: Callable[[Any], Checked], tasks: Iterator[tuple[int, Any]], total: int, name: Callable[[int], str],
    pool: Workers, stop: StopRequest,
) -> list[str]:  # fmt: skip
    wrong, read_bytes = [], 0
    with Progress("verified", total) as progress:
        for number, checked in enumerate(pool.map(check, tasks, stop, name)):
            wrong += [f"{name(number)}: {reason}" for reason in checked.wrong]
            read_bytes += checked.read_bytes
            progress.add(1, checked.read_bytes)
        pace = progress.pace
        seconds = progress.seconds
    print(f"{total:,} pictures, {gigabytes(read_bytes)}, decoded in {seconds:.1f} s: {pace}")
    return wrong


def check_stored(task: StoredTask) -> Checked:
    """Checks one picture of a .beton; in a worker process."""
    stored = _mapped(task.path)[task.begin : task.begin + task.stored_bytes].tobytes()
    wrong = []
    if task.crc32 is not None and zlib.crc32(stored) != task.crc32:
        wrong.append("its bytes do not have the checksum that the index tells")
    if task.mode == JPEG:
        try:
            found = simplejpeg.decode_jpeg(stored, "RGB", strict=True).shape[:2]
        except ValueError as error:
            wrong.append(f"is not decoded ({error})")
        else:
            if found != (task.height, task.width):
                wrong.append(f"has {found[1]}x{found[0]} pixels, {task.width}x{task.height} by the index")
    return Checked(tuple(wrong), len(stored))


@lru_cache(maxsize=1)
def _mapped(path: Path) -> np.memmap[Any, np.dtype[np.uint8]]:
    return np.memmap(path, np.uint8, "r")


def check_file(task: FileTask) -> Checked:
    """Checks one picture file and its stand-in; in a worker process."""
    if task.path is None:
        return _check_stand_in(task, None)
    judged = judge(task.path, task.rules)
    if isinstance(judged, Refusal):
        return Checked((judged.reason,), 0)
    row, told = judged.row, task.row
    pairs = (
        ("bytes", row.file_bytes, told.file_bytes),
        ("pixels (height, width)", (row.height, row.width), (told.height, told.width)),
        ("mode", row.mode, told.mode),
        ("condition", CONDITIONS[row.condition == DAMAGED], CONDITIONS[told.condition == DAMAGED]),
    )
    wrong = [f"{what}: {found}, {listed} by the manifest" for what, found, listed in pairs if found != listed]
    if not wrong and row.digest != told.digest:
        wrong.append("holds other bytes than when the manifest was made")
    if judged.inspected is not None and judged.inspected.plain == (task.stand_in is not None):
        wrong.append("needs no stand-in, and has one" if judged.inspected.plain else "needs a stand-in, and has none")
    if task.stand_in is None or wrong:
        return Checked(tuple(wrong), row.file_bytes)
    return _check_stand_in(task, judged.pixels)


def _check_stand_in(task: FileTask, wanted: np.typing.NDArray[np.uint8] | None) -> Checked:
    """Compares a stand-in with the pixels it stands for, or, where those are not known, with their digest."""
    if task.stand_in is None:
        return Checked(("has neither a file nor a stand-in",), 0)
    try:
        content = task.stand_in.read_bytes()
        pixels = decode_plain(content)
    except OSError as error:
        return Checked((f"its stand-in {task.stand_in} cannot be opened ({error.strerror})",), 0)
    except Refused as refused:
        return Checked((f"its stand-in {task.stand_in} {refused}",), 0)
    same = digest_of(pixels.tobytes()) == task.row.digest if wanted is None else np.array_equal(pixels, wanted)
    wrong = () if same else (f"its stand-in {task.stand_in} shows another picture",)
    return Checked(wrong, task.row.file_bytes)


def _read_arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = Arguments("data_prep.verify", "Decodes everything in a .beton or manifest and lists what is wrong.")
    parser.add_argument("file", type=Path, metavar="FILE", help=".beton or manifest")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the whole list of what is wrong")
    add_workers(parser)
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
