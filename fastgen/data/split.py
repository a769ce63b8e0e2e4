"""A data set's splits: images in memory or an index of files, their limits, and the hash that names their content."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from fastgen.config import DataSettings, hash_of
from fastgen.crops import NO_JITTER, CropPolicy, JitterPolicy, ResizedCrop, ShiftCrop
from fastgen.data.beton import Beton
from fastgen.data.facts import Facts
from fastgen.data.manifest import Manifest
from fastgen.errors import UserError
from fastgen.selection import class_balanced, holdout_split
from fastgen.views import EpochViews, evaluation_views, training_views

UInt8 = npt.NDArray[np.uint8]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """Samples of one purpose, in memory; all images have one size.

    Attributes:
        images_NHWC: uint8.
        labels: int64 (N,).
        ids: int64 (N,), position of each sample in the data set's own file; stays the same when
            the split is only a part of it.
    """

    images_NHWC: UInt8
    labels: Int64
    ids: Int64

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def sizes(self) -> Int32:
        """int32 (N, 2), height and width of each image."""
        return np.broadcast_to(np.array(self.images_NHWC.shape[1:3], np.int32), (len(self), 2))

    @property
    def content_hash(self) -> str:
        """SHA-256 of images and labels."""
        digest = hashlib.sha256()
        digest.update(repr(self.images_NHWC.shape).encode())
        digest.update(np.ascontiguousarray(self.images_NHWC).data)
        digest.update(np.ascontiguousarray(self.labels, dtype="<i8").data)
        return digest.hexdigest()

    def at(self, positions: Int64) -> Split:
        """The samples at the given positions."""
        return Split(self.images_NHWC[positions], self.labels[positions], self.ids[positions])


@dataclass(frozen=True)
class FileSplit:
    """Samples of one purpose, in files; a sample's id is its row in the index.

    Attributes:
        index: where each sample's picture is.
        labels: int64 (N,).
        ids: int64 (N,).
        sizes: int32 (N, 2), height and width of each original picture.
        index_hash: names the content of the whole index, of which the split may be a part.
    """

    index: Manifest | Beton
    labels: Int64
    ids: Int64
    sizes: Int32
    index_hash: str

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def content_hash(self) -> str:
        """Names pictures and labels."""
        if len(self) == len(self.index):
            return self.index_hash
        return hash_of([self.index_hash, hashlib.sha256(self.ids.astype("<i8").tobytes()).hexdigest()])

    def at(self, positions: Int64) -> FileSplit:
        """The samples at the given positions."""
        return replace(self, labels=self.labels[positions], ids=self.ids[positions], sizes=self.sizes[positions])


AnySplit = Split | FileSplit


@dataclass(frozen=True)
class Dataset:
    """What a run learns from and is measured on.

    Attributes:
        facts: of the data set.
        train: samples to train on.
        evaluation: samples to evaluate on.
        evaluated_on: `test`, or `holdout` for a part of the training set.
        train_hash: of images and labels of the data set's whole training split, of which `train` may be a part.
        class_names: one for each class.
        crop: how training views are drawn.
        pixels: names what turns a view into pixels; `stored` where nothing is resampled.
        evaluation_px: side of the evaluation's views where they are resampled.
    """

    facts: Facts
    train: AnySplit
    evaluation: AnySplit
    evaluated_on: str
    train_hash: str
    class_names: tuple[str, ...]
    crop: CropPolicy
    pixels: str
    evaluation_px: int

    def training_views(self, data_seed: int, generation: int, epoch: int, resolution_px: int) -> EpochViews:
        """Views of the training split in one epoch; see `views.training_views`."""
        sizes = self.train.sizes
        return training_views(
            self.train.ids, self.crop, data_seed, generation, epoch, sizes=sizes, resolution_px=resolution_px
        )

    def evaluation_views(self, split: AnySplit) -> EpochViews:
        """The fixed views of one of the two splits; see `views.evaluation_views`."""
        return evaluation_views(split.ids, self.crop, sizes=split.sizes, resolution_px=self.evaluation_px)


def make_dataset(
    settings: DataSettings,
    facts: Facts,
    train: AnySplit,
    test: AnySplit,
    class_names: tuple[str, ...],
    pixels: str = "stored",
) -> Dataset:
    """Cuts the splits of a run out of a data set's official ones.

    Raises:
        UserError: holdout and limits ask for more images of a class than there are.
    """
    whole_hash = train.content_hash
    evaluation, evaluated_on = test, "test"
    if settings.holdout:
        train, evaluation = _hold_out(train, settings.holdout, facts.classes)
        evaluated_on = "holdout"
    train = _limit(train, settings.train_limit, facts.classes, "data.train_limit")
    evaluation = _limit(evaluation, settings.val_limit, facts.classes, "data.val_limit")
    return Dataset(
        facts=facts,
        train=train,
        evaluation=evaluation,
        evaluated_on=evaluated_on,
        train_hash=whole_hash,
        class_names=class_names,
        crop=_crop_policy(settings, facts),
        pixels=pixels,
        evaluation_px=settings.eval_resolution_px or settings.resolution_px,
    )


def _crop_policy(settings: DataSettings, facts: Facts) -> CropPolicy:
    augment = settings.augment == "standard"
    jitter = JitterPolicy(settings.rotation_degrees, settings.pixel_shift) if augment else NO_JITTER
    if facts.height_px:
        pad_px = facts.pad_px if augment else 0
        return ShiftCrop(facts.height_px, facts.width_px, pad_px, facts.flip and augment, jitter)
    area, aspect = settings.crop_area, settings.crop_aspect
    return ResizedCrop(
        area=(area[0], area[1]),
        aspect=(aspect[0], aspect[1]),
        flip=facts.flip and augment,
        evaluation_share=settings.eval_crop_share,
        jitter=jitter,
        random=augment,
    )


def _hold_out(train: AnySplit, count: int, classes: int) -> tuple[AnySplit, AnySplit]:
    try:
        kept, held = holdout_split(train.ids, train.labels, count, classes)
    except ValueError as error:
        raise UserError(f"data.holdout = {count}: {error}: give a smaller number") from None
    if not len(kept):
        raise UserError(f"data.holdout = {count}: leaves no image to train on: give a smaller number")
    return train.at(kept), train.at(held)


def _limit(split: AnySplit, count: int | None, classes: int, key: str) -> AnySplit:
    if count is None:
        return split
    if count < classes:
        raise UserError(f"{key} = {count}: give at least {classes}, one image for each class")
    try:
        return split.at(class_balanced(split.labels, count, classes))
    except ValueError as error:
        raise UserError(f"{key} = {count}: {error}: give a smaller number") from None
