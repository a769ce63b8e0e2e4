"""A data set in memory: images, labels, ids, and the hash that names its content."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastgen.config import DataSettings
from fastgen.data.facts import Facts
from fastgen.errors import UserError
from fastgen.views import CropPolicy, class_balanced, holdout_split

UInt8 = npt.NDArray[np.uint8]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """Samples of one purpose.

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

    def at(self, positions: Int64) -> Split:
        """The samples at the given positions."""
        return Split(self.images_NHWC[positions], self.labels[positions], self.ids[positions])


@dataclass(frozen=True)
class Dataset:
    """What a run learns from and is measured on.

    Attributes:
        facts: of the data set.
        train: samples to train on.
        evaluation: samples to evaluate on.
        evaluated_on: `test`, or `holdout` for a part of the training set.
        train_hash, evaluation_hash: SHA-256 of images and labels: of the data set's whole training
            split, and of the samples evaluated on.
        class_names: one for each class.
        crop: how training views are drawn.
    """

    facts: Facts
    train: Split
    evaluation: Split
    evaluated_on: str
    train_hash: str
    evaluation_hash: str
    class_names: tuple[str, ...]
    crop: CropPolicy


def make_dataset(
    settings: DataSettings, facts: Facts, train: Split, test: Split, class_names: tuple[str, ...]
) -> Dataset:
    """Cuts the splits of a run out of a data set's official ones.

    Raises:
        UserError: holdout and limits ask for more images of a class than there are.
    """
    whole_hash = _hash(train)
    evaluation, evaluated_on = test, "test"
    if settings.holdout:
        train, evaluation = _hold_out(train, settings.holdout, facts.classes)
        evaluated_on = "holdout"
    train = _limit(train, settings.train_limit, facts.classes, "data.train_limit")
    evaluation = _limit(evaluation, settings.val_limit, facts.classes, "data.val_limit")
    augment = settings.augment == "standard"
    crop = CropPolicy(facts.height_px, facts.width_px, facts.pad_px if augment else 0, facts.flip and augment)
    return Dataset(facts, train, evaluation, evaluated_on, whole_hash, _hash(evaluation), class_names, crop)


def _hold_out(train: Split, count: int, classes: int) -> tuple[Split, Split]:
    try:
        kept, held = holdout_split(train.ids, train.labels, count, classes)
    except ValueError as error:
        raise UserError(f"data.holdout = {count}: {error}: give a smaller number") from None
    if not len(kept):
        raise UserError(f"data.holdout = {count}: leaves no image to train on: give a smaller number")
    return train.at(kept), train.at(held)


def _limit(split: Split, count: int | None, classes: int, key: str) -> Split:
    if count is None:
        return split
    try:
        return split.at(class_balanced(split.labels, count, classes))
    except ValueError as error:
        raise UserError(f"{key} = {count}: {error}: give a smaller number") from None


def _hash(split: Split) -> str:
    digest = hashlib.sha256()
    digest.update(repr(split.images_NHWC.shape).encode())
    digest.update(np.ascontiguousarray(split.images_NHWC).data)
    digest.update(np.ascontiguousarray(split.labels, dtype="<i8").data)
    return digest.hexdigest()
