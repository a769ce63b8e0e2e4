"""Small pictures for tests, and odd ones: made here, none of them from anywhere else."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

READ, DAMAGED, REFUSED = "read", "damaged", "refused"
ORIENTATION = 274


def photograph(seed: int, height: int = 60, width: int = 80) -> np.ndarray:
    """Soft random colours, uint8 (height, width, 3): like a photograph in that neighbours are alike."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def ramp(height: int, width: int) -> np.ndarray:
    """A picture whose pixels tell where they are: red rises to the right, green downwards, blue falls to the right."""
    right, down = np.linspace(0, 255, width), np.linspace(0, 255, height)
    channels = (np.tile(right, (height, 1)), np.tile(down[:, None], (1, width)), np.tile(right[::-1], (height, 1)))
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def encode(pixels: np.ndarray, kind: str = "JPEG", *, mode: str | None = None, **options) -> bytes:
    """A picture file by Pillow; `mode` converts before."""
    picture = Image.fromarray(pixels)
    buffer = io.BytesIO()
    (picture if mode is None else picture.convert(mode)).save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation: int) -> Image.Exif:
    """An EXIF block that says how to turn a picture."""
    block = Image.Exif()
    block[ORIENTATION] = orientation
    return block


def png_chunk(name: bytes, content: bytes) -> bytes:
    """A chunk with its length and checksum."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_header(width: int, height: int, *, bits: int = 8, colour: int = 2, interlace: int = 0) -> bytes:
    """Signature and first chunk of a PNG file."""
    return b"\x89PNG\r\n\x1a\n" + png_chunk(
        b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlace)
    )


def png_16_bit(pixels: np.ndarray, colour: int) -> bytes:
    """PNG of 16 bits a channel whose upper eight are the given ones; `colour` 0 takes the first channel, as grey."""
    wide = (pixels.astype(np.uint16) * 256 + 77).astype(">u2")
    rows = wide[:, :, :1] if colour == 0 else wide
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    head = png_header(pixels.shape[1], pixels.shape[0], bits=16, colour=colour)
    return head + png_chunk(b"IDAT", zlib.compress(raw)) + png_chunk(b"IEND", b"")


def png_interlaced(pixels: np.ndarray) -> bytes:
    """PNG in Adam7's seven passes."""
    raw = b""
    for left, top, right, down in (
        (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2),
    ):  # fmt: skip
        part = pixels[top::down, left::right]
        raw += b"".join(b"\0" + row.tobytes() for row in part if part.size)
    head = png_header(pixels.shape[1], pixels.shape[0], interlace=1)
    return head + png_chunk(b"IDAT", zlib.compress(raw)) + png_chunk(b"IEND", b"")


def with_claimed_size(jpeg: bytes, height: int, width: int) -> bytes:
    """The same JPEG, whose header claims another size."""
    at = next(jpeg.index(marker) for marker in (b"\xff\xc0", b"\xff\xc2") if marker in jpeg) + 5
    return jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]


def with_stray_bytes(jpeg: bytes) -> bytes:
    """A JPEG with some bytes too many before its last marker: libjpeg warns, and decodes it all the same."""
    return jpeg[:-2] + b"\x01\x02\x03\x04" + jpeg[-2:]


@dataclass(frozen=True)
class Odd:
    """An odd file.

    Attributes:
        content: its bytes.
        found: READ, DAMAGED or REFUSED.
        plain: whether every decoder shows the same picture.
        suffix: of its name, which need not be true.
    """

    content: bytes
    found: str
    plain: bool = False
    suffix: str = ".JPEG"


