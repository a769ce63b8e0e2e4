"""Loader that keeps the whole uint8 set in the device's memory and executes views there."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastgen.augment import Windows, crop_and_flip
from fastgen.data.batch import Batch
from fastgen.data.split import Split
from fastgen.views import EpochViews


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

    def batches(self, views: EpochViews, batch_size: int, first_batch: int = 0) -> Iterator[Batch]:
        """See `Loader.batches`."""
        order, table = self._to_device(views)
        for positions in order[first_batch * batch_size :].split(batch_size):
            images_NCHW = crop_and_flip(self._windows, positions, table[positions])
            yield Batch(images_NCHW, self._labels[positions], self._ids[positions])

    def _to_device(self, views: EpochViews) -> tuple[Tensor, Tensor]:
        tensors = (torch.from_numpy(views.order), torch.from_numpy(views.table).long())
        if self._device.type == "cuda":
            # From pinned memory the copy does not make the host wait for the device.
            tensors = (tensors[0].pin_memory(), tensors[1].pin_memory())
        order, table = (tensor.to(self._device, non_blocking=True) for tensor in tensors)
        return order, table
