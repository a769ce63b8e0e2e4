"""The commands of data_prep: what they write is what a plain reading of the files gives, and nothing ends in a hang."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pictures
import pytest
import simplejpeg
from PIL import Image

from data_prep import beton as beton_command
from data_prep import judge, sources, tars, verify, work
from data_prep import manifest as manifest_command
from data_prep.options import run
from fastgen.data.beton import JPEG, RAW, read_beton
from fastgen.data.cifar import read_cifar
from fastgen.data.manifest import DAMAGED, READ, read_manifest
from fastgen.data.photos import Refused, decode, inspect
from fastgen.errors import MachineError, UserError
from fastgen.stop import StopRequest

ROOT = Path(__file__).parent.parent
SLOW_MACHINE_SECONDS = 120


def ends(command, *words: object, workers: int | None = 1) -> int:
    """Exit code of a command in this process; its workers are others."""
    asked = [] if workers is None else [f"--workers={workers}"]
    return run(command.main, [*map(str, words), *asked])


def make(command, source: Path, out: Path, *words: object, workers: int = 1) -> Path:
    """Runs a command that must succeed; gives the file that it wrote."""
    assert ends(command, f"--source={source}", f"--out={out}", *words, workers=workers) == 0
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of four ordinary pictures."""
    return pictures.write_folder(tmp_path_factory.mktemp("plain") / "train")


@pytest.fixture(scope="module")
def odd_folder(tmp_path_factory):
    """All odd files; those that are refused have the class of those that are, with one ordinary picture."""
    return pictures.write_odd_folder(tmp_path_factory.mktemp("odd") / "train")


def listing(source: Path) -> list[Path]:
    """Files in the order that every command must use."""
    return [file for place in sorted(source.iterdir()) for file in sorted(place.iterdir())]


def picture_of(file: Path) -> Image.Image:
    """A picture file by Pillow, which leaves no file open."""
    return Image.open(io.BytesIO(file.read_bytes()))


def condition_of(file: Path) -> str:
    made = pictures.ODD.get(file.stem)
    return pictures.READ if made is None else made().found


# ------------------------------------------------------------------------------------------- manifest


def test_a_manifest_tells_what_is_there(folder, tmp_path):
    manifest = read_manifest(make(manifest_command, folder, tmp_path / "x.manifest"))
    files = listing(folder)
    assert manifest.class_names == ("class_0", "class_1", "class_2")
    assert [manifest.file(number) for number in range(len(manifest))] == files
    assert manifest.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert [(int(w), int(h)) for h, w in manifest.sizes] == [picture_of(file).size for file in files]
    assert manifest.file_bytes.tolist() == [file.stat().st_size for file in files]
    digests = [hashlib.blake2b(file.read_bytes(), digest_size=16).digest() for file in files]
    assert [digest.tobytes() for digest in manifest.digests] == digests
    assert set(manifest.conditions.tolist()) == {READ}
    assert manifest.header["counts"] == [4, 4, 4]
    assert manifest.header["data_hash"] == manifest.data_hash
    assert not (tmp_path / "x.manifest.stand_ins").exists()


def test_odd_files_are_named_and_have_stand_ins(odd_folder, tmp_path, capsys):
    out = make(manifest_command, odd_folder, tmp_path / "x.manifest", "--on-error=skip")
    told = capsys.readouterr().out
    manifest = read_manifest(out)
    files = listing(odd_folder)
    kept = [file for file in files if condition_of(file) != pictures.REFUSED]
    assert [odd_folder / manifest.name(number) for number in range(len(manifest))] == kept
    assert {name for name, _ in manifest.refused} == {
        str(file.relative_to(odd_folder)) for file in files if condition_of(file) == pictures.REFUSED
    }
    assert all(f"{name}: refused: {reason}" in told for name, reason in manifest.refused)
    for number, file in enumerate(kept):
        made = pictures.ODD[file.stem]() if file.stem in pictures.ODD else None
        assert manifest.conditions[number] == (DAMAGED if condition_of(file) == pictures.DAMAGED else READ)
        assert bool(manifest.stand_ins[number]) == (made is not None and not made.plain)
        shown = picture_of(manifest.file(number))
        if manifest.stand_ins[number]:
            assert (shown.format, shown.mode) == ("PNG", "RGB")
            # Twice, because findings are also listed in the header.
            assert manifest.name(number) in told
        assert np.array_equal(np.asarray(shown.convert("RGB")), decode(file.read_bytes(), exif=False))
        assert shown.size == (manifest.widths[number], manifest.heights[number])
    assert "png_named_jpeg.JPEG: PNG named JPEG" in told
    assert ends(verify, out) == 0


def test_a_refused_file_ends_the_command_with_its_name(odd_folder, tmp_path, capsys):
    assert ends(manifest_command, f"--source={odd_folder}", f"--out={tmp_path / 'x'}") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fastgen: refused/32_bit_tiff.JPEG: has mode I")
    assert "--on-error=skip" in error
    assert list(tmp_path.iterdir()) in ([], [tmp_path / "x.stand_ins"])


def test_damaged_files_may_be_refused(odd_folder, tmp_path):
    words = ("--on-error=skip", "--damaged=refuse")
    manifest = read_manifest(make(manifest_command, odd_folder, tmp_path / "x.manifest", *words))
    assert not (manifest.conditions == DAMAGED).any()
    refused = dict(manifest.refused)
    assert "damaged: " in refused["damaged/truncated.JPEG"]
    assert "damaged/ordinary.jpg" not in refused


def test_exif_is_applied_on_request(tmp_path):
    source = tmp_path / "train"
    pictures.write_odd_folder(source, ["exif_turned", "444"])
    manifest = read_manifest(make(manifest_command, source, tmp_path / "x.manifest", "--exif=apply"))
    number = [manifest.name(each) for each in range(len(manifest))].index("read/exif_turned.JPEG")
    assert manifest.sizes[number].tolist() == [80, 60]
    turned = np.asarray(picture_of(source / "read/exif_turned.JPEG").transpose(Image.Transpose.ROTATE_270))
    assert np.array_equal(np.asarray(picture_of(manifest.file(number))), turned)
    assert ends(verify, tmp_path / "x.manifest") == 0
    ignoring = read_manifest(make(manifest_command, source, tmp_path / "y.manifest"))
    assert ignoring.sizes[number].tolist() == [60, 80]
    assert not ignoring.stand_ins[number]


