"""Loader that keeps the whole uint8 set in the device's memory and executes views there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastgen.augment import Windows, crop_and_flip
from fastgen.data.batch import Batch
from fastgen.data.split import Split
from fastgen.views import WHOLE, EpochViews, Share, batch_positions


class ResidentLoader:
    """Batches from a set of equally sized images in the device's memory.

    Args:
        split: the samples.
        pad_px: how far a crop may reach over the image's edge.
        device: where the set is kept, 4 (H + 2 pad)(W + 2 pad) bytes an image.
    """

    def __init__(self, split: Split, pad_px: int, device: torch.device) -> None:
        self._windows = Windows(torch.from_numpy(split.images_NHWC).to(device), pad_px)
        self._labels = torch.from_numpy(split.labels).to(device)
        self._ids = torch.from_numpy(split.ids).to(device)
        self._device = device

    def __len__(self) -> int:
        return len(self._labels)

    def batches(
        self, views: EpochViews, batch_size: int, first_batch: int = 0, share: Share = WHOLE
    ) -> Iterator[Batch]:
        """See `Loader.batches`."""
        shares = list(batch_positions(views.order, batch_size, first_batch, share))
        if not shares:
            return
        mine = self._to_device(np.concatenate(shares))
        table = self._to_device(views.table).long()
        jitter = None if views.jitter is None else self._to_device(views.jitter)
        for positions in mine.split([len(part) for part in shares]):
            if len(positions):
                images_NCHW = crop_and_flip(self._windows, positions, table[positions])
                drawn = None if jitter is None else jitter[positions]
                yield Batch(images_NCHW, self._labels[positions], self._ids[positions], drawn)

    def _to_device(self, values: npt.NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(values)
        if self._device.type == "cuda":
            # From pinned memory the copy does not make the host wait for the device.
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)
