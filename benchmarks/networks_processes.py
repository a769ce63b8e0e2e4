"""Networks side by side, each in a process of its own, which all begin and end by one clock."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from benchmarks.networks import NetworkFailed, Peak, Race, Runner, Setup, peak_memory, rig_maker, run_together
from fastgen.config import RunSettings
from fastgen.data.batch import usable_cores
from fastgen.device import choose_device
from fastgen.errors import FastgenError

# How long a process may take: to build its network, to begin a round, and to tell of it after its end.
BUILD_SECONDS, BEGIN_SECONDS, ANSWER_SECONDS = 300.0, 120.0, 120.0
# Until every process has heard when a round begins.
LEAD_SECONDS = 0.05
EXIT_SECONDS = 5.0
MPS_KEY, MPS_FOLDER = "CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"


@dataclass(frozen=True)
class Worker:
    """A process with one network, as seen from here."""

    name: str
    process: BaseProcess
    pipe: connection.Connection[Any, Any]

    def tell(self, order: Any) -> None:
        """Sends what to do next; NetworkFailed where the process is over."""
        try:
            self.pipe.send(order)
        except OSError:
            raise self._ended() from None

    def answer(self) -> Any:
        """What it has sent; NetworkFailed where that is a failure, or the process is over."""
        try:
            answer = self.pipe.recv()
        except (EOFError, OSError):
            raise self._ended() from None
        if isinstance(answer, NetworkFailed):
            raise NetworkFailed(f"{self.name}: {answer}")
        return answer

    def _ended(self) -> NetworkFailed:
        self.process.join(EXIT_SECONDS)
        code = self.process.exitcode
        if code is None or code >= 0:
            return NetworkFailed(f"{self.name}: its process ended with exit code {code}")
        return NetworkFailed(f"{self.name}: its process was ended by {signal.Signals(-code).name}")


def answers(workers: Sequence[Worker], seconds: float, what: str) -> list[Any]:
    """One answer of each process, in the order of the processes.

    Args:
        seconds: that they have for it, together.
        what: they have not done if they do not.

    Raises:
        NetworkFailed: one is over, has failed, or is too late.
    """
    deadline = time.monotonic() + seconds
    found: dict[str, Any] = {}
    while len(found) < len(workers):
        waiting = [worker for worker in workers if worker.name not in found]
        ready = connection.wait([worker.pipe for worker in waiting], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise NetworkFailed(f"{waiting[0].name}: did not {what} within {seconds:g} s")
        found |= {worker.name: worker.answer() for worker in waiting if worker.pipe in ready}
    return [found[worker.name] for worker in workers]


@dataclass(frozen=True)
class Processes:
    """Networks in processes; see `in_processes`."""

    workers: Sequence[Worker]

    def race(self, networks: int, seconds: float) -> Race:
        """Lets so many of them take steps for so long.

        Raises:
            NetworkFailed: a process is over, has failed, or does not answer.
        """
        chosen = self.workers[:networks]
        for worker in chosen:
            worker.tell(threads_each(networks))
        answers(chosen, BEGIN_SECONDS, "begin")
        start = time.monotonic() + LEAD_SECONDS
        for worker in chosen:
            worker.tell((start, seconds))
        races: list[Race] = answers(chosen, seconds + ANSWER_SECONDS, "end")
        images = tuple(images for race in races for images in race.images)
        peaks = [race.peak for race in races if race.peak is not None]
        return Race(images, Peak(*map(sum, zip(*peaks, strict=True))) if peaks else None, races[0].threads)


@contextmanager
def in_processes(setup: Setup, most: int) -> Iterator[Processes]:
    """Processes with a network each, all of them ready; none of them is left afterwards.

    Where this process is killed before, each of them ends by itself when it is done with what it is at: at the latest
    after its building, or the seconds of a round.

    Raises:
        NetworkFailed: a network could not be built.
    """
    workers: list[Worker] = []
    try:
        for number in range(most):
            workers.append(_start(setup, number, most))
        answers(workers, BUILD_SECONDS, "build its network")
        yield Processes(workers)
    finally:
        for worker in workers:
            # They keep nothing that could be lost.
            worker.process.kill()
        for worker in workers:
            worker.process.join()
            worker.pipe.close()


def _start(setup: Setup, number: int, most: int) -> Worker:
    # A forked process could not use a GPU that this one has used.
    spawning = multiprocessing.get_context("spawn")
    ours, theirs = spawning.Pipe()
    process = spawning.Process(target=_work, args=(setup, threads_each(most), theirs), daemon=True)
    process.start()
    # Then the pipe ends with the process.
    theirs.close()
    return Worker(f"network {number + 1} of {most}", process, ours)


def _work(setup: Setup, threads: int, pipe: connection.Connection[Any, Any]) -> None:
    """What a process runs: `_serve`, with its end told to whoever asked."""
    # A Ctrl-C in the terminal reaches all processes; it is for the one that started the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _serve(setup, threads, pipe)
    except (EOFError, ConnectionError):
        # Whoever asked is gone.
        return
    except Exception as error:  # noqa: BLE001 (told in one line by whoever asked)
        kind = "" if isinstance(error, FastgenError) else f"{type(error).__name__}: "
        pipe.send(NetworkFailed(f"{kind}{error}"))


def _serve(setup: Setup, threads: int, pipe: connection.Connection[Any, Any]) -> None:
    """Builds a network; then, round by round: threads in, begun out, start and seconds in, what came of it out."""
    torch.set_num_threads(threads)
    device = choose_device(RunSettings(device=setup.device))
    runner = Runner(rig_maker(setup, device)(), device)
    runner.warm_up()
    pipe.send(None)
    while True:
        torch.set_num_threads(pipe.recv())
        runner.warm_up()
        pipe.send(None)
        start, seconds = pipe.recv()
        time.sleep(max(0.0, start - time.monotonic()))
        pipe.send(Race(run_together([runner], start, seconds), peak_memory(device), torch.get_num_threads()))


def threads_each(networks: int) -> int:
    """Threads of each process, so that all of them together have a core each where there are enough."""
    return max(1, usable_cores() // networks)


def mps_pipe() -> Path:
    """Where the control daemon of NVIDIA's MPS listens, if it runs."""
    return Path(os.environ.get(MPS_KEY, MPS_FOLDER)) / "control"


def sharing_line(counts: Sequence[int], device: torch.device) -> str:
    """What processes share, for the reader."""
    if device.type == "cpu":
        each = ", ".join(f"{threads_each(networks)} in each of {networks}" for networks in counts)
        return f"processes: {usable_cores()} cores; threads {each}"
    pipe = mps_pipe()
    if pipe.exists():
        return f"processes: NVIDIA's MPS listens at {pipe}: they run on the GPU at the same time"
    return f"processes: NVIDIA's MPS is not running (no {pipe}): they share the GPU by time slices"