def test_workers_do_not_change_a_byte(odd_folder, tmp_path):
    contents = []
    for workers in (1, 3):
        place = tmp_path / str(workers)
        out = make(manifest_command, odd_folder, place / "x.manifest", "--on-error=skip", workers=workers)
        stand_ins = {file.relative_to(place): file.read_bytes() for file in place.rglob("*.png")}
        contents.append((read_manifest(out).data_hash, stand_ins))
        contents[-1][1][Path("x")] = out.read_bytes()
    assert len(contents[0][1]) > 10
    assert contents[0] == contents[1]


def test_a_second_manifest_replaces_the_first(odd_folder, tmp_path):
    source = tmp_path / "train"
    shutil.copytree(odd_folder, source)
    out = make(manifest_command, source, tmp_path / "x.manifest", "--on-error=skip")
    before = len(list(tmp_path.rglob("*.png")))
    (source / "read" / "cmyk.JPEG").unlink()
    again = read_manifest(make(manifest_command, source, out, "--on-error=skip"))
    used = {again.file(number) for number in range(len(again)) if again.stand_ins[number]}
    assert set(tmp_path.rglob("*.png")) == used
    assert len(used) == before - 1


def test_limit_takes_all_classes_alike(folder, tmp_path):
    manifest = read_manifest(make(manifest_command, folder, tmp_path / "x.manifest", "--limit=5"))
    assert [manifest.name(number) for number in range(5)] == [
        "class_0/0.JPEG", "class_0/1.JPEG", "class_1/0.JPEG", "class_1/1.JPEG", "class_2/0.JPEG",
    ]  # fmt: skip
    assert ends(manifest_command, f"--source={folder}", f"--out={tmp_path / 'y'}", "--limit=13") == 2


def test_counts_are_checked(folder, tmp_path, capsys):
    make(manifest_command, folder, tmp_path / "x.manifest", "--expect=12")
    for expected in ("13", "ilsvrc2012-train", "many"):
        assert ends(manifest_command, f"--source={folder}", f"--out={tmp_path / 'y'}", f"--expect={expected}") == 2
        assert expected in capsys.readouterr().err
    assert not (tmp_path / "y").exists()


def test_show_and_csv(folder, tmp_path, capsys):
    out = make(manifest_command, folder, tmp_path / "x.manifest")
    assert ends(manifest_command, f"--show={out}", f"--csv={tmp_path / 'x.csv'}") == 0
    assert "12 pictures of 3 classes (4 to 4 each)" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "x.csv").read_text().splitlines()))
    assert [row["path"] for row in rows] == [str(file.relative_to(folder)) for file in listing(folder)]
    for row in rows:
        assert picture_of(folder / row["path"]).size == (int(row["width"]), int(row["height"]))
    assert rows[5]["class"] == "class_1"


def test_known_odd_files_of_ilsvrc2012_are_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(judge, "is_ilsvrc2012", lambda names: True)
    place = tmp_path / "train" / "n02105855"
    place.mkdir(parents=True)
    (place / "n02105855_2933.JPEG").write_bytes(pictures.odd("png_named_jpeg").content)
    (place / "n01739381_1309.JPEG").write_bytes(pictures.odd("cmyk").content)
    (place / "n02077923_14822.JPEG").write_bytes(pictures.odd("444").content)
    (place / "other.JPEG").write_bytes(pictures.odd("cmyk").content)
    make(manifest_command, tmp_path / "train", tmp_path / "x.manifest")
    told = capsys.readouterr().out
    assert "known odd files, CMYK: 1 of the 2 that are there found as such, 1 others" in told
    assert "known odd files, PNG named JPEG: 1 of the 1 that are there found as such, 0 others" in told
    assert "these are 4" in told
    assert len(judge.KNOWN_CMYK) == 23


# --------------------------------------------------------------------------------------------- beton


def stored(path: Path, number: int) -> bytes:
    return read_beton(path).bytes_of(number).tobytes()


