"""Loader of FFCV's .beton files, under views that are data.

FFCV's own `Loader` draws its crops itself, cannot be seeded, ignores the decoder's return value, and hangs or
aborts on errors. This one gives parts of a batch to threads, which call a native decoder (`data.beton_decoder`)
without Python's lock. An error is an exception of a future: it ends the epoch, with the sample's name.

Memory: with `os_cache` the file is mapped: its pages belong to the system's cache, are shared by all processes,
and count as theirs without being theirs. Without it each image is read into a buffer of its thread and the
system is told to forget it. Either way `batches_ahead` + 1 batches are held and, for JPEG, the decoded part
of one image a worker (of FFCV's decoder: the whole image).
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastgen.config import DataSettings
from fastgen.data.batch import Batch, make_batch, usable_cores
from fastgen.data.beton import Beton
from fastgen.data.decoder import Decoder, Images
from fastgen.data.manifest import read_manifest
from fastgen.data.split import FileSplit
from fastgen.errors import UserError
from fastgen.views import WHOLE, EpochViews, Share, batch_positions, require_inside, to_stored

UInt8 = npt.NDArray[np.uint8]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


class FfcvLoader:
    """Batches from a .beton.

    Args:
        split: whose index is a Beton.
        settings: workers, batches_ahead, os_cache, beton_decoder.
        device: where batches go.

    Raises:
        UserError: what the decoder needs is not installed.
    """

    def __init__(self, split: FileSplit, settings: DataSettings, device: torch.device) -> None:
        if not isinstance(split.index, Beton):
            raise TypeError("the split's index must be a Beton")
        self._split, self._beton, self._device = split, split.index, device
        self._workers = settings.workers or usable_cores()
        self._ahead = settings.batches_ahead
        self._decode = make_decoder(settings.beton_decoder)
        self._read = _Mapped(self._beton) if settings.os_cache else _Pread(self._beton)
        self._stored_sizes = self._beton.stored_sizes[split.ids]
        self._local = threading.local()

    def __len__(self) -> int:
        return len(self._split)

    def batches(
        self, views: EpochViews, batch_size: int, first_batch: int = 0, share: Share = WHOLE
    ) -> Iterator[Batch]:
        """See `Loader.batches`."""
        table = self._stored_table(views)
        parts = (part for part in batch_positions(views.order, batch_size, first_batch, share) if len(part))
        pool = ThreadPoolExecutor(self._workers, "fastgen-ffcv")
        try:
            flight: deque[_Flight] = deque()
            for positions in parts:
                flight.append(self._begin(pool, views, table, positions))
                if len(flight) > self._ahead:
                    yield self._end(flight.popleft(), views)
            while flight:
                yield self._end(flight.popleft(), views)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _stored_table(self, views: EpochViews) -> Int32:
        """The view table in pixels of the stored images; whatever could lead the decoder astray is refused."""
        same = np.array_equal(self._stored_sizes, self._split.sizes)
        resampled = (views.table[:, 2] != views.height_px) | (views.table[:, 3] != views.width_px)
        if not same or resampled.any():
            require_inside(views, self._split.sizes)
        elif len(views.table) != len(self._split):
            raise ValueError(f"views of {len(views.table)} samples were given to a loader of {len(self._split)}")
        return views.table if same else to_stored(views.table, self._split.sizes, self._stored_sizes)

    def _begin(self, pool: ThreadPoolExecutor, views: EpochViews, table: Int32, positions: Int64) -> _Flight:
        shape = (len(positions), views.height_px, views.width_px, 3)
        images_NHWC = torch.empty(shape, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        target = images_NHWC.numpy()
        chunks = [c for c in np.array_split(np.arange(len(positions)), self._workers) if len(c)]
        futures = [
            pool.submit(self._decode_part, positions[c[0] : c[-1] + 1], table, target[c[0] : c[-1] + 1]) for c in chunks
        ]
        return _Flight(positions, images_NHWC, futures)

    def _decode_part(self, positions: Int64, table: Int32, images_NHWC: UInt8) -> None:
        ids, beton = self._split.ids[positions], self._beton
        content, begin = self._read(ids, self._local)
        stored = (beton.stored_bytes[ids], beton.modes[ids], beton.stored_sizes[ids])
        failed = self._decode(Images(content, begin, *stored, table[positions]), images_NHWC)
        if failed >= 0:
            raise UserError(_undecodable(beton.path, int(ids[failed])))

    def _end(self, flight: _Flight, views: EpochViews) -> Batch:
        for future in flight.futures:
            future.result()
        return make_batch(self._split, views, flight.positions, flight.images_NHWC, self._device)


@dataclass(frozen=True)
class _Flight:
    """A batch that is being decoded."""

    positions: Int64
    images_NHWC: torch.Tensor
    futures: list[Future[None]]


class _Mapped:
    """Images where they lie in the mapped file."""

    def __init__(self, beton: Beton) -> None:
        self._beton, self._content = beton, np.asarray(beton.content())

    def __call__(self, ids: Int64, local: Any) -> tuple[UInt8, Int64]:
        """The file, and where each image begins in it."""
        return self._content, self._beton.pointers[ids]


class _Pread:
    """Images read into a buffer of the thread, and forgotten by the system's cache."""

    def __init__(self, beton: Beton) -> None:
        self._beton = beton
        self._file = open(beton.path, "rb", buffering=0)  # noqa: SIM115 (open as long as the loader lives)
        os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)

    def __call__(self, ids: Int64, local: Any) -> tuple[UInt8, Int64]:
        """A buffer with the images one after the other, and where each begins in it."""
        pointers, sizes = self._beton.pointers[ids], self._beton.stored_bytes[ids]
        ends = np.cumsum(sizes)
        if not hasattr(local, "buffer") or len(local.buffer) < ends[-1]:
            local.buffer = np.empty(int(ends[-1]), np.uint8)
        for pointer, size, end in zip(pointers.tolist(), sizes.tolist(), ends.tolist(), strict=True):
            self._read(memoryview(local.buffer)[end - size : end], pointer)
        return local.buffer, ends - sizes

    def _read(self, target: memoryview, pointer: int) -> None:
        done, number = 0, self._file.fileno()
        while done < len(target):
            count = os.preadv(number, [target[done:]], pointer + done)
            if count == 0:
                raise UserError(f"{self._beton.path}: was cut short while it was in use: make it again")
            done += count
        os.posix_fadvise(number, pointer, len(target), os.POSIX_FADV_DONTNEED)


def make_decoder(name: str) -> Decoder:
    """The decoder that `data.beton_decoder` names.

    Raises:
        UserError: what it needs is not installed.
    """
    if name == "native":
        from fastgen.data.native import NativeDecoder

        return NativeDecoder()
    from fastgen.data.ffcv_decoder import FfcvDecoder

    return FfcvDecoder()


def _undecodable(path: Path, sample_id: int) -> str:
    beside = Path(f"{path}.manifest")
    name = f" ({read_manifest(beside).name(sample_id)})" if beside.exists() else ""
    return f"{path}: sample {sample_id}{name} cannot be decoded, the file is damaged: run python -m data_prep.verify"
