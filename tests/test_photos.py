"""Picture files are judged alike everywhere, and decoded as Pillow decodes them."""

from __future__ import annotations

import io
import resource
import subprocess
import sys
import warnings

import cv2
import numpy as np
import pictures
import pytest
from PIL import Image, ImageOps

from fastgen.data import manifest, photos
from fastgen.data.photos import Refused, decode, decode_plain, examine, inspect, read_size

CONDITIONS = {manifest.READ: pictures.READ, manifest.DAMAGED: pictures.DAMAGED}
READABLE = [name for name in pictures.ODD if pictures.odd(name).found == pictures.READ]
DAMAGED = [name for name in pictures.ODD if pictures.odd(name).found == pictures.DAMAGED]
REFUSED = [name for name in pictures.ODD if pictures.odd(name).found == pictures.REFUSED]
PLAIN = [name for name in pictures.ODD if pictures.odd(name).plain]


def by_pillow(content: bytes) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def found(content: bytes) -> str:
    try:
        return CONDITIONS[inspect(content, exif=False).condition]
    except Refused:
        return pictures.REFUSED


@pytest.mark.parametrize("name", pictures.ODD)
def test_every_odd_file_is_classed(name):
    odd = pictures.odd(name)
    assert found(odd.content) == odd.found


@pytest.mark.parametrize("name", READABLE)
def test_what_is_plain(name):
    odd = pictures.odd(name)
    inspected = inspect(odd.content, exif=False)
    assert inspected.plain == odd.plain
    picture = Image.open(io.BytesIO(odd.content))
    assert (inspected.width, inspected.height, inspected.mode) == (*picture.size, picture.mode)


@pytest.mark.parametrize("name", [name for name in READABLE if name != "16_bit_grey"])
def test_pixels_are_pillows(name):
    content = pictures.odd(name).content
    pixels = decode(content, exif=False)
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, by_pillow(content))


@pytest.mark.parametrize("name", PLAIN)
def test_plain_is_what_another_decoder_shows(name):
    content = pictures.odd(name).content
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    other = cv2.imdecode(np.frombuffer(content, np.uint8), flags)[:, :, ::-1]
    assert np.array_equal(decode_plain(content), other)


@pytest.mark.parametrize("name", ["16_bit_grey", "16_bit_rgb"])
def test_sixteen_bits_keep_the_upper_eight(name):
    pixels = decode(pictures.odd(name).content, exif=False)
    made_of = pictures.photograph(1)
    wanted = np.repeat(made_of[:, :, :1], 3, axis=2) if name == "16_bit_grey" else made_of
    assert np.array_equal(pixels, wanted)


def test_alpha_is_dropped():
    pixels = decode(pictures.odd("alpha").content, exif=False)
    assert np.array_equal(pixels, pictures.photograph(1))


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_have_pixels(name):
    content = pictures.odd(name).content
    inspected, pixels = examine(content, exif=False)
    assert pixels.shape == (inspected.height, inspected.width, 3) == (60, 80, 3)
    assert np.array_equal(pixels, decode(content, exif=False))
    whole = by_pillow(pictures.encode(pictures.photograph(1)))
    # What is there is right: the upper part of the picture (its last row also looks at the missing one below).
    assert np.array_equal(pixels[:7], whole[:7])
    assert not inspected.plain
    assert "damaged" in inspected.notes[-1]


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_all_functions(name):
    content = pictures.odd(name).content
    for function in (
        lambda: inspect(content, exif=True),
        lambda: decode(content, exif=False),
        lambda: decode_plain(content),
    ):
        with pytest.raises(Refused) as refused:
            function()
        assert "\n" not in str(refused.value)


def test_a_truncated_file_is_not_plain_reading():
    with pytest.raises(Refused):
        decode_plain(pictures.odd("truncated").content)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_turns_as_pillow_does(orientation, kind):
    content = pictures.encode(pictures.ramp(30, 50), kind, exif=pictures.exif(orientation))
    picture = Image.open(io.BytesIO(content))
    wanted = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    inspected, pixels = examine(content, exif=True)
    assert np.array_equal(pixels, wanted)
    assert np.array_equal(decode(content, exif=True), wanted)
    assert (inspected.height, inspected.width) == wanted.shape[:2]
    assert inspected.plain == (orientation == 1)
    ignoring, unturned = examine(content, exif=False)
    assert ignoring.plain
    assert np.array_equal(unturned, np.asarray(picture.convert("RGB")))


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_impossible_orientations_turn_nothing(orientation):
    content = pictures.encode(pictures.photograph(1), exif=pictures.exif(orientation))
    assert inspect(content, exif=True).plain