@pytest.mark.parametrize("which", ["folder", "odd_folder"])
def test_a_sample_is_a_row_of_the_manifest(which, request, tmp_path):
    source = request.getfixturevalue(which)
    words = ("--limit=8",) if which == "folder" else ("--on-error=skip", "--damaged=refuse")
    manifest = read_manifest(make(manifest_command, source, tmp_path / "x.manifest", *words))
    path = make(beton_command, source, tmp_path / "x.beton", *words)
    beton, beside = read_beton(path), read_manifest(tmp_path / "x.beton.manifest")
    assert beton.labels.tolist() == manifest.labels.tolist() == beside.labels.tolist()
    assert beton.sizes.tolist() == manifest.sizes.tolist() == beside.sizes.tolist()
    assert beside.paths.tolist() == manifest.paths.tolist()
    assert beside.refused == manifest.refused
    assert beside.header["data_hash"] == beside.data_hash == manifest.data_hash
    assert beside.header["beton_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert beside.header["beton_index_hash"] == beton.index_hash
    assert sorted(file.name for file in tmp_path.iterdir() if "beton" in file.name) == ["x.beton", "x.beton.manifest"]


def test_plain_jpegs_keep_their_bytes(odd_folder, tmp_path):
    path = make(beton_command, odd_folder, tmp_path / "x.beton", "--on-error=skip")
    beton, manifest = read_beton(path), read_manifest(tmp_path / "x.beton.manifest")
    assert set(beton.modes.tolist()) == {JPEG}
    kept = 0
    for number in range(len(beton)):
        content = (odd_folder / manifest.name(number)).read_bytes()
        found = inspect(content, exif=False)
        if found.plain and found.is_jpeg:
            kept += 1
            assert stored(path, number) == content
        else:
            # 4:2:0 at quality 90 of the pixels that every loader of files sees.
            wanted = bytes(simplejpeg.encode_jpeg(decode(content, exif=False), 90, "RGB", "420"))
            assert stored(path, number) == wanted
    assert 10 < kept < len(beton)


def test_raw_holds_the_pixels(odd_folder, tmp_path):
    path = make(beton_command, odd_folder, tmp_path / "x.beton", "--on-error=skip", "--mode=raw", "--exif=apply")
    beton, manifest = read_beton(path), read_manifest(tmp_path / "x.beton.manifest")
    assert set(beton.modes.tolist()) == {RAW}
    for number in range(len(beton)):
        pixels = decode((odd_folder / manifest.name(number)).read_bytes(), exif=True)
        assert beton.sizes[number].tolist() == beton.stored_sizes[number].tolist() == list(pixels.shape[:2])
        assert stored(path, number) == pixels.tobytes()
        assert beton.crc32[number] == zlib.crc32(pixels.tobytes())


@pytest.mark.parametrize(("word", "side"), [("--longest-px=30", max), ("--shortest-px=30", min)])
def test_larger_pictures_are_made_smaller(folder, tmp_path, word, side):
    path = make(beton_command, folder, tmp_path / "x.beton", "--mode=raw", word)
    beton = read_beton(path)
    for number, file in enumerate(listing(folder)):
        picture = picture_of(file).convert("RGB")
        scale = 30 / side(picture.size)
        size = tuple(int(length * scale + 0.5 + 1e-9) for length in picture.size)
        assert side(size) == 30
        assert beton.sizes[number].tolist() == [picture.height, picture.width]
        assert beton.stored_sizes[number].tolist() == [size[1], size[0]]
        assert stored(path, number) == picture.resize(size, Image.Resampling.LANCZOS).tobytes()


def test_nothing_is_enlarged_or_lost():
    storage = beton_command.Storage("raw", 0.5, 90, None, 100, False)
    assert storage.size(50, 3000) == (50, 3000)
    assert storage.size(100, 101) == (100, 101)
    assert storage.size(1, 65535) == (1, 65535)
    longest = beton_command.Storage("raw", 0.5, 90, 100, None, False)
    assert longest.size(1, 65535) == (1, 100)
    assert longest.size(300, 200) == (100, 67)


def test_quality_and_reencoding(folder, tmp_path):
    path = make(beton_command, folder, tmp_path / "x.beton", "--reencode", "--quality=35")
    for number, file in enumerate(listing(folder)):
        pixels = np.asarray(picture_of(file).convert("RGB"))
        assert stored(path, number) == bytes(simplejpeg.encode_jpeg(pixels, 35, "RGB", "420"))


def test_mixed_follows_a_draw_of_its_own(folder, tmp_path):
    path = make(beton_command, folder, tmp_path / "x.beton", "--mode=mixed", "--jpeg-share=0.4")
    storage = beton_command.Storage("mixed", 0.4, 90, None, None, False)
    assert read_beton(path).modes.tolist() == [JPEG if storage.is_jpeg(place) else RAW for place in range(12)]
    share = np.mean([storage.is_jpeg(place) for place in range(4000)])
    assert abs(share - 0.4) < 4 * (0.24 / 4000) ** 0.5
    for share, wanted in ((0.0, False), (1.0, True)):
        only = beton_command.Storage("mixed", share, 90, None, None, False)
        assert {only.is_jpeg(place) for place in range(100)} == {wanted}


@pytest.mark.parametrize("words", [(), ("--mode=mixed", "--longest-px=50")])
def test_workers_do_not_change_a_beton(odd_folder, tmp_path, words):
    contents = []
    for workers in (1, 2, 4):
        path = make(
            beton_command, odd_folder, tmp_path / f"{workers}" / "x.beton", "--on-error=skip", *words, workers=workers
        )
        contents.append((path.read_bytes(), path.with_name("x.beton.manifest").read_bytes()))
    assert contents[0] == contents[1] == contents[2]


def test_a_finished_file_is_left_alone(folder, tmp_path, capsys):
    source = tmp_path / "train"
    shutil.copytree(folder, source)
    path = make(beton_command, source, tmp_path / "x.beton")
    before = path.stat().st_mtime_ns
    capsys.readouterr()
    make(beton_command, source, path)
    assert "nothing to do" in capsys.readouterr().out
    # Touched, or copied: the same content.
    os.utime(source / "class_0" / "0.JPEG")
    make(beton_command, source, path)
    assert "nothing to do" in capsys.readouterr().out
    assert path.stat().st_mtime_ns == before
    words = (f"--source={source}", f"--out={path}")
    assert ends(beton_command, *words, "--mode=raw") == 2
    assert "other options" in capsys.readouterr().err
    (source / "class_0" / "0.JPEG").write_bytes(pictures.encode(pictures.photograph(99)))
    assert ends(beton_command, *words) == 2
    assert path.stat().st_mtime_ns == before
    make(beton_command, source, path, "--redo")
    assert stored(path, 0) == (source / "class_0" / "0.JPEG").read_bytes()


def test_a_foreign_or_damaged_file_is_not_replaced(folder, tmp_path, capsys):
    path = tmp_path / "x.beton"
    path.write_bytes(b"somebody's")
    words = (f"--source={folder}", f"--out={path}")
    assert ends(beton_command, *words) == 2
    assert "--redo" in capsys.readouterr().err
    assert path.read_bytes() == b"somebody's"
    make(beton_command, folder, path, "--redo")
    with open(path, "ab") as file:
        file.write(b"x" * 24)
    assert ends(beton_command, *words) == 2
    assert "--redo" in capsys.readouterr().err


def test_a_refused_picture_leaves_no_file(odd_folder, tmp_path, capsys):
    path = tmp_path / "x.beton"
    assert ends(beton_command, f"--source={odd_folder}", f"--out={path}") == 2
    assert "refused/32_bit_tiff.JPEG: has mode I" in capsys.readouterr().err
    assert not path.exists()
    # What was written before it counts: only whether refused pictures are skipped changes.
    make(beton_command, odd_folder, path, "--on-error=skip")
    assert "going on after" in capsys.readouterr().err
    fresh = make(beton_command, odd_folder, tmp_path / "y.beton", "--on-error=skip")
    assert path.read_bytes() == fresh.read_bytes()


def test_too_little_room_is_told_before_writing(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(beton_command.shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**6, 10**6, 5000))
    assert ends(beton_command, f"--source={folder}", f"--out={tmp_path / 'x.beton'}") == 1
    error = capsys.readouterr().err
    assert "has 0.0 MB free" in error
    assert not (tmp_path / "x.beton").exists()


def test_the_estimate_is_near(folder, tmp_path, capsys):
    make(beton_command, folder, tmp_path / "x.beton")
    told = capsys.readouterr().err
    total = sum(file.stat().st_size for file in listing(folder))
    assert f"12 pictures: about {total / 1e6:.1f} MB" in told


def test_options_that_make_no_sense(folder, tmp_path, capsys):
    out = f"--out={tmp_path / 'x'}"
    for words in (
        [out],
        [f"--source={folder}"],
        [f"--source={folder / 'no'}", out],
        [f"--source={folder}", out, "--quality=0"],
        [f"--source={folder}", out, "--jpeg-share=1.5"],
        [f"--source={folder}", out, "--longest-px=0"],
        [f"--source={folder}", out, "--longest-px=10", "--shortest-px=10"],
        [f"--source={folder}", out, "--longest-px=70000"],
        [f"--source={folder}", out, "--mode=png"],
        [f"--source={folder}", out, "--kind=zip"],
        [f"--source={folder}", out, "--unknown=1"],
    ):
        assert ends(beton_command, *words) == 2, words
        error = capsys.readouterr().err
        assert error.startswith("fastgen: ")
        assert error.count("\n") == 1, error
    assert list(tmp_path.iterdir()) == []


def test_pages_grow_where_a_picture_needs_it(tmp_path, monkeypatch, capsys):
    """Encoded noise can be larger than was thought from the headers: then it starts over, with larger pages."""
    source = tmp_path / "train"
    (source / "a").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (2500, 2500, 3), dtype=np.uint8)
    Image.fromarray(noise).save(source / "a" / "noise.bmp")
    path = make(beton_command, source, tmp_path / "x.beton", "--reencode", "--quality=100", "--mode=jpeg")
    assert "starting over" in capsys.readouterr().err
    beton = read_beton(path)
    assert beton.stored_bytes[0] > 9_000_000
    assert read_manifest(tmp_path / "x.beton.manifest").header["page_bytes"] == 16 << 20
    assert ends(verify, path) == 0


