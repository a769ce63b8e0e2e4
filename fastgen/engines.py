"""How the steps of an epoch are taken: one by one, or in programs that a GPU replays as CUDA graphs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fastgen.config import TrainSettings
from fastgen.crops import JITTER_COLUMNS
from fastgen.data.batch import Batch, DeviceSource, to_device
from fastgen.learner import Learner
from fastgen.meters import Tally
from fastgen.programs import Capture, Program
from fastgen.shapes import Shape, group_sizes, own_size
from fastgen.supply import Supply
from fastgen.views import WHOLE, EpochViews, Share, batch_positions


class Engine(Protocol):
    """Takes the steps of a training."""

    @property
    def how(self) -> str:
        """For the record."""
        ...

    def epoch(self, views: EpochViews, first_batch: int, lrs: Sequence[float]) -> Iterator[Tally]:
        """Takes the steps of an epoch from a batch on; an item is what one of them came to, or several at once.

        Args:
            views: of the epoch.
            first_batch: its number in the epoch.
            lrs: of each step that is left in the epoch.
        """
        ...


@dataclass(frozen=True)
class Plant:
    """What an engine runs.

    Attributes:
        learner: takes a step.
        supply: of batches.
        train: settings of the training.
        samples: in an epoch.
        shapes: of all batches, each whole.
        channels: of an image.
        jitter: whether views carry jitter.
        device: where it runs.
        share: of each batch, that this process takes.
    """

    learner: Learner
    supply: Supply
    train: TrainSettings
    samples: int
    shapes: Sequence[Shape]
    channels: int
    jitter: bool
    device: torch.device
    share: Share = WHOLE

    @property
    def batch_sizes(self) -> list[int]:
        """Images of each batch of an epoch, whole."""
        size, samples = self.train.batch_size, self.samples
        return [min(size, samples - begin) for begin in range(0, samples, size)]

    def own(self, shape: Shape) -> Shape:
        """What falls to this process of a batch of this shape."""
        return own_size(shape[0], self.share), *shape[1:]

    def blank(self, shape: Shape) -> Batch:
        """So many black images of class 0, as the data set's loader would give them."""
        count, height_px, width_px = shape
        image_shape = (count, self.channels, height_px, width_px)
        images_NCHW = torch.zeros(image_shape, dtype=torch.uint8, device=self.device)
        numbers = torch.zeros(count, dtype=torch.int64, device=self.device)
        jitter = torch.zeros((count, len(JITTER_COLUMNS)), device=self.device) if self.jitter else None
        return Batch(images_NCHW.contiguous(memory_format=torch.channels_last), numbers, numbers, jitter)


def make_engine(plant: Plant) -> Engine:
    """The engine that the settings name; all that it compiles or captures is ready, and nothing has been learned."""
    return GraphEngine(plant) if plant.train.engine == "graph" else StepByStep(plant)


class StepByStep:
    """Every step is called by itself: engines eager and compile."""

    def __init__(self, plant: Plant) -> None:
        self.how: str = plant.train.engine
        self._plant = plant
        self._rehearse()

    def epoch(self, views: EpochViews, first_batch: int, lrs: Sequence[float]) -> Iterator[Tally]:
        """See `Engine.epoch`."""
        plant = self._plant
        batches = plant.supply.loader.batches(views, plant.train.batch_size, first_batch, plant.share)
        for batch, lr, images in zip(batches, lrs, plant.batch_sizes[first_batch:], strict=True):
            yield plant.learner.step(batch, lr, images)

    def _rehearse(self) -> None:
        """Compiles, and lets libraries choose their algorithms."""
        plant = self._plant
        _rehearse_teacher(plant)
        with _preserved(plant):
            # Every process takes as many steps here: shapes are told apart by their whole batches.
            for shape in plant.shapes:
                plant.learner.step(plant.supply.dress(plant.blank(plant.own(shape))), 0.0, shape[0])


@contextmanager
def _preserved(plant: Plant) -> Iterator[None]:
    """Whatever steps change is put back afterwards."""
    means = plant.supply.means
    with plant.learner.preserved(), nullcontext() if means is None else means.preserved():
        yield


def _rehearse_teacher(plant: Plant) -> None:
    """Of a teacher that is asked before the steps."""
    ahead = plant.supply.ahead
    if ahead is None:
        return
    for side in {shape[1:] for shape in plant.shapes}:
        for count in group_sizes(plant.samples, plant.train.batch_size, ahead.count, plant.share):
            ahead.taught(plant.blank((count, *side)))


