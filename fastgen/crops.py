"""How crops and jitter are drawn: policies, and rows of the view table. numpy only.

No function of the C library is used whose last bit differs between machines.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

import numpy as np
import numpy.typing as npt

from fastgen.philox import CHUNK, CROP_STREAM, FLIP_STREAM, JITTER_STREAM, TRY_STREAM, Draws, Words, below, uniform

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

TRIES = 10
TABLE_COLUMNS = ("top", "left", "height", "width", "flip")
JITTER_COLUMNS = ("degrees", "red", "green", "blue")


@dataclass(frozen=True)
class JitterPolicy:
    """Augmentation after decoding; zeros are none.

    Attributes:
        rotation_degrees: views are turned by an angle in [-rotation, rotation].
        pixel_shift: each colour channel is shifted by a value in [-shift, shift], in units of 0..255.
    """

    rotation_degrees: float = 0.0
    pixel_shift: float = 0.0

    @property
    def active(self) -> bool:
        """Whether there is anything to draw."""
        return self.rotation_degrees > 0 or self.pixel_shift > 0


NO_JITTER = JitterPolicy()


@dataclass(frozen=True)
class ShiftCrop:
    """Crops of the images' own size, for images that all have one size; nothing is resampled.

    Attributes:
        height_px, width_px: of the image, and of every crop.
        pad_px: the crop's corner lies in [-pad, pad]; what is outside the image is zero.
        flip: whether half of the views are mirrored left to right.
        jitter: augmentation after decoding.
    """

    height_px: int
    width_px: int
    pad_px: int
    flip: bool
    jitter: JitterPolicy = NO_JITTER


@dataclass(frozen=True)
class ResizedCrop:
    """Crops of any size that are resampled to a square ("Inception" crops, Szegedy et al., CVPR 2015).

    Drawn as torchvision's RandomResizedCrop draws them: up to ten tries of an area and an aspect, then the
    largest centre crop within the range of aspects.

    Attributes:
        area: smallest and largest share of the picture.
        aspect: smallest and largest width over height.
        flip: whether half of the views are mirrored left to right.
        evaluation_share: side of the centre square that is evaluated on, over the short side.
        jitter: augmentation after decoding.
        random: False: training views are the evaluation's centre squares.
    """

    area: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    evaluation_share: float = 0.875
    jitter: JitterPolicy = NO_JITTER
    random: bool = True


CropPolicy = ShiftCrop | ResizedCrop


def shifted(ids: Int64, policy: ShiftCrop, draws: Draws) -> Int32:
    """int32 (N, 5): crops of the images' own size, moved by up to the padding."""
    words = draws(ids, CROP_STREAM)
    corners = 2 * policy.pad_px + 1
    table = whole_images(len(ids), policy)
    table[:, 0] = below(words[:, 0], corners) - policy.pad_px
    table[:, 1] = below(words[:, 1], corners) - policy.pad_px
    table[:, 4] = below(words[:, 2], 2) if policy.flip else 0
    return table


def whole_images(count: int, policy: ShiftCrop) -> Int32:
    """int32 (N, 5): every image as it is."""
    table = np.zeros((count, len(TABLE_COLUMNS)), np.int32)
    table[:, 2:4] = (policy.height_px, policy.width_px)
    return table


def resized(ids: Int64, sizes: Int32, policy: ResizedCrop, draws: Draws) -> Int32:
    """int32 (N, 5): crops of a drawn area and aspect, at a drawn place."""
    table = np.empty((len(ids), len(TABLE_COLUMNS)), np.int32)
    # A row at a time would give the same; chunks keep the intermediate values of 1.3 million rows small.
    for begin in range(0, len(ids), CHUNK):
        part = slice(begin, begin + CHUNK)
        table[part, :4] = _crops(ids[part], sizes[part], policy, draws)
        table[part, 4] = below(draws(ids[part], FLIP_STREAM)[:, 0], 2) if policy.flip else 0
    return table


def _crops(ids: Int64, sizes: Int32, policy: ResizedCrop, draws: Draws) -> Int32:
    crops = _fallback_crops(sizes, policy)
    waiting = np.arange(len(ids))
    for attempt in range(TRIES):
        words = draws(ids[waiting], TRY_STREAM + attempt)
        height_width = _extents(words, sizes[waiting], policy)
        fits = ((height_width >= 1) & (height_width <= sizes[waiting])).all(axis=1)
        found, extent = waiting[fits], height_width[fits]
        room = sizes[found] - extent + 1
        crops[found, 0] = below(words[fits, 2], room[:, 0])
        crops[found, 1] = below(words[fits, 3], room[:, 1])
        crops[found, 2:] = extent
        waiting = waiting[~fits]
        if not len(waiting):
            break
    return crops


def _extents(words: Words, sizes: Int32, policy: ResizedCrop) -> Int64:
    """int64 (M, 2), height and width of crops of a drawn area and aspect; they may be larger than the picture."""
    whole = sizes[:, 0].astype(np.float64) * sizes[:, 1]
    smallest, largest = policy.area
    area = whole * (smallest + uniform(words[:, 0]) * (largest - smallest))
    low, high = (_log(aspect) for aspect in policy.aspect)
    aspect = _exp(low + uniform(words[:, 1]) * (high - low))
    return np.rint(np.sqrt(np.stack([area / aspect, area * aspect], axis=1))).astype(np.int64)


def _fallback_crops(sizes: Int32, policy: ResizedCrop) -> Int32:
    """The largest centre crop whose aspect is within the range."""
    height, width = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    narrowest, widest = policy.aspect
    crop_height = np.where(width / height < narrowest, np.rint(width / narrowest), height)
    crop_width = np.where(width / height > widest, np.rint(height * widest), width)
    extent = np.maximum(np.stack([crop_height, crop_width], axis=1), 1).astype(np.int32)
    return np.concatenate([(sizes - extent) // 2, extent], axis=1)


def centre_squares(sizes: Int32, policy: ResizedCrop) -> Int32:
    """int32 (N, 5): the square in the middle that is evaluated on."""
    side = np.maximum(np.rint(policy.evaluation_share * sizes.min(axis=1)), 1).astype(np.int32)
    table = np.zeros((len(sizes), len(TABLE_COLUMNS)), np.int32)
    table[:, :2] = (sizes - side[:, None]) // 2
    table[:, 2:4] = side[:, None]
    return table


def drawn_jitter(ids: Int64, policy: JitterPolicy, draws: Draws) -> Float32:
    """float32 (N, 4), JITTER_COLUMNS."""
    half_ranges = np.array([policy.rotation_degrees] + 3 * [policy.pixel_shift])
    return ((2 * uniform(draws(ids, JITTER_STREAM)) - 1) * half_ranges).astype(np.float32)


def _log(value: float) -> float:
    # Correctly rounded, unlike the C library's.
    return float(Decimal(value).ln())


def _exp(x: Float64) -> Float64:
    """e^x to a few units in the last place, from additions and multiplications alone: the same bits on every machine.

    numpy's own picks an implementation by the processor's instructions.
    """
    # For |x| < 4 the reduced argument is below 1/8, where twelve terms leave less than 2^-60.
    reduced = x * (1 / 32)
    result = np.ones_like(reduced)
    for term in range(12, 0, -1):
        result = 1 + result * reduced / term
    for _ in range(5):
        result = result * result
    return result
