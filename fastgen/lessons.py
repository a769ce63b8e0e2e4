"""Loaders whose batches bring the teacher's word along: from a look ahead, a table of labels, or a store of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fastgen.crops import Int64
from fastgen.data.batch import Batch, Columns, DeviceSource, Loader, numbered, to_device
from fastgen.errors import MachineError
from fastgen.label_store import KnownLabels, LabelStore
from fastgen.labels import LabelTable
from fastgen.step import Prepare
from fastgen.teacher import Teacher
from fastgen.truncation import Labels
from fastgen.views import WHOLE, EpochViews, Share, batch_positions

TABLE_ROWS = "table_rows"


class LookAhead:
    """Asks the teacher for several batches at once: fewer, larger passes.

    A teacher in eval mode treats each image by itself, so its logits are those of a live teacher, but for what
    libraries' arithmetic depends on the size of a batch. Batches are grouped by their number in the epoch, so a run
    that was stopped forms the same groups again.

    Args:
        loader: of the student's batches.
        teacher: see `teacher.make_teacher`.
        prepare: what the student sees of an image, and the teacher too.
        count: batches that the teacher sees at once.
        classes: of its logits.
    """

    def __init__(self, loader: Loader, teacher: Teacher, prepare: Prepare, count: int, classes: int) -> None:
        self._loader = loader
        self._teacher = teacher
        self._prepare = prepare
        self.count = count
        self._classes = classes

    def __len__(self) -> int:
        return len(self._loader)

    def batches(
        self, views: EpochViews, batch_size: int, first_batch: int = 0, share: Share = WHOLE
    ) -> Iterator[Batch]:
        """See `Loader.batches`; images are prepared, jitter included."""
        skipped = first_batch % self.count
        found = self._loader.batches(views, batch_size, first_batch - skipped, share)
        # islice asks for no batch beyond the group: the loader's own look ahead is enough.
        while group := list(itertools.islice(found, self.count)):
            yield from self.teach(group)[skipped:]
            skipped = 0

    def teach(self, group: Sequence[Batch]) -> list[Batch]:
        """The same batches, prepared and with the teacher's logits."""
        images_NCHW = torch.cat([batch.images_NCHW for batch in group])
        drawn = [batch.jitter for batch in group if batch.jitter is not None]
        labels, ids = torch.cat([batch.labels for batch in group]), torch.cat([batch.ids for batch in group])
        taught = self.taught(Batch(images_NCHW, labels, ids, torch.cat(drawn) if drawn else None))
        ends = list(itertools.accumulate(len(batch.labels) for batch in group))
        return [taught[begin:end] for begin, end in itertools.pairwise([0, *ends])]

    def taught(self, whole: Batch) -> Batch:
        """The same samples, prepared and with the teacher's logits, of one pass."""
        inputs_NCHW = self._prepare(whole.images_NCHW, whole.jitter)
        return replace(whole, images_NCHW=inputs_NCHW, jitter=None, teacher_logits_BC=self._teacher(inputs_NCHW))

    def dress(self, batch: Batch) -> Batch:
        """A raw batch, prepared, with some logits."""
        inputs_NCHW = self._prepare(batch.images_NCHW, batch.jitter)
        logits_BC = inputs_NCHW.new_zeros((len(batch.labels), self._classes))
        return replace(batch, images_NCHW=inputs_NCHW, jitter=None, teacher_logits_BC=logits_BC)


class TableLoader:
    """Batches with the teacher's logits from a table.

    Args:
        loader: of the student's batches, of the split that the table is of.
        table: of its teacher.
    """

    def __init__(self, loader: Loader, table: LabelTable) -> None:
        self._loader = loader
        self._table = table

    def __len__(self) -> int:
        return len(self._loader)

    def batches(
        self, views: EpochViews, batch_size: int, first_batch: int = 0, share: Share = WHOLE
    ) -> Iterator[Batch]:
        """See `Loader.batches`."""
        logits_RC, row_of = self._table.logits_RC, self._table.rows(views)
        for batch, rows in numbered(self._loader, views, batch_size, first_batch, share, row_of, logits_RC.device):
            yield replace(batch, teacher_logits_BC=logits_RC[rows])

    def dress(self, batch: Batch) -> Batch:
        """A raw batch with some logits of the table's shape."""
        return replace(batch, teacher_logits_BC=self._table.logits_RC[:1].expand(len(batch.labels), -1).contiguous())


class TableSource:
    """What `TableLoader` is, for batches that are made on the device: see `DeviceSource`."""

    def __init__(self, source: DeviceSource, table: LabelTable) -> None:
        self._source = source
        self._table = table

    def columns(self, views: EpochViews, positions: Int64) -> dict[str, Tensor]:
        """See `DeviceSource.columns`."""
        rows = torch.from_numpy(self._table.rows(views)[positions])
        return self._source.columns(views, positions) | {TABLE_ROWS: to_device(rows, self._table.logits_RC.device)}

    def execute(self, columns: Columns) -> Batch:
        """See `DeviceSource.execute`."""
        logits_BC = self._table.logits_RC.index_select(0, columns[TABLE_ROWS])
        return replace(self._source.execute(columns), teacher_logits_BC=logits_BC)

    def blank(self, count: int, jitter: bool) -> dict[str, Tensor]:
        """See `DeviceSource.blank`."""
        rows = torch.zeros(count, dtype=torch.int64, device=self._table.logits_RC.device)
        return self._source.blank(count, jitter) | {TABLE_ROWS: rows}