# -------------------------------------------------------------------------------- kills and signals

# Writes to the disk after every picture, so that a kill finds something to go on from.
EAGER = """
import sys
import data_prep.journal as journal
journal.FLUSH_SECONDS = 0.0
import data_prep.beton as beton
from data_prep.options import run
if __name__ == "__main__":
    sys.exit(run(beton.main, sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """150 pictures, and one that is refused in the middle."""
    folder = pictures.write_folder(tmp_path_factory.mktemp("many") / "train", classes=3, per_class=50)
    (folder / "class_1" / "30.JPEG").write_bytes(b"")
    return folder


def start(source: Path, out: Path) -> subprocess.Popen:
    words = [f"--source={source}", f"--out={out}", "--mode=raw", "--on-error=skip", "--workers=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", EAGER, *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_lines(process: subprocess.Popen, journal: Path, wanted: int) -> None:
    limit = time.monotonic() + SLOW_MACHINE_SECONDS
    while lines_of(journal) < wanted and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.002)


def test_killed_anywhere_it_goes_on_to_the_same_bytes(many, tmp_path):
    whole = make(beton_command, many, tmp_path / "whole.beton", "--mode=raw", "--on-error=skip")
    out = tmp_path / "x.beton"
    journal = tmp_path / "x.beton.journal"
    went_on = 0
    for wanted in (1, 20, 60, 110, 152):
        process = start(many, out)
        wait_for_lines(process, journal, wanted)
        process.kill()
        _, told = process.communicate(timeout=SLOW_MACHINE_SECONDS)
        went_on += "going on after" in told
        # Never half a file under the final name.
        assert not out.exists() or out.read_bytes() == whole.read_bytes()
    process = start(many, out)
    _, told = process.communicate(timeout=SLOW_MACHINE_SECONDS)
    assert process.returncode == 0, told
    assert went_on >= 2
    assert out.read_bytes() == whole.read_bytes()
    assert out.with_name("x.beton.manifest").read_bytes() == whole.with_name("whole.beton.manifest").read_bytes()
    assert not journal.exists()
    assert not (tmp_path / "x.beton.partial").exists()


def test_a_killed_command_leaves_no_workers(many, tmp_path):
    out = tmp_path / "x.beton"
    process = start(many, out)
    wait_for_lines(process, tmp_path / "x.beton.journal", 5)
    children = {
        place.parent.name for place in Path("/proc").glob("[0-9]*/stat")
        if _session_of(place) == os.getsid(process.pid) and place.parent.name != str(process.pid)
    }  # fmt: skip
    workers = {number for number in children if _descends(number, process.pid)}
    assert len(workers) >= 3  # two workers and the server that forks them
    process.kill()
    process.communicate(timeout=SLOW_MACHINE_SECONDS)
    limit = time.monotonic() + 30
    while any(Path(f"/proc/{number}").exists() for number in workers) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not [number for number in workers if Path(f"/proc/{number}").exists()]


def _fields(place: Path) -> list[str]:
    try:
        return place.read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _session_of(place: Path) -> int | None:
    fields = _fields(place)
    return int(fields[3]) if fields else None


def _descends(number: str, ancestor: int) -> bool:
    while number not in ("0", "1"):
        fields = _fields(Path(f"/proc/{number}/stat"))
        if not fields:
            return False
        number = fields[1]
        if number == str(ancestor):
            return True
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly(many, tmp_path, number):
    out = tmp_path / "x.beton"
    process = start(many, out)
    wait_for_lines(process, tmp_path / "x.beton.journal", 10)
    process.send_signal(number)
    _, told = process.communicate(timeout=SLOW_MACHINE_SECONDS)
    assert process.returncode == 128 + number, told
    assert "Traceback" not in told
    assert "the same command goes on: python -m data_prep.beton --source=" in told
    assert not out.exists()
    assert lines_of(tmp_path / "x.beton.journal") >= 10
    again = make(beton_command, many, out, "--mode=raw", "--on-error=skip")
    whole = make(beton_command, many, tmp_path / "whole.beton", "--mode=raw", "--on-error=skip")
    assert again.read_bytes() == whole.read_bytes()


def test_a_full_disk_is_one_line_and_it_goes_on(many, tmp_path):
    """The system refuses to let a file grow: what a full disk does, and no privileges are needed for it."""
    out = tmp_path / "x.beton"
    words = [f"--source={many}", f"--out={out}", "--mode=raw", "--on-error=skip", "--workers=1"]
    script = f'ulimit -f {(8 << 10) + 200}; exec {sys.executable} -m data_prep.beton "$@"'
    done = subprocess.run(
        ["bash", "-c", script, "bash", *words], capture_output=True, text=True, timeout=SLOW_MACHINE_SECONDS, cwd=ROOT
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith("fastgen: ")
    assert "File too large" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not out.exists()
    make(beton_command, many, out, "--mode=raw", "--on-error=skip")
    whole = make(beton_command, many, tmp_path / "whole.beton", "--mode=raw", "--on-error=skip")
    assert out.read_bytes() == whole.read_bytes()


def test_what_was_begun_with_other_options_is_refused(many, tmp_path, capsys):
    out = tmp_path / "x.beton"
    process = start(many, out)
    wait_for_lines(process, tmp_path / "x.beton.journal", 10)
    process.kill()
    process.communicate(timeout=SLOW_MACHINE_SECONDS)
    words = (f"--source={many}", f"--out={out}", "--on-error=skip")
    assert ends(beton_command, *words, "--mode=raw", "--longest-px=20") == 2
    assert "start over with --redo" in capsys.readouterr().err
    make(beton_command, many, out, "--on-error=skip", "--mode=raw", "--longest-px=20", "--redo")
    assert read_beton(out).stored_sizes.max() == 20


def test_a_torn_journal_is_taken_up_before_the_tear(many, tmp_path):
    out = tmp_path / "x.beton"
    process = start(many, out)
    wait_for_lines(process, tmp_path / "x.beton.journal", 30)
    process.kill()
    process.communicate(timeout=SLOW_MACHINE_SECONDS)
    journal = tmp_path / "x.beton.journal"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:20]) + lines[20][:-9])
    make(beton_command, many, out, "--on-error=skip", "--mode=raw")
    whole = make(beton_command, many, tmp_path / "whole.beton", "--mode=raw", "--on-error=skip")
    assert out.read_bytes() == whole.read_bytes()


def test_one_writer_at_a_time(many, tmp_path, capsys):
    out = tmp_path / "x.beton"
    process = start(many, out)
    wait_for_lines(process, tmp_path / "x.beton.journal", 5)
    process.send_signal(signal.SIGSTOP)
    words = (f"--source={many}", f"--out={out}", "--mode=raw", "--on-error=skip")
    try:
        codes = [ends(beton_command, *words), ends(beton_command, *words, "--redo")]
    finally:
        process.send_signal(signal.SIGCONT)
        process.communicate(timeout=SLOW_MACHINE_SECONDS)
    assert codes == [2, 2]
    assert capsys.readouterr().err.count("is being written by another process") == 2
    assert process.returncode == 0


def die(number: int) -> int:
    """A decoder that crashes at one picture; in a worker process."""
    if number == 13:
        os.kill(os.getpid(), signal.SIGSEGV)
    return number


def raise_memory_error(number: int) -> int:
    """In a worker process."""
    raise MemoryError(f"at {number}")


def test_a_worker_that_dies_is_told_by_name():
    with StopRequest() as stop, work.Workers(2) as pool, pytest.raises(MachineError, match=r"picture_13\.JPEG"):
        list(pool.map(die, ((number, number) for number in range(100)), stop, lambda place: f"picture_{place}.JPEG"))


def test_an_error_of_a_worker_comes_back():
    with StopRequest() as stop, work.Workers(1) as pool, pytest.raises(MemoryError, match="at 0"):
        list(pool.map(raise_memory_error, [(0, 0)], stop, str))


def double(number: int) -> int:
    """In a worker process."""
    return 2 * number


def test_results_come_in_order_and_few_are_ahead():
    taken = []

    def jobs():
        for number in itertools.count():
            taken.append(number)
            yield number, number

    with StopRequest() as stop, work.Workers(2) as pool:
        results = pool.map(double, jobs(), stop, str)
        assert [next(results) for _ in range(100)] == [2 * number for number in range(100)]
        assert len(taken) <= 100 + work.CHUNK * (2 * work.CHUNKS_AHEAD + 1)
        results.close()


# -------------------------------------------------------------------------------------------- sources


def test_a_folder_is_listed_by_name(tmp_path):
    source = tmp_path / "train"
    for name in (
        "b/2.JPG",
        "b/10.jpeg",
        "a/x.png",
        "b/notes.txt",
        "b/.hidden.jpg",
        "a/deep/y.jpg",
        "readme.md",
        ".git/z.jpg",
    ):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(pictures.encode(pictures.photograph(1)))
    found = sources.open_source(sources.Request(source))
    assert found.kind == "folder"
    assert found.class_names == ("a", "b")
    assert found.names == ("a/x.png", "b/10.jpeg", "b/2.JPG")
    assert found.labels.tolist() == [0, 1, 1]
    assert found.ignored == ("readme.md", "a/deep", "b/notes.txt")


def test_sources_that_cannot_be_told(tmp_path):
    def refused(match: str, **request):
        with pytest.raises(UserError, match=match):
            sources.open_source(sources.Request(tmp_path / "x", **request))

    refused("no such folder")
    (tmp_path / "x").mkdir()
    refused("neither class folders nor")
    (tmp_path / "x" / "1.jpg").write_bytes(b"")
    refused("one folder a class")
    refused("--val-labels", kind="ilsvrc2012-val")
    (tmp_path / "x" / "empty").mkdir()
    refused("holds no picture: fill or remove")
    refused("none of folder", kind="tfrecord")
    refused("no data set of that name", kind="torchvision:ResNet")
    refused("cannot open its MNIST", kind="torchvision:MNIST")
    for place in ("cifar-100-binary", "cifar-10-batches-py"):
        (tmp_path / "x" / place).mkdir()
    refused("say which with --kind")


def test_classes_are_those_of_the_training_set(folder, tmp_path, capsys):
    made = make(manifest_command, folder, tmp_path / "train.manifest")
    val = tmp_path / "val"
    shutil.copytree(folder / "class_2", val / "class_2")
    known = f"--classes-from={made}"
    found = read_manifest(make(manifest_command, val, tmp_path / "val.manifest", known))
    assert found.class_names == ("class_0", "class_1", "class_2")
    assert set(found.labels.tolist()) == {2}
    shutil.copytree(folder / "class_1", val / "class_9")
    assert ends(manifest_command, f"--source={val}", f"--out={tmp_path / 'y'}", known) == 2
    assert "class_9: is no class" in capsys.readouterr().err
    beton = make(beton_command, folder, tmp_path / "train.beton")
    assert sources.read_class_names(beton) == found.class_names


WNIDS = ("n01440764", "n01443537", "n15075141")


@pytest.fixture
def flat_val(tmp_path):
    """Six pictures of ILSVRC2012's validation folder, of classes 2 0 1 1 0 2 in the order of WordNet ids."""
    folder = tmp_path / "val"
    folder.mkdir()
    for number in range(6):
        content = pictures.encode(pictures.photograph(number))
        (folder / f"ILSVRC2012_val_{number + 1:08d}.JPEG").write_bytes(content)
    return folder


