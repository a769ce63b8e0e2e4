"""What is counted while training: losses and hits on the device, seconds on the host."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgen.distributed import ALONE, Group

NEVER = 2**62


@dataclass(frozen=True)
class Reading:
    """State of a meter, read from the device.

    Attributes:
        images: how many it speaks of.
        loss: mean over them.
        accuracy: share of them that the network ranked first, under training's batch statistics.
        first_bad_step: first step whose loss was not finite, or None.
    """

    images: int
    loss: float
    accuracy: float
    first_bad_step: int | None


@dataclass(frozen=True)
class Tally:
    """What some steps came to, in parts that passed through the network one after the other.

    Attributes:
        steps: of each part, counted from the first step of the tally.
        images: of each part.
        loss_sums: over the images, on the device; their values, in order, are those of the parts.
        correct: hits, likewise.
    """

    steps: tuple[int, ...]
    images: tuple[int, ...]
    loss_sums: tuple[Tensor, ...]
    correct: tuple[Tensor, ...]

    @property
    def count(self) -> int:
        """How many steps it is of."""
        return self.steps[-1] + 1

    @staticmethod
    def of(tallies: Sequence[Tally]) -> Tally:
        """Of several, in order, with one tensor of losses and one of hits."""
        firsts = itertools.accumulate((tally.count for tally in tallies), initial=0)
        return Tally(
            tuple(first + step for first, tally in zip(firsts, tallies, strict=False) for step in tally.steps),
            tuple(images for tally in tallies for images in tally.images),
            (_joined([values for tally in tallies for values in tally.loss_sums]),),
            (_joined([values for tally in tallies for values in tally.correct]),),
        )


class Meter:
    """Losses and hits of an epoch. They stay on the device until they are read; keeping them takes no operator.

    Args:
        group: whose processes count their shares; a reading is of all of them.
    """

    def __init__(self, group: Group = ALONE) -> None:
        self._group = group
        self.reset()

    def reset(self) -> None:
        """Starts an epoch."""
        self._images, self._loss_sum, self._correct = 0, 0.0, 0.0
        self._first_bad_step: int | None = None
        self._unread: list[tuple[int, Tally]] = []

    def add(self, first_step: int, tally: Tally) -> None:
        """Counts steps, the first of which is given; the tally's tensors must stay as they are."""
        self._unread.append((first_step, tally))

    def read(self) -> Reading:
        """Waits for the device and tells the means so far; to be asked for in all processes at once."""
        self._take_in()
        own = torch.tensor([self._images, self._loss_sum, self._correct], dtype=torch.float64)
        counted, loss_sum, correct = self._group.sum(own).tolist()
        # The first of all processes is the largest of what is negative; a finite loss is never the first.
        bad = -NEVER if self._first_bad_step is None else -self._first_bad_step
        (first,) = self._group.most([bad])
        images = max(counted, 1)
        return Reading(int(counted), loss_sum / images, correct / images, None if first == -NEVER else -first)

    def state(self) -> dict[str, Any]:
        """Plain values from which `restore` goes on exactly: of this process."""
        self._take_in()
        return {"images": self._images, "loss_sum": self._loss_sum, "correct": int(self._correct)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state` told."""
        self.reset()
        self._images, self._loss_sum, self._correct = state["images"], state["loss_sum"], float(state["correct"])

    def restore_sum(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Goes on from what several processes told, in one."""
        self.restore({name: sum(state[name] for state in states) for name in ("images", "loss_sum", "correct")})

    def _take_in(self) -> None:
        """Adds up what is unread: one value after the other, so that the sum does not depend on when it is read."""
        tallies = [tally for _, tally in self._unread]
        if not tallies:
            return
        steps = [first + step for first, tally in self._unread for step in tally.steps]
        losses = _joined([values for tally in tallies for values in tally.loss_sums]).tolist()
        hits = _joined([values for tally in tallies for values in tally.correct]).tolist()
        for step, loss_sum, correct in zip(steps, losses, hits, strict=True):
            self._loss_sum += loss_sum
            # Kernels count in floating point, and what is not finite is no whole number.
            self._correct += correct
            if self._first_bad_step is None and not math.isfinite(loss_sum):
                self._first_bad_step = step
        self._images += sum(images for tally in tallies for images in tally.images)
        self._unread = []


def _joined(values: Sequence[Tensor]) -> Tensor:
    return torch.cat([value.reshape(-1).double() for value in values])


class Stopwatch:
    """Seconds of each phase of a generation; exactly one phase runs at a time.

    Args:
        device: waited for at each change of phase, so that work is charged to the phase that
            asked for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}
        self._phase: str | None = None
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charges what happens inside to a phase; an outer phase pauses meanwhile."""
        outer = self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def seconds(self) -> dict[str, float]:
        """Seconds of every phase so far."""
        running = {self._phase: time.perf_counter() - self._since} if self._phase else {}
        return {name: self._seconds.get(name, 0.0) + running.get(name, 0.0) for name in {**self._seconds, **running}}

    def add(self, earlier: Mapping[str, float]) -> None:
        """Adds the seconds of an earlier session of the same training."""
        now, self._since = self.seconds(), time.perf_counter()
        self._seconds = {name: now.get(name, 0.0) + earlier.get(name, 0.0) for name in {**now, **earlier}}

    def _switch(self, name: str | None) -> str | None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        outer = self._phase
        self._seconds = self.seconds()
        self._phase, self._since = name, time.perf_counter()
        return outer
