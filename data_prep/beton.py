"""Writes a .beton, the file that FFCV reads, and a manifest beside it.

    python -m data_prep.beton --source=DIR --out=FILE

The same pictures and options give the same bytes, whatever the number of workers. Killed at any time, it
leaves the old file or the new one under the final name; the same command then goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import shutil
import sys
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from data_prep.journal import Journal, Places, Stored, remove_leftovers
from data_prep.judge import Judged, Refusal, Row, Rules, check_count, digest_of, findings, judge, make_manifest, summary
from data_prep.options import add_source, request_of, run, say, shown, versions
from data_prep.progress import Progress, clock, gigabytes
from data_prep.sources import Picture, Source, UInt8, file_bytes, open_source, sample_evenly
from data_prep.work import CHUNK, Workers
from fastgen.arguments import Arguments, at_least_one
from fastgen.data.beton import JPEG, MAX_SIDE_PX, RAW, Sample, page_bytes_for, read_beton
from fastgen.data.manifest import Manifest, read_manifest, to_bytes
from fastgen.data.photos import Refused, read_size
from fastgen.errors import MachineError, Stopped, UserError
from fastgen.philox import philox4x32
from fastgen.stop import StopRequest

MODES = ("jpeg", "raw", "mixed")
SAMPLED = 128
# Key of the draw which pictures of `mixed` are JPEG: the letters "beto", "n".
MIXED_KEY = (0x6265746F, 0x6E)
HASH_BYTES = 1 << 24


@dataclass(frozen=True)
class Storage:
    """How pictures are stored.

    Attributes:
        mode: `jpeg`, `raw` or `mixed`.
        jpeg_share: of the pictures of `mixed` that are JPEG.
        quality: of JPEGs that are encoded here, 1 to 100.
        longest_px, shortest_px: larger pictures are made so small that this side has so many pixels; None leaves them.
        reencode: also JPEGs that could stay as they are.
    """

    mode: str
    jpeg_share: float
    quality: int
    longest_px: int | None
    shortest_px: int | None
    reencode: bool

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width as stored: never enlarged, never below one pixel."""
        side, wanted = max(height, width), self.longest_px
        if self.shortest_px is not None:
            side, wanted = min(height, width), self.shortest_px
        if wanted is None or wanted >= side:
            return height, width
        # Rounded half up, in integers.
        return tuple(max(1, (2 * length * wanted + side) // (2 * side)) for length in (height, width))  # type: ignore[return-value]

    def is_jpeg(self, position: int) -> bool:
        """Whether the picture at that place of the listing is stored as JPEG; a function of the place alone."""
        if self.mode != "mixed":
            return self.mode == "jpeg"
        counter = np.asarray([position, 0, 0, 0], np.uint32)
        return int(philox4x32(counter, MIXED_KEY)[0]) < self.jpeg_share * 2**32


@dataclass(frozen=True)
class Task:
    """One picture to store."""

    picture: Picture
    label: int
    as_jpeg: bool
    storage: Storage
    rules: Rules


class PageTooSmall(Exception):
    """A picture takes more than a page."""

    def __init__(self, needed_bytes: int) -> None:
        super().__init__(f"{needed_bytes:,} bytes")
        self.needed_bytes = needed_bytes


def main(words: Sequence[str]) -> None:
    """The command."""
    arguments = _read_arguments(words)
    if arguments.out is None:
        raise UserError("--out is missing: name the file to write, such as DIR/train.beton")
    if arguments.out.is_dir():
        raise UserError(f"--out={arguments.out}: is a folder: name a file in it, such as train.beton")
    places = Places(arguments.out)
    source = open_source(request_of(arguments))
    check_count(len(source), arguments.expect)
    storage = _storage(arguments, source)
    rules = Rules(arguments.on_error == "skip", arguments.damaged == "keep", arguments.exif == "apply")
    # Whether a refused file ends the command or not: what is written is the same.
    options = {**{key: value for key, value in rules.as_options().items() if key != "on-error"}, **asdict(storage)}
    identity = {
        "options": options,
        "fingerprint": source.fingerprint(),
        "versions": versions(),
        "pictures": len(source),
    }
    if arguments.redo:
        remove_leftovers(places)
    elif not places.journal.exists() and is_done(places, source, identity, arguments.workers):
        print(
            f"{places.out}: is there already, of the same pictures and options: nothing to do (--redo writes it again)"
        )
        return
    places.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        manifest = write(source, places, storage, rules, identity, arguments.workers)
    except Stopped:
        print(f"the same command goes on: {_as_typed('data_prep.beton', words)}", file=sys.stderr)
        raise
    say(f"{places.out}: {gigabytes(places.out.stat().st_size)}, SHA-256 {manifest.header['beton_sha256'][:16]}")
    say(*(f"  {line}" for line in [*summary(manifest), *shown(findings(manifest))]))


def write(
    source: Source, places: Places, storage: Storage, rules: Rules, identity: dict[str, Any], workers: int
) -> Manifest:
    """Writes the .beton and its manifest.

    Raises:
        UserError: a picture is refused, and the rules do not skip those.
        MachineError: the disk has too little room, or a worker process died.
        Stopped: a signal came.
    """
    with StopRequest() as stop, Workers(workers) as pool:
        page_bytes = page_bytes_for(_largest(source, storage, pool, stop))
        while True:
            try:
                return _write(source, places, storage, rules, identity, page_bytes, pool, stop)
            except PageTooSmall as found:
                # Rare: only pictures that are encoded here can turn out larger than was seen from their headers.
                page_bytes = page_bytes_for(found.needed_bytes)
                print(f"a picture takes {found}: starting over with pages of {gigabytes(page_bytes)}", file=sys.stderr)
                remove_leftovers(places)


def _write(
    source: Source, places: Places, storage: Storage, rules: Rules, identity: dict[str, Any], page_bytes: int,
    pool: Workers, stop: StopRequest,
) -> Manifest:  # fmt: skip
    labels = source.labels.tolist()
    with Journal(places, identity, labels, page_bytes) as journal:
        done = len(journal.entries)
        if done:
            print(f"going on after {done:,} of {len(source):,} pictures", file=sys.stderr)
        if done < len(source):
            _estimate(source, storage, rules, places, done, pool, stop)
        with Progress("written", len(source), done) as progress:
            tasks = ((place, _task(source, place, storage, rules)) for place in range(done, len(source)))
            for entry in pool.map(store, tasks, stop, source.names.__getitem__):
                _add(journal, entry, source, rules, page_bytes)
                progress.add(1, entry.stored_bytes if isinstance(entry, Stored) else 0)
            print(f"{progress.pace}, {progress.seconds:.1f} s", file=sys.stderr)
        results = [entry.row if isinstance(entry, Stored) else entry for entry in journal.entries]
        manifest = make_manifest(source, results, {}, None)
        journal.finish()
        header = {
            "kind": "beton",
            **identity,
            "page_bytes": page_bytes,
            "beton_bytes": places.partial.stat().st_size,
            "beton_sha256": sha256_of(places.partial, stop),
            "beton_index_hash": read_beton(places.partial).index_hash,
            "stored_as_jpeg": sum(isinstance(entry, Stored) and entry.sample.mode == JPEG for entry in journal.entries),
        }
        manifest = make_manifest(source, results, header, None)
        os.replace(places.partial, places.out)
        _write_manifest(places.manifest, manifest)
        places.journal.unlink()
    return manifest


def _add(journal: Journal, entry: Stored | Refusal, source: Source, rules: Rules, page_bytes: int) -> None:
    name = source.names[len(journal.entries)]
    if isinstance(entry, Refusal) and not rules.skip_refused:
        raise UserError(f"{name}: {entry.reason}: mend or remove it, or leave such files out with --on-error=skip")
    if isinstance(entry, Stored) and entry.stored_bytes > page_bytes:
        raise PageTooSmall(entry.stored_bytes)
    journal.add(entry)


def _task(source: Source, position: int, storage: Storage, rules: Rules) -> Task:
    as_jpeg = storage.is_jpeg(position)
    return Task(source.picture(position), int(source.labels[position]), as_jpeg, storage, rules)


def store(task: Task) -> Stored | Refusal:
    """Judges one picture and brings it into the form in which it is stored; in a worker process."""
    judged = judge(task.picture, task.rules)
    if isinstance(judged, Refusal):
        return judged
    row, storage = judged.row, task.storage
    stored_size = storage.size(row.height, row.width)
    if task.as_jpeg and not storage.reencode and stored_size == (row.height, row.width) and _may_stay(judged):
        assert judged.content is not None
        return _stored(row, judged.content, JPEG, stored_size, task.label)
    pixels = _resized(judged.pixels, stored_size)
    if task.as_jpeg:
        # 4:2:0, as nearly all photographs have it.
        content = bytes(simplejpeg.encode_jpeg(pixels, storage.quality, "RGB", "420"))
        return _stored(row, content, JPEG, stored_size, task.label)
    return _stored(row, pixels.tobytes(), RAW, stored_size, task.label)


def _may_stay(judged: Judged) -> bool:
    return judged.inspected is not None and judged.inspected.plain and judged.inspected.is_jpeg


def _stored(row: Row, content: bytes, mode: int, stored_size: tuple[int, int], label: int) -> Stored:
    sample = Sample(content, mode, stored_size, (row.height, row.width), label, zlib.crc32(content))
    return Stored(row, sample, len(content))


def _resized(pixels: UInt8, size: tuple[int, int]) -> UInt8:
    """Smaller, by Pillow's antialiased Lanczos filter.

    Of Pillow's filters it keeps most of the detail that the smaller picture can hold; the loader's own, softer filter
    comes after it, for every crop.
    """
    if pixels.shape[:2] == size:
        return pixels
    return np.ascontiguousarray(Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.LANCZOS))


def is_done(places: Places, source: Source, identity: dict[str, Any], workers: int) -> bool:
    """Whether the .beton is there already.

    Raises:
        UserError: something else is there under its name.
    """
    if not places.out.exists():
        return False
    if not places.manifest.exists():
        raise UserError(
            f"{places.out}: is there already, without its manifest: name another --out, or replace it with --redo"
        )
    manifest, beton = read_manifest(places.manifest), read_beton(places.out)
    header = manifest.header
    if header.get("beton_index_hash") != beton.index_hash or header.get("beton_bytes") != places.out.stat().st_size:
        raise UserError(f"{places.out}: does not belong to the manifest beside it: replace it with --redo")
    same = all(header.get(key) == identity[key] for key in ("options", "pictures"))
    same_files = header.get("fingerprint") == identity["fingerprint"]
    if not same or not (same_files or _same_content(manifest, source, workers)):
        raise UserError(
            f"{places.out}: is there already, with other options or pictures: "
            "name another --out, or replace it with --redo"
        )
    return True


def _same_content(manifest: Manifest, source: Source, workers: int) -> bool:
    """Whether the files, although touched or moved, still hold what they held; reads all of them."""
    names = tuple(manifest.name(number) for number in range(len(manifest)))
    if source.names != names or (source.labels != manifest.labels).any() or source.class_names != manifest.class_names:
        return False
    jobs = ((place, source.picture(place)) for place in range(len(source)))
    with StopRequest() as stop, Workers(workers) as pool, Progress("compared", len(source)) as progress:
        for place, digest in enumerate(pool.map(read_digest, jobs, stop, source.names.__getitem__)):
            if digest != manifest.digests[place].tobytes():
                return False
            progress.add(1)
    return True


def read_digest(picture: Picture) -> bytes:
    """Digest of a file or of pixels; in a worker process."""
    return digest_of(picture.read_bytes() if isinstance(picture, Path) else picture.tobytes())


def sha256_of(path: Path, stop: StopRequest | None = None) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while content := file.read(HASH_BYTES):
            digest.update(content)
            if stop is not None:
                stop.check()
    return digest.hexdigest()


def _largest(source: Source, storage: Storage, pool: Workers, stop: StopRequest) -> int:
    """Bytes of the largest picture as stored, from files' sizes or headers."""
    positions = range(len(source))
    unchanged = storage.mode == "jpeg" and not storage.reencode and storage.longest_px is storage.shortest_px is None
    if unchanged:
        return max(file_bytes(source, [position]) for position in positions)
    jobs = ((position, source.picture(position)) for position in positions)
    bytes_per_pixel = 1 if storage.mode == "jpeg" else 3
    largest = 0
    with Progress("sizes read", len(source)) as progress:
        for height, width in pool.map(measure, jobs, stop, source.names.__getitem__):
            stored = storage.size(height, width)
            largest = max(largest, bytes_per_pixel * stored[0] * stored[1])
            progress.add(1)
    return largest


def measure(picture: Picture) -> tuple[int, int]:
    """Height and width by the header, (0, 0) where there is none; in a worker process."""
    if not isinstance(picture, Path):
        return picture.shape[0], picture.shape[1]
    try:
        with open(picture, "rb") as file:
            head = file.read(1 << 16)
            try:
                return read_size(head)
            except Refused:
                return read_size(head + file.read())
    except (OSError, Refused):
        return 0, 0


def _estimate(
    source: Source, storage: Storage, rules: Rules, places: Places, done: int, pool: Workers, stop: StopRequest
) -> None:
    """Says how large the file will be and how long it takes, from some of the pictures, and that the disk has room.

    Raises:
        MachineError: it has not.
    """
    left = len(source) - done
    sampled = (done + sample_evenly(left, SAMPLED)).tolist()
    jobs = ((position, _task(source, position, storage, rules)) for position in sampled)
    sizes: list[int] = []
    for entry in pool.map(store, jobs, stop, source.names.__getitem__):
        if not sizes:
            # The processes have started now; that time is not charged to the pictures.
            progress = Progress("sampled", len(sampled))
        sizes.append(entry.stored_bytes if isinstance(entry, Stored) else 0)
    wanted = float(np.mean(sizes)) * left
    spread = 2 * float(np.std(sizes)) / len(sizes) ** 0.5 * left
    free = shutil.disk_usage(places.out.parent).free
    seconds = progress.seconds / max(len(sampled) - CHUNK, 1) * left
    print(
        f"{left:,} pictures: about {gigabytes(wanted)} (+- {gigabytes(spread)}) and {clock(seconds)}, "
        f"judged by {len(sizes)} of them; {gigabytes(free)} free",
        file=sys.stderr,
    )
    if wanted > free:
        raise MachineError(
            f"{places.out.parent}: has {gigabytes(free)} free, about {gigabytes(wanted)} are needed: "
            "free some, or name another --out"
        )


def _storage(arguments: argparse.Namespace, source: Source) -> Storage:
    """Settings of the command line; raw is the default for pictures that come as pixels."""
    mode = arguments.mode or ("raw" if source.folder is None else "jpeg")
    if arguments.longest_px is not None and arguments.shortest_px is not None:
        raise UserError("--longest-px and --shortest-px: give one of them")
    if not 1 <= arguments.quality <= 100:
        raise UserError(f"--quality={arguments.quality}: must be 1 to 100")
    if not 0 <= arguments.jpeg_share <= 1:
        raise UserError(f"--jpeg-share={arguments.jpeg_share}: must be 0 to 1")
    if max(arguments.longest_px or 1, arguments.shortest_px or 1) > MAX_SIDE_PX:
        raise UserError(f"--longest-px and --shortest-px: must be at most {MAX_SIDE_PX:,}")
    return Storage(
        mode, arguments.jpeg_share, arguments.quality, arguments.longest_px, arguments.shortest_px, arguments.reencode
    )


def _write_manifest(path: Path, manifest: Manifest) -> None:
    # Brings torch with it, which worker processes need not load.
    from fastgen.files import write_atomically

    write_atomically(path, to_bytes(manifest, path))


def _as_typed(module: str, words: Sequence[str]) -> str:
    return shlex.join(["python", "-m", module, *(word for word in words if word != "--redo")])


def _read_arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = Arguments("data_prep.beton", "Writes pictures into a .beton, the file that FFCV reads.")
    add_source(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help=".beton to write")
    parser.add_argument("--mode", choices=MODES, help="jpeg (default for files), raw (default for CIFAR), or mixed")
    parser.add_argument(
        "--jpeg-share", type=float, default=0.5, metavar="S", help="of the pictures of mixed that are JPEG; default 0.5"
    )
    parser.add_argument(
        "--quality", type=int, default=90, metavar="Q", help="of JPEGs that are encoded here; default 90"
    )
    parser.add_argument(
        "--longest-px",
        type=at_least_one,
        metavar="N",
        help="make larger pictures so small that the longest side has N pixels",
    )
    parser.add_argument("--shortest-px", type=at_least_one, metavar="N", help="... that the shortest side has N pixels")
    parser.add_argument(
        "--reencode",
        action="store_true",
        help="encode every JPEG anew; without it those that need no change keep their bytes",
    )
    parser.add_argument(
        "--expect",
        metavar="COUNT",
        help="ilsvrc2012-train, ilsvrc2012-val or a number: refuse a source of another count",
    )
    parser.add_argument("--redo", action="store_true", help="start over, and replace a file that is there")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
