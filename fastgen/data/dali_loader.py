"""Loader by NVIDIA DALI: reads, decodes, cuts and resamples in DALI's own threads, or in the GPU's decoder.

The views are data: DALI draws nothing. What each sample needs (file, corner and extent of the crop, size of the
result) goes into the pipeline as inputs, so nothing is rebuilt for another epoch or another resolution.

Memory: `batches_ahead` batches, and what DALI keeps of them between its operators.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from fastgen.config import DataSettings
from fastgen.data.batch import Batch, make_batch, usable_cores
from fastgen.data.folder import require_bytes, require_pictures, require_unchanged, require_views
from fastgen.data.manifest import Manifest
from fastgen.data.split import AnySplit, FileSplit, Split
from fastgen.errors import MachineError, UserError
from fastgen.extras import install_line
from fastgen.views import WHOLE, EpochViews, Share, batch_positions

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

# Inputs of the pipelines, with the number of dimensions of a sample.
PHOTOGRAPH_INPUTS = {"path": 1, "start": 1, "shape": 1, "size": 1}
_STORED_INPUTS = {"image": 3, "start": 1, "shape": 1, "flip": 0}
# Share of the JPEGs that the hardware decoder takes, the rest goes to CUDA; DALI's own default.
_HARDWARE_SHARE = 0.65


class DaliLoader:
    """Batches from image files, or from images in memory, through a DALI pipeline.

    Photographs: the crop alone is decoded as far as the format allows, then resampled by DALI's linear filter with
    antialiasing. That is Pillow's bilinear filter to within rounding, except in the outermost row and column of a
    view that shrinks: there DALI repeats the crop's edge where Pillow leaves out what is not there (differences of up
    to 18 of 255 were seen there, of 1 elsewhere).

    A file whose size in bytes is not the manifest's, or that DALI cannot read, ends the epoch with its name. One that
    was replaced by another picture of the same number of bytes, at least as large in pixels, is decoded without a
    word: `data_prep.verify` finds it.

    Args:
        split: whose index is a Manifest, or images in memory.
        settings: workers, batches_ahead, dali_decoder.
        device: where batches go.

    Raises:
        UserError: DALI is not installed, or shall decode on a GPU where there is none.
    """

    def __init__(self, split: AnySplit, settings: DataSettings, device: torch.device) -> None:
        _dali()
        if settings.dali_decoder == "gpu" and device.type != "cuda":
            raise UserError("data.dali_decoder = gpu needs a GPU: set data.dali_decoder=cpu, or run.device=cuda")
        require_pictures(split)
        self._split, self._settings, self._device = split, settings, device
        self._work: _Work = _Stored(split) if isinstance(split, Split) else _Photographs(split, settings.dali_decoder)
        # A pipeline that nobody uses; an iterator takes it along and brings it back whole, or not at all.
        self._idle: _Pipeline | None = None

    def __len__(self) -> int:
        return len(self._split)

    def batches(
        self, views: EpochViews, batch_size: int, first_batch: int = 0, share: Share = WHOLE
    ) -> Iterator[Batch]:
        """See `Loader.batches`.

        Raises:
            MachineError: DALI failed and no file is at fault.
        """
        require_views(self._split, views)
        shares = [part for part in batch_positions(views.order, batch_size, first_batch, share) if len(part)]
        if not shares:
            return
        pipeline = self._take(len(shares[0]))
        try:
            pipeline.begin(shares, views)
            while (done := pipeline.next()) is not None:
                positions, images_NHWC = done
                yield make_batch(self._split, views, positions, images_NHWC, self._device)
        except _Failed as failed:
            raise self._explained(failed) from None
        finally:
            if pipeline.end():
                self._idle = pipeline

    def _take(self, batch_size: int) -> _Pipeline:
        pipeline, self._idle = self._idle, None
        if pipeline is not None and pipeline.batch_size >= batch_size:
            return pipeline
        try:
            return _Pipeline(self._work, self._settings, self._device, batch_size)
        except RuntimeError as error:
            raise MachineError(f"DALI cannot start ({_reason(error)})") from None

    def _explained(self, failed: _Failed) -> MachineError:
        """Names the file that is at fault.

        Raises:
            UserError: this is the file.
        """
        self._work.find_culprit(failed.positions)
        ids = self._split.ids[failed.positions].tolist()
        return MachineError(f"DALI failed ({failed}), and no file is at fault; the batch has the ids {ids}")


def export_pipeline(
    manifest: Manifest, path: Path, *, batch_size: int = 256, decoder: Literal["cpu", "gpu"] = "cpu"
) -> None:
    """Writes the pipeline for photographs in DALI's serialised form, for use without fastgen.

    Its inputs are named; each is fed with one entry a sample, all of the same number of samples, at most
    `batch_size`:

    - `path`: uint8, the bytes of the file's name;
    - `start`: int32 (top, left), corner of the crop in pixels of the picture;
    - `shape`: int32 (height, width) of the crop, which must lie inside the picture;
    - `size`: float32 (height, width) of the result; a negative width gives the mirrored image.

    Its outputs are the images (uint8, HWC, RGB) and the number of bytes of each file (int64, one each):

        pipeline = nvidia.dali.Pipeline.deserialize(filename="train.dali", num_threads=8)
        names = [os.fsencode(manifest.file(n)) for n in ids]
        pipeline.feed_input("path", [np.frombuffer(name, np.uint8) for name in names])
        pipeline.feed_input("start", table[ids, 0:2])
        pipeline.feed_input("shape", table[ids, 2:4])
        pipeline.feed_input("size", np.where(table[ids, 4:5], [224, -224], [224, 224]).astype(np.float32))
        images, file_bytes = pipeline.run()

    `run` wants as many inputs to have been fed as its queue is deep: one, in this file. Stand-ins are files like
    others: `Manifest.file` names them.

    Args:
        manifest: of the pictures that it will read; it must name files.
        path: of the file to write.
        batch_size: most samples in a batch.
        decoder: `cpu`, or `gpu` for a pipeline that decodes on the GPU that it is opened with (`device_id=0`).

    Raises:
        UserError: DALI is not installed, the manifest names no files, or there is no GPU to decode on.
    """
    from fastgen.files import write_atomically

    dali = _dali()
    if manifest.folder is None:
        raise UserError(f"{path}: there is no pipeline for a .beton: give the manifest of image files")
    if decoder == "gpu" and not torch.cuda.is_available():
        raise UserError(f"{path}: a pipeline that decodes on a GPU is exported where there is one: give decoder=cpu")
    device_id = 0 if decoder == "gpu" else None
    pipeline = dali.Pipeline(batch_size, num_threads=usable_cores(), device_id=device_id, prefetch_queue_depth=1)
    with pipeline:
        inputs = [dali.fn.external_source(name=name, ndim=ndim) for name, ndim in PHOTOGRAPH_INPUTS.items()]
        pipeline.set_outputs(*_photograph_graph(inputs, decoder))
    write_atomically(path, pipeline.serialize())


class _Work(Protocol):
    """What a pipeline does for each sample."""

    inputs: dict[str, int]

    def graph(self, inputs: list[Any]) -> list[Any]:
        """DALI's operators from inputs to outputs, of which the images are the first."""
        ...

    def feed(self, positions: Int64, views: EpochViews) -> list[Any]:
        """Values of the inputs for one batch."""
        ...

    def check(self, positions: Int64, outputs: Any) -> None:
        """Raises UserError if the outputs beside the images show that a file has changed."""
        ...

    def find_culprit(self, positions: Int64) -> None:
        """Raises UserError if one of the files is not what its manifest says."""
        ...


