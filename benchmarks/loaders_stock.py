"""Stock FFCV and stock DALI for benchmarks.loaders: what their documentation tells people to write.

Both draw order, crops and flips themselves. What goes beyond their documentation is only there so that they can be
timed beside others: an epoch ends with nothing under way, and a failure is an error instead of a hang.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastgen.errors import MachineError, UserError

Int64 = npt.NDArray[np.int64]
# Images uint8 (N, 3, H, W) and labels (N, or N x 1) of each batch of one epoch, by the epoch's number.
Epochs = Callable[[int], Iterator[tuple[Tensor, Tensor]]]

# FFCV's default, and that of data.batches_ahead.
BATCHES_AHEAD = 3
ASK_EVERY_SECONDS = 0.5
AREA = (0.08, 1.0)
# FFCV changes types that numba has used as keys; freeing what it compiled would print "Exception ignored" at any time.
_NEVER_FREED: list[Any] = []
ASPECT = (3 / 4, 4 / 3)


@contextmanager
def torch_threads_kept() -> Iterator[None]:
    """FFCV sets torch's threads to its own, for the whole process, already when it is imported."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def stock_ffcv(path: Path, batch_size: int, resolution_px: int, workers: int, *, flip: bool) -> Epochs:
    """FFCV's own Loader with its random-resized-crop decoder.

    Args:
        path: a .beton with the fields `image` and `label`.
        batch_size: images in a batch.
        resolution_px: side of the crops.
        workers: FFCV's threads; numba's TBB layer runs no more of them than there are cores.
        flip: with its RandomHorizontalFlip, which is slow.

    Raises:
        UserError: FFCV cannot be imported, or cannot use so many threads.
    """
    try:
        from ffcv.fields.basics import IntDecoder
        from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.reader import Reader
        from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage
    except ImportError as error:
        raise UserError(f"FFCV cannot be imported: {error}") from None
    crop = RandomResizedCropRGBImageDecoder((resolution_px, resolution_px), scale=AREA, ratio=ASPECT)
    flips = [RandomHorizontalFlip()] if flip else []
    pipelines: dict[str, Any] = dict.fromkeys(Reader(str(path)).handlers)
    pipelines["image"] = [crop, *flips, ToTensor(), ToTorchImage()]
    pipelines["label"] = [IntDecoder(), ToTensor()]
    try:
        loader = Loader(
            str(path),
            batch_size=batch_size,
            num_workers=workers,
            os_cache=True,
            order=OrderOption.RANDOM,
            pipelines=pipelines,
            drop_last=False,
            batches_ahead=BATCHES_AHEAD,
        )
    except ValueError as error:
        raise UserError(f"FFCV: {' '.join(str(error).split())}") from None
    _NEVER_FREED.append(loader)
    return lambda epoch: _ffcv_epoch(loader)


def _ffcv_epoch(loader: Any) -> Iterator[tuple[Tensor, Tensor]]:
    with torch_threads_kept():
        thread = iter(loader)
        try:
            while (batch := _take(thread)) is not None:
                yield batch[0], batch[1]
        finally:
            _end(thread)


def _take(thread: Any) -> tuple[Tensor, ...] | None:
    """FFCV's `__next__`, which waits for ever if its thread has died."""
    while True:
        alive = thread.is_alive()
        try:
            taken = thread.output_queue.get(timeout=ASK_EVERY_SECONDS)
        except queue.Empty:
            if not alive:
                raise MachineError("FFCV's thread has died; its own words are above") from None
            continue
        batch: tuple[Tensor, ...] | None = None if taken is None else taken[1]
        return batch


def _end(thread: Any) -> None:
    """Ends FFCV's thread; it may be waiting for room in its queue, where nothing else wakes it."""
    thread.close()
    while thread.is_alive():
        try:
            thread.output_queue.get(timeout=ASK_EVERY_SECONDS / 10)
        except queue.Empty:
            continue
    thread.join()


def stock_dali(files: Sequence[Path], labels: Int64, batch_size: int, resolution_px: int, workers: int) -> Epochs:
    """DALI's file reader, its decoder of random crops, resize and flip, on the CPU.

    Its outputs become tensors as in DALI's plugin for PyTorch, which copies nothing under DALI's default executor.
    The plugin itself goes on with the next epoch's batches while something else is being timed: here an epoch
    asks for its own batches alone.

    Args:
        files: image files; as many as whole batches take.
        labels: int64, one each.
        batch_size: images in a batch.
        resolution_px: side of the crops.
        workers: DALI's threads.

    Raises:
        UserError: DALI cannot be imported.
    """
    try:
        import nvidia.dali
    except ImportError as error:
        raise UserError(f"DALI cannot be imported: {error}") from None
    if len(files) % batch_size:
        raise ValueError(f"{len(files)} files are no whole batches of {batch_size}")
    # Its type hints know only a part of it.
    dali: Any = nvidia.dali
    fn = dali.fn
    depth = min(BATCHES_AHEAD, len(files) // batch_size)
    pipeline = dali.Pipeline(batch_size, num_threads=workers, device_id=None, prefetch_queue_depth=depth)
    with pipeline:
        names = [str(file) for file in files]
        content, label = fn.readers.file(files=names, labels=labels.tolist(), random_shuffle=True)
        crop = fn.decoders.image_random_crop(
            content, device="cpu", output_type=dali.types.RGB, random_area=AREA, random_aspect_ratio=ASPECT
        )
        # Linear with antialiasing is the default.
        image = fn.resize(crop, size=[resolution_px, resolution_px])
        pipeline.set_outputs(fn.flip(image, horizontal=fn.random.coin_flip()), label)
    pipeline.build()
    batches = len(files) // batch_size
    return lambda epoch: _dali_epoch(pipeline, batches, depth, first=epoch == 0)


def _dali_epoch(pipeline: Any, batches: int, depth: int, *, first: bool) -> Iterator[tuple[Tensor, Tensor]]:
    # The very first call fills DALI's queue, every other one asks for a single batch.
    for _ in range(1 if first else depth):
        pipeline.schedule_run()
    for number in range(batches):
        images_NHWC, labels = (_as_torch(pipeline, output) for output in pipeline.share_outputs())
        pipeline.release_outputs()
        if number + depth < batches:
            pipeline.schedule_run()
        yield images_NHWC.permute(0, 3, 1, 2), labels


def _as_torch(pipeline: Any, output: Any) -> Tensor:
    tensor = torch.utils.dlpack.from_dlpack(output.as_tensor())
    # Other executors use the memory again for their next batches.
    return tensor if pipeline.exec_dynamic else tensor.clone()
