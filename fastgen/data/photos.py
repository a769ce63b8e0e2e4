"""A picture file's bytes: is it read, read with damage, or refused? And its pixels.

The one place where that is judged, for data preparation and for loaders, so that a file is classed
alike everywhere. numpy, Pillow and simplejpeg, no torch.

Who decodes: Pillow, and where it gives up on a damaged JPEG, libjpeg-turbo (simplejpeg), which fills
what is missing with grey. What is not RGB becomes RGB by Pillow's own `convert("RGB")`: an alpha
channel is dropped, not composited, a palette is looked up, grey is copied into three channels; 16 bits
a pixel keep their upper eight.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

from fastgen.data.manifest import DAMAGED, READ
from fastgen.errors import first_line

# The largest picture of ILSVRC2012 has 61 million pixels; a header that claims more than twice as many is
# damaged, or an attack on the memory: three bytes a pixel are 400 MB at this limit.
MAX_PIXELS = 1 << 27
# Both the JPEG format and FFCV's have 16 bits for a side.
MAX_SIDE_PX = 0xFFFF
# Raster formats alone: Pillow would also start Ghostscript for an EPS file.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000")
# Of the files that are taken for pictures; what is in them is judged by their content.
SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")
)
# A JPEG file of several pictures is "MPO" for Pillow; all decoders take the first.
JPEG_FORMATS = ("JPEG", "MPO")
JPEG_BEGIN = b"\xff\xd8"
# Of what a library says of a file, in an index.
MOST_LETTERS = 120
SUBSAMPLINGS = ("444", "422", "420", "440", "411", "Gray")

UInt8 = npt.NDArray[np.uint8]


def is_picture_name(name: str) -> bool:
    """Whether a file is taken for a picture, by its name alone."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


class Refused(Exception):
    """The bytes are no picture that can be read; the text says why."""


@dataclass(frozen=True)
class Inspected:
    """What is known of a picture file that can be read.

    Attributes:
        condition: READ or DAMAGED.
        height, width: of the picture that is read, in pixels; after turning, where EXIF is applied.
        mode: Pillow's mode of the file, such as RGB, L or CMYK.
        format: Pillow's name of the format, such as JPEG.
        plain: every decoder (Pillow, DALI, FFCV's libjpeg-turbo) gives the same picture from these bytes.
        notes: what is unusual, for people.
    """

    condition: int
    height: int
    width: int
    mode: str
    format: str
    plain: bool
    notes: tuple[str, ...] = ()

    @property
    def is_jpeg(self) -> bool:
        """Whether the bytes are a JPEG stream, whatever the file is called."""
        return self.format in JPEG_FORMATS


def inspect(content: bytes, *, exif: bool) -> Inspected:
    """Judges a picture file by decoding it fully.

    Args:
        content: the file's bytes.
        exif: whether the picture is turned as its EXIF orientation says.

    Raises:
        Refused: it cannot be read.
    """
    return examine(content, exif=exif)[0]


def decode(content: bytes, *, exif: bool) -> UInt8:
    """Pixels of a picture file, uint8 (height, width, 3), RGB; of a damaged one, too.

    For an undamaged file these are those of `PIL.Image.open(...).convert("RGB")`, bit for bit (16-bit grey, which
    Pillow clips, apart).

    Args:
        content, exif: as in `inspect`.

    Raises:
        Refused: it cannot be read.
    """
    picture = _open(content)
    return _turned(_pixels(picture, content)[0], _orientation(picture) if exif else 1)


def decode_plain(content: bytes) -> UInt8:
    """Pixels of a picture that is plain, or of a stand-in, by Pillow alone: for loaders, which know from the manifest.

    Raises:
        Refused: Pillow cannot decode it: it is not what was inspected.
    """
    picture = _open(content)
    pixels, failure = _pixels(picture, content)
    if failure is not None:
        raise Refused(f"cannot be decoded ({failure})")
    return pixels


def read_size(content: bytes) -> tuple[int, int]:
    """Height and width as a file's header claims them, before any turning; decodes nothing.

    Raises:
        Refused: it has no such header.
    """
    width, height = _open(content).size
    return height, width


def examine(content: bytes, *, exif: bool) -> tuple[Inspected, UInt8]:
    """`inspect` and `decode` at the price of one.

    Raises:
        Refused: it cannot be read.
    """
    picture = _open(content)
    mode, form, orientation = picture.mode, str(picture.format), _orientation(picture)
    plain_png = form == "PNG" and _is_plain_png(picture, content)
    pixels, failure = _pixels(picture, content)
    if form in JPEG_FORMATS:
        damage, plain, notes = _judge_jpeg(content, pixels.shape[:2], failure)
    else:
        damage, plain, notes = None, plain_png, () if plain_png else (f"{form} of mode {mode}",)
    if damage is not None:
        notes = (*notes, f"damaged: {damage}")
    turned = exif and orientation != 1
    if turned:
        pixels = _turned(pixels, orientation)
        notes = (*notes, f"turned: EXIF orientation {orientation}")
    height, width = pixels.shape[:2]
    condition = READ if damage is None else DAMAGED
    return Inspected(condition, height, width, mode, form, plain and not turned and damage is None, notes), pixels


