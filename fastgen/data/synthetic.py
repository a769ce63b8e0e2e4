"""Loader that yields one random batch again and again: the ceiling that no data path can beat."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastgen.data.batch import Batch, to_device
from fastgen.data.facts import Facts
from fastgen.views import WHOLE, EpochViews, Share, batch_positions


class SyntheticLoader:
    """The same random images under random labels in every step; only the number of samples is real.

    Args:
        samples: how many samples an epoch pretends to have.
        facts: number of channels and classes.
        device: where the batch is kept.
    """

    def __init__(self, samples: int, facts: Facts, device: torch.device) -> None:
        self._samples = samples
        self._facts = facts
        self._device = device

    def __len__(self) -> int:
        return self._samples

    def batches(
        self, views: EpochViews, batch_size: int, first_batch: int = 0, share: Share = WHOLE
    ) -> Iterator[Batch]:
        """See `Loader.batches`; the ids are the positions in the order, the pixels belong to none."""
        images_NCHW, labels = self._draw(min(batch_size, self._samples), views.height_px, views.width_px)
        jitter = None if views.jitter is None else torch.from_numpy(views.jitter[: len(labels)]).to(self._device)
        for positions in batch_positions(views.order, batch_size, first_batch, share):
            count = len(positions)
            if count:
                ids = to_device(torch.from_numpy(positions), self._device)
                yield Batch(images_NCHW[:count], labels[:count], ids, None if jitter is None else jitter[:count])

    def _draw(self, count: int, height_px: int, width_px: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        shape = (count, self._facts.channels, height_px, width_px)
        images_NCHW = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, self._facts.classes, (count,), generator=generator)
        return images_NCHW.to(self._device, memory_format=torch.channels_last), labels.to(self._device)