def test_a_broken_exif_block_turns_nothing():
    content = pictures.encode(pictures.photograph(1))
    broken = b"\xff\xe1" + (21).to_bytes(2) + b"Exif\0\0II*\0garbage!!"
    assert inspect(content[:2] + broken + content[2:], exif=True).plain


def test_a_damaged_file_is_turned_too():
    content = pictures.encode(pictures.photograph(1), exif=pictures.exif(6))[:-40]
    inspected, pixels = examine(content, exif=True)
    assert inspected.condition == manifest.DAMAGED
    assert (inspected.height, inspected.width) == pixels.shape[:2] == (80, 60)
    assert np.array_equal(pixels, np.rot90(decode(content, exif=False), -1))


def test_sizes_are_read_from_the_header():
    content = pictures.encode(pictures.photograph(1, 310, 470))
    assert read_size(content[: len(content) // 2]) == (310, 470)
    with pytest.raises(Refused):
        read_size(b"no picture")


def test_the_limit_of_pixels_is_the_stated_one(monkeypatch):
    content = pictures.encode(pictures.photograph(1))
    monkeypatch.setattr(photos, "MAX_PIXELS", 60 * 80)
    assert inspect(content, exif=False).plain
    monkeypatch.setattr(photos, "MAX_PIXELS", 60 * 80 - 1)
    with pytest.raises(Refused, match="4,799"):
        inspect(content, exif=False)


def test_a_bomb_allocates_nothing():
    # 60,000 x 60,000 pixels would be 10.8 GB.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Refused, match="claims"):
        inspect(pictures.odd("huge").content, exif=False)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


def test_every_multi_picture_file_is_its_first_picture():
    first, second = pictures.photograph(1), pictures.photograph(2)
    buffer = io.BytesIO()
    Image.fromarray(first).save(buffer, "MPO", save_all=True, append_images=[Image.fromarray(second)], quality=95)
    inspected, pixels = examine(buffer.getvalue(), exif=False)
    assert inspected.plain
    assert inspected.is_jpeg
    assert np.abs(pixels.astype(int) - first).mean() < 3


def test_pillow_keeps_its_settings():
    code = (
        "from PIL import Image, ImageFile; before = (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS);"
        "import sys; from fastgen.data import photos; assert 'torch' not in sys.modules;"
        "assert before == (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_mutated_files_are_classed_and_never_crash():
    originals = [
        pictures.encode(pictures.photograph(1), subsampling="4:2:0"),
        pictures.encode(pictures.photograph(2), progressive=True),
        pictures.encode(pictures.photograph(3), mode="CMYK"),
    ]
    counts = {pictures.READ: 0, pictures.DAMAGED: 0, pictures.REFUSED: 0}
    for seed in range(210):
        content = pictures.mutate(originals[seed % 3], seed)
        first = found(content)
        counts[first] += 1
        assert first == found(content)
        if first != pictures.REFUSED:
            inspected, pixels = examine(content, exif=False)
            # What a decoder leaves untouched must not come from whatever lay in memory.
            assert np.array_equal(pixels, decode(content, exif=False))
            assert pixels.shape == (inspected.height, inspected.width, 3)
            if inspected.plain:
                assert np.array_equal(pixels, by_pillow(content))
        else:
            with pytest.raises(Refused):
                decode(content, exif=False)
    assert min(counts.values()) > 10, counts


def test_mutations_are_repeatable():
    content = pictures.encode(pictures.photograph(1))
    assert [pictures.mutate(content, seed) for seed in range(14)] == [
        pictures.mutate(content, seed) for seed in range(14)
    ]
    assert all(pictures.mutate(content, seed) != content for seed in range(14))
