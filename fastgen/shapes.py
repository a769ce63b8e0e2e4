"""Which shapes pass through the network in a run: parts of batches, sides of views."""

from __future__ import annotations

import itertools

from fastgen.config import Recipe
from fastgen.crops import ShiftCrop
from fastgen.data.split import Dataset
from fastgen.errors import UserError
from fastgen.rules import PHOTO_MODELS
from fastgen.schedule import resolution_px

# torchvision's ResNets halve the plane five times.
PHOTO_STRIDE_PX = 32


Shape = tuple[int, int, int]


def batch_shapes(recipe: Recipe, dataset: Dataset) -> list[Shape]:
    """(images, height, width) of all batches of the training."""
    counts = group_sizes(len(dataset.train), recipe.train.batch_size, 1)
    return [(count, height_px, width_px) for count in counts for height_px, width_px in _view_sizes(recipe, dataset)]


def part_shapes(recipe: Recipe, dataset: Dataset) -> list[Shape]:
    """(images, height, width) of everything that will pass through the network.

    Raises:
        UserError: a single image would meet a batch-norm over a single pixel, which has no variance.
    """
    counts, sides = _part_sizes(recipe, len(dataset.train)), _view_sizes(recipe, dataset)
    smallest = min(min(side) for side in sides)
    if min(counts) == 1 and recipe.model.name in PHOTO_MODELS and smallest <= PHOTO_STRIDE_PX:
        raise UserError(
            f"a part of a batch would hold one image of {smallest} pixels, of which {recipe.model.name} leaves "
            "a single one, too few for batch-norm: change train.batch_size or train.accumulate_steps"
        )
    return [(count, height_px, width_px) for count in counts for height_px, width_px in sides]


def part_bounds(images: int, count: int) -> list[int]:
    """Bounds of at most `count` parts that differ by one image at most; no part is empty."""
    return sorted({images * number // count for number in range(count + 1)})


def group_sizes(samples: int, batch_size: int, count: int) -> list[int]:
    """How many images are in a group of `count` batches: in full groups, and in the last one of an epoch."""
    full = batch_size * count
    return sorted({size for size in (min(full, samples), samples % full) if size})


def _part_sizes(recipe: Recipe, samples: int) -> list[int]:
    """How many images may pass through the network at once: parts of full batches and of the last one."""
    batches = group_sizes(samples, recipe.train.batch_size, 1)
    bounds = [itertools.pairwise(part_bounds(images, recipe.train.accumulate_steps)) for images in batches]
    return sorted({end - begin for pairs in bounds for begin, end in pairs})


def _view_sizes(recipe: Recipe, dataset: Dataset) -> list[tuple[int, int]]:
    """Heights and widths of all training views."""
    if isinstance(dataset.crop, ShiftCrop):
        return [(dataset.crop.height_px, dataset.crop.width_px)]
    epochs = recipe.train.epochs
    sides = {resolution_px(recipe.data, epochs, epoch) for epoch in range(epochs)}
    return [(side, side) for side in sorted(sides)]
