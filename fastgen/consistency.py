"""SoTeacher's consistency term: predictions of an image shall agree over the epochs, whatever its views.

For each training image the mean of its softmax over all earlier epochs is kept, C numbers an image: 20 MB of CIFAR-100,
5.1 GB of ILSVRC2012 in fp32. Each process keeps those of the images that it is shown in an epoch, on its device, in
the order in which they are shown; between two epochs the processes pass on what others will be shown.

In epoch e, counted from 0, of E, with mean m of the softmaxes of epochs 0..e-1:

    L = CE(y, p) + w e / E sum_c (p_c - m_c)^2,        then m <- m + (p - m) / (e + 1)

Source: Dong, Liu, Shang, ICLR 2024, arXiv 2206.06661 (C times the mean squared error, weight 1 on a linear ramp).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fastgen.config import TrainSettings
from fastgen.crops import Int64
from fastgen.data.batch import Batch, Columns, DeviceSource, Loader, numbered, to_device
from fastgen.distributed import Group
from fastgen.plan import Objective
from fastgen.views import WHOLE, EpochViews, Share, batch_positions

MEAN_ROWS = "mean_rows"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
# What is passed on at once.
CHUNK_ROWS = 1 << 15


class Means:
    """Mean predictions of the images that this process is shown in the present epoch.

    Args:
        images: in the training set, N.
        classes: C.
        train: gives the batch size, of all processes together, and the epochs, E.
        objective: gives w, and the dtype in which they are kept.
        device: where they are kept.
        group: of the run.

    Attributes:
        table_RC: a row for each image of this process's share, in the order in which they are shown.
        weight, rate: fp32 (), on the device: w e / E and 1 / (e + 1) of the present epoch.
    """

    def __init__(
        self,
        images: int,
        classes: int,
        train: TrainSettings,
        objective: Objective,
        device: torch.device,
        group: Group,
    ) -> None:
        self._images, self._batch_size, self._epochs = images, train.batch_size, train.epochs
        self._full_weight, self._group = objective.consistency_weight, group
        own = len(self._positions(np.arange(images)))
        self.table_RC = torch.zeros((own, classes), dtype=DTYPES[objective.consistency_dtype], device=device)
        self.weight = torch.zeros((), device=device)
        self.rate = torch.ones((), device=device)
        self._own: Int64 | None = None
        # What a checkpoint held, in the main process; True in all of them until `begin` has dealt it out.
        self._restored_NC: Tensor | None = None
        self._restored = False
        self._row_of = np.zeros(images, np.int64)

    def begin(self, epoch: int, views: EpochViews) -> None:
        """Turns to an epoch, from its beginning or from its middle; all processes call this at once.

        Args:
            epoch: counted from 0.
            views: of it.
        """
        own = self._positions(views.order)
        if self._restored:
            self.table_RC.copy_(self._picked(own, self._dealt_out()))
            self._restored, self._restored_NC = False, None
        elif self._own is not None:
            self.table_RC.copy_(self._picked(own, self._told(self._own)))
        self._own = own
        self._row_of[own] = np.arange(len(own))
        self.weight.fill_(self._full_weight * epoch / self._epochs)
        self.rate.fill_(1 / (epoch + 1))

    def rows(self, positions: Int64) -> Int64:
        """Rows of the table of images of this process's share, by their positions in the training set."""
        return self._row_of[positions]

    def term(self, p_BC: Tensor, rows_B: Tensor) -> Tensor:
        """The consistency term of some images, which are counted into their means: each of them once an epoch.

        Args:
            p_BC: softmax, fp32.
            rows_B: int64, of the table.

        Returns:
            Mean over the batch, fp32 ().
        """
        mean_BC = self.table_RC.index_select(0, rows_B).to(p_BC.dtype)
        with torch.no_grad():
            new_BC = mean_BC + (p_BC.detach() - mean_BC) * self.rate
            self.table_RC.index_copy_(0, rows_B, new_BC.to(self.table_RC.dtype))
        return self.weight * (p_BC - mean_BC).square().sum(1).mean()

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """What steps on blank batches write, which is the first row, is put back afterwards."""
        before_C = self.table_RC[0].clone()
        yield
        self.table_RC[0].copy_(before_C)

    def state(self) -> Tensor | None:
        """All of it, (N, C), for a checkpoint; to be asked for in all processes at once, and given to the main one."""
        if self._own is None:
            return None
        full_NC = self._blank(self._images) if self._group.main else None
        for positions_R, rows_RC in self._told(self._own):
            if full_NC is not None:
                full_NC[positions_R] = rows_RC
        return full_NC

    def restore(self, full_NC: Tensor | None) -> None:
        """Goes on from what `state` gave, here or in another number of processes; `begin` follows.

        Args:
            full_NC: in the main process; None in the others.
        """
        self._restored, self._restored_NC = True, full_NC

    def _blank(self, rows: int) -> Tensor:
        return torch.zeros((rows, self.table_RC.shape[1]), dtype=self.table_RC.dtype)

    def _positions(self, order: Int64) -> Int64:
        parts = list(batch_positions(order, self._batch_size, 0, self._group.share))
        return np.concatenate(parts).astype(np.int64)

    def _picked(self, wanted: Int64, told: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """Rows of these images, in this order, from positions and rows that are told of all images."""
        place = torch.full((self._images,), -1)
        place[torch.from_numpy(wanted)] = torch.arange(len(wanted))
        found_RC = self._blank(len(wanted))
        for positions_R, rows_RC in told:
            rows = place[positions_R]
            mine = rows >= 0
            found_RC[rows[mine]] = rows_RC[mine]
        return found_RC

    def _dealt_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Positions and rows of what the main process has restored, in pieces, everywhere."""
        for first in range(0, self._images, CHUNK_ROWS):
            size = min(CHUNK_ROWS, self._images - first)
            rows = self._blank(size) if self._restored_NC is None else self._restored_NC[first : first + size]
            yield torch.arange(first, first + size), self._group.told_by(0, rows)

    def _told(self, own: Int64) -> Iterator[tuple[Tensor, Tensor]]:
        """Positions and rows of all processes, in pieces, everywhere."""
        positions_R, rows_RC = torch.from_numpy(own), self.table_RC.cpu()
        counts = self._group.gather(len(positions_R))
        for rank, count in enumerate(counts):
            for first in range(0, count, CHUNK_ROWS):
                size, mine = min(CHUNK_ROWS, count - first), rank == self._group.rank
                positions = positions_R[first : first + size] if mine else torch.empty(size, dtype=torch.int64)
                rows = rows_RC[first : first + size] if mine else self._blank(size)
                yield self._group.told_by(rank, positions), self._group.told_by(rank, rows)


class MeansLoader:
    """Batches that know their rows of the means.

    Args:
        loader: of the training set.
        means: of its images.
        device: where batches are.
    """

    def __init__(self, loader: Loader, means: Means, device: torch.device) -> None:
        self._loader, self._means, self._device = loader, means, device

    def __len__(self) -> int:
        return len(self._loader)

    def batches(
        self, views: EpochViews, batch_size: int, first_batch: int = 0, share: Share = WHOLE
    ) -> Iterator[Batch]:
        """See `Loader.batches`."""
        row_of = self._means.rows(np.arange(len(self)))
        for batch, rows in numbered(self._loader, views, batch_size, first_batch, share, row_of, self._device):
            yield replace(batch, mean_rows=rows)

    def dress(self, batch: Batch) -> Batch:
        """A raw batch with some rows, see `Means.preserved`."""
        return replace(batch, mean_rows=torch.zeros_like(batch.labels))


class MeansSource:
    """What `MeansLoader` is, for batches that are made on the device: see `DeviceSource`."""

    def __init__(self, source: DeviceSource, means: Means, device: torch.device) -> None:
        self._source, self._means, self._device = source, means, device

    def columns(self, views: EpochViews, positions: Int64) -> dict[str, Tensor]:
        """See `DeviceSource.columns`."""
        rows = torch.from_numpy(self._means.rows(positions))
        return {**self._source.columns(views, positions), MEAN_ROWS: to_device(rows, self._device)}

    def execute(self, columns: Columns) -> Batch:
        """See `DeviceSource.execute`."""
        return replace(self._source.execute(columns), mean_rows=columns[MEAN_ROWS])

    def blank(self, count: int, jitter: bool) -> dict[str, Tensor]:
        """See `DeviceSource.blank`."""
        rows = torch.zeros(count, dtype=torch.int64, device=self._device)
        return {**self._source.blank(count, jitter), MEAN_ROWS: rows}
