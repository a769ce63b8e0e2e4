"""What is counted while training: sums on the device, seconds on the host."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_NEVER = 2**62


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


class Meter:
    """Sums of one epoch, kept on the device; only `read` and `state` wait for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.reset()

    def reset(self) -> None:
        """Starts an epoch."""
        self._images = 0
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self._device)
        # A whole number; kernels count in floating point.
        self._correct = torch.zeros((), dtype=torch.float64, device=self._device)
        self._first_bad_step = torch.full((), _NEVER, dtype=torch.int64, device=self._device)

    def add(self, step: int, images: int, loss_sum: Tensor, correct: Tensor) -> None:
        """Counts a step, or a part of one: its losses and its hits, summed over the images."""
        self._images += images
        self._loss_sum += loss_sum
        self._correct += correct
        bad_step = torch.where(loss_sum.isfinite(), _NEVER, step)
        self._first_bad_step = torch.minimum(self._first_bad_step, bad_step)

    def read(self) -> Reading:
        """Waits for the device and tells the means so far."""
        images = max(self._images, 1)
        bad = int(self._first_bad_step.item())
        return Reading(
            self._images,
            self._loss_sum.item() / images,
            self._correct.item() / images,
            None if bad == _NEVER else bad,
        )

    def state(self) -> dict[str, Any]:
        """Plain values from which `restore` goes on exactly."""
        return {"images": self._images, "loss_sum": self._loss_sum.item(), "correct": int(self._correct.item())}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state` told."""
        self.reset()
        self._images = state["images"]
        self._loss_sum += state["loss_sum"]
        self._correct += state["correct"]


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
