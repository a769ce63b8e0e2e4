"""What networks side by side train, and how many of their images are done within a time.

An image counts when the device is done with its step, not when the step is queued; of the tally that is under way when
the time is up, that part of its images counts that lies before.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from benchmarks.rigs import PATRIARCH, STUDENT, Case, Kernels, Precision, Rig, make_rig, random_split
from fastgen.data.facts import Facts
from fastgen.data.resident import ResidentLoader
from fastgen.errors import FastgenError
from fastgen.step import EngineName

ROLES = {"patriarch": PATRIARCH, "student": STUDENT}
# Tallies of each network that wait on the device, about 0.1 s of work: enough that it does not wait for the host, which
# prepares epochs meanwhile (15 ms each), and few enough that a turn ends soon after its time is up.
MOST_QUEUED = 16


class NetworkFailed(FastgenError):
    """A network that takes part has failed, or its process: no number is left that means anything."""


@dataclass(frozen=True)
class Setup:
    """What each of the networks trains. It is small: processes are sent it.

    Attributes:
        model, batch_size, precision, facts, kernels, batchnorm: see `rigs.Case`.
        role: with a teacher of its own or without.
        images: how many, random ones.
    """

    model: str
    batch_size: int
    precision: Precision
    role: Literal["patriarch", "student"]
    facts: Facts
    images: int
    device: Literal["cpu", "cuda"]
    kernels: Kernels = "torch"
    batchnorm: Kernels = "torch"

    @property
    def engine(self) -> EngineName:
        """A graph that is not captured would only be another order of the same work."""
        return "graph" if self.device == "cuda" else "eager"

    @property
    def images_at_once(self) -> int:
        """Of a tally."""
        return self.batch_size * (Case.graph_steps if self.engine == "graph" else 1)


def rig_maker(setup: Setup, device: torch.device) -> Callable[[], Rig]:
    """Function that builds a network with all that its steps need; they all read the same images, kept once."""
    split = random_split(setup.facts, setup.images)
    case = Case(
        setup.model, setup.batch_size, setup.precision, setup.facts, split, device, setup.kernels, setup.batchnorm
    )
    loader = ResidentLoader(split, setup.facts.pad_px, device, kernels=setup.kernels == "triton")
    return lambda: make_rig(case, setup.engine, ROLES[setup.role], loader)


class HostEvent:
    """What `torch.cuda.Event` is on a GPU: now, as on a CPU a call returns when its work is done."""

    def __init__(self) -> None:
        self._at_seconds = time.monotonic()

    def synchronize(self) -> None:
        """Does not wait."""

    def elapsed_time(self, later: HostEvent) -> float:
        """Milliseconds until a later one."""
        return 1e3 * (later._at_seconds - self._at_seconds)


class Runner:
    """Takes a network's steps, a tally at a time, and knows how many images were done when.

    Args:
        stream: where steps are queued; None: the device's current one.
    """

    def __init__(self, rig: Rig, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        self._rig, self._device, self._stream = rig, device, stream
        self.begin(time.monotonic())

    def begin(self, start: float) -> None:
        """Counts anew, from a point on the clock of `time.monotonic` that may have just passed."""
        self._late_seconds = time.monotonic() - start
        with torch.cuda.stream(self._stream):
            self._first = self._event()
        self._ends: list[Any] = []
        self._images: list[int] = []

    def take(self) -> None:
        """Queues the next tally, after waiting for an earlier one where too many wait."""
        with torch.cuda.stream(self._stream):
            tally = next(self._rig.tallies)
            self._ends.append(self._event())
        self._rig.meter.add(self._rig.steps, tally)
        self._rig.steps += tally.count
        self._images.append(sum(tally.images))
        if len(self._ends) >= MOST_QUEUED:
            self._ends[-MOST_QUEUED].synchronize()

    def warm_up(self) -> None:
        """Takes a tally that does not count, and waits for it."""
        self.take()
        self._ends[-1].synchronize()

    def images_within(self, seconds: float) -> float:
        """Waits for all that was taken, and tells how many images were done so long after the start.

        Raises:
            NetworkFailed: nothing was taken.
        """
        if not self._ends:
            raise NetworkFailed(f"took no step within {seconds:g} s: give more --seconds")
        self._ends[-1].synchronize()
        done = [self._late_seconds + self._first.elapsed_time(end) / 1e3 for end in self._ends]
        return images_done(seconds, done, self._images)

    def require_finite(self) -> None:
        """Raises ValueError where a loss was not finite."""
        # On the stream that wrote the losses, so they are there when they are read.
        with torch.cuda.stream(self._stream):
            self._rig.require_finite()

    def _event(self) -> Any:
        if self._device.type == "cpu":
            return HostEvent()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def images_done(seconds: float, done: Sequence[float], images: Sequence[int]) -> float:
    """Images of tallies that were done by a time; where it falls between two, a part of the later one's.

    All times are in seconds since the start.
    """
    return float(np.interp(seconds, [0.0, *done], [0, *itertools.accumulate(images)]))


def run_together(runners: Sequence[Runner], start: float, seconds: float) -> tuple[float, ...]:
    """Lets runners take a tally each in turn until the time is up; images of each, done within it.

    Args:
        start: on the clock of `time.monotonic`.

    Raises:
        NetworkFailed: one took nothing.
        ValueError: a loss was not finite.
    """
    for runner in runners:
        runner.begin(start)
    while time.monotonic() < start + seconds:
        for runner in runners:
            runner.take()
    images = tuple(runner.images_within(seconds) for runner in runners)
    for runner in runners:
        runner.require_finite()
    return images


class Peak(NamedTuple):
    """Most memory of the device, by torch's allocator; the CUDA contexts of processes are not in it.

    What a graph works in counts as allocated only while it is captured, and as reserved for as long as it lives.
    """

    allocated_mb: float
    reserved_mb: float


def peak_memory(device: torch.device) -> Peak | None:
    """Of this process so far; None on a CPU."""
    if device.type != "cuda":
        return None
    return Peak(torch.cuda.max_memory_allocated(device) / 1e6, torch.cuda.max_memory_reserved(device) / 1e6)


class Race(NamedTuple):
    """What networks side by side came to.

    Attributes:
        images: of each, done within the seconds.
        peak: of all together; None on a CPU.
        threads: of torch, in each process; None where they are this one's.
    """

    images: tuple[float, ...]
    peak: Peak | None
    threads: int | None = None
