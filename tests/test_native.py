"""The decoder in C against Pillow: crops of JPEGs and of raw pixels, awkward sizes, damage, foreign memory."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from fastgen.data.beton import JPEG, RAW
from fastgen.data.decoder import Images
from fastgen.data.native import NativeDecoder, load
from fastgen.errors import UserError

# Pillow rounds to whole levels between its two passes, half a level off at most, and again at the end.
TOLERANCE = 1


def picture(height, width, seed=0, smooth=True):
    random = np.random.default_rng(seed)
    if not smooth:
        return random.integers(0, 256, (height, width, 3), np.uint8)
    small = Image.fromarray(random.integers(0, 256, (max(height // 16, 2), max(width // 16, 2), 3), np.uint8))
    return np.asarray(small.resize((width, height), Image.BICUBIC))


def jpeg(pixels_HWC, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "JPEG", **({"quality": 90} | options))
    return buffer.getvalue()


def execute(stored, rows, side, decoder=None):
    """[(bytes, mode, (height, width))], rows -> (row that failed or -1, uint8 (B, H, W, 3))"""
    height, width = side if isinstance(side, tuple) else (side, side)
    content = np.frombuffer(b"".join(entry[0] for entry in stored), np.uint8)
    lengths = np.array([len(entry[0]) for entry in stored], np.int64)
    out = np.full((len(stored) + 1, height, width, 3), 77, np.uint8)
    images = Images(
        content=content,
        begin=np.cumsum(lengths) - lengths,
        stored_bytes=lengths,
        modes=np.array([entry[1] for entry in stored], np.uint8),
        stored_sizes=np.array([entry[2] for entry in stored], np.int32),
        rows=np.array(rows, np.int32),
    )
    failed = (decoder or NativeDecoder())(images, out[:-1])
    # What lies behind the batch is nobody's business.
    assert (out[-1] == 77).all()
    return failed, out[:-1]


def by_pillow(pixels_HWC, row, height, width):
    top, left, rows, columns, flip = row
    view = Image.fromarray(pixels_HWC[top : top + rows, left : left + columns]).resize((width, height), Image.BILINEAR)
    return np.asarray(view)[:, ::-1] if flip else np.asarray(view)


def random_rows(height, width, count, seed=0):
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        extent = [int(random.integers(1, length + 1)) for length in (height, width)]
        corner = [
            int(random.integers(0, length - part + 1)) for length, part in zip((height, width), extent, strict=True)
        ]
        rows.append([*corner, *extent, int(random.integers(2))])
    return [*rows, [0, 0, height, width, 0], [height - 1, width - 1, 1, 1, 1]]


def worst_difference(one, two):
    return int(np.abs(one.astype(int) - two.astype(int)).max())


# Pillow's numbers for 4:4:4, 4:2:2 and 4:2:0.
JPEG_KINDS = [{"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True}]
SIZES = [(375, 500), (64, 64), (33, 47), (17, 300), (300, 17), (8, 8), (1, 1), (1, 50), (50, 1), (16, 15)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", JPEG_KINDS, ids=str)
def test_crops_of_a_jpeg_are_pillows_to_a_level(size, options):
    """Where the crop's edges were decoded without their neighbours' colours, they would differ by far more."""
    content = jpeg(picture(*size, seed=size[0]), **options)
    pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    rows = random_rows(*size, count=40)
    failed, views = execute([(content, JPEG, size)] * len(rows), rows, 24)
    assert failed == -1
    for row, view in zip(rows, views, strict=True):
        assert worst_difference(view, by_pillow(pixels, row, 24, 24)) <= TOLERANCE, row


@pytest.mark.parametrize("side", [1, 7, 96, (40, 90), (90, 40)])
@pytest.mark.parametrize("size", [(375, 500), (9, 9), (2, 700)])
def test_crops_of_raw_pixels_are_pillows_to_a_level(size, side):
    pixels = picture(*size, smooth=False)
    height, width = side if isinstance(side, tuple) else (side, side)
    rows = [row for row in random_rows(*size, count=30) if (row[2], row[3]) != (height, width)]
    failed, views = execute([(pixels.tobytes(), RAW, size)] * len(rows), rows, side)
    assert failed == -1
    for row, view in zip(rows, views, strict=True):
        assert worst_difference(view, by_pillow(pixels, row, height, width)) <= TOLERANCE, row


def test_a_crop_of_the_views_size_is_copied():
    pixels = picture(50, 60, smooth=False)
    rows = [[3, 4, 32, 32, 0], [3, 4, 32, 32, 1]]
    _, views = execute([(pixels.tobytes(), RAW, (50, 60))] * 2, rows, 32)
    np.testing.assert_array_equal(views[0], pixels[3:35, 4:36])
    np.testing.assert_array_equal(views[1], pixels[3:35, 4:36][:, ::-1])
    content = jpeg(pixels)
    _, views = execute([(content, JPEG, (50, 60))] * 2, rows, 32)
    decoded = np.asarray(Image.open(io.BytesIO(content)))
    np.testing.assert_array_equal(views[0], decoded[3:35, 4:36])


@pytest.mark.parametrize(
    "row", [[-4, -4, 8, 8, 0], [4, 3, 8, 8, 1], [-8, 0, 8, 8, 0], [20, 20, 8, 8, 1], [0, 0, 8, 8, 1]]
)
def test_a_window_over_the_edge_is_filled_with_zeros(row):
    pixels = picture(8, 8, smooth=False)
    padded = np.zeros((60, 60, 3), np.uint8)
    padded[20:28, 20:28] = pixels
    expected = padded[20 + row[0] : 28 + row[0], 20 + row[1] : 28 + row[1]]
    _, views = execute([(pixels.tobytes(), RAW, (8, 8))], [row], 8)
    np.testing.assert_array_equal(views[0], expected[:, ::-1] if row[4] else expected)


def test_grey_jpegs_become_three_equal_channels():
    buffer = io.BytesIO()
    Image.fromarray(picture(40, 50)[..., 0]).save(buffer, "JPEG")
    _, views = execute([(buffer.getvalue(), JPEG, (40, 50))], [[5, 5, 20, 30, 0]], 16)
    expected = np.asarray(Image.open(buffer).convert("RGB").crop((5, 5, 35, 25)).resize((16, 16), Image.BILINEAR))
    assert worst_difference(views[0], expected) <= TOLERANCE
    assert (views[0] == views[0][..., :1]).all()


@pytest.mark.parametrize("value", [0, 1, 127, 128, 254, 255])
@pytest.mark.parametrize("size", [(300, 500), (3, 5)])
def test_a_plain_colour_stays_what_it_is(value, size):
    pixels = np.full((*size, 3), value, np.uint8)
    _, views = execute([(pixels.tobytes(), RAW, size)], [[0, 0, *size, 0]], 61)
    assert (views == value).all()


def test_damage_is_told_with_its_row_and_the_others_are_decoded():
    pixels = picture(64, 64)
    good = jpeg(pixels)
    stored = [(good, JPEG, (64, 64)), (good[: len(good) // 2], JPEG, (64, 64)), (good, JPEG, (64, 64))]
    row = [0, 0, 64, 64, 0]
    failed, views = execute(stored, [row] * 3, 32)
    assert failed == 1
    np.testing.assert_array_equal(views[0], views[2])


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"not a picture at all", bytes(2000), b"\xff\xd8\xff\xe0" + bytes(50)]
)
def test_what_is_no_jpeg_is_told(content):
    assert execute([(content, JPEG, (10, 10))], [[0, 0, 5, 5, 0]], 8)[0] == 0


@pytest.mark.parametrize("claimed", [(64, 63), (63, 64), (64, 65), (640, 640)])
def test_a_jpeg_of_another_size_than_the_index_says_is_told(claimed):
    assert execute([(jpeg(picture(64, 64)), JPEG, claimed)], [[0, 0, 30, 30, 0]], 8)[0] == 0


def test_mutated_jpegs_neither_crash_nor_write_elsewhere():
    random = np.random.default_rng(0)
    decoder, content = NativeDecoder(), jpeg(picture(120, 90))
    outcomes = set()
    for _ in range(400):
        mutated = bytearray(content)
        for _ in range(int(random.integers(1, 8))):
            mutated[int(random.integers(len(mutated)))] = int(random.integers(256))
        failed, _ = execute([(bytes(mutated), JPEG, (120, 90))], [[7, 9, 100, 60, 1]], 32, decoder)
        outcomes.add(failed)
    assert outcomes == {-1, 0}


def test_one_decoder_serves_several_threads():
    from concurrent.futures import ThreadPoolExecutor

    decoder = NativeDecoder()
    contents = [jpeg(picture(100 + 13 * n, 140 - 11 * n, seed=n)) for n in range(8)]
    sizes = [(100 + 13 * n, 140 - 11 * n) for n in range(8)]

    def digest(n):
        height, width = sizes[n % 8]
        row = [1, 1, height - 2, width - 2, 0]
        return zlib.crc32(execute([(contents[n % 8], JPEG, sizes[n % 8])], [row], 48, decoder)[1].tobytes())

    alone = [digest(n) for n in range(8)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(digest, range(400))) == [alone[n % 8] for n in range(400)]


def test_without_a_compiler_one_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    load.cache_clear()
    with pytest.raises(UserError, match=r"needs a C compiler .*gcc.*data\.beton_decoder=ffcv"):
        load()
    load.cache_clear()


def test_without_headers_one_line_tells_the_compilers_reason(monkeypatch, tmp_path):
    fake = tmp_path / "cc"
    fake.write_text(
        '#!/bin/sh\ncase "$1" in --version) exit 0;; esac\necho "x.c:1: fatal error: jpeglib.h: none" >&2\nexit 1\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", str(fake))
    load.cache_clear()
    with pytest.raises(UserError, match=r"fatal error: jpeglib.h.*libjpeg-dev"):
        load()
    load.cache_clear()
    assert not list(tmp_path.glob("fastgen/*.so"))
