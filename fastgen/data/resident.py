"""Loader that keeps the whole uint8 set in the device's memory and executes views there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy

import numpy as np
import torch
from torch import Tensor

from fastgen.augment import Normaliser, Windows, crop_and_flip
from fastgen.crops import JITTER_COLUMNS, TABLE_COLUMNS, Int64
from fastgen.data.batch import Batch, Columns, to_device
from fastgen.data.split import Split
from fastgen.views import WHOLE, EpochViews, Share, batch_positions

# Positions int64 (B,) and their rows (B, 5) of the view table -> images (B, C, H, W) in channels-last memory.
Execute = Callable[[Tensor, Tensor], Tensor]


class ResidentLoader:
    """Batches from a set of equally sized images in the device's memory.

    Args:
        split: the samples.
        pad_px: how far a crop may reach over the image's edge.
        device: where the set is kept, 4 (H + 2 pad)(W + 2 pad) bytes an image, or H W C with kernels.
        kernels: whether one kernel makes a batch; the pixels are the same.

    Raises:
        UserError: kernels cannot run on this device.
    """

    def __init__(self, split: Split, pad_px: int, device: torch.device, kernels: bool = False) -> None:
        images_NHWC = torch.from_numpy(split.images_NHWC).to(device).contiguous()
        # Without kernels the images are kept padded, as words, and only so.
        self._images_NHWC = images_NHWC if kernels else None
        self._execute = _by_kernel(images_NHWC) if kernels else _by_torch(images_NHWC, pad_px)
        self._rows_dtype = torch.int32 if kernels else torch.int64
        self._raw = True
        self._size_px = split.images_NHWC.shape[1:3]
        self._pad_px = pad_px
        self._labels = torch.from_numpy(split.labels).to(device)
        self._ids = torch.from_numpy(split.ids).to(device)
        self._device = device

    def __len__(self) -> int:
        return len(self._labels)

    def normalised(self, normalise: Normaliser) -> ResidentLoader:
        """A loader over the same memory, whose batches are normalised by the kernel that makes them.

        Its images are `normalise(images)` of this loader's but for the last bits; see `kernels.views`. It refuses
        views with jitter by a ValueError: jitter is of pixels as stored.

        Raises:
            ValueError: this loader is without kernels, or the normaliser is of another data set or device.
        """
        if self._images_NHWC is None:
            raise ValueError("only kernels normalise while they make a batch: give ResidentLoader kernels=True")
        loader = copy(self)
        loader._execute = _by_kernel(self._images_NHWC, normalise)
        loader._raw = False
        return loader

    def batches(
        self, views: EpochViews, batch_size: int, first_batch: int = 0, share: Share = WHOLE
    ) -> Iterator[Batch]:
        """See `Loader.batches`."""
        shares = list(batch_positions(views.order, batch_size, first_batch, share))
        if not shares:
            return
        # All that is gathered beside the images is gathered at once: a batch takes slices, without a launch.
        columns = self.columns(views, np.concatenate(shares))
        end = 0
        for size in map(len, shares):
            part = slice(end, end + size)
            end += size
            if size:
                yield self.execute({name: column[part] for name, column in columns.items()})

    def columns(self, views: EpochViews, positions: Int64) -> dict[str, Tensor]:
        """See `DeviceSource.columns`."""
        self._require_own(views)
        mine = to_device(torch.from_numpy(positions), self._device)
        rows = to_device(torch.from_numpy(views.table), self._device).index_select(0, mine)
        found = {
            "positions": mine,
            "rows": rows.to(self._rows_dtype),
            "labels": self._labels.index_select(0, mine),
            "ids": self._ids.index_select(0, mine),
        }
        if views.jitter is not None:
            found["jitter"] = to_device(torch.from_numpy(views.jitter), self._device).index_select(0, mine)
        return found

    def execute(self, columns: Columns) -> Batch:
        """See `DeviceSource.execute`."""
        images_NCHW = self._execute(columns["positions"], columns["rows"])
        return Batch(images_NCHW, columns["labels"], columns["ids"], columns.get("jitter"))

    def blank(self, count: int, jitter: bool) -> dict[str, Tensor]:
        """See `DeviceSource.blank`: the first image, uncut, as class 0."""
        numbers = torch.zeros(count, dtype=torch.int64, device=self._device)
        rows = torch.zeros((count, len(TABLE_COLUMNS)), dtype=self._rows_dtype, device=self._device)
        drawn = {"jitter": torch.zeros((count, len(JITTER_COLUMNS)), device=self._device)} if jitter else {}
        return {"positions": numbers, "rows": rows, "labels": numbers.clone(), "ids": numbers.clone(), **drawn}

    def _require_own(self, views: EpochViews) -> None:
        """On the device a position or corner that does not exist would be read all the same."""
        order, table = views.order, views.table
        if len(table) != len(self) or (len(order) and not 0 <= order.min() <= order.max() < len(self)):
            raise ValueError(f"views of {len(table)} samples were given to a loader of {len(self)}")
        if (np.abs(table[:, :2]) > self._pad_px).any() or (table[:, 2:4] != self._size_px).any():
            raise ValueError(
                f"views must be of {self._size_px[0]}x{self._size_px[1]} pixels and reach at most {self._pad_px} over "
                "the edge: these are of other images"
            )
        if views.jitter is not None and not self._raw:
            raise ValueError("views carry jitter, which is of pixels as stored: take the loader that is not normalised")


def _by_torch(images_NHWC: Tensor, pad_px: int) -> Execute:
    windows = Windows(images_NHWC, pad_px)
    return lambda positions, rows: crop_and_flip(windows, positions, rows)


def _by_kernel(images_NHWC: Tensor, normalise: Normaliser | None = None) -> Execute:
    from fastgen.kernels.runtime import require_runnable
    from fastgen.kernels.views import empty_views, launch, require_normalisation

    require_runnable(images_NHWC.device, "train.kernels")
    scale_C, shift_C, dtype = None, None, torch.uint8
    if normalise is not None:
        scale_C, shift_C, dtype = normalise.scale_C, normalise.shift_C, normalise.dtype
    require_normalisation(images_NHWC, scale_C, shift_C, dtype)

    def execute(positions: Tensor, rows: Tensor) -> Tensor:
        images_NCHW = empty_views(images_NHWC, len(positions), dtype)
        launch(images_NHWC, positions, rows, scale_C, shift_C, images_NCHW)
        return images_NCHW

    return execute
