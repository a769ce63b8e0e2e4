"""Data sets and loaders. Loaders execute the views of `views.py` and know no model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from fastgen.config import Recipe
    from fastgen.data.batch import Loader
    from fastgen.data.split import AnySplit, Dataset


def open_dataset(recipe: Recipe) -> Dataset:
    """Reads the recipe's data set, or its index, and cuts the run's splits out of it.

    Raises:
        UserError: files are missing or damaged, or a limit asks for too many images.
    """
    from fastgen.data.cifar import read_cifar
    from fastgen.data.digits import read_digits
    from fastgen.data.facts import DATASETS
    from fastgen.data.photographs import read_photographs
    from fastgen.data.small_beton import read_small_betons
    from fastgen.data.split import make_dataset

    settings, facts = recipe.data, DATASETS[recipe.data.dataset]
    root = Path(settings.root)
    if settings.dataset == "imagenet":
        photographs = read_photographs(settings, recipe.gen.k)
        facts = replace(facts, classes=len(photographs.class_names))
        parts = (photographs.train, photographs.test, photographs.class_names, photographs.pixels)
        return make_dataset(settings, facts, *parts)
    if settings.backend == "ffcv":
        return make_dataset(settings, facts, *read_small_betons(root, facts))
    if settings.dataset == "digits":
        return make_dataset(settings, facts, *read_digits())
    return make_dataset(settings, facts, *read_cifar(settings.dataset, root, download=settings.download))


def build_loader(recipe: Recipe, dataset: Dataset, split: AnySplit, device: torch.device) -> Loader:
    """Makes the loader that the recipe's `data.backend` names, for one split.

    Raises:
        UserError: the package that the backend needs is not installed.
    """
    from fastgen.data.split import FileSplit, Split

    settings = recipe.data
    if settings.backend == "synthetic":
        from fastgen.data.synthetic import SyntheticLoader

        return SyntheticLoader(len(split), dataset.facts, device)
    if settings.backend == "folder":
        from fastgen.data.folder import FolderLoader

        return FolderLoader(split, settings, device)
    if settings.backend == "dali":
        from fastgen.data.dali_loader import DaliLoader

        return DaliLoader(split, settings, device)
    if settings.backend == "ffcv":
        from fastgen.data.ffcv_loader import FfcvLoader

        if not isinstance(split, FileSplit):
            raise TypeError("the ffcv loader reads a .beton, not images in memory")
        return FfcvLoader(split, settings, device)
    from fastgen.data.resident import ResidentLoader

    if not isinstance(split, Split):
        raise TypeError("the resident loader takes images in memory, not files")
    return ResidentLoader(split, dataset.facts.pad_px, device, kernels=recipe.train.kernels == "triton")
