"""What the network sees: a pure function of (data seed, generation, epoch, sample id).

numpy only, no torch. Every loader executes what is computed here, so the same recipe shows the
same pixels whatever the backend, the number of workers or of GPUs, and a run can go on in the
middle of an epoch.

The randomness is Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as
1, 2, 3", SC 2011), a counter-based generator: key = the 64 bits of the data seed, counter =
(sample id, epoch, generation, stream). All four words name something, so no two draws share a
counter, and a row of the table depends on its sample alone: not on the number of samples, the
rank, the worker, or the version of numpy (`numpy.random.Generator` promises no stream).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

# The last word of the counter keeps draws for different purposes apart.
_ORDER_STREAM = 0
_CROP_STREAM = 1
_HOLDOUT_STREAM = 2

TABLE_COLUMNS = ("top", "left", "height", "width", "flip")


@dataclass(frozen=True)
class CropPolicy:
    """How the crop of a training view is drawn, for images that all have one size.

    Attributes:
        height_px, width_px: of the image, and of every crop.
        pad_px: the crop's corner lies in [-pad, pad]; what is outside the image is zero.
        flip: whether half of the views are mirrored left to right.
    """

    height_px: int
    width_px: int
    pad_px: int
    flip: bool


@dataclass(frozen=True)
class EpochViews:
    """Views of one epoch, or of one evaluation.

    Attributes:
        order: int64 (N,), positions in the split, in the order in which they are shown; global
            batch b is order[b*B : (b+1)*B].
        table: int32 (N, 5), row n = (top, left, height, width, flip) of the sample at position n,
            in pixels of the original image.
    """

    order: Int64
    table: Int32


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Philox4x32-10.

    Args:
        counter: uint32 (..., 4).
        key: two 32-bit words.

    Returns:
        uint32 (..., 4), 128 random bits for each counter.
    """
    c0, c1, c2, c3 = (counter[..., word].astype(np.uint64) for word in range(4))
    for round_ in range(_ROUNDS):
        k0, k1 = (np.uint64((key[i] + round_ * _KEY_STEPS[i]) & 0xFFFFFFFF) for i in range(2))
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT) ^ c1 ^ k0,
            product1 & _LOW,
            (product0 >> _SHIFT) ^ c3 ^ k1,
            product0 & _LOW,
        )
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def training_views(ids: Int64, policy: CropPolicy, data_seed: int, generation: int, epoch: int) -> EpochViews:
    """Order and view table of one training epoch.

    Args:
        ids: int64 (N,), the sample ids of the split, in [0, 2^32).
        policy: how crops are drawn.
        data_seed: in [0, 2^64).
        generation, epoch: counted from 0, in [0, 2^32).
    """
    order = np.argsort(_keys64(_draw(ids, data_seed, epoch, generation, _ORDER_STREAM)), kind="stable")
    words = _draw(ids, data_seed, epoch, generation, _CROP_STREAM)
    corners = 2 * policy.pad_px + 1
    table = _whole_images(len(ids), policy)
    table[:, 0] = _below(words[:, 0], corners) - policy.pad_px
    table[:, 1] = _below(words[:, 1], corners) - policy.pad_px
    table[:, 4] = _below(words[:, 2], 2) if policy.flip else 0
    return EpochViews(order.astype(np.int64), table)


def evaluation_views(ids: Int64, policy: CropPolicy) -> EpochViews:
    """The fixed views of an evaluation: every whole image once, in the order of the split."""
    return EpochViews(np.arange(len(ids), dtype=np.int64), _whole_images(len(ids), policy))


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
    shuffled = np.argsort(_keys64(_draw(ids, 0, 0, 0, _HOLDOUT_STREAM)), kind="stable")
    held = np.sort(shuffled[class_balanced(labels[shuffled], count, classes)])
    return np.setdiff1d(np.arange(len(ids)), held), held


def _draw(ids: Int64, data_seed: int, epoch: int, generation: int, stream: int) -> Words:
    counter = np.empty((len(ids), 4), np.uint32)
    counter[:, 0] = ids
    counter[:, 1:] = (epoch, generation, stream)
    return philox4x32(counter, (data_seed & 0xFFFFFFFF, data_seed >> 32))


def _keys64(words: Words) -> npt.NDArray[np.uint64]:
    return words[:, 0].astype(np.uint64) << _SHIFT | words[:, 1].astype(np.uint64)


def _below(words: Words, bound: int) -> Int32:
    """Integers in [0, bound) from 32 random bits; the bias, at most bound / 2^32, is not seen."""
    return ((words.astype(np.uint64) * np.uint64(bound)) >> _SHIFT).astype(np.int32)


def _whole_images(count: int, policy: CropPolicy) -> Int32:
    table = np.zeros((count, len(TABLE_COLUMNS)), np.int32)
    table[:, 2:4] = (policy.height_px, policy.width_px)
    return table
