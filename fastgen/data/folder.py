"""Loader of image files by torch's DataLoader and Pillow: the plain baseline that works everywhere.

What the loaders of files have in common is here, too: views are checked before anything is read by them, and a
file that is no longer what its manifest says ends the epoch with its name.

Memory: worker processes are forks that share the index; `batches_ahead` + 1 batches are held, those of the
workers in /dev/shm.
"""

from __future__ import annotations

import gc
import hashlib
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastgen.config import DataSettings
from fastgen.data.batch import Batch, make_batch, usable_cores
from fastgen.data.manifest import DIGEST_BYTES, Manifest
from fastgen.data.photos import Refused, decode_plain
from fastgen.data.split import AnySplit, FileSplit, Split
from fastgen.errors import MACHINE_FAULTS, FastgenError, MachineError, UserError
from fastgen.trainings import end_with
from fastgen.views import WHOLE, EpochViews, Share, batch_positions, require_inside

UInt8 = npt.NDArray[np.uint8]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

# A message between processes costs as much as a few dozen small images.
_LEAST_IMAGES = 16


class FolderLoader:
    """Batches from image files, or from images in memory, made by worker processes.

    A file is read by Pillow, its view cut out and resampled with Pillow's bilinear filter, which widens where it
    shrinks. The images of a batch are shared out among the workers; so the first batch is there soon, and what is
    decoded ahead is `batches_ahead` batches, however many workers there are.

    A file whose size in bytes or pixels is not the manifest's, or that Pillow cannot read, ends the epoch with its
    name. One that was replaced by another picture of the same size in both is not noticed: `data_prep.verify` does.

    Args:
        split: whose index is a Manifest, or images in memory.
        settings: workers, batches_ahead.
        device: where batches go.
    """

    def __init__(self, split: AnySplit, settings: DataSettings, device: torch.device) -> None:
        require_pictures(split)
        self._split, self._device = split, device
        self._workers = settings.workers or usable_cores()
        self._ahead = settings.batches_ahead

    def __len__(self) -> int:
        return len(self._split)

    def batches(
        self, views: EpochViews, batch_size: int, first_batch: int = 0, share: Share = WHOLE
    ) -> Iterator[Batch]:
        """See `Loader.batches`.

        Raises:
            MachineError: a worker process was killed.
        """
        require_views(self._split, views)
        shares = [part for part in batch_positions(views.order, batch_size, first_batch, share) if len(part)]
        if not shares:
            return
        parts = [np.array_split(positions, self._parts(len(positions))) for positions in shares]
        workers = _Workers(_Parts(self._split, views), parts, self._workers, self._ahead)
        try:
            for positions, of_batch in zip(shares, parts, strict=True):
                images_NHWC = self._collect(workers, [len(part) for part in of_batch], _shape(self._split, views))
                yield make_batch(self._split, views, positions, images_NHWC, self._device)
        finally:
            workers.close()

    def _parts(self, images: int) -> int:
        return min(self._workers, -(-images // _LEAST_IMAGES))

    def _collect(self, workers: _Workers, sizes: list[int], shape: tuple[int, int, int]) -> Tensor:
        pinned = self._device.type == "cuda"
        images_NHWC = torch.empty((sum(sizes), *shape), dtype=torch.uint8, pin_memory=pinned)
        # Copied out of the shared memory: every part that is kept would otherwise hold a file descriptor.
        for target in images_NHWC.split(sizes):
            target.copy_(workers.next())
        return images_NHWC


def require_pictures(split: AnySplit) -> None:
    """Checks that a split's pictures are in files of their own, or in memory."""
    if isinstance(split, FileSplit) and not isinstance(split.index, Manifest):
        raise TypeError("the split's index must be a Manifest")


def require_views(split: AnySplit, views: EpochViews) -> None:
    """Checks that views are of the split's samples, and that pictures are not asked for what they do not hold.

    Raises:
        ValueError: one is not; the text names its position.
    """
    if isinstance(split, FileSplit):
        require_inside(views, split.sizes)
        return
    height, width = split.images_NHWC.shape[1:3]
    count, order = len(split), views.order
    if len(views.table) != count or ((order < 0) | (order >= count)).any():
        raise ValueError(f"views of {len(views.table)} samples were given to a loader of {count}")
    top, left = np.abs(views.table[:, 0]), np.abs(views.table[:, 1])
    fits = (views.table[:, 2] == height) & (views.table[:, 3] == width) & (top < height) & (left < width)
    if not fits.all() or (views.height_px, views.width_px) != (height, width):
        worst = int(np.flatnonzero(~fits)[0]) if not fits.all() else 0
        raise ValueError(
            f"the view {views.table[worst].tolist()} at position {worst} is no shifted {width}x{height} image"
        )


def read_picture(manifest: Manifest, sample_id: int) -> UInt8:
    """Pixels of a sample's picture, uint8 (height, width, 3).

    Raises:
        UserError: its file is not what the manifest says, as far as size and decoding tell.
        MachineError: the disk failed.
    """
    content = _read_bytes(manifest, sample_id)
    expected = int(manifest.file_bytes[sample_id])
    if not manifest.stand_ins[sample_id] and len(content) != expected:
        raise _changed(manifest, sample_id, f"it has {len(content):,} bytes, had {expected:,}")
    try:
        pixels = decode_plain(content)
    except Refused as error:
        raise _changed(manifest, sample_id, f"it {error}") from None
    height, width = int(manifest.heights[sample_id]), int(manifest.widths[sample_id])
    if pixels.shape[:2] != (height, width):
        found = f"{pixels.shape[1]}x{pixels.shape[0]}"
        raise _changed(manifest, sample_id, f"it has {found} pixels, had {width}x{height}")
    return pixels


def resampled(window_HWC: UInt8, height_px: int, width_px: int) -> UInt8:
    """A window at another size, uint8 (H, W, 3): by Pillow's bilinear filter, which widens where it shrinks."""
    return np.asarray(Image.fromarray(window_HWC).resize((width_px, height_px), Image.Resampling.BILINEAR))


def require_unchanged(manifest: Manifest, sample_id: int) -> None:
    """Checks a sample's file against all that the manifest tells of it.

    Raises:
        UserError: it is another one.
        MachineError: the disk failed.
    """
    read_picture(manifest, sample_id)
    if manifest.stand_ins[sample_id]:
        return
    digest = hashlib.blake2b(_read_bytes(manifest, sample_id), digest_size=DIGEST_BYTES).digest()
    if digest != manifest.digests[sample_id].tobytes():
        raise _changed(manifest, sample_id, "its content is another")


def require_bytes(manifest: Manifest, ids: Int64, file_bytes: Int64) -> None:
    """Checks that files that were read had the sizes that the manifest tells.

    Raises:
        UserError: one had not.
    """
    own = manifest.stand_ins[ids] == b""
    wrong = np.flatnonzero(own & (manifest.file_bytes[ids] != file_bytes))
    if len(wrong):
        sample_id, found = int(ids[wrong[0]]), int(file_bytes[wrong[0]])
        expected = int(manifest.file_bytes[sample_id])
        raise _changed(manifest, sample_id, f"it has {found:,} bytes, had {expected:,}")


class _Parts(Dataset[Any]):
    """Positions of a part of a batch -> its images, in a worker process."""

    def __init__(self, split: AnySplit, views: EpochViews) -> None:
        self._split, self._views = split, views

    def __getitem__(self, positions: Int64) -> Tensor | FastgenError:
        images_NHWC = np.empty((len(positions), *_shape(self._split, self._views)), np.uint8)
        try:
            for target_HWC, position in zip(images_NHWC, positions.tolist(), strict=True):
                self._execute(position, target_HWC)
        except FastgenError as error:
            # As a value: DataLoader would wrap an exception into a text of many lines.
            return error
        return torch.from_numpy(images_NHWC)

    def _execute(self, position: int, target_HWC: UInt8) -> None:
        top, left, height, width, flip = self._views.table[position].tolist()
        if isinstance(self._split, Split):
            view_HWC = _shifted(self._split.images_NHWC[position], top, left)
        else:
            assert isinstance(self._split.index, Manifest)
            pixels = read_picture(self._split.index, int(self._split.ids[position]))
            window_HWC = pixels[top : top + height, left : left + width]
            view_HWC = resampled(window_HWC, self._views.height_px, self._views.width_px)
        target_HWC[:] = view_HWC[:, ::-1] if flip else view_HWC


def _shifted(image_HWC: UInt8, top: int, left: int) -> UInt8:
    """The window of the image's size whose corner is at (top, left), zeros outside the image."""
    height, width = image_HWC.shape[:2]
    view_HWC = np.zeros_like(image_HWC)
    inside = image_HWC[max(top, 0) : height + min(top, 0), max(left, 0) : width + min(left, 0)]
    down, right = max(-top, 0), max(-left, 0)
    view_HWC[down : down + inside.shape[0], right : right + inside.shape[1]] = inside
    return view_HWC


def _shape(split: AnySplit, views: EpochViews) -> tuple[int, int, int]:
    """Height, width and channels of a view."""
    channels = split.images_NHWC.shape[3] if isinstance(split, Split) else 3
    return views.height_px, views.width_px, channels


class _Workers:
    """Processes that make parts of batches, a few ahead, in order.

    Args:
        work: positions of a part -> its images.
        parts: positions of the parts of each batch.
        processes: most of them.
        ahead: batches that are made before they are asked for.
    """

    def __init__(self, work: _Parts, parts: list[list[Int64]], processes: int, ahead: int) -> None:
        flat = [part for of_batch in parts for part in of_batch]
        processes = min(processes, len(flat))
        with _fit_for_forks():
            loader = DataLoader(
                work,
                batch_size=None,
                sampler=flat,
                collate_fn=_as_it_is,
                num_workers=processes,
                prefetch_factor=-(-ahead * len(parts[0]) // processes),
                worker_init_fn=_set_up_worker,
                # Forks share the index and the views; other ways would pickle them for each worker.
                multiprocessing_context=multiprocessing.get_context("fork"),
                # Its own, so that the epoch draws nothing from the generator of everything else.
                generator=torch.Generator(),
            )
            self._results: Iterator[Any] | None = iter(loader)

    def next(self) -> Tensor:
        """The images of the next part.

        Raises:
            UserError: a file has changed.
            MachineError: a process was killed.
        """
        assert self._results is not None
        killed = None
        try:
            result = next(self._results)
        except RuntimeError as error:
            killed = (str(error).splitlines() or [""])[0]
            if "DataLoader worker (pid" not in killed:
                raise
        # Raised out here, where no context of the exception keeps torch's iterator and its processes alive.
        if killed is not None:
            raise MachineError(
                f"a process that decodes was killed ({killed}), most often for want of memory: "
                "lower data.workers, data.batches_ahead or train.batch_size, or enlarge /dev/shm"
            )
        if isinstance(result, FastgenError):
            raise result
        assert isinstance(result, Tensor)
        return result

    def close(self) -> None:
        """Ends the processes: torch does when its iterator is freed, and nobody else holds it."""
        self._results = None


@contextmanager
def _fit_for_forks() -> Iterator[None]:
    """Lets workers begin with what they need alone, and the process go on as it was."""
    before = signal.getsignal(signal.SIGCHLD)
    # What is garbage here shall not be collected in a worker: to end another loader's pipeline there would wait for
    # threads that the fork has not.
    gc.freeze()
    try:
        with warnings.catch_warnings():
            # Of more workers than cores, which is the user's choice, and of forks beside threads: see above.
            warnings.simplefilter("ignore")
            yield
    finally:
        gc.unfreeze()
    # torch would raise when a worker dies, in the middle of whatever the main thread does; that it waits in vain for
    # the worker's part is found out all the same, within five seconds, where we are prepared for it.
    if threading.current_thread() is threading.main_thread() and before is not None:
        signal.signal(signal.SIGCHLD, before)


def _set_up_worker(worker: int) -> None:
    # A Ctrl-C in the terminal and a launcher's signals reach the whole group of processes; it is the main one that
    # decides what is still finished.
    os.setpgid(0, 0)
    # Forked, it holds the main one's lock of the run folder too: it may not outlive it by a moment.
    end_with(os.getppid(), signal.SIGKILL)
    warnings.simplefilter("ignore")


def _as_it_is(part: Any) -> Any:
    return part


def _read_bytes(manifest: Manifest, sample_id: int) -> bytes:
    path = manifest.file(sample_id)
    try:
        return path.read_bytes()
    except OSError as error:
        if error.errno in MACHINE_FAULTS:
            raise MachineError(f"{path}: cannot be read ({error.strerror})") from None
        raise _changed(manifest, sample_id, error.strerror or str(error)) from None


def _changed(manifest: Manifest, sample_id: int, reason: str) -> UserError:
    return UserError(
        f"{manifest.file(sample_id)}: cannot be read ({reason}): it has changed since the manifest was made: "
        "run python -m data_prep.manifest again"
    )
