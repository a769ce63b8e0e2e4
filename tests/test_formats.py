"""Manifests and .beton files: what is written is read, by FFCV too, and damage is one line, never a crash."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pictures
import pytest

from fastgen.data.beton import (
    JPEG,
    MIN_PAGE_BYTES,
    RAW,
    BetonWriter,
    Sample,
    page_bytes_for,
    read_beton,
)  # fmt: skip
from fastgen.data.manifest import DAMAGED, READ, Manifest, read_manifest, to_bytes
from fastgen.errors import UserError

FFCV_SECONDS = 240


def some_manifest(folder: Path, count: int = 5) -> Manifest:
    numbers = np.random.default_rng(0)
    return Manifest(
        folder=folder / "train",
        class_names=("cat", "dög"),
        paths=np.asarray([os.fsencode(f"cat/{number}\udcff.JPEG") for number in range(count)]),
        stand_ins=np.asarray([b"", b"ab/x.png"] * count)[:count],
        labels=np.arange(count, dtype=np.int64) % 2,
        heights=np.arange(1, count + 1, dtype=np.int32),
        widths=np.arange(11, count + 11, dtype=np.int32),
        modes=np.asarray([b"RGB"] * count),
        file_bytes=np.arange(100, count + 100, dtype=np.int64),
        digests=numbers.integers(0, 256, (count, 16), dtype=np.uint8),
        conditions=np.asarray([READ, DAMAGED] * count, np.uint8)[:count],
        refused=(("cat/bad.JPEG", "is empty"),),
        header={"kind": "manifest", "counts": [3, 2]},
        stand_in_folder=folder / "x.stand_ins",
    )


def written(manifest: Manifest, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(to_bytes(manifest, path))
    return path


def same(one: Manifest, other: Manifest) -> bool:
    columns = ("paths", "stand_ins", "labels", "heights", "widths", "modes", "file_bytes", "digests", "conditions")
    values = ("class_names", "refused", "header")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in columns) and all(
        getattr(one, name) == getattr(other, name) for name in values
    )


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    manifest = some_manifest(tmp_path)
    path = written(manifest, tmp_path / "x.manifest")
    found = read_manifest(path)
    assert same(found, manifest)
    assert found.folder == tmp_path / "train"
    assert found.file(0) == tmp_path / "train" / os.fsdecode(b"cat/0\xff.JPEG")
    assert found.file(1) == tmp_path / "x.stand_ins" / "ab/x.png"
    assert to_bytes(found, path) == path.read_bytes()


def test_a_manifest_moves_with_its_data(tmp_path):
    path = written(some_manifest(tmp_path / "old"), tmp_path / "old" / "x.manifest")
    path.parent.rename(tmp_path / "new")
    assert read_manifest(tmp_path / "new" / "x.manifest").folder == tmp_path / "new" / "train"
    elsewhere = written(some_manifest(tmp_path / "new"), tmp_path / "far" / "x.manifest")
    assert read_manifest(elsewhere).folder == tmp_path / "new" / "train"


def test_the_data_hash_is_of_digests_sizes_and_labels(tmp_path):
    manifest = some_manifest(tmp_path)
    digest = hashlib.sha256(b"photographs" + manifest.digests.tobytes())
    for height, width in zip(manifest.heights, manifest.widths, strict=True):
        digest.update(int(height).to_bytes(4, "little") + int(width).to_bytes(4, "little"))
    for label in manifest.labels:
        digest.update(int(label).to_bytes(8, "little"))
    assert manifest.data_hash == digest.hexdigest()
    assert replace(manifest, paths=manifest.paths[::-1]).data_hash == manifest.data_hash
    assert replace(manifest, labels=1 - manifest.labels).data_hash != manifest.data_hash
    assert replace(manifest, widths=manifest.widths + 1).data_hash != manifest.data_hash


@pytest.mark.parametrize(
    "change",
    [
        {"labels": np.asarray([0, 1, 2, 0, 1])},
        {"labels": np.asarray([0, 1, -1, 0, 1])},
        {"heights": np.zeros(5, np.int32)},
        {"widths": np.ones(4, np.int32)},
        {"digests": np.zeros((5, 15), np.uint8)},
        {"labels": np.zeros(5)},
    ],
)
def test_impossible_rows_are_refused(tmp_path, change):
    path = written(replace(some_manifest(tmp_path), **change), tmp_path / "x.manifest")
    with pytest.raises(UserError, match=r"x\.manifest: is damaged"):
        read_manifest(path)


def test_no_manifest_and_another_version(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such manifest"):
        read_manifest(tmp_path / "x.manifest")
    path = tmp_path / "x.manifest"
    monkeypatch.setattr("fastgen.data.manifest.MANIFEST_FORMAT", 0)
    written(some_manifest(tmp_path), path)
    monkeypatch.undo()
    with pytest.raises(UserError, match="another version"):
        read_manifest(path)


def test_a_mutated_manifest_is_refused_or_the_same(tmp_path):
    manifest = some_manifest(tmp_path)
    path = written(manifest, tmp_path / "x.manifest")
    content = path.read_bytes()
    numbers = np.random.default_rng(1)
    refused = 0
    for _ in range(300):
        changed = bytearray(content)
        changed[int(numbers.integers(len(changed)))] ^= 1 << int(numbers.integers(8))
        path.write_bytes(changed)
        try:
            # Some bits, such as a date in the zip file, mean nothing.
            assert same(read_manifest(path), manifest)
        except UserError:
            refused += 1
    assert refused > 100
    for length in range(0, len(content), len(content) // 40):
        path.write_bytes(content[:length])
        with pytest.raises(UserError):
            read_manifest(path)


# ---------------------------------------------------------------------------------------------- .beton


def some_samples(sizes: list[tuple[int, int]], seed: int = 0) -> list[Sample]:
    samples = []
    for number, (height, width) in enumerate(sizes):
        pixels = pictures.photograph(seed + number, height, width)
        as_jpeg = number % 3 == 1
        stored = pictures.encode(pixels, quality=90) if as_jpeg else pixels.tobytes()
        size = (2 * height, 3 * width)
        samples.append(Sample(stored, JPEG if as_jpeg else RAW, (height, width), size, number % 5, zlib.crc32(stored)))
    return samples


def write_beton(path: Path, samples: list[Sample], page_bytes: int = MIN_PAGE_BYTES, room: int | None = None) -> Path:
    with open(path, "wb") as file:
        writer = BetonWriter(file, len(samples) if room is None else room, page_bytes)
        for sample in samples:
            writer.add(sample)
        writer.finish()
    return path


def assert_holds(path: Path, samples: list[Sample]) -> None:
    beton = read_beton(path)
    assert len(beton) == len(samples)
    assert beton.labels.tolist() == [sample.label for sample in samples]
    assert beton.modes.tolist() == [sample.mode for sample in samples]
    assert [tuple(size) for size in beton.stored_sizes.tolist()] == [sample.stored_size for sample in samples]
    assert [tuple(size) for size in beton.sizes.tolist()] == [sample.size for sample in samples]
    assert beton.crc32.tolist() == [sample.crc32 for sample in samples]
    assert all(beton.bytes_of(number).tobytes() == sample.stored for number, sample in enumerate(samples))


def test_a_beton_is_read_as_it_was_written(tmp_path):
    samples = some_samples([(40, 50), (30, 30), (1, 1), (3, 700), (700, 3)])
    assert_holds(write_beton(tmp_path / "x.beton", samples), samples)


def test_images_never_cross_the_end_of_a_page(tmp_path):
    # Two raw ones fill a page to the byte; then one does not fit into what the next one left.
    page = MIN_PAGE_BYTES
    exact = [Sample(bytes([number]) * (page // 2), RAW, (1, 1), (1, 1), 0, 0) for number in range(2)]
    larger = [Sample(b"\7" * (page * 3 // 4), RAW, (1, 1), (1, 1), 0, 0) for _ in range(2)]
    whole = Sample(b"\x09" * page, RAW, (1, 1), (1, 1), 0, 0)
    samples = [*exact, *larger, whole]
    path = tmp_path / "x.beton"
    with open(path, "wb") as file:
        writer = BetonWriter(file, len(samples), page)
        for sample in samples:
            writer.add(sample)
        with pytest.raises(ValueError, match="too large"):
            writer.add(Sample(b"x" * (page + 1), RAW, (1, 1), (1, 1), 0, 0))
        writer.finish()
    content = path.read_bytes()
    # Read by hand: rows of 1 x image (13 bytes, padded to 16) and 4 x int64, after a header of 24 bytes and 5 fields.
    row_at = 24 + 5 * 1041
    row_at += -row_at % 1
    rows = np.frombuffer(
        content, np.dtype({"names": ["ptr"], "formats": ["<u8"], "offsets": [5], "itemsize": 48}), 5, row_at
    )
    begins = rows["ptr"].tolist()
    assert begins == [page, page + page // 2, 2 * page, 3 * page, 4 * page]
    for begin, sample in zip(begins, samples, strict=True):
        assert content[begin : begin + len(sample.stored)] == sample.stored
        assert begin // page == (begin + len(sample.stored) - 1) // page


def test_pages_are_powers_of_two_that_hold_the_largest():
    assert page_bytes_for(0) == page_bytes_for(8 << 20) == 8 << 20
    assert page_bytes_for((8 << 20) + 1) == 16 << 20
    with pytest.raises(ValueError, match="power of two"):
        BetonWriter(io.BytesIO(), 1, 3 << 20)


def test_fewer_samples_than_there_is_room_for(tmp_path):
    samples = some_samples([(40, 50), (30, 30)])
    assert_holds(write_beton(tmp_path / "x.beton", samples, room=100), samples)


def test_going_on_gives_the_same_bytes(tmp_path):
    samples = some_samples([(40 + number, 50) for number in range(20)])
    whole = write_beton(tmp_path / "whole.beton", samples).read_bytes()
    for done in range(len(samples)):
        path = tmp_path / "part.beton"
        with open(path, "w+b") as file:
            writer = BetonWriter(file, len(samples), MIN_PAGE_BYTES)
            for sample in samples[:done]:
                writer.add(sample)
            file.write(b"half an image")
        with open(path, "r+b") as file:
            writer = BetonWriter(file, len(samples), MIN_PAGE_BYTES)
            for sample in samples[:done]:
                writer.skip(replace(sample, stored=b""), len(sample.stored))
            writer.cut()
            for sample in samples[done:]:
                writer.add(sample)
            writer.finish()
        assert path.read_bytes() == whole


def test_going_on_needs_what_was_written(tmp_path):
    samples = some_samples([(40, 50)])
    with open(tmp_path / "x", "w+b") as file:
        writer = BetonWriter(file, 2, MIN_PAGE_BYTES)
        writer.skip(samples[0], 6000)
        with pytest.raises(ValueError, match="ends before"):
            writer.cut()


def run_python(code: str, *words: object) -> str:
    """Runs code in a process of its own: FFCV compiles, warns, and may abort."""
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=FFCV_SECONDS, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


READ_BY_FFCV = """
import json, sys, zlib
from ffcv.reader import Reader
from ffcv.memory_managers import OSCacheManager
import numpy as np
reader = Reader(sys.argv[1])
rows = reader.metadata
where = {int(entry["ptr"]): int(entry["size"]) for entry in reader.alloc_table}
content = np.fromfile(sys.argv[1], np.uint8)
columns = dict(zip(reader.field_names, rows.dtype.names))
image = rows[columns["image"]]
print(json.dumps({
    "fields": reader.field_names,
    "handlers": [type(handler).__name__ for handler in reader.handlers.values()],
    "page": int(reader.page_size),
    "rows": [
        [int(image["mode"][n]), int(image["height"][n]), int(image["width"][n]),
         zlib.crc32(content[int(image["data_ptr"][n]):][:where[int(image["data_ptr"][n])]].tobytes()),
         *[int(rows[columns[name]][n]) for name in ("label", "height", "width", "crc32")]]
        for n in range(reader.num_samples)
    ],
    "ids": reader.alloc_table["sample_id"].tolist(),
}))
"""


def test_ffcv_reads_ours(tmp_path):
    pytest.importorskip("ffcv")
    samples = some_samples([(40, 50), (30, 30), (1, 1), (3, 700), (700, 3), (60, 60)])
    path = write_beton(tmp_path / "x.beton", samples)
    found = json.loads(run_python(READ_BY_FFCV, path).splitlines()[-1])
    assert found["fields"] == ["image", "label", "height", "width", "crc32"]
    assert found["handlers"] == ["RGBImageField"] + 4 * ["IntField"]
    assert found["page"] == MIN_PAGE_BYTES
    assert found["ids"] == list(range(len(samples)))
    assert found["rows"] == [
        [sample.mode, *sample.stored_size, zlib.crc32(sample.stored), sample.label, *sample.size, sample.crc32]
        for sample in samples
    ]


LOAD_BY_FFCV = """
import sys
import numpy as np
from ffcv.loader import Loader, OrderOption
from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder
loader = Loader(sys.argv[1], batch_size=2, num_workers=1, order=OrderOption.SEQUENTIAL,
    drop_last=False, os_cache=sys.argv[3] == "os",
    pipelines={"image": [CenterCropRGBImageDecoder((32, 32), 1.0)], "label": [IntDecoder()],
               "height": [IntDecoder()], "width": [IntDecoder()], "crc32": [IntDecoder()]})
