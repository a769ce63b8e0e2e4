"""What all benchmarks share: interleaved timing, facts of the machine, rows of results, the command line."""

from __future__ import annotations

import argparse
import csv
import io
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgen.config import RunSettings
from fastgen.device import choose_device
from fastgen.environment import commit, device_name
from fastgen.errors import FastgenError, UserError
from fastgen.processor import cpu_name

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

# One call is one training step (or whatever is timed); it may leave work queued on the device.
Step = Callable[[], None]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements."""

    median: float
    low: float
    high: float

    def text(self, digits: int) -> str:
        """`median (first quartile .. third quartile)`."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} .. {self.high:.{digits}f})"


@dataclass(frozen=True)
class Timings:
    """Seconds a step of each candidate, one value a round; round r of all candidates belongs together."""

    seconds_per_step: Mapping[str, tuple[float, ...]]

    @property
    def rounds(self) -> int:
        """Rounds that were kept."""
        return min(len(values) for values in self.seconds_per_step.values())

    def ms_per_step(self, name: str) -> Spread:
        """Milliseconds a step."""
        return spread([1e3 * seconds for seconds in self.seconds_per_step[name]])

    def speed_ratio(self, name: str, base: str) -> Spread:
        """How many times as fast as the base: the ratio of each round, then median and quartiles of those.

        Neighbours in time share what else the machine does, so a ratio within a round is worth
        more than a ratio of medians.
        """
        pairs = zip(self.seconds_per_step[base], self.seconds_per_step[name], strict=True)
        return spread([base_seconds / seconds for base_seconds, seconds in pairs])


class FloorMissed(FastgenError):
    """A measured figure is worse than it must be; told line by line before."""


@dataclass(frozen=True)
class Floor:
    """What is asked for, beside what was measured.

    Attributes:
        what: was measured.
        measured: not-a-number does not pass.
        asked: the worst that passes.
        at_most: whether less is better.
    """

    what: str
    measured: float
    asked: float
    at_most: bool = False

    @property
    def passed(self) -> bool:
        """Whether the floor holds."""
        return self.measured <= self.asked if self.at_most else self.measured >= self.asked

    def line(self) -> str:
        """As it is printed."""
        bound = "at most" if self.at_most else "at least"
        return f"{'PASS' if self.passed else 'FAIL'}  {self.what}: {self.measured:.3g}, asked {bound} {self.asked:.3g}"


def require(floors: Sequence[Floor]) -> None:
    """Ends the command where a floor does not hold; each was told before.

    Raises:
        FloorMissed: one does not hold.
    """
    missed = [floor.what for floor in floors if not floor.passed]
    if missed:
        raise FloorMissed(f"{len(missed)} of {len(floors)} floors missed: {'; '.join(missed)}")


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles, linearly interpolated."""
    low, median, high = np.percentile(np.asarray(values, np.float64), [25, 50, 75])
    return Spread(float(median), float(low), float(high))


def columns(name: str, value: Spread | None, digits: int) -> dict[str, float | None]:
    """A spread as three columns of a row; empty where it is None."""
    if value is None:
        return {f"{name}_median": None, f"{name}_q25": None, f"{name}_q75": None}
    median, low, high = (round(number, digits) for number in (value.median, value.low, value.high))
    return {f"{name}_median": median, f"{name}_q25": low, f"{name}_q75": high}


def time_interleaved(
    steps: Mapping[str, Step],
    device: torch.device,
    *,
    rounds: int,
    steps_per_round: int,
    warm_up_rounds: int = 1,
    until: float = math.inf,
) -> Timings:
    """Times several candidates in one process, in turns of a few steps.

    Args:
        steps: the candidates by name.
        device: waited for before and after each turn.
        rounds: that are kept.
        steps_per_round: steps of each candidate in a round.
        warm_up_rounds: rounds before those, which are dropped (compilation, choice of algorithms).
        until: on the clock of `time.monotonic`; after it no kept round is begun but the first.
    """
    names = list(steps)
    kept: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(warm_up_rounds + rounds):
        if round_ > warm_up_rounds and time.monotonic() > until:
            break
        # Another one begins in each round, so that none always follows the same neighbour's warm caches.
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            seconds = _seconds_per_step(steps[name], device, steps_per_round)
            if round_ >= warm_up_rounds:
                kept[name].append(seconds)
    return Timings({name: tuple(values) for name, values in kept.items()})


def _seconds_per_step(step: Step, device: torch.device, count: int) -> float:
    wait_for(device)
    start = time.perf_counter()
    for _ in range(count):
        step()
    wait_for(device)
    return (time.perf_counter() - start) / count


def wait_for(device: torch.device) -> None:
    """Waits until the device has done all that was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def choose(name: str) -> torch.device | None:
    """The device of that name, as training would set it up; None where a GPU is asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        return None
    return choose_device(RunSettings(device="cuda" if name == "cuda" else "cpu"))


def machine_facts(device: torch.device) -> dict[str, str | int | float | None]:
    """Where and with what a row was measured. Clocks and power are of this very moment, None where unknown."""
    return {
        "time_utc": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device_name(device),
        "cpu": cpu_name(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_1min": round(os.getloadavg()[0], 2),
        **_gpu_state(device),
    }


def facts_line(device: torch.device) -> str:
    """The machine's facts for the reader, those that are known."""
    return ", ".join(f"{name} {value}" for name, value in machine_facts(device).items() if value is not None)


GPU_STATE = {"clocks.sm": "sm_clock_mhz", "clocks.mem": "memory_clock_mhz", "power.draw": "power_w"}


def _gpu_state(device: torch.device) -> dict[str, float | None]:
    unknown: dict[str, float | None] = dict.fromkeys(GPU_STATE.values())
    if device.type != "cuda":
        return unknown
    identity = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    words = ["nvidia-smi", f"--query-gpu={','.join(GPU_STATE)}", "--format=csv,noheader,nounits", "-i", identity]
    try:
        answer = subprocess.run(words, check=True, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError) as error:
        # The measurement stands without these facts; that they are missing is said and seen in the row.
        print(f"clocks and power are not known: {error}")
        return unknown
    return dict(zip(GPU_STATE.values(), map(_number_or_none, answer.split(",")), strict=True))


def _number_or_none(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        # nvidia-smi writes [N/A] where a device does not tell.
        return None


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Appends rows to a CSV file whose header is the rows' keys; writes the header where the file is new.

    Raises:
        UserError: the file has another header.
    """
    if not rows:
        return
    columns = list(rows[0])
    found = header_of(path)
    if found is not None and found != columns:
        differing = sorted({*found} ^ {*columns}) or ["their order"]
        raise UserError(f"{path}: has other columns ({', '.join(differing)}): move it away, or name another --results")
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if found is None:
        writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    # One write for all of them: a kill leaves all rows or none.
    with path.open("ab", buffering=0) as file:
        file.write(text.getvalue().encode())


def header_of(path: Path) -> list[str] | None:
    """Columns of a CSV file, None where there is no file or nothing in it."""
    if not path.exists():
        return None
    with path.open(newline="") as file:
        return next(csv.reader(file), None)


def read_rows(path: Path) -> list[dict[str, str]]:
    """All rows of a CSV file, as text; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def positive_minutes(text: str) -> float:
    """Type of arguments that are durations in minutes."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is no time above 0")
    return value