def val_labels(flat_val: Path, labels: Path | None, **request) -> list[int]:
    return sources.open_source(sources.Request(flat_val, val_labels=labels, **request)).labels.tolist()


ORDER = (2, 0, 1, 1, 0, 2)


def test_a_flat_val_with_labels_in_a_file(flat_val, tmp_path):
    text = tmp_path / "labels.txt"
    names = [f"ILSVRC2012_val_{number + 1:08d}" for number in range(6)]
    text.write_text("".join(f"{WNIDS[label]}\n" for label in ORDER))
    assert val_labels(flat_val, text) == list(ORDER)
    pairs = list(zip(names, ORDER, strict=True))
    text.write_text("".join(f"{name}.JPEG {WNIDS[label]}\n" for name, label in reversed(pairs)))
    assert val_labels(flat_val, text) == list(ORDER)
    # Nor need the pictures have ILSVRC2012's names.
    renamed = flat_val.parent / "renamed"
    renamed.mkdir()
    for number, file in enumerate(sorted(flat_val.iterdir())):
        shutil.copy(file, renamed / f"{number}.jpg")
    text.write_text("".join(f"{number}.jpg {WNIDS[label]}\n" for number, label in enumerate(ORDER)))
    assert val_labels(renamed, text) == list(ORDER)
    rows = "".join(f"{name},{WNIDS[label]} 85 1 499 272 {WNIDS[label]} 3 4 5 6\n" for name, label in reversed(pairs))
    text.write_text("ImageId,PredictionString\n" + rows)
    assert val_labels(flat_val, text) == list(ORDER)