images, labels, heights = [], [], []
for batch in loader:
    images.append(np.array(batch[0])); labels.append(np.array(batch[1])); heights.append(np.array(batch[2]))
np.savez(sys.argv[2], images=np.concatenate(images), labels=np.concatenate(labels), heights=np.concatenate(heights))
"""


@pytest.mark.parametrize("cache", ["os", "process"])
def test_ffcv_loads_ours(tmp_path, cache):
    pytest.importorskip("ffcv")
    pixels = [pictures.photograph(number, 32, 32) for number in range(5)]
    samples = [
        Sample(each.tobytes(), RAW, (32, 32), (64 + number, 64), number, zlib.crc32(each.tobytes()))
        for number, each in enumerate(pixels)
    ]
    path = write_beton(tmp_path / "x.beton", samples)
    run_python(LOAD_BY_FFCV, path, tmp_path / "out.npz", cache)
    with np.load(tmp_path / "out.npz") as found:
        assert np.array_equal(found["images"], np.stack(pixels))
        assert found["labels"].ravel().tolist() == [0, 1, 2, 3, 4]
        assert found["heights"].ravel().tolist() == [64, 65, 66, 67, 68]


WRITE_BY_FFCV = """
import sys
import numpy as np
from ffcv.writer import DatasetWriter
from ffcv.fields import IntField, FloatField, BytesField, RGBImageField
content = np.load(sys.argv[1])
images = [content[f"image_{n}"] for n in range(len(content.files))]
class Pictures:
    def __len__(self): return len(images)
    def __getitem__(self, n): return 0.5 * n, images[n], np.arange(n + 1, dtype=np.uint8), 7 - n
