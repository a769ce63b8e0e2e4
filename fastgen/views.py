"""What the network sees: a pure function of (data seed, generation, epoch, sample id).

numpy only, no torch. Every loader executes what is computed here, so the same recipe shows the
same pixels whatever the backend, the number of workers or of GPUs, and a run can go on in the
middle of an epoch.

The randomness is Philox (`philox.py`) under the data seed as key, with (sample id, epoch,
generation, stream) as counter. All four words name something, so no two draws share a counter, and
a row of the table depends on its sample alone: not on the number of samples, the rank, the worker,
or the version of numpy. No function of the C library is used whose last bit differs between
machines.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal

import numpy as np
import numpy.typing as npt

from fastgen.philox import Words, below, keys64, philox4x32, uniform

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

# The last word of the counter keeps draws for different purposes apart.
_ORDER_STREAM = 0
_CROP_STREAM = 1
_HOLDOUT_STREAM = 2
_FLIP_STREAM = 3
_JITTER_STREAM = 4
_TRY_STREAM = 16  # and the following, one for each try

TRIES = 10
_CHUNK = 1 << 14

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


@dataclass(frozen=True)
class EpochViews:
    """Views of one epoch, or of one evaluation.

    Attributes:
        order: int64 (N,), positions in the split, in the order in which they are shown; global
            batch b is order[b*B : (b+1)*B].
        table: int32 (N, 5), row n = (top, left, height, width, flip) of the sample at position n,
            in pixels of the original image.
        height_px, width_px: of every view once it is resampled.
        jitter: float32 (N, 4), row n = (degrees, and shift of red, green, blue in units of 0..255);
            None: no augmentation after decoding.
    """

    order: Int64
    table: Int32
    height_px: int
    width_px: int
    jitter: Float32 | None = None


@dataclass(frozen=True)
class Share:
    """Which part of every global batch a process takes: rank of world, contiguous parts."""

    rank: int = 0
    world: int = 1


WHOLE = Share()


def batch_positions(order: Int64, batch_size: int, first_batch: int = 0, share: Share = WHOLE) -> Iterator[Int64]:
    """Positions of the samples of each batch, from first_batch on, as far as they fall to a share.

    Parts of a batch differ by one sample at most, the first ones being larger; a part may be empty
    where the last batch holds fewer samples than there are processes.
    """
    for begin in range(first_batch * batch_size, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        size, larger = divmod(len(batch), share.world)
        first = share.rank * size + min(share.rank, larger)
        yield batch[first : first + size + (share.rank < larger)]


def training_views(
    ids: Int64,
    policy: CropPolicy,
    data_seed: int,
    generation: int,
    epoch: int,
    *,
    sizes: Int32 | None = None,
    resolution_px: int | None = None,
) -> EpochViews:
    """Order and view table of one training epoch.

    Args:
        ids: int64 (N,), the sample ids of the split, in [0, 2^32).
        policy: how crops are drawn.
        data_seed: in [0, 2^64).
        generation, epoch: counted from 0, in [0, 2^32).
        sizes: int32 (N, 2), height and width of each original picture; for ResizedCrop.
        resolution_px: side of the resampled view; for ResizedCrop.
    """
    draws = _Draws(data_seed, epoch, generation)
    order = np.argsort(keys64(draws(ids, _ORDER_STREAM)), kind="stable").astype(np.int64)
    jitter = _jitter(draws(ids, _JITTER_STREAM), policy.jitter) if policy.jitter.active else None
    if isinstance(policy, ShiftCrop):
        return EpochViews(order, _shifted(ids, policy, draws), policy.height_px, policy.width_px, jitter)
    sizes, side = _required(sizes, resolution_px)
    table = _resized(ids, sizes, policy, draws) if policy.random else _centre_squares(sizes, policy)
    return EpochViews(order, table, side, side, jitter)


def evaluation_views(
    ids: Int64, policy: CropPolicy, *, sizes: Int32 | None = None, resolution_px: int | None = None
) -> EpochViews:
    """The fixed views of an evaluation, in the order of the split: whole images, or one centre square of each picture.

    Args:
        ids: int64 (N,).
        policy: of the data set.
        sizes, resolution_px: as in `training_views`.
    """
    order = np.arange(len(ids), dtype=np.int64)
    if isinstance(policy, ShiftCrop):
        return EpochViews(order, _whole_images(len(ids), policy), policy.height_px, policy.width_px)
    sizes, side = _required(sizes, resolution_px)
    return EpochViews(order, _centre_squares(sizes, policy), side, side)


def to_stored(rows: Int32, sizes: Int32, stored_sizes: Int32) -> Int32:
    """Maps views of original pictures to pictures that were stored at another size.

    The one rounding rule: an edge at e of L original pixels lies at the stored pixel boundary nearest
    to e * stored / L, halves upwards; a view keeps at least one pixel.

    Args:
        rows: int32 (B, 5) of the view table.
        sizes, stored_sizes: int32 (B, 2), height and width.

    Returns:
        int32 (B, 5), inside the stored picture.
    """
    mapped = rows.copy()
    for axis in range(2):
        length, stored = sizes[:, axis].astype(np.int64), stored_sizes[:, axis].astype(np.int64)
        begin, end = rows[:, axis].astype(np.int64), rows[:, axis].astype(np.int64) + rows[:, axis + 2]
        first, last = ((2 * edge * stored + length) // (2 * length) for edge in (begin, end))
        first = np.minimum(first, stored - 1)
        mapped[:, axis] = first
        mapped[:, axis + 2] = np.maximum(last - first, 1)
    return mapped


def require_inside(views: EpochViews, sizes: Int32) -> None:
    """Checks that every position exists and that every view lies inside its picture: decoders may not survive others.

    Args:
        views: of the epoch.
        sizes: int32 (N, 2), height and width of the pictures that the table speaks of.

    Raises:
        ValueError: one does not; the text names its position.
    """
    count = len(sizes)
    if len(views.table) != count or ((views.order < 0) | (views.order >= count)).any():
        raise ValueError(f"views of {len(views.table)} samples were given to a loader of {count}")
    top, left, height, width = (views.table[:, column] for column in range(4))
    inside = (top >= 0) & (left >= 0) & (height >= 1) & (width >= 1)
    inside &= (top + height <= sizes[:, 0]) & (left + width <= sizes[:, 1])
    if not inside.all():
        worst = int(np.flatnonzero(~inside)[0])
        raise ValueError(
            f"the view {views.table[worst].tolist()} at position {worst} is not inside its picture of "
            f"{sizes[worst, 1]}x{sizes[worst, 0]} pixels"
        )


def class_balanced(labels: Int64, count: int, classes: int) -> Int64:
    """Positions of the first `count` samples that hold all classes alike, in rising order.

    Each class gives its first count // classes samples; the first count % classes classes one more.

    Raises:
        ValueError: a class has fewer samples than that.
    """
    taken = []
    for label in range(classes):
        wanted = count // classes + (label < count % classes)
        positions = np.flatnonzero(labels == label)
        if len(positions) < wanted:
            raise ValueError(f"class {label} has {len(positions)} images, {wanted} are wanted")
        taken.append(positions[:wanted])
    return np.sort(np.concatenate(taken)).astype(np.int64)


def holdout_split(ids: Int64, labels: Int64, count: int, classes: int) -> tuple[Int64, Int64]:
    """Splits a training set into the rest and a class-balanced validation set of `count` samples.

    The draw has a fixed key, the same for every seed: all runs of a sweep select on the same images.

    Returns:
        (positions kept for training, positions held out), both rising.
    """
    shuffled = np.argsort(keys64(_Draws(0, 0, 0)(ids, _HOLDOUT_STREAM)), kind="stable")
    held = np.sort(shuffled[class_balanced(labels[shuffled], count, classes)])
    return np.setdiff1d(np.arange(len(ids)), held), held


@dataclass(frozen=True)
class _Draws:
    """Random words of one epoch: (ids, stream) -> uint32 (N, 4)."""

    data_seed: int
    epoch: int
    generation: int

    def __call__(self, ids: Int64, stream: int) -> Words:
        key = (self.data_seed & 0xFFFFFFFF, self.data_seed >> 32)
        words = np.empty((len(ids), 4), np.uint32)
        # In parts that stay in the processor's cache: more than twice as fast for a million ids.
        for begin in range(0, len(ids), _CHUNK):
            part = ids[begin : begin + _CHUNK]
            counter = np.empty((len(part), 4), np.uint32)
            counter[:, 0] = part
            counter[:, 1:] = (self.epoch, self.generation, stream)
            words[begin : begin + _CHUNK] = philox4x32(counter, key)
        return words


def _shifted(ids: Int64, policy: ShiftCrop, draws: _Draws) -> Int32:
    words = draws(ids, _CROP_STREAM)
    corners = 2 * policy.pad_px + 1
    table = _whole_images(len(ids), policy)
    table[:, 0] = below(words[:, 0], corners) - policy.pad_px
    table[:, 1] = below(words[:, 1], corners) - policy.pad_px
    table[:, 4] = below(words[:, 2], 2) if policy.flip else 0
    return table


def _whole_images(count: int, policy: ShiftCrop) -> Int32:
    table = np.zeros((count, len(TABLE_COLUMNS)), np.int32)
    table[:, 2:4] = (policy.height_px, policy.width_px)
    return table


def _resized(ids: Int64, sizes: Int32, policy: ResizedCrop, draws: _Draws) -> Int32:
    table = np.empty((len(ids), len(TABLE_COLUMNS)), np.int32)
    # A row at a time would give the same; chunks keep the intermediate values of 1.3 million rows small.
    for begin in range(0, len(ids), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        table[part, :4] = _crops(ids[part], sizes[part], policy, draws)
        table[part, 4] = below(draws(ids[part], _FLIP_STREAM)[:, 0], 2) if policy.flip else 0
    return table


def _crops(ids: Int64, sizes: Int32, policy: ResizedCrop, draws: _Draws) -> Int32:
    crops = _fallback_crops(sizes, policy)
    waiting = np.arange(len(ids))
    for attempt in range(TRIES):
        words = draws(ids[waiting], _TRY_STREAM + attempt)
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


def _centre_squares(sizes: Int32, policy: ResizedCrop) -> Int32:
    side = np.maximum(np.rint(policy.evaluation_share * sizes.min(axis=1)), 1).astype(np.int32)
    table = np.zeros((len(sizes), len(TABLE_COLUMNS)), np.int32)
    table[:, :2] = (sizes - side[:, None]) // 2
    table[:, 2:4] = side[:, None]
    return table


def _jitter(words: Words, policy: JitterPolicy) -> Float32:
    half_ranges = np.array([policy.rotation_degrees] + 3 * [policy.pixel_shift])
    return ((2 * uniform(words) - 1) * half_ranges).astype(np.float32)


def _required(sizes: Int32 | None, resolution_px: int | None) -> tuple[Int32, int]:
    if sizes is None or resolution_px is None:
        raise ValueError("a ResizedCrop needs the sizes of the pictures and a resolution")
    return sizes, resolution_px


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