def _odd_makers() -> dict[str, Callable[[], Odd]]:
    pixels = photograph(1)
    plain: dict[str, Callable[[], bytes]] = {
        "444": lambda: encode(pixels, subsampling="4:4:4"),
        "422": lambda: encode(pixels, subsampling="4:2:2"),
        "420": lambda: encode(pixels, subsampling="4:2:0"),
        "440": lambda: bytes(simplejpeg.encode_jpeg(pixels, 90, "RGB", "440")),
        "411": lambda: bytes(simplejpeg.encode_jpeg(pixels, 90, "RGB", "411")),
        "grey": lambda: encode(pixels, mode="L"),
        "progressive": lambda: encode(pixels, progressive=True),
        "restarts": lambda: encode(pixels, restart_marker_blocks=2),
        "one_pixel": lambda: encode(pixels[:1, :1]),
        "very_wide": lambda: encode(photograph(2, 3, 900)),
        "very_tall": lambda: encode(photograph(3, 900, 3)),
        "exif_turned": lambda: encode(pixels, exif=exif(6)),
        "trailing_bytes": lambda: encode(pixels) + b"and then some",
        "png_named_jpeg": lambda: encode(pixels, "PNG"),
        "grey_png_named_jpeg": lambda: encode(pixels, "PNG", mode="L"),
    }
    unusual: dict[str, Callable[[], bytes]] = {
        "cmyk": lambda: encode(pixels, mode="CMYK"),
        "rgb_jpeg": lambda: encode(pixels, keep_rgb=True),
        "palette": lambda: encode(pixels, "PNG", mode="P"),
        "black_and_white": lambda: encode(pixels, "PNG", mode="1"),
        "alpha": lambda: encode(np.dstack([pixels, pixels[:, :, :1]]), "PNG"),
        "grey_alpha": lambda: encode(pixels, "PNG", mode="LA"),
        "key_colour": lambda: encode(pixels, "PNG", transparency=(1, 2, 3)),
        "16_bit_grey": lambda: png_16_bit(pixels, 0),
        "16_bit_rgb": lambda: png_16_bit(pixels, 2),
        "interlaced": lambda: png_interlaced(pixels),
        "bmp": lambda: encode(pixels, "BMP"),
        "gif": lambda: encode(pixels, "GIF", mode="P"),
        "webp": lambda: encode(pixels, "WEBP", lossless=True),
        "tiff": lambda: encode(pixels, "TIFF"),
    }
    damaged: dict[str, Callable[[], bytes]] = {
        "truncated": lambda: encode(pixels)[: len(encode(pixels)) * 2 // 3],
        "without_end": lambda: encode(pixels)[:-2],
        "stray_bytes": lambda: with_stray_bytes(encode(pixels)),
        "stray_bytes_in_header": lambda: encode(pixels)[:20] + b"\x07" + encode(pixels)[20:],
    }
    refused: dict[str, Callable[[], bytes]] = {
        "empty": lambda: b"",
        "zeros": lambda: bytes(500),
        "text": lambda: b"<html>404 not found</html>",
        "header_alone": lambda: encode(pixels)[:20],
        "huge": lambda: with_claimed_size(encode(pixels), 60_000, 60_000),
        "huge_png": lambda: png_header(100_000, 2) + png_chunk(b"IDAT", zlib.compress(bytes(9))),
        "no_height": lambda: with_claimed_size(encode(pixels), 0, 80),
        "cut_png": lambda: encode(pixels, "PNG")[:200],
        "postscript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
        "32_bit_tiff": lambda: encode(np.arange(48, dtype=np.int32).reshape(6, 8), "TIFF"),
    }
    groups = ((plain, READ, True), (unusual, READ, False), (damaged, DAMAGED, False), (refused, REFUSED, False))
    return {
        name: lambda make=make, found=found, is_plain=is_plain: Odd(make(), found, is_plain)
        for group, found, is_plain in groups
        for name, make in group.items()
    }


ODD = _odd_makers()


def odd(name: str) -> Odd:
    """One of the odd files of ODD."""
    return ODD[name]()


def write_folder(folder: Path, classes: int = 3, per_class: int = 4, seed: int = 0) -> Path:
    """An image folder of ordinary JPEGs of several sizes, `class_<c>/<n>.JPEG`."""
    for label in range(classes):
        place = folder / f"class_{label}"
        place.mkdir(parents=True)
        for number in range(per_class):
            key = seed + 1000 * label + number
            pixels = photograph(key, 40 + key % 7 * 5, 40 + key % 5 * 9)
            (place / f"{number}.JPEG").write_bytes(encode(pixels, quality=90, subsampling=("4:4:4", "4:2:0")[key % 2]))
    return folder


def write_odd_folder(folder: Path, names: list[str] | None = None) -> Path:
    """An image folder of odd files, one class for each way in which they are found, with one ordinary picture each."""
    for name in names if names is not None else ODD:
        made = odd(name)
        place = folder / made.found
        if not place.exists():
            place.mkdir(parents=True)
            (place / "ordinary.jpg").write_bytes(encode(photograph(len(made.found))))
        (place / f"{name}{made.suffix}").write_bytes(made.content)
    return folder


def mutate(content: bytes, seed: int) -> bytes:
    """A JPEG that suffered: flipped bits, a lost end or middle, swapped or overwritten markers, noise.

    Args:
        content: an undamaged JPEG.
        seed: the same one does the same.
    """
    numbers = np.random.default_rng(seed)
    changed = bytearray(content)
    kind = seed % 7
    if kind == 0:
        for place in numbers.integers(0, len(changed), int(numbers.integers(1, 9))):
            changed[place] ^= 1 << int(numbers.integers(8))
    elif kind == 1:
        del changed[int(numbers.integers(0, len(changed))) :]
    elif kind == 2:
        begin = int(numbers.integers(2, len(changed)))
        del changed[begin : begin + int(numbers.integers(1, 200))]
    elif kind == 3:
        _swap_markers(changed, numbers)
    elif kind == 4:
        # In the header, where it hurts most.
        for place in numbers.integers(0, min(len(changed), 640), 3):
            changed[place] = int(numbers.integers(256))
    elif kind == 5:
        begin = int(numbers.integers(0, len(changed)))
        changed[begin : begin + 64] = numbers.bytes(64)
    else:
        place = int(numbers.integers(2, len(changed)))
        changed[place:place] = b"\xff" + bytes([int(numbers.integers(0xC0, 0xFF))])
    return bytes(changed)


def _swap_markers(content: bytearray, numbers: np.random.Generator) -> None:
    """Exchanges the codes of two markers."""
    places = [
        place + 1 for place in range(len(content) - 1) if content[place] == 0xFF and content[place + 1] not in (0, 0xFF)
    ]
    first, second = numbers.choice(places, 2, replace=False)
    content[first], content[second] = content[second], content[first]
