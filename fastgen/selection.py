"""Parts of a data set that hold all classes alike: limits, and the hold-out. numpy only."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fastgen.philox import HOLDOUT_STREAM, Draws, keys64

Int64 = npt.NDArray[np.int64]


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
    shuffled = np.argsort(keys64(Draws(0, 0, 0)(ids, HOLDOUT_STREAM)), kind="stable")
    held = np.sort(shuffled[class_balanced(labels[shuffled], count, classes)])
    return np.setdiff1d(np.arange(len(ids)), held), held