class StoreLoader:
    """Batches with a truncated teacher's labels from a store; what it lacks a teacher is asked for, and it is kept.

    A label that was asked for and one that was read are the same bits: the training that fills a store learns from what
    it keeps.

    Args:
        loader: of the student's batches.
        store: of the teacher's labels.
        ahead: asks the teacher; None: the store has all labels.
        prepare: what the student sees of an image.
        device: where batches are.

    Attributes:
        read, asked: images, since this was made.
    """

    def __init__(
        self, loader: Loader, store: LabelStore, ahead: LookAhead | None, prepare: Prepare, device: torch.device
    ) -> None:
        self._loader = loader
        self._store = store
        self._ahead = ahead
        self._prepare = prepare
        self._device = device
        self.read = self.asked = 0

    def __len__(self) -> int:
        return len(self._loader)

    def batches(
        self, views: EpochViews, batch_size: int, first_batch: int = 0, share: Share = WHOLE
    ) -> Iterator[Batch]:
        """See `Loader.batches`; where a teacher may be asked, images are prepared, jitter included."""
        count = 1 if self._ahead is None else self._ahead.count
        skipped = first_batch % count
        first, numbers = first_batch - skipped, np.arange(len(views.order))
        rows = [part for part in batch_positions(numbers, batch_size, first, share) if len(part)]
        if not rows:
            return
        known = self._store.read(views)
        found = zip(self._loader.batches(views, batch_size, first, share), rows, strict=True)
        while group := list(itertools.islice(found, count)):
            yield from self._teach([batch for batch, _ in group], [part for _, part in group], known, views)[skipped:]
            skipped = 0

    def dress(self, batch: Batch) -> Batch:
        """A raw batch, prepared where others are, with some labels."""
        return self._prepared(batch).taught(self._store.kind.truncation.blank(len(batch.labels), self._device))

    def _teach(
        self, batches: Sequence[Batch], rows: Sequence[Int64], known: KnownLabels, views: EpochViews
    ) -> list[Batch]:
        whole = np.concatenate(rows)
        labels = known.at(whole, self._device)
        if known.known[whole].all():
            self.read += len(whole)
            prepared = [self._prepared(batch) for batch in batches]
        else:
            self.asked += len(whole)
            prepared = self._asked(batches)
            logits = [batch.teacher_logits_BC for batch in prepared if batch.teacher_logits_BC is not None]
            labels = self._completed(torch.cat(logits), labels, whole, known, views)
        parts = zip(*(column.split([len(part) for part in rows]) for column in labels.values()), strict=True)
        return [batch.taught(dict(zip(labels, part, strict=True))) for batch, part in zip(prepared, parts, strict=True)]

    def _asked(self, batches: Sequence[Batch]) -> list[Batch]:
        if self._ahead is None:
            raise MachineError(f"{self._store.folder}: labels that were there have gone: start again")
        return self._ahead.teach(batches)

    def _completed(
        self, logits_BC: Tensor, stored: Labels, rows: Int64, known: KnownLabels, views: EpochViews
    ) -> Labels:
        """Labels of a group for which the teacher was asked; those that are stored already stay what they are."""
        truncation, missing = self._store.kind.truncation, torch.from_numpy(~known.known[rows])
        labels, fresh = truncation(logits_BC), to_device(missing.nonzero()[:, 0], self._device)
        if self._store.writes:
            divergence_B = truncation.divergence(logits_BC, labels)[fresh]
            noted = {name: column[fresh] for name, column in labels.items()}
            self._store.note(views, torch.from_numpy(rows)[missing], noted, divergence_B)
        return {name: stored[name].index_copy(0, fresh, column[fresh]) for name, column in labels.items()}

    def _prepared(self, batch: Batch) -> Batch:
        if self._ahead is None:
            return batch
        return replace(batch, images_NCHW=self._prepare(batch.images_NCHW, batch.jitter), jitter=None)


class StoreSource:
    """What `StoreLoader` is with a store that has all labels, for batches that are made on the device alone."""

    def __init__(self, source: DeviceSource, store: LabelStore, device: torch.device) -> None:
        self._source = source
        self._store = store
        self._device = device

    def columns(self, views: EpochViews, positions: Int64) -> dict[str, Tensor]:
        """See `DeviceSource.columns`."""
        row_of = np.empty_like(views.order)
        row_of[views.order] = np.arange(len(views.order))
        known, rows = self._store.read(views), row_of[positions]
        if not known.known[rows].all():
            raise MachineError(f"{self._store.folder}: labels that were there have gone: start again")
        return {**self._source.columns(views, positions), **known.at(rows, self._device)}

    def execute(self, columns: Columns) -> Batch:
        """See `DeviceSource.execute`."""
        return self._source.execute(columns).taught(columns)

    def blank(self, count: int, jitter: bool) -> dict[str, Tensor]:
        """See `DeviceSource.blank`."""
        return {**self._source.blank(count, jitter), **self._store.kind.truncation.blank(count, self._device)}