def test_labels_that_do_not_fit(flat_val, tmp_path):
    text = tmp_path / "labels.txt"
    for content, match in (
        ("n01440764\n" * 5, "5 labels for 6 pictures"),
        ("ILSVRC2012_val_00000001.JPEG n01440764\n", "does not name it"),
        ("ILSVRC2012_val_00000001.JPEG n01440764\nwhat is this\n", "what is this"),
    ):
        text.write_text(content)
        with pytest.raises(UserError, match=match):
            val_labels(flat_val, text)
    text.write_bytes(b"\xff\xfe\0")
    with pytest.raises(UserError, match="cannot be read as text"):
        val_labels(flat_val, text)
    with pytest.raises(UserError, match="cannot be read as text"):
        val_labels(flat_val, tmp_path / "none.txt")


def write_devkit(folder: Path) -> Path:
    """The devkit's two files: ids of its own, inner nodes behind the leaves."""
    savemat = pytest.importorskip("scipy.io").savemat
    data = folder / "data"
    data.mkdir(parents=True)
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    # ILSVRC2012's own order of classes is not that of the WordNet ids.
    rows = [(1, WNIDS[2], "x", 0), (2, WNIDS[0], "y", 0), (3, WNIDS[1], "z", 0), (4, "n99999999", "inner", 2)]
    savemat(data / "meta.mat", {"synsets": np.asarray(rows, kind)})
    own_id = {2: 1, 0: 2, 1: 3}
    text = "".join(f"{own_id[label]}\n" for label in ORDER)
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text(text)
    return folder


def test_a_flat_val_with_the_devkit(flat_val, tmp_path):
    devkit = write_devkit(tmp_path / "ILSVRC2012_devkit_t12")
    assert val_labels(flat_val, devkit) == list(ORDER)
    found = sources.open_source(sources.Request(flat_val, val_labels=devkit))
    assert found.class_names == WNIDS
    (devkit / "data" / "meta.mat").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"meta\.mat: is damaged"):
        val_labels(flat_val, devkit)
    (devkit / "data" / "meta.mat").unlink()
    with pytest.raises(UserError, match=r"meta\.mat: is missing"):
        val_labels(flat_val, devkit)


def add_file(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def class_tar(wnid: str, names: list[str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number, name in enumerate(names):
            add_file(archive, name, pictures.encode(pictures.photograph(number + int(wnid[-3:]))))
    return buffer.getvalue()


def write_tars(folder: Path, flat_val: Path) -> Path:
    folder.mkdir()
    with tarfile.open(folder / tars.TRAIN_TAR, "w") as archive:
        for wnid in WNIDS:
            add_file(archive, f"{wnid}.tar", class_tar(wnid, [f"{wnid}_{number}.JPEG" for number in range(3)]))
    with tarfile.open(folder / tars.VAL_TAR, "w") as archive:
        for file in sorted(flat_val.iterdir()):
            archive.add(file, file.name)
    devkit = write_devkit(folder.parent / "ILSVRC2012_devkit_t12")
    with tarfile.open(folder / tars.DEVKIT_TAR, "w:gz") as archive:
        archive.add(devkit, devkit.name)
    return folder


def test_the_original_tars_are_unpacked(flat_val, tmp_path):
    folder = write_tars(tmp_path / "tars", flat_val)
    target = tmp_path / "data"
    to = f"--unpack-to={target}"
    train = read_manifest(make(manifest_command, folder, tmp_path / "train.manifest", to))
    assert train.class_names == WNIDS
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    content = (target / "train" / WNIDS[1] / f"{WNIDS[1]}_2.JPEG").read_bytes()
    assert content == pictures.encode(pictures.photograph(2 + 537))
    val = read_manifest(make(manifest_command, folder, tmp_path / "val.manifest", to, "--split=val"))
    assert val.labels.tolist() == list(ORDER)
    assert val.class_names == WNIDS
    # A second time, only what is missing or cut short is written again.
    kept = target / "train" / WNIDS[0] / f"{WNIDS[0]}_0.JPEG"
    cut = target / "train" / WNIDS[1] / f"{WNIDS[1]}_2.JPEG"
    before = kept.stat().st_mtime_ns
    cut.write_bytes(content[:10])
    make(manifest_command, folder, tmp_path / "train.manifest", to)
    assert kept.stat().st_mtime_ns == before
    assert cut.read_bytes() == content


@pytest.mark.parametrize("name", ["../evil.JPEG", "/tmp/evil.JPEG", "a/b.JPEG", "x.sh", ".hidden.JPEG"])
def test_a_tar_leads_nowhere_else(tmp_path, name):
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / tars.TRAIN_TAR, "w") as archive:
        add_file(archive, f"{WNIDS[0]}.tar", class_tar(WNIDS[0], ["good_1.JPEG", name]))
    before = set(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="which is no picture file"):
        tars.unpack(sources.Request(tmp_path / "tars"), tmp_path / "data")
    assert set(tmp_path.rglob("*")) == before


def test_links_in_a_tar_are_refused(tmp_path):
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / tars.VAL_TAR, "w") as archive:
        member = tarfile.TarInfo("ILSVRC2012_val_00000001.JPEG")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)
    with pytest.raises(UserError, match="which is no picture file"):
        tars.unpack(sources.Request(tmp_path / "tars", split=sources.TEST), tmp_path / "data")


