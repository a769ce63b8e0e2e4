"""The label store: what a teacher said of the very views of a generation's epochs, kept while a student trained.

Views are a pure function of (data seed, generation, epoch, sample id), so the next student that learns from the same
teacher under the same data seed sees the same pixels, whatever its teacher weight, temperature, learning rate or
architecture: it takes these labels, and no teacher runs.

<store>/labels/<key>/store.json                                       what all of it depends on
<store>/labels/<key>/seed_<s>_generation_<g>/epoch_<e>_<side>/*.part  rows of one epoch: safetensors, each written whole

A part holds rows that one process has asked for, between two saves of its training: `rows` int32 (n,), numbers in the
epoch's order, and the columns of `truncation.Labels`. Its metadata has a checksum of each and of the views. Which rows
are there is asked of all parts together: a training that was stopped, or goes on in another number of processes, adds
others.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastgen.config import hash_of
from fastgen.crops import CropPolicy, Int64
from fastgen.data.batch import to_device
from fastgen.errors import MachineError, UserError
from fastgen.files import write_json
from fastgen.label_parts import (
    ROWS,
    Bool,
    Columns,
    Part,
    epoch_folder,
    generation_folder,
    known_rows,
    part_paths,
    read_columns,
    read_part,
    write_part,
)
from fastgen.nodes import read_json
from fastgen.truncation import Labels, Truncation
from fastgen.views import EpochName, EpochViews

STORE_FORMAT = 1
DIVERGENCE = "divergence"


@dataclass(frozen=True)
class StoreKind:
    """What a label store is of; two stores of one kind hold the same labels.

    Attributes:
        teacher: id of its node, or of its weights file.
        images: `content_hash` of the training split.
        count: images in it.
        crop: how views are drawn.
        pixels: what turns them into pixels.
        mean, std: of the normalisation.
        precision: of the teacher's pass, `fp32`, `bf16` or `fp16`.
        engine: how the teacher is run.
        truncation: of its logits.
        weights: `weights_hash` of the teacher; empty: nobody has looked. A node that is trained anew has its old name.
    """

    teacher: str
    images: str
    count: int
    crop: CropPolicy
    pixels: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    precision: str
    engine: str
    truncation: Truncation
    weights: str = ""

    @property
    def description(self) -> dict[str, Any]:
        """All of it, as plain values."""
        crops = {"crop": {"kind": type(self.crop).__name__, **asdict(self.crop)}}
        return {"format": STORE_FORMAT} | json.loads(json.dumps({**asdict(self), **crops}))

    @property
    def key(self) -> str:
        """Sixteen hexadecimal digits."""
        return hash_of(self.description)[:16]

    @property
    def epoch_bytes(self) -> int:
        """Bytes of one epoch's labels."""
        return self.count * (self.truncation.row_bytes + np.dtype(np.int32).itemsize)


class Whereabouts(NamedTuple):
    """Where a teacher is found again.

    Attributes:
        node: its id; empty: the recipe names its weights.
        weights: where they are now.
    """

    node: str
    weights: Path


def weights_hash(weights: Sequence[Path]) -> str:
    """Sixteen hexadecimal digits that name the content of weights files, in their order."""
    return hash_of([hashlib.sha256(path.read_bytes()).hexdigest() for path in weights])[:16]


def whereabouts(teachers: Sequence[Whereabouts]) -> dict[str, Any]:
    """For a description that people, and the list of labels, read."""
    return {"teachers": [[one.node, str(one.weights.absolute())] for one in teachers]}


@dataclass(frozen=True)
class KnownLabels:
    """What is known of one epoch.

    Attributes:
        known: bool (N,), by row of the epoch's order.
        columns: see `Labels`, N rows of each; those that are not known are 0.
    """

    known: Bool
    columns: Columns

    def at(self, rows: Int64, device: torch.device) -> Labels:
        """The labels of some rows, on the device."""
        return {name: to_device(torch.from_numpy(column[rows]), device) for name, column in self.columns.items()}