class _Photographs:
    """Files are read, decoded within the crop, resampled and flipped."""

    inputs = PHOTOGRAPH_INPUTS

    def __init__(self, split: FileSplit, decoder: str) -> None:
        assert isinstance(split.index, Manifest)
        self._split, self._manifest, self._decoder = split, split.index, decoder

    def graph(self, inputs: list[Any]) -> list[Any]:
        return _photograph_graph(inputs, self._decoder)

    def feed(self, positions: Int64, views: EpochViews) -> list[Any]:
        files = [os.fsencode(self._manifest.file(n)) for n in self._split.ids[positions].tolist()]
        rows = views.table[positions]
        size = np.empty((len(rows), 2), np.float32)
        size[:, 0] = views.height_px
        # The resampler mirrors what has a negative extent, which spares a pass over the pixels.
        size[:, 1] = np.where(rows[:, 4] != 0, -views.width_px, views.width_px)
        return [[np.frombuffer(name, np.uint8) for name in files], *_corner_and_extent(rows), size]

    def check(self, positions: Int64, outputs: Any) -> None:
        file_bytes = outputs[1].as_array().reshape(len(positions))
        require_bytes(self._manifest, self._split.ids[positions], file_bytes)

    def find_culprit(self, positions: Int64) -> None:
        for sample_id in self._split.ids[positions].tolist():
            require_unchanged(self._manifest, sample_id)