def test_damaged_and_missing_tars(flat_val, tmp_path):
    request = sources.Request(tmp_path / "tars")
    (tmp_path / "tars").mkdir()
    with pytest.raises(UserError, match="is missing"):
        tars.unpack(request, tmp_path / "data")
    path = tmp_path / "tars" / tars.TRAIN_TAR
    path.write_bytes(b"no tar file at all" * 100)
    with pytest.raises(UserError, match="is damaged"):
        tars.unpack(request, tmp_path / "data")
    path.unlink()
    path.parent.rmdir()
    write_tars(tmp_path / "tars", flat_val)
    whole = path.read_bytes()
    for length in (700, 3000, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"img_train\.tar"):
            tars.unpack(request, tmp_path / f"data_{length}")
    with pytest.raises(UserError, match="--unpack-to"):
        sources.open_source(request)


@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar_becomes_a_raw_beton(fake_cifar100, tmp_path, split):
    path = make(beton_command, fake_cifar100, tmp_path / "x.beton", f"--split={split}", workers=1)
    train, test, names = read_cifar("cifar100", fake_cifar100)
    wanted = train if split == "train" else test
    beton = read_beton(path)
    assert beton.labels.tolist() == wanted.labels.tolist()
    assert set(beton.modes.tolist()) == {RAW}
    pixels = np.stack([beton.bytes_of(number).reshape(32, 32, 3) for number in range(len(beton))])
    assert np.array_equal(pixels, wanted.images_NHWC)
    manifest = read_manifest(tmp_path / "x.beton.manifest")
    assert manifest.class_names == names
    assert manifest.folder is None
    assert ends(verify, path) == 0


def test_a_manifest_of_cifar_has_a_picture_file_each(fake_cifar100, tmp_path):
    out = make(manifest_command, fake_cifar100, tmp_path / "x.manifest", "--split=test", "--limit=100")
    manifest = read_manifest(out)
    _, test, _ = read_cifar("cifar100", fake_cifar100)
    positions = sources.class_balanced(test.labels, 100, 100)
    for number, position in enumerate(positions):
        assert np.array_equal(np.asarray(picture_of(manifest.file(number))), test.images_NHWC[position])
    assert manifest.labels.tolist() == test.labels[positions].tolist()
    assert ends(verify, out) == 0


def test_torchvision_sets_that_are_there(tmp_path):
    """MNIST's own files, made here: grey pictures, labels of their own."""
    raw = tmp_path / "root" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    numbers = np.random.default_rng(0)
    for prefix, count in (("train", 30), ("t10k", 20)):
        images = numbers.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + images.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels.tobytes())
    words = ("--kind=torchvision:MNIST", "--split=test")
    path = make(beton_command, tmp_path / "root", tmp_path / "x.beton", *words)
    beton = read_beton(path)
    assert beton.labels.tolist() == [number % 10 for number in range(20)]
    grey = images[7]
    assert stored(path, 7) == np.repeat(grey[:, :, None], 3, axis=2).tobytes()


# --------------------------------------------------------------------------------------------- verify


def wrong(path: Path, capsys, *words: object) -> str:
    """What verify says of a file in which something is wrong."""
    capsys.readouterr()
    assert ends(verify, path, *words) == 1
    told = capsys.readouterr()
    assert "things are wrong" in told.err
    return told.out


def test_verify_finds_changed_pixels_and_index(odd_folder, tmp_path, capsys):
    path = make(beton_command, odd_folder, tmp_path / "x.beton", "--on-error=skip")
    whole = path.read_bytes()
    assert ends(verify, path) == 0
    assert "nothing is wrong" in capsys.readouterr().out
    beton, manifest = read_beton(path), read_manifest(tmp_path / "x.beton.manifest")
    at = int(beton.pointers[4] + beton.stored_bytes[4] // 2)
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 8]) + whole[at + 1 :])
    told = wrong(path, capsys, f"--report={tmp_path / 'report.txt'}")
    assert f"{manifest.name(4)}: its bytes do not have the checksum" in told
    assert "its SHA-256 is not the manifest's" in told
    assert (tmp_path / "report.txt").read_text().splitlines() == told.splitlines()[1:]
    # A label in the index: row 4, 16 bytes into it.
    at = 24 + 5 * 1041 + 4 * 48 + 16
    path.write_bytes(whole[:at] + b"\x01" + whole[at + 1 :])
    assert f"{manifest.name(4)}: label is 1, {manifest.labels[4]} by the manifest" in wrong(path, capsys)
    path.write_bytes(whole[:-48])
    assert ends(verify, path) in (1, 2)
    path.write_bytes(whole)
    (tmp_path / "x.beton.manifest").unlink()
    capsys.readouterr()
    assert ends(verify, path) == 0
    assert "labels, sizes and names are not checked" in capsys.readouterr().out


def test_verify_finds_a_stored_picture_that_is_not_decoded(folder, tmp_path, capsys):
    from fastgen.data.beton import MIN_PAGE_BYTES, BetonWriter, Sample

    path = tmp_path / "x.beton"
    good = pictures.encode(pictures.photograph(1))
    bad = [good[:-30], b"no picture", good]
    with open(path, "wb") as file:
        writer = BetonWriter(file, 3, MIN_PAGE_BYTES)
        for number, content in enumerate(bad):
            writer.add(Sample(content, JPEG, (60, 80 + (number == 2)), (60, 80), 0, zlib.crc32(content)))
        writer.finish()
    told = wrong(path, capsys)
    assert "sample 0: is not decoded" in told
    assert "sample 1: is not decoded" in told
    assert "sample 2: has 80x60 pixels, 81x60 by the index" in told


