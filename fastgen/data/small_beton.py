"""CIFAR as .beton files: the same pixels as the official files, under the same hash."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastgen.data.beton import RAW, Beton, read_beton
from fastgen.data.facts import Facts
from fastgen.data.photographs import names_or_numbers, read_beside
from fastgen.data.split import FileSplit, Split
from fastgen.errors import UserError


def read_small_betons(root: Path, facts: Facts) -> tuple[FileSplit, FileSplit, tuple[str, ...]]:
    """Reads the indices of train.beton and val.beton of a data set whose images all have one size.

    Args:
        root: folder that holds them.
        facts: of the data set.

    Returns:
        training split, test split, names of the classes. The splits' hashes are those of the images in memory, so a
        run from .beton files shares its generations with one from the official files.

    Raises:
        UserError: a file is missing or damaged, or is not of this data set.
    """
    betons = [_read(root / "train.beton", facts), _read(root / "val.beton", facts)]
    train, test = _split(betons[0], facts.train_images, facts), _split(betons[1], facts.test_images, facts)
    beside = [manifest for manifest in map(read_beside, betons) if manifest is not None]
    if any(len(manifest.class_names) != facts.classes for manifest in beside):
        raise UserError(f"{root}: its .beton files are not of {facts.classes} classes: {_again()}")
    return train, test, names_or_numbers(beside[0].class_names if beside else None, facts.classes)


def _read(path: Path, facts: Facts) -> Beton:
    if not path.is_file():
        raise UserError(f"{path}: is missing: {_again()}")
    beton = read_beton(path)
    size = (facts.height_px, facts.width_px)
    for sizes in (beton.stored_sizes, beton.sizes):
        if (sizes != size).any():
            height, width = sizes[np.flatnonzero((sizes != size).any(axis=1))[0]]
            raise UserError(f"{path}: holds an image of {width}x{height} pixels, not {size[1]}x{size[0]}: {_again()}")
    if (beton.modes != RAW).any():
        raise UserError(f"{path}: holds JPEG, which has not the official pixels: {_again()} as raw pixels")
    return beton


def _split(beton: Beton, count: int, facts: Facts) -> FileSplit:
    if len(beton) != count:
        raise UserError(f"{beton.path}: holds {len(beton):,} images, not {count:,}: {_again()}")
    if beton.labels.min() < 0 or beton.labels.max() >= facts.classes:
        raise UserError(f"{beton.path}: holds labels outside 0..{facts.classes - 1}: {_again()}")
    in_memory = _load(beton, facts)
    return FileSplit(beton, in_memory.labels, in_memory.ids, beton.sizes, in_memory.content_hash)


def _load(beton: Beton, facts: Facts) -> Split:
    content = np.asarray(beton.content())
    size = facts.height_px * facts.width_px * 3
    images = np.stack([content[begin : begin + size] for begin in beton.pointers.tolist()])
    images_NHWC = images.reshape(-1, facts.height_px, facts.width_px, 3)
    return Split(images_NHWC, beton.labels, np.arange(len(beton), dtype=np.int64))


def _again() -> str:
    return "make it from the official files with python -m data_prep.beton"