class _Stored:
    """Images in memory: a window of their own size is cut out, with zeros outside, and flipped."""

    inputs = _STORED_INPUTS

    def __init__(self, split: Split) -> None:
        self._split = split

    def graph(self, inputs: list[Any]) -> list[Any]:
        fn = _dali().fn
        image, start, shape, flip = inputs
        image = fn.reinterpret(image, layout="HWC")
        window = fn.slice(image, start=start, shape=shape, axes=(0, 1), out_of_bounds_policy="pad")
        return [fn.flip(window, horizontal=flip)]

    def feed(self, positions: Int64, views: EpochViews) -> list[Any]:
        rows = views.table[positions]
        return [self._split.images_NHWC[positions], *_corner_and_extent(rows), np.ascontiguousarray(rows[:, 4])]

    def check(self, positions: Int64, outputs: Any) -> None:
        pass

    def find_culprit(self, positions: Int64) -> None:
        pass


class _Failed(Exception):
    """DALI gave up a batch; the text is its own first line that says why."""

    def __init__(self, text: str, positions: Int64) -> None:
        super().__init__(text)
        self.positions = positions


class _Requests:
    """What a pipeline shall do next, and what it is doing; apart from the pipeline, which holds it.

    Attributes:
        flight: positions of the batches that were asked for and not yet handed out.
    """

    def __init__(self, work: _Work) -> None:
        self.flight: deque[Int64] = deque()
        self._work = work
        self._feed: Iterator[list[Any]] = iter(())

    def set(self, shares: list[Int64], views: EpochViews) -> None:
        """Puts these batches next."""
        self._feed = self._inputs(shares, views)

    def clear(self) -> None:
        """Asks for nothing any more."""
        self._feed = iter(())

    def __call__(self) -> list[Any]:
        # DALI calls this once a batch; StopIteration tells it that the epoch ends.
        return next(self._feed)

    def _inputs(self, shares: list[Int64], views: EpochViews) -> Iterator[list[Any]]:
        for positions in shares:
            self.flight.append(positions)
            yield self._work.feed(positions, views)


