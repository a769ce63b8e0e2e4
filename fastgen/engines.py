"""How the steps of an epoch are taken: one by one, or in programs that a GPU replays as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from fastgen.config import TrainSettings
from fastgen.crops import JITTER_COLUMNS
from fastgen.data.batch import Batch, DeviceSource, to_device
from fastgen.learner import Learner
from fastgen.meters import Tally
from fastgen.programs import Body, Program
from fastgen.shapes import Shape, group_sizes
from fastgen.supply import Supply
from fastgen.views import EpochViews


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
        shapes: of all batches.
        channels: of an image.
        jitter: whether views carry jitter.
        device: where it runs.
    """

    learner: Learner
    supply: Supply
    train: TrainSettings
    samples: int
    shapes: Sequence[Shape]
    channels: int
    jitter: bool
    device: torch.device

    def blank(self, shape: Shape) -> Batch:
        """Black images of class 0, as the data set's loader would give them."""
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
        batches = self._plant.supply.loader.batches(views, self._plant.train.batch_size, first_batch)
        for batch, lr in zip(batches, lrs, strict=True):
            yield self._plant.learner.step(batch, lr)

    def _rehearse(self) -> None:
        """Compiles, and lets libraries choose their algorithms."""
        plant, supply = self._plant, self._plant.supply
        if supply.ahead is not None:
            groups = group_sizes(plant.samples, plant.train.batch_size, supply.ahead.count)
            for side in {shape[1:] for shape in plant.shapes}:
                for count in groups:
                    supply.ahead.taught(plant.blank((count, *side)))
        with plant.learner.preserved():
            for shape in plant.shapes:
                plant.learner.step(supply.dress(plant.blank(shape)), 0.0)


class GraphEngine:
    """Steps in programs, of `train.graph_steps` each where batches are made on the device alone, else of one.

    The last batch of an epoch, which is smaller, has a program of its own: filling it up and masking the rest would
    not do, as batch-norm takes its statistics of all that it is given.
    """

    def __init__(self, plant: Plant) -> None:
        self._plant = plant
        self._programs: dict[tuple[int, ...], Program] = {}
        self._pool = torch.cuda.graph_pool_handle() if plant.device.type == "cuda" else None
        source = plant.supply.source
        steps = 1 if source is None else plant.train.graph_steps
        self.how = f"graphs of {steps} steps" if self._pool else f"programs of {steps} steps, not captured: no GPU"
        if source is None:
            for shape in plant.shapes:
                self._streamed(plant.supply.dress(plant.blank(shape)))
        else:
            for size, count in dict.fromkeys(self._pieces(0)):
                self._resident(source, size, count)

    def epoch(self, views: EpochViews, first_batch: int, lrs: Sequence[float]) -> Iterator[Tally]:
        """See `Engine.epoch`."""
        lrs_S = to_device(torch.tensor(lrs, dtype=torch.float32), self._plant.device)
        source = self._plant.supply.source
        if source is not None:
            return self._epoch_of(source, views, first_batch, lrs_S)
        return self._epoch_streamed(views, first_batch, lrs_S)

    def _epoch_of(self, source: DeviceSource, views: EpochViews, first_batch: int, lrs_S: Tensor) -> Iterator[Tally]:
        columns = source.columns(views, views.order[first_batch * self._plant.train.batch_size :])
        sample = step = 0
        for size, steps in self._pieces(first_batch):
            part = slice(sample, sample + size * steps)
            program = self._resident(source, size, steps)
            yield program.run({name: column[part] for name, column in columns.items()}, lrs_S[step : step + steps])
            sample, step = part.stop, step + steps

    def _epoch_streamed(self, views: EpochViews, first_batch: int, lrs_S: Tensor) -> Iterator[Tally]:
        batches = self._plant.supply.loader.batches(views, self._plant.train.batch_size, first_batch)
        for step, batch in enumerate(batches):
            yield self._streamed(batch).run(_columns_of(batch), lrs_S[step : step + 1])

    def _pieces(self, first_batch: int) -> Iterator[tuple[int, int]]:
        """(images in a batch, batches) of each program that runs in the rest of an epoch."""
        batch_size, at_once = self._plant.train.batch_size, self._plant.train.graph_steps
        full, rest = divmod(self._plant.samples, batch_size)
        left = full - first_batch
        yield from [(batch_size, at_once)] * max(0, left // at_once)
        yield from [(batch_size, 1)] * max(0, left % at_once if left > 0 else 0)
        if rest:
            yield rest, 1

    def _resident(self, source: DeviceSource, size: int, steps: int) -> Program:
        def inputs() -> Mapping[str, Tensor]:
            return source.blank(size * steps, self._plant.jitter)

        def body(columns: Mapping[str, Tensor], lrs: Tensor) -> Tally:
            return self._steps(source.execute(columns), size, lrs)

        return self._program((size, steps), body, inputs, steps)

    def _streamed(self, batch: Batch) -> Program:
        def inputs() -> Mapping[str, Tensor]:
            return {name: column.clone() for name, column in _columns_of(batch).items()}

        def body(columns: Mapping[str, Tensor], lrs: Tensor) -> Tally:
            return Tally.of([self._plant.learner.step(Batch(**columns), lrs[0])])

        return self._program(tuple(batch.images_NCHW.shape), body, inputs, 1)

    def _program(
        self, key: tuple[int, ...], body: Body, inputs: Callable[[], Mapping[str, Tensor]], steps: int
    ) -> Program:
        if key not in self._programs:
            with self._plant.learner.preserved():
                self._programs[key] = Program(body, inputs(), steps, self._plant.device, self._pool)
        return self._programs[key]

    def _steps(self, whole: Batch, size: int, lrs: Tensor) -> Tally:
        """Takes the steps of the batches that lie behind each other in this one."""
        ahead, tallies = self._plant.supply.ahead, []
        at_once = 1 if ahead is None or len(lrs) % ahead.count else ahead.count
        for first in range(0, len(lrs), at_once):
            group = whole[first * size : (first + at_once) * size]
            if ahead is not None:
                group = ahead.taught(group)
            for number in range(at_once):
                batch = group[number * size : (number + 1) * size]
                tallies.append(self._plant.learner.step(batch, lrs[first + number]))
        return Tally.of(tallies)


def _columns_of(batch: Batch) -> dict[str, Tensor]:
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value for name, value in values.items() if value is not None}