class GraphEngine:
    """Steps in programs, of `train.graph_steps` each where batches are made on the device alone, else of one.

    The last batch of an epoch, which is smaller, has a program of its own: filling it up and masking the rest would
    not do, as batch-norm takes its statistics of all that it is given.
    """

    def __init__(self, plant: Plant) -> None:
        self._plant = plant
        joined, stream = plant.learner.group.control is not None, plant.learner.stream
        self._capture = None if stream is None else Capture(stream, joined=joined)
        source = plant.supply.source
        programs: dict[tuple[int, ...], Program]
        if source is None:
            _rehearse_teacher(plant)
            # By whole batches, so that every process has as many, and warms up as often.
            programs = {shape: self._of_shape(shape) for shape in plant.shapes}
        else:
            programs = {piece: self._of_source(source, *piece) for piece in self._pieces(0)}
        self._programs: dict[tuple[int, ...], Program] = {}
        self._make_ready(programs)

    @property
    def how(self) -> str:
        """See `Engine.how`."""
        steps = 1 if self._plant.supply.source is None else max(steps for _, steps in self._pieces(0))
        size = f"{steps} step{'s' if steps > 1 else ''}"
        return f"graphs of {size}" if self._capture else f"programs of {size}, not captured: no GPU"

    def epoch(self, views: EpochViews, first_batch: int, lrs: Sequence[float]) -> Iterator[Tally]:
        """See `Engine.epoch`."""
        lrs_S = to_device(torch.tensor(lrs, dtype=torch.float32), self._plant.device)
        source = self._plant.supply.source
        if source is not None:
            return self._epoch_of(source, views, first_batch, lrs_S)
        return self._epoch_streamed(views, first_batch, lrs_S)

    def _epoch_of(self, source: DeviceSource, views: EpochViews, first_batch: int, lrs_S: Tensor) -> Iterator[Tally]:
        batch_size, share = self._plant.train.batch_size, self._plant.share
        columns = source.columns(
            views, np.concatenate(list(batch_positions(views.order, batch_size, first_batch, share)))
        )
        sample = step = 0
        for size, steps in self._pieces(first_batch):
            part = slice(sample, sample + own_size(size, share) * steps)
            if (size, steps) not in self._programs:
                # A session before this one stopped where its own programs ended.
                self._make_ready({(size, steps): self._of_source(source, size, steps)})
            program = self._programs[size, steps]
            yield program.run({name: column[part] for name, column in columns.items()}, lrs_S[step : step + steps])
            sample, step = part.stop, step + steps

    def _epoch_streamed(self, views: EpochViews, first_batch: int, lrs_S: Tensor) -> Iterator[Tally]:
        plant = self._plant
        batches = plant.supply.loader.batches(views, plant.train.batch_size, first_batch, plant.share)
        for step, (batch, images) in enumerate(zip(batches, plant.batch_sizes[first_batch:], strict=True)):
            program = self._programs[images, views.height_px, views.width_px]
            yield program.run(_columns_of(batch), lrs_S[step : step + 1])

    def _pieces(self, first_batch: int) -> Iterator[tuple[int, int]]:
        """(images in a whole batch, batches) of each program that runs in the rest of an epoch.

        What is too short for a whole program still asks its teacher for as many batches at once as others do: the same
        groups, whatever `graph_steps` is.
        """
        plant = self._plant
        full, rest = divmod(plant.samples, plant.train.batch_size)
        left = max(0, full - first_batch)
        at_once = 1 if plant.supply.ahead is None else plant.supply.ahead.count
        for steps in (plant.train.graph_steps, at_once, 1):
            yield from [(plant.train.batch_size, steps)] * (left // steps)
            left %= steps
        if rest:
            yield rest, 1

    def _of_source(self, source: DeviceSource, size: int, steps: int) -> Program:
        def body(columns: Mapping[str, Tensor], lrs: Tensor) -> Tally:
            return self._steps(source.execute(columns), size, lrs)

        count = own_size(size, self._plant.share) * steps
        return Program(body, source.blank(count, self._plant.jitter), steps, self._plant.device)

    def _of_shape(self, shape: Shape) -> Program:
        plant = self._plant

        def body(columns: Mapping[str, Tensor], lrs: Tensor) -> Tally:
            return Tally.of([plant.learner.step(Batch(**columns), lrs[0], shape[0])])

        batch = plant.supply.dress(plant.blank(plant.own(shape)))
        inputs = {name: column.clone() for name, column in _columns_of(batch).items()}
        return Program(body, inputs, 1, plant.device)

    def _make_ready(self, programs: Mapping[tuple[int, ...], Program]) -> None:
        """Warms all of them up, then captures them, the largest first: the others find their memory in its own."""
        with _preserved(self._plant):
            for program in programs.values():
                program.warm_up(self._capture)
            for key in sorted(programs, key=math.prod, reverse=True):
                programs[key].capture(self._capture)
        self._programs |= programs

    def _steps(self, whole: Batch, size: int, lrs: Tensor) -> Tally:
        """Takes the steps of the batches of so many images, whole, whose shares lie behind each other in this one."""
        ahead, tallies, own = self._plant.supply.ahead, [], own_size(size, self._plant.share)
        at_once = 1 if ahead is None or len(lrs) % ahead.count else ahead.count
        for first in range(0, len(lrs), at_once):
            group = whole[first * own : (first + at_once) * own]
            if ahead is not None:
                group = ahead.taught(group)
            for number in range(at_once):
                batch = group[number * own : (number + 1) * own]
                tallies.append(self._plant.learner.step(batch, lrs[first + number], size))
        return Tally.of(tallies)


def _columns_of(batch: Batch) -> dict[str, Tensor]:
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value for name, value in values.items() if value is not None}