class _Pipeline:
    """A DALI pipeline and the batches that it works on.

    Args:
        work: what it does.
        settings: workers, batches_ahead, dali_decoder.
        device: where the images are needed.
        batch_size: most samples in a batch.
    """

    def __init__(self, work: _Work, settings: DataSettings, device: torch.device, batch_size: int) -> None:
        dali = _dali()
        self.batch_size = batch_size
        self._work, self._requests, self._failed = work, _Requests(work), False
        self._device = device if settings.dali_decoder == "gpu" else None
        self._pipeline = dali.Pipeline(
            batch_size,
            num_threads=settings.workers or usable_cores(),
            device_id=None if self._device is None else _number_of(self._device),
            prefetch_queue_depth=settings.batches_ahead,
        )
        with self._pipeline:
            dimensions = list(work.inputs.values())
            inputs = dali.fn.external_source(self._requests, num_outputs=len(dimensions), batch=True, ndim=dimensions)
            self._pipeline.set_outputs(*work.graph(list(inputs)))
        self._pipeline.build()

    def begin(self, shares: list[Int64], views: EpochViews) -> None:
        """Starts on the first batches.

        Raises:
            _Failed: DALI could not.
        """
        self._requests.set(shares, views)
        self._call(self._pipeline.schedule_run)

    def next(self) -> tuple[Int64, torch.Tensor] | None:
        """Positions and images of the next batch, uint8 NHWC; None where there is no further one.

        Raises:
            _Failed: DALI could not make it.
            UserError: a file has changed.
        """
        outputs = self._share()
        if outputs is None:
            return None
        positions = self._requests.flight.popleft()
        try:
            self._work.check(positions, outputs)
            # DALI gives the memory to the tensor, and takes other memory for its next batches.
            images_NHWC = torch.utils.dlpack.from_dlpack(outputs[0].as_tensor())
            if self._device is not None:
                # torch's own memory knows the streams that still use it when it is freed.
                images_NHWC = images_NHWC.clone()
        finally:
            self._pipeline.release_outputs()
        self._call(self._pipeline.schedule_run)
        return positions, images_NHWC

    def end(self) -> bool:
        """Waits for what is under way and drops it; whether the pipeline can be used again."""
        self._requests.clear()
        try:
            while not self._failed and self._share() is not None:
                self._pipeline.release_outputs()
        except (_Failed, AttributeError):
            # AttributeError: the interpreter ends, and DALI has taken its pipelines apart.
            return False
        self._requests.flight.clear()
        if not self._failed:
            self._pipeline.reset()
        return not self._failed

    def _share(self) -> Any:
        stream = None if self._device is None else torch.cuda.current_stream(self._device)
        try:
            return self._call(self._pipeline.share_outputs, stream)
        except StopIteration:
            return None

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            self._failed = True
            flight = self._requests.flight
            raise _Failed(_reason(error), flight[0] if flight else np.empty(0, np.int64)) from error


def _photograph_graph(inputs: list[Any], decoder: str) -> list[Any]:
    fn, types = _dali().fn, _dali().types
    path, start, shape, size = inputs
    # Not mapped: a file that is cut short while it is mapped kills the process.
    content = fn.io.file.read(path, dont_use_mmap=True)
    on_gpu = {"device": "mixed", "hw_decoder_load": _HARDWARE_SHARE, "jpeg_fancy_upsampling": True}
    crop = fn.decoders.image_slice(
        content,
        start=start,
        shape=shape,
        axes=(0, 1),
        adjust_orientation=False,
        output_type=types.RGB,
        **(on_gpu if decoder == "gpu" else {"device": "cpu"}),
    )
    image = fn.resize(crop, size=size, interp_type=types.INTERP_LINEAR, antialias=True)
    return [image, content.shape()]


def _corner_and_extent(rows: Int32) -> tuple[Int32, Int32]:
    return np.ascontiguousarray(rows[:, 0:2]), np.ascontiguousarray(rows[:, 2:4])


def _number_of(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _reason(error: Exception) -> str:
    """DALI's own words, without where in our code the operator was defined."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if "encountered:" in lines:
        lines = lines[lines.index("encountered:") + 1 :]
    return lines[0] if lines else type(error).__name__


def _dali() -> Any:
    """The package, which is imported where it is needed and has no types to speak of.

    Raises:
        UserError: it is not installed.
    """
    try:
        import nvidia.dali
    except ImportError as error:
        raise UserError(
            f"data.backend = dali: NVIDIA DALI cannot be imported ({error}): {install_line('nvidia-dali-cuda120')}"
        ) from None
    return nvidia.dali
