"""Data sets and loaders. Loaders execute the views of `views.py` and know no model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from fastgen.config import Recipe
    from fastgen.data.batch import Loader
    from fastgen.data.split import Dataset, Split


def open_dataset(recipe: Recipe) -> Dataset:
    """Reads the recipe's data set and cuts its splits out of it.

    Raises:
        UserError: files are missing or damaged, or a limit asks for too many images.
    """
    from fastgen.data.cifar import read_cifar
    from fastgen.data.digits import read_digits
    from fastgen.data.facts import DATASETS
    from fastgen.data.split import make_dataset

    settings = recipe.data
    if settings.dataset == "digits":
        train, test, names = read_digits()
    else:
        train, test, names = read_cifar(settings.dataset, Path(settings.root), download=settings.download)
    return make_dataset(settings, DATASETS[settings.dataset], train, test, names)


def build_loader(recipe: Recipe, dataset: Dataset, split: Split, device: torch.device) -> Loader:
    """Makes the loader that the recipe's `data.backend` names, for one split."""
    if recipe.data.backend == "synthetic":
        from fastgen.data.synthetic import SyntheticLoader

        return SyntheticLoader(len(split), dataset.facts, device)
    from fastgen.data.resident import ResidentLoader

    return ResidentLoader(split, dataset.crop.pad_px, device)
