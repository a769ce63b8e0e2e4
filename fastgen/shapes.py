"""Which shapes pass through the network in a run: parts of batches, sides of views."""

from __future__ import annotations

import itertools

from fastgen.config import Recipe
from fastgen.crops import ShiftCrop
from fastgen.data.split import Dataset
from fastgen.errors import UserError
from fastgen.networks import traits_of
from fastgen.schedule import resolution_px
from fastgen.views import WHOLE, Share

Shape = tuple[int, int, int]


def batch_shapes(recipe: Recipe, dataset: Dataset) -> list[Shape]:
    """(images, height, width) of all batches of the training, each whole."""
    counts = group_sizes(len(dataset.train), recipe.train.batch_size, 1)
    return [(count, height_px, width_px) for count in counts for height_px, width_px in view_sizes(recipe, dataset)]


def part_shapes(recipe: Recipe, dataset: Dataset, share: Share = WHOLE) -> list[Shape]:
    """(images, height, width) of everything that will pass through the network of one process.

    Raises:
        UserError: a process would have no image of a batch; or a single image would meet a batch-norm over a single
            pixel, which has no variance.
    """
    _require_images_for_all(recipe, len(dataset.train), share)
    if recipe.dist.batchnorm == "synchronised":
        _require_equal_parts(recipe, len(dataset.train), share)
    counts, sides = _part_sizes(recipe, len(dataset.train), share), view_sizes(recipe, dataset)
    smallest = min(min(side) for side in sides)
    stride_px = traits_of(recipe.model.name).stride_px
    # A library's network is tried with these shapes instead: see `models.trial`.
    if min(counts) == 1 and stride_px is not None and smallest <= stride_px:
        raise UserError(
            f"a part of a batch would hold one image of {smallest} pixels, of which {recipe.model.name} leaves "
            "a single one, too few for batch-norm: change train.batch_size, train.accumulate_steps or dist.processes"
        )
    return [(count, height_px, width_px) for count in counts for height_px, width_px in sides]


def part_bounds(images: int, count: int) -> list[int]:
    """Bounds of at most `count` parts that differ by one image at most; no part is empty."""
    return sorted({images * number // count for number in range(count + 1)})


def own_parts(parts: int, share: Share) -> int:
    """In how many parts each process takes its share of a batch that shall pass in so many: rounded up."""
    return -(-parts // share.world)


def own_bounds(images: int, parts: int, share: Share) -> list[int]:
    """Bounds of the parts of one process's share of a batch, counted from the share's first image.

    All processes together have `parts` of them, or a few more, so that each has as many: those that one would form.

    Args:
        images: in the whole batch.
        parts: wanted.
        share: of this process.
    """
    each = own_parts(parts, share)
    numbers = range(share.rank * each, (share.rank + 1) * each + 1)
    bounds = sorted({images * number // (share.world * each) for number in numbers})
    return [bound - bounds[0] for bound in bounds]


def own_size(images: int, share: Share) -> int:
    """How many images of a whole batch fall to a share."""
    begin, end = share.bounds(images)
    return end - begin


def group_sizes(samples: int, batch_size: int, count: int, share: Share = WHOLE) -> list[int]:
    """How many images of a share are in a group of `count` batches: in full groups, and in the last one of an epoch."""
    full, rest = divmod(samples, batch_size)
    groups, left = divmod(full, count)
    one, last = own_size(batch_size, share), own_size(rest, share)
    return sorted({size for size in (one * count if groups else 0, one * left + last) if size})


def _part_sizes(recipe: Recipe, samples: int, share: Share) -> list[int]:
    """How many images may pass through the network at once: parts of full batches and of the last one."""
    batches = group_sizes(samples, recipe.train.batch_size, 1)
    bounds = [itertools.pairwise(own_bounds(images, recipe.train.accumulate_steps, share)) for images in batches]
    return sorted({end - begin for pairs in bounds for begin, end in pairs})


def _require_images_for_all(recipe: Recipe, samples: int, share: Share) -> None:
    least = min(group_sizes(samples, recipe.train.batch_size, 1))
    if least < share.world:
        which = "a batch" if least == recipe.train.batch_size else "the last batch of an epoch"
        raise UserError(
            f"{which} holds {least} images, fewer than the {share.world} processes: change train.batch_size or "
            "dist.processes"
        )


def _require_equal_parts(recipe: Recipe, samples: int, share: Share) -> None:
    """Synchronised batch-norms of all processes meet in each part."""
    parts = recipe.train.accumulate_steps
    for images in group_sizes(samples, recipe.train.batch_size, 1):
        counts = {len(own_bounds(images, parts, Share(rank, share.world))) for rank in range(share.world)}
        if len(counts) > 1:
            raise UserError(
                f"a batch of {images} images gives {share.world} processes unlike numbers of parts, which synchronised "
                "batch-norm cannot have: change train.batch_size or train.accumulate_steps"
            )


def view_sizes(recipe: Recipe, dataset: Dataset) -> list[tuple[int, int]]:
    """Heights and widths of all training views."""
    if isinstance(dataset.crop, ShiftCrop):
        return [(dataset.crop.height_px, dataset.crop.width_px)]
    epochs = recipe.train.epochs
    sides = {resolution_px(recipe.data, epochs, epoch) for epoch in range(epochs)}
    return [(side, side) for side in sorted(sides)]
