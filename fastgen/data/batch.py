"""The contract between loaders and everything that takes batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fastgen.views import EpochViews


@dataclass(frozen=True)
class Batch:
    """Samples of one step, on the device.

    Attributes:
        images_NCHW: uint8 in channels-last memory; views are executed, normalisation is not.
        labels: int64 (N,).
        ids: int64 (N,), sample ids.
    """

    images_NCHW: Tensor
    labels: Tensor
    ids: Tensor


class Loader(Protocol):
    """Executes views that `views.py` computed. It knows no seed, no epoch and no model."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def batches(self, views: EpochViews, batch_size: int, first_batch: int = 0) -> Iterator[Batch]:
        """Yields batches first_batch, first_batch + 1, ... of the order; the last may be smaller."""
        ...