class LabelStore:
    """Labels of one teacher for the views of a training.

    Args:
        folder: of all stores.
        kind: of this one.
        writes: whether what is asked of the teacher is kept.
    """

    def __init__(self, folder: Path, kind: StoreKind, *, writes: bool) -> None:
        self.kind = kind
        self.folder = folder / kind.key
        self.writes = writes
        self._name: EpochName | None = None
        self._views = 0
        self._pending: list[dict[str, Tensor]] = []

    def describe(self, teachers: Sequence[Whereabouts]) -> None:
        """Writes store.json, for people and for the list of stores; to be called by one process that holds a lock.

        Args:
            teachers: all members of the teacher.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "store.json", {**self.kind.description, **whereabouts(teachers)})

    def clear(self, data_seed: int, generation: int) -> None:
        """Removes what kills within a write left of a generation; for the holder of its lock, before anyone writes."""
        for path in generation_folder(self.folder, data_seed, generation).glob("epoch_*/.*.partial"):
            path.unlink(missing_ok=True)

    def give_up(self) -> None:
        """Keeps nothing any more: another run writes here now."""
        self.writes = False
        self._pending.clear()

    def missing(self, names: Sequence[EpochName]) -> int:
        """How many labels of these epochs are not there; reads numbers of rows, not labels.

        Raises:
            UserError: a part is damaged.
        """
        return sum(int((~known_rows(epoch_folder(self.folder, name), self.kind.count)).sum()) for name in names)

    def require_room(self, labels: int) -> None:
        """Refuses to begin what would end with a full disk.

        Raises:
            MachineError: there is no room for so many labels.
        """
        needed, free = labels * self.kind.epoch_bytes // self.kind.count, shutil.disk_usage(self.folder).free
        if needed > free:
            raise MachineError(
                f"{self.folder}: the label store needs {needed / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free: free "
                "some, name another place with run.nodes, lower teacher.store_classes, or set teacher.labels=live"
            )

    def divergence(self, names: Sequence[EpochName]) -> float | None:
        """What truncation has lost in these epochs: mean KL of what is kept from the teacher's own word, in nats.

        None: nothing is kept.
        """
        parts = [part for name in names for part in self.parts(name)]
        count = sum(part.count for part in parts)
        return sum(part.divergence for part in parts) / count if count else None

    def parts(self, name: EpochName) -> list[Part]:
        """Parts of an epoch, in the order of their first rows.

        Raises:
            UserError: one of them is damaged.
        """
        return [read_part(path) for path in part_paths(epoch_folder(self.folder, name))]

    def read(self, views: EpochViews) -> KnownLabels:
        """What is known of an epoch; everything that is read is checked.

        Raises:
            UserError: a part is damaged, or of other views.
        """
        truncation, count = self.kind.truncation, self.kind.count
        columns: Columns = {
            name: torch.zeros((count, truncation.widths[name]), dtype=dtype).numpy()
            for name, dtype in truncation.columns.items()
        }
        known, checksum = np.zeros(count, bool), views.checksum
        for part in self.parts(_named(views)):
            if part.views != checksum or part.of != count:
                raise UserError(f"{part.path}: holds labels of other views than this recipe's: delete it")
            found = read_columns(part)
            # Where two parts have a row the first one counts, for all that read them.
            fresh = ~known[found[ROWS]]
            rows = found[ROWS][fresh]
            known[rows] = True
            for name, column in columns.items():
                column[rows] = found[name][fresh]
        return KnownLabels(known, columns)

    def note(self, views: EpochViews, rows: Tensor, labels: Labels, divergence_B: Tensor) -> None:
        """Keeps labels until `flush`, on their device.

        Args:
            views: of the epoch.
            rows: int64 (B,), their numbers in its order.
            labels: of these rows.
            divergence_B: what truncation has lost, in nats.
        """
        name = _named(views)
        if name != self._name:
            if self._pending:
                raise ValueError(f"labels of {self._name} were not flushed before those of {name}")
            self._name, self._views = name, views.checksum
        self._pending.append({ROWS: rows.to(torch.int32), **labels, DIVERGENCE: divergence_B})

    def flush(self) -> None:
        """Writes what was noted as one part. A kill leaves the whole part, or nothing.

        Raises:
            OSError: the disk is full, or the folder may not be written to.
        """
        if not self._pending or self._name is None:
            return
        columns = {name: torch.cat([noted[name] for noted in self._pending]).cpu().numpy() for name in self._pending[0]}
        if not np.isfinite(columns[DIVERGENCE]).all():
            raise UserError(
                "the teacher's logits are not finite: its weights are broken, or train.precision=fp32 is needed"
            )
        divergence = float(columns.pop(DIVERGENCE).sum())
        write_part(epoch_folder(self.folder, self._name), self._name, self._views, self.kind.count, columns, divergence)
        self._pending.clear()


def other_stores(folder: Path, kind: StoreKind) -> list[str]:
    """Tells of each other store of the same teacher in what it differs, so that nobody wonders why it is not read.

    Args:
        folder: of all stores.
        kind: that is looked for.
    """
    own, told = kind.description, list[str]()
    for path in sorted(folder.glob("*/store.json")):
        there = read_json(path)
        if path.parent.name != kind.key and there.get("teacher") == kind.teacher:
            told.append(f"{path.parent} is of the same teacher, but {', '.join(_differences(there, own))}")
    return told


def _differences(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in here.items():
        other = there.get(name)
        if isinstance(value, dict) and isinstance(other, dict):
            yield from _differences(other, value, f"{name}.")
        elif other != value:
            yield f"has {prefix}{name} = {other}, not {value}"


def _named(views: EpochViews) -> EpochName:
    if views.name is None:
        raise ValueError("a label store keeps labels of training epochs alone")
    return views.name
