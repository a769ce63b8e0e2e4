"""The contract between loaders and everything that takes batches."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fastgen.crops import Int64
from fastgen.truncation import CLASSES, LOG_P, Labels
from fastgen.views import WHOLE, EpochViews, Share, batch_positions

if TYPE_CHECKING:
    from fastgen.data.split import AnySplit


class Remembered(NamedTuple):
    """Where the means of a batch's earlier predictions are kept; see `consistency.Means`.

    Attributes:
        rows_B: int64 (B,).
    """

    rows_B: Tensor


class Kept(NamedTuple):
    """What a loss is told of a teacher of which M < C classes a row are kept; see `truncation.Labels`."""

    log_p_BN: Tensor
    classes_BM: Tensor


# What a batch brings along for its loss: the teacher's logits, some of them, or where earlier predictions are.
Lesson = Tensor | Kept | Remembered


@dataclass(frozen=True)
class Batch:
    """Samples of one step, on the device.

    Attributes:
        images_NCHW: in channels-last memory; views are executed. uint8: jitter and normalisation are still to come;
            else they are done.
        labels: int64 (N,).
        ids: int64 (N,), sample ids.
        jitter: float32 (N, 4), what `augment.jitter_views` shall do to each image; None: nothing.
        teacher_logits_BC: of these very views, where the teacher was asked before; else None.
        teacher_classes_BM: int16, where the teacher is truncated, and the logits are log-probabilities (N, M + 1) of
            these classes and of all others together; else None.
        mean_rows: int64 (N,), where the means of earlier predictions are kept; None: none are.
    """

    images_NCHW: Tensor
    labels: Tensor
    ids: Tensor
    jitter: Tensor | None = None
    teacher_logits_BC: Tensor | None = None
    teacher_classes_BM: Tensor | None = None
    mean_rows: Tensor | None = None

    @property
    def lesson(self) -> Lesson | None:
        """What the teacher says of them, or where earlier predictions are; None: there is none, or it was not asked."""
        if self.mean_rows is not None:
            return Remembered(self.mean_rows)
        if self.teacher_logits_BC is None or self.teacher_classes_BM is None:
            return self.teacher_logits_BC
        return Kept(self.teacher_logits_BC, self.teacher_classes_BM)

    def taught(self, labels: Labels) -> Batch:
        """The same samples with what a truncated teacher says of them."""
        return replace(self, teacher_logits_BC=labels[LOG_P], teacher_classes_BM=labels.get(CLASSES))

    def __getitem__(self, part: slice) -> Batch:
        """Some of the samples."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        parts: dict[str, Any] = {name: None if whole is None else whole[part] for name, whole in columns.items()}
        return Batch(**parts)


class Loader(Protocol):
    """Executes views that `views.py` computed. It knows no seed, no epoch and no model."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def batches(
        self, views: EpochViews, batch_size: int, first_batch: int = 0, share: Share = WHOLE
    ) -> Iterator[Batch]:
        """Yields this share of the batches first_batch, first_batch + 1, ... of the order.

        The last batch may be smaller, and a share of it empty: then it is left out. The memory of a batch is its
        own: it may be kept. Leaving the iterator early ends whatever works behind it.

        Raises:
            UserError: a sample cannot be read; the line names its file.
            ValueError: the views are not of these samples, or lie outside their pictures.
        """
        ...


# What is known of samples, by name: tensors on the device whose first dimension counts the samples.
Columns = Mapping[str, Tensor]


class DeviceSource(Protocol):
    """Batches in two halves: what the host looks up for many of them at once, and what the device makes of it.

    The second half launches the same work whatever the values are, so it can be captured in a CUDA graph.
    """

    def columns(self, views: EpochViews, positions: Int64) -> dict[str, Tensor]:
        """What `execute` needs of the samples at these positions.

        Raises:
            ValueError: the views are not of these samples.
        """
        ...

    def execute(self, columns: Columns) -> Batch:
        """The samples that the columns speak of."""
        ...

    def blank(self, count: int, jitter: bool) -> dict[str, Tensor]:
        """Columns of so many samples that nothing has been looked up for: valid, and all the same."""
        ...


def make_batch(
    split: AnySplit, views: EpochViews, positions: Int64, images_NHWC: Tensor, device: torch.device
) -> Batch:
    """Brings images, and what is known of their samples, to the device.

    Args:
        split: the loader's.
        views: of the epoch.
        positions: int64 (N,), of the batch.
        images_NHWC: uint8, dense.
        device: where the batch goes.
    """
    drawn = None if views.jitter is None else to_device(torch.from_numpy(views.jitter[positions]), device)
    return Batch(
        to_device(images_NHWC, device).permute(0, 3, 1, 2),
        to_device(torch.from_numpy(split.labels[positions]), device),
        to_device(torch.from_numpy(split.ids[positions]), device),
        drawn,
    )


def numbered(
    loader: Loader,
    views: EpochViews,
    batch_size: int,
    first_batch: int,
    share: Share,
    numbers_N: Int64,
    device: torch.device,
) -> Iterator[tuple[Batch, Tensor]]:
    """Batches of a loader, each with a number of each of its samples.

    Args:
        loader, views, batch_size, first_batch, share: see `Loader.batches`.
        numbers_N: int64, by position in the split.
        device: where the numbers go, all of them at once.
    """
    parts = [part for part in batch_positions(views.order, batch_size, first_batch, share) if len(part)]
    if not parts:
        return
    numbers = to_device(torch.from_numpy(numbers_N[np.concatenate(parts)]), device)
    found = loader.batches(views, batch_size, first_batch, share)
    yield from zip(found, numbers.split([len(part) for part in parts]), strict=True)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies without making the host wait for a GPU, which takes page-locked memory."""
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def usable_cores() -> int:
    """Cores that this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0))