def _open(content: bytes) -> Image.Image:
    """The picture, not yet decoded: nothing of its size is allocated before its size was looked at."""
    if not content:
        raise Refused("is empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            picture = Image.open(io.BytesIO(content), formats=FORMATS)
        except Image.DecompressionBombError:
            raise Refused(f"claims more than {MAX_PIXELS:,} pixels") from None
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 (Pillow's readers trip over damage in every way)
            raise Refused(_unknown(content, error)) from None
    _check_size(*picture.size)
    return picture


def _unknown(content: bytes, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        if content.startswith(JPEG_BEGIN):
            return "begins like a JPEG, but its header is damaged or of an unknown kind"
        return "is no picture"
    return f"has a damaged header ({first_line(error, MOST_LETTERS)})"


def _check_size(width: int, height: int) -> None:
    if min(width, height) < 1:
        raise Refused(f"claims {width}x{height} pixels")
    if max(width, height) > MAX_SIDE_PX:
        raise Refused(f"claims {width}x{height} pixels, a side has at most {MAX_SIDE_PX:,}")
    if width * height > MAX_PIXELS:
        raise Refused(f"claims {width}x{height} pixels, more than {MAX_PIXELS:,}")


def _pixels(picture: Image.Image, content: bytes) -> tuple[UInt8, str | None]:
    """RGB pixels, and why Pillow did not decode them where another decoder had to."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _rgb(picture), None
    except (MemoryError, Refused):
        raise
    except Exception as error:  # noqa: BLE001 (as above)
        reason = first_line(error, MOST_LETTERS)
    if picture.format not in JPEG_FORMATS:
        raise Refused(f"cannot be decoded ({reason})")
    try:
        return _turbo(content, strict=False), reason
    except ValueError:
        raise Refused(f"cannot be decoded ({reason})") from None


def _rgb(picture: Image.Image) -> UInt8:
    if picture.mode.startswith("I;16"):
        # Pillow would clip at 255: nearly all of the picture would be white.
        grey = (np.asarray(picture).astype(np.uint16) >> 8).astype(np.uint8)
        return np.ascontiguousarray(np.repeat(grey[:, :, None], 3, axis=2))
    if picture.mode in ("I", "F"):
        raise Refused(f"has mode {picture.mode}: there is no one way to make 8 bits of it")
    return np.ascontiguousarray(picture.convert("RGB"))


def _turbo(content: bytes, *, strict: bool) -> UInt8:
    """libjpeg-turbo's pixels.

    Raises:
        ValueError: it cannot decode them, or, if strict, warned.
        Refused: the size is beyond our limits.
    """
    height, width = _jpeg_header(content)[:2]
    _check_size(width, height)
    # Zeros, because libjpeg-turbo may leave a part untouched, and what lies there shall not decide what is learned.
    pixels = np.zeros((height, width, 3), np.uint8)
    decoded: UInt8 = simplejpeg.decode_jpeg(content, "RGB", buffer=pixels, strict=strict)
    return decoded


def _jpeg_header(content: bytes) -> tuple[int, int, str, str]:
    """Height, width, kind of colour and its subsampling, by libjpeg-turbo.

    Raises:
        ValueError: it has no name for this kind, or the header is damaged.
    """
    try:
        found: tuple[int, int, str, str] = simplejpeg.decode_jpeg_header(content, strict=False)
    except KeyError:
        # simplejpeg 1.9 does not expect this answer of the library.
        raise ValueError("the kind of its colours is unknown") from None
    return found


def _judge_jpeg(content: bytes, size: tuple[int, ...], failure: str | None) -> tuple[str | None, bool, tuple[str, ...]]:
    """What is damaged (None if nothing), whether all decoders agree, what is unusual.

    Args:
        content: the file.
        size: height and width as decoded.
        failure: why Pillow gave up, if it did.
    """
    try:
        height, width, colour, subsampling = _jpeg_header(content)
    except ValueError as error:
        # A kind that TurboJPEG has no name for: Pillow's word stands. It did not fail: nobody else could have decoded.
        return failure, False, (f"JPEG of an unusual kind ({first_line(error, MOST_LETTERS)})",)
    ordinary = colour in ("YCbCr", "Gray") and subsampling in SUBSAMPLINGS
    notes = () if ordinary else (f"JPEG in {colour}, {subsampling}",)
    damage = failure
    try:
        _turbo(content, strict=True)
    except ValueError as error:
        # Its warnings count: Pillow passes over them.
        damage = first_line(error, MOST_LETTERS)
    if damage is None and (height, width) != size:
        damage = f"decoders disagree on its size: {width}x{height} and {size[1]}x{size[0]}"
    return damage, ordinary, notes


def _is_plain_png(picture: Image.Image, content: bytes) -> bool:
    """8 bits a channel, grey or RGB, in rows from top to bottom, nothing transparent, not moving."""
    if content[12:16] != b"IHDR":
        return False
    bits, colour_type, interlace = content[24], content[25], content[28]
    moving = getattr(picture, "is_animated", False)
    return bits == 8 and colour_type in (0, 2) and interlace == 0 and "transparency" not in picture.info and not moving


def _orientation(picture: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 where there is none, or a damaged one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 (a broken EXIF block fails in every way, and turns nothing)
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


# What makes a picture of each EXIF orientation upright.
_TURNS: dict[int, Callable[[UInt8], UInt8]] = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: np.rot90(pixels, 1),
}


def _turned(pixels: UInt8, orientation: int) -> UInt8:
    return np.ascontiguousarray(_TURNS[orientation](pixels))
