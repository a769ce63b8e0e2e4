"""The images on which exported files are checked: the run's own, as it evaluates them, or random ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastgen.config import Recipe
from fastgen.data import build_loader, open_dataset
from fastgen.data.split import Dataset
from fastgen.errors import UserError
from fastgen.export.subject import Subject
from fastgen.measuring import EVALUATION_BATCH
from fastgen.source import readable_here

CPU = torch.device("cpu")
# They are all alike, and some 150 MB at 224 px.
MOST_RANDOM = 1024


@dataclass(frozen=True)
class Images:
    """Images for a check.

    Attributes:
        pixels_NCHW: uint8, on the CPU.
        what: they are, for people.
        class_names: of the data set; None: it could not be read.
        why_random: why they are not the run's own; None: they are.
    """

    pixels_NCHW: Tensor
    what: str
    class_names: tuple[str, ...] | None
    why_random: str | None = None

    def __len__(self) -> int:
        return len(self.pixels_NCHW)


def images_of(subject: Subject, count: int) -> Images:
    """Images of the run's evaluation set, spread evenly over it; random ones where it cannot be read, with the reason.

    Args:
        count: how many; all where there are fewer. Random ones: MOST_RANDOM at most.
    """
    recipe = readable_here(subject.recipe)
    if recipe.data.backend == "synthetic":
        return _random(subject, count, "the run's data are synthetic")
    try:
        dataset = open_dataset(recipe)
        if dataset.facts.classes != subject.facts.classes:
            found, own = dataset.facts.classes, subject.facts.classes
            raise UserError(f"{recipe.data.root}: holds {found} classes, and the network is for {own}")
        return _own(recipe, dataset, count)
    except UserError as error:
        return _random(subject, count, str(error))


def _own(recipe: Recipe, dataset: Dataset, count: int) -> Images:
    whole = dataset.evaluation
    count = min(count, len(whole))
    # Of photographs whole classes lie one after the other.
    split = whole.at(np.arange(count, dtype=np.int64) * len(whole) // count)
    views = dataset.evaluation_views(split)
    batches = list(build_loader(recipe, dataset, split, CPU).batches(views, EVALUATION_BATCH))
    order = torch.cat([batch.ids for batch in batches])
    if order.tolist() != split.ids.tolist():
        raise ValueError("the loader gave other images than were asked for")
    pixels_NCHW = torch.cat([batch.images_NCHW for batch in batches]).contiguous()
    return Images(pixels_NCHW, f"{dataset.evaluated_on} images of the run's own data", dataset.class_names)


def _random(subject: Subject, count: int, why: str) -> Images:
    shape = (min(count, MOST_RANDOM), subject.facts.channels, subject.view.side_px, subject.view.side_px)
    pixels_NCHW = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Images(pixels_NCHW, "random images", None, why)