def test_verify_finds_changed_files_and_stand_ins(odd_folder, tmp_path, capsys):
    source = tmp_path / "train"
    shutil.copytree(odd_folder, source)
    out = make(manifest_command, source, tmp_path / "x.manifest", "--on-error=skip")
    manifest = read_manifest(out)
    assert ends(verify, out) == 0
    (source / "read" / "444.JPEG").unlink()
    (source / "read" / "422.JPEG").write_bytes(pictures.encode(pictures.photograph(5, 20, 20)))
    content = (source / "read" / "420.JPEG").read_bytes()
    (source / "read" / "420.JPEG").write_bytes(content[:-2])
    (source / "refused" / "empty.JPEG").write_bytes(content)
    # Another density in the header: the same size, the same pixels, other bytes.
    content = (source / "read" / "progressive.JPEG").read_bytes()
    (source / "read" / "progressive.JPEG").write_bytes(content[:15] + bytes([content[15] ^ 1]) + content[16:])
    names = [manifest.name(number) for number in range(len(manifest))]
    gone, other = (manifest.file(names.index(f"read/{name}.JPEG")) for name in ("cmyk", "palette"))
    gone.unlink()
    picture_of(other).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(other)
    told = wrong(out, capsys)
    assert "read/444.JPEG: cannot be opened (No such file or directory)" in told
    assert "read/422.JPEG: bytes: " in told
    assert "read/422.JPEG: pixels (height, width): (20, 20), (60, 80) by the manifest" in told
    assert "read/420.JPEG: condition: read with damage, read by the manifest" in told
    assert "read/progressive.JPEG: holds other bytes than when the manifest was made" in told
    assert "read/cmyk.JPEG: its stand-in" in told
    assert "read/palette.JPEG: its stand-in" in told
    assert "shows another picture" in told
    assert "refused/empty.JPEG: was refused (is empty) and can be read now" in told


def test_verify_of_what_cannot_be_verified(folder, tmp_path, capsys):
    assert ends(verify, tmp_path / "none") == 2
    (tmp_path / "text").write_text("text")
    assert ends(verify, tmp_path / "text") == 2
    make(beton_command, folder, tmp_path / "x.beton")
    assert ends(verify, tmp_path / "x.beton.manifest") == 2
    assert "give the .beton itself" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- damage


def test_mutated_files_are_classed_alike_everywhere(tmp_path):
    source = tmp_path / "train"
    originals = [
        pictures.encode(pictures.photograph(1), subsampling="4:2:0"),
        pictures.encode(pictures.photograph(2), progressive=True),
        pictures.encode(pictures.photograph(3), mode="L"),
    ]
    wanted = {}
    (source / "a").mkdir(parents=True)
    (source / "a" / "whole.jpg").write_bytes(originals[0])
    for seed in range(150):
        content = pictures.mutate(originals[seed % 3], seed)
        name = f"a/{seed:03d}.jpg"
        (source / name).write_bytes(content)
        try:
            wanted[name] = inspect(content, exif=False).condition
        except Refused:
            wanted[name] = pictures.REFUSED
    assert len(set(wanted.values())) == 3
    made = make(manifest_command, source, tmp_path / "x.manifest", "--on-error=skip", workers=2)
    beton = make(beton_command, source, tmp_path / "x.beton", "--on-error=skip", workers=2)
    for path in (made, tmp_path / "x.beton.manifest"):
        manifest = read_manifest(path)
        found = {manifest.name(number): int(manifest.conditions[number]) for number in range(len(manifest))}
        found |= {name: pictures.REFUSED for name, _ in manifest.refused}
        assert found.pop("a/whole.jpg") == READ
        assert found == wanted
    assert ends(verify, made) == 0
    assert ends(verify, beton) == 0
    # What is in the .beton is decoded without a complaint, also where the file was damaged.
    index, manifest = read_beton(beton), read_manifest(tmp_path / "x.beton.manifest")
    for number in range(len(index)):
        shown = simplejpeg.decode_jpeg(stored(beton, number), "RGB", strict=True)
        pixels = decode((source / manifest.name(number)).read_bytes(), exif=False)
        assert shown.shape == pixels.shape
        if (source / manifest.name(number)).read_bytes() == stored(beton, number):
            assert np.array_equal(shown, pixels)


def test_names_need_not_be_utf8(tmp_path, capsys):
    source = tmp_path / "train"
    (source / "a").mkdir(parents=True)
    name = os.fsdecode(b"caf\xe9 1.jpg")
    (source / "a" / name).write_bytes(pictures.odd("cmyk").content)
    (source / "a" / "\N{SNOWMAN}.jpg").write_bytes(b"")
    out = make(manifest_command, source, tmp_path / "x.manifest", "--on-error=skip", f"--csv={tmp_path / 'x.csv'}")
    manifest = read_manifest(out)
    assert manifest.name(0) == f"a/{name}"
    assert manifest.refused == (("a/\N{SNOWMAN}.jpg", "is empty"),)
    assert b"caf\xe9 1.jpg" in (tmp_path / "x.csv").read_bytes()
    assert "caf\\udce9 1.jpg" in capsys.readouterr().out
    path = make(beton_command, source, tmp_path / "x.beton", "--on-error=skip")
    assert ends(verify, path) == 0
    assert ends(verify, out) == 0


def test_a_file_that_may_not_be_read(folder, tmp_path, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    rules = judge.Rules(skip_refused=True, keep_damaged=True, exif=False)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert judge.judge(listing(folder)[0], rules) == judge.Refusal("cannot be opened (Permission denied)")


def test_every_command_has_help():
    for module in ("manifest", "beton", "verify"):
        command = [sys.executable, "-m", f"data_prep.{module}", "--help"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, cwd=ROOT)
        assert f"python -m data_prep.{module}" in done.stdout


def test_workers_import_no_torch(folder):
    code = (
        "import sys, data_prep.beton, data_prep.manifest, data_prep.verify;"
        "assert not {'torch', 'ffcv', 'scipy', 'cv2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT)
