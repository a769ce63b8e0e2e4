"""What `benchmarks.loaders` measures: samples in three forms, loaders on them, and the figures of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.common import Timings
from benchmarks.loaders_stock import Epochs
from fastgen.data.beton import read_beton
from fastgen.data.manifest import Manifest
from fastgen.data.split import FileSplit

SHORT_PX = 256
FILES, JPEG, RAW = "files", "jpeg", "raw256"
STORED = {
    FILES: "image files",
    JPEG: ".beton of the files' own JPEG bytes",
    RAW: f".beton of raw pixels, short side {SHORT_PX} px",
}
FOLDER_NAME = f"folder/{FILES}"


@dataclass(frozen=True)
class Bench:
    """What all candidates share: samples in all three forms, and what is made of them.

    Attributes:
        manifest: rows of image files, repeated.
        betons: .beton files of the same samples, by how they are stored.
        distinct: photographs that are repeated.
        batch_size: images in a batch; the samples are whole batches.
        resolution_px: side of the crops.
    """

    manifest: Manifest
    betons: Mapping[str, Path]
    distinct: int
    batch_size: int
    resolution_px: int

    @property
    def samples(self) -> int:
        """Samples of an epoch."""
        return len(self.manifest)

    def split(self, stored: str) -> FileSplit:
        """The samples in one of their forms, for our loaders."""
        index = read_beton(self.betons[stored]) if stored in self.betons else self.manifest
        ids = np.arange(len(index), dtype=np.int64)
        return FileSplit(index, index.labels, ids, index.sizes, index_hash="")


@dataclass(frozen=True)
class Candidate:
    """A loader on one form of the samples.

    Attributes:
        loader: its name.
        stored: form of the samples.
        make: gives its epochs with so many workers; UserError where it needs what is not installed.
        stock: loader to compare it with, which does the same work.
        process_workers: whether its workers are processes.
    """

    loader: str
    stored: str
    make: Callable[[Bench, int], Epochs]
    stock: str | None = None
    process_workers: bool = False

    @property
    def name(self) -> str:
        """Loader and form."""
        return f"{self.loader}/{self.stored}"


@dataclass(frozen=True)
class Case:
    """A candidate with a number of workers."""

    candidate: Candidate
    workers: int

    @property
    def key(self) -> str:
        """Its name in timings."""
        return case_key(self.candidate.name, self.workers)


def case_key(name: str, workers: int) -> str:
    """Name of a candidate with a number of workers."""
    return f"{name} workers={workers}"


@dataclass(frozen=True)
class Measured:
    """Seconds an epoch of each case, by `Case.key`.

    Attributes:
        wall: on the clock.
        cpu: user and system seconds of this process and of its ended children.
    """

    wall: Timings
    cpu: Timings


@dataclass(frozen=True)
class Memory:
    """Peak memory of a process that makes one candidate and runs one epoch, all that it imports and compiles included.

    Attributes:
        peak_mb: VmHWM, the most that was resident, of the process itself.
        mapped_mb: RssFile at the end: pages of mapped files (the .beton, libraries) within that, which the system
            may take back.
        worker_mb: the most that was resident in any worker process, pages shared with the others included; None
            where workers are threads.
    """

    peak_mb: float
    mapped_mb: float
    worker_mb: float | None