if __name__ == "__main__":
    writer = DatasetWriter(sys.argv[2], {"weight": FloatField(), "picture": RGBImageField(write_mode=sys.argv[3]),
        "extra": BytesField(), "label": IntField()}, page_size=1 << 21, num_workers=1)
    writer.from_indexed_dataset(Pictures(), chunksize=2)
"""


@pytest.mark.parametrize("mode", ["raw", "jpg"])
def test_we_read_ffcvs(tmp_path, mode):
    pytest.importorskip("ffcv")
    made = [pictures.photograph(number, 30 + number, 44) for number in range(7)]
    np.savez(tmp_path / "in.npz", **{f"image_{number}": each for number, each in enumerate(made)})
    path = tmp_path / "ffcv.beton"
    run_python(WRITE_BY_FFCV, tmp_path / "in.npz", path, mode)
    beton = read_beton(path)
    assert beton.labels.tolist() == [7, 6, 5, 4, 3, 2, 1]
    assert beton.crc32 is None
    assert beton.sizes.tolist() == beton.stored_sizes.tolist() == [[30 + number, 44] for number in range(7)]
    assert beton.modes.tolist() == [RAW if mode == "raw" else JPEG] * 7
    for number, each in enumerate(made):
        stored = beton.bytes_of(number)
        if mode == "raw":
            assert np.array_equal(stored.reshape(each.shape), each)
        else:
            decoded = pictures.Image.open(io.BytesIO(stored.tobytes()))
            assert np.abs(np.asarray(decoded).astype(int) - each).mean() < 10


def test_a_truncated_beton_is_one_line(tmp_path):
    path = write_beton(tmp_path / "x.beton", some_samples([(40, 50), (30, 30), (20, 20)]))
    content = path.read_bytes()
    lengths = [
        0,
        1,
        23,
        24,
        1000,
        24 + 5 * 1041,
        MIN_PAGE_BYTES,
        len(content) - 25,
        len(content) - 24,
        len(content) - 1,
    ]
    for length in lengths:
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"x\.beton") as error:
            read_beton(path)
        assert "\n" not in str(error.value)
    path.unlink()
    with pytest.raises(UserError, match="no such file"):
        read_beton(path)


def test_a_mutated_index_is_refused_or_safe(tmp_path):
    """Where damage is not seen in the index, no access leads out of the file, and the index hash tells."""
    path = write_beton(tmp_path / "x.beton", some_samples([(40, 50), (30, 30), (20, 20), (9, 9)]))
    content = path.read_bytes()
    whole = read_beton(path)
    rows_end = 24 + 5 * 1041 + 4 * 48
    table_at = len(content) - 4 * 24
    numbers = np.random.default_rng(2)
    places = [*range(24), *range(24 + 5 * 1041, rows_end), *range(table_at, len(content))]
    # Names and kinds of the fields; the rest of them is empty.
    places += [24 + field * 1041 + byte for field in range(5) for byte in range(18)]
    refused = told = 0
    for _ in range(600):
        at, bit = int(numbers.choice(places)), int(numbers.integers(8))
        with open(path, "r+b") as file:
            file.seek(at)
            file.write(bytes([content[at] ^ 1 << bit]))
        try:
            beton = read_beton(path)
        except UserError:
            refused += 1
        else:
            for number in range(len(beton)):
                assert len(beton.bytes_of(number)) == beton.stored_bytes[number]
            told += beton.index_hash != whole.index_hash
        with open(path, "r+b") as file:
            file.seek(at)
            file.write(content[at : at + 1])
    assert refused > 150
    assert told > 100
    assert read_beton(path).index_hash == whole.index_hash


ROWS_AT = 24 + 5 * 1041


@pytest.mark.parametrize(
    ("at", "written_there"),
    [
        (24 + 3 * 1041 + 1, b"height\0"),  # width, too, is called height
        (24 + 0 * 1041, b"\xff"),  # a kind of field that only its maker knows
        (-8, (0).to_bytes(8, "little")),  # the last picture has no bytes
        (-8, (1 << 63).to_bytes(8, "little")),  # or more than there are
        (-8, ((1 << 64) - 5).to_bytes(8, "little")),
        (-16, (1 << 63).to_bytes(8, "little")),  # it lies beyond the file
        (ROWS_AT + 48, b"\x02"),  # it is neither JPEG nor raw
        (ROWS_AT + 48 + 1, b"\0\0"),  # it has no pixels
        (ROWS_AT + 48 + 24, bytes(8)),  # the picture it was made of had none
    ],
)
def test_impossible_entries_are_refused(tmp_path, at, written_there):
    # The second of two, a JPEG: nothing but the table tells how many bytes it has.
    path = write_beton(tmp_path / "x.beton", some_samples([(40, 50), (30, 30)]))
    assert len(read_beton(path)) == 2
    with open(path, "r+b") as file:
        file.seek(at, os.SEEK_SET if at >= 0 else os.SEEK_END)
        file.write(written_there)
    with pytest.raises(UserError, match=r"x\.beton: (is damaged|holds a field)"):
        read_beton(path)


CLAIMS = [("num_samples", 1 << 60), ("num_samples", 5), ("num_fields", 60_000), ("num_fields", 0)]


@pytest.mark.parametrize(("field", "claimed"), CLAIMS)
def test_claims_of_the_header_allocate_nothing(tmp_path, field, claimed):
    path = write_beton(tmp_path / "x.beton", some_samples([(40, 50)]))
    at, size = {"num_fields": (2, 2), "num_samples": (8, 8)}[field]
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(claimed.to_bytes(size, "little"))
    with pytest.raises(UserError):
        read_beton(path)
