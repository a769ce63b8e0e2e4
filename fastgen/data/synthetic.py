"""Loader that yields one random batch again and again: the ceiling that no data path can beat."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastgen.data.batch import Batch
from fastgen.data.facts import Facts
from fastgen.views import EpochViews


class SyntheticLoader:
    """The same random images under random labels in every step; only the number of samples is real.

    Args:
        samples: how many samples an epoch pretends to have.
        facts: shape of the images and number of classes.
        batch_size: the largest batch that will be asked for.
        device: where the batch is kept.
    """

    def __init__(self, samples: int, facts: Facts, batch_size: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (min(batch_size, samples), facts.channels, facts.height_px, facts.width_px)
        images_NCHW = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        self._images_NCHW = images_NCHW.to(device, memory_format=torch.channels_last)
        self._labels = torch.randint(0, facts.classes, shape[:1], generator=generator).to(device)
        self._samples = samples
        self._device = device

    def __len__(self) -> int:
        return self._samples

    def batches(self, views: EpochViews, batch_size: int, first_batch: int = 0) -> Iterator[Batch]:
        """See `Loader.batches`; the ids are the positions in the order, the pixels belong to none."""
        positions = torch.from_numpy(views.order).to(self._device)
        for ids in positions[first_batch * batch_size :].split(batch_size):
            yield Batch(self._images_NCHW[: len(ids)], self._labels[: len(ids)], ids)
