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

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fastgen.crops import (
    CropPolicy,
    Float32,
    Int32,
    Int64,
    ShiftCrop,
    centre_squares,
    drawn_jitter,
    resized,
    shifted,
    whole_images,
)
from fastgen.philox import ORDER_STREAM, Draws, keys64


class EpochName(NamedTuple):
    """Which epoch's views they are, counted from 0, and of which size."""

    data_seed: int
    generation: int
    epoch: int
    height_px: int
    width_px: int


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
        name: of a training epoch; None: they are of something else.
    """

    order: Int64
    table: Int32
    height_px: int
    width_px: int
    jitter: Float32 | None = None
    name: EpochName | None = None

    @property
    def checksum(self) -> int:
        """CRC-32 of all that decides what is seen, and in which order."""
        columns = [self.order.astype("<i8"), self.table.astype("<i4")]
        if self.jitter is not None:
            columns.append(self.jitter.astype("<f4"))
        checksum = zlib.crc32(repr((self.height_px, self.width_px)).encode())
        for column in columns:
            checksum = zlib.crc32(np.ascontiguousarray(column).data, checksum)
        return checksum


@dataclass(frozen=True)
class Share:
    """Which part of every global batch a process takes: rank of world, contiguous parts."""

    rank: int = 0
    world: int = 1

    def bounds(self, images: int) -> tuple[int, int]:
        """Which of so many images fall to it: sizes differ by one at most, and may be 0."""
        return images * self.rank // self.world, images * (self.rank + 1) // self.world


WHOLE = Share()


def batch_positions(order: Int64, batch_size: int, first_batch: int = 0, share: Share = WHOLE) -> Iterator[Int64]:
    """Positions of the samples of each batch, from first_batch on, as far as they fall to a share.

    Parts of a batch differ by one sample at most (`Share.bounds`); a part may be empty where the last batch holds
    fewer samples than there are processes.
    """
    for begin in range(first_batch * batch_size, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        first, end = share.bounds(len(batch))
        yield batch[first:end]


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
    draws = Draws(data_seed, epoch, generation)
    order = np.argsort(keys64(draws(ids, ORDER_STREAM)), kind="stable").astype(np.int64)
    jitter = drawn_jitter(ids, policy.jitter, draws) if policy.jitter.active else None
    if isinstance(policy, ShiftCrop):
        name = EpochName(data_seed, generation, epoch, policy.height_px, policy.width_px)
        return EpochViews(order, shifted(ids, policy, draws), policy.height_px, policy.width_px, jitter, name)
    sizes, side = _required(sizes, resolution_px)
    table = resized(ids, sizes, policy, draws) if policy.random else centre_squares(sizes, policy)
    name = EpochName(data_seed, generation, epoch, side, side)
    return EpochViews(order, table, side, side, jitter, name)


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
        return EpochViews(order, whole_images(len(ids), policy), policy.height_px, policy.width_px)
    sizes, side = _required(sizes, resolution_px)
    return EpochViews(order, centre_squares(sizes, policy), side, side)


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


def _required(sizes: Int32 | None, resolution_px: int | None) -> tuple[Int32, int]:
    if sizes is None or resolution_px is None:
        raise ValueError("a ResizedCrop needs the sizes of the pictures and a resolution")
    return sizes, resolution_px
