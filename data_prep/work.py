"""Work on many pictures in several processes: results in order, memory bounded, no hang.

A process that dies (a decoder that crashes, too little memory) ends the command with the names of the
pictures that were being worked on; a signal ends it cleanly.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing import connection, forkserver, resource_tracker
from types import TracebackType
from typing import Any, Generic, TypeVar

from fastgen.errors import MachineError
from fastgen.stop import StopRequest

CHUNK = 8
# Chunks that wait for each process: it must never run dry, and results must not pile up.
CHUNKS_AHEAD = 3
ASK_EVERY_SECONDS = 0.3
NOBODY = -1

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Job(Generic[Task]):
    """One picture's work, with its position in the listing."""

    position: int
    task: Task


class Workers:
    """Processes that wait for work, entered as a context.

    Args:
        count: of processes; 0 works in this one (a crash of a decoder then ends it, too).
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._pool: ProcessPoolExecutor | None = None
        self._working_on: Any = None

    def __enter__(self) -> Workers:
        if self._count:
            # Not fork: it copies locks in whatever state other threads hold them.
            context = multiprocessing.get_context("forkserver")
            # Imported once, for all of them.
            context.set_forkserver_preload(["data_prep.judge"])
            _start_server()
            self._working_on = context.Array("q", [NOBODY] * self._count, lock=False)
            places = context.Value("i", 0)
            self._pool = ProcessPoolExecutor(
                self._count, context, initializer=_begin, initargs=(self._working_on, places)
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def map(
        self,
        function: Callable[[Task], Result],
        jobs: Iterable[tuple[int, Task]],
        stop: StopRequest,
        name: Callable[[int], str],
    ) -> Iterator[Result]:
        """Results in the order of the jobs.

        Args:
            function: of a module, so that another process can import it.
            jobs: (position, task) of each picture.
            stop: asked while waiting.
            name: of the picture at a position, for an error.

        Raises:
            Stopped: a signal came.
            MachineError: a process died.
        """
        waiting: deque[Future[list[Result]]] = deque()
        chunks = _chunks(jobs)
        try:
            for chunk in islice(chunks, max(self._count, 1) * CHUNKS_AHEAD):
                waiting.append(self._submit(function, chunk))
            while waiting:
                results = _wait(waiting.popleft(), stop)
                yield from results
                stop.check()
                for chunk in islice(chunks, 1):
                    waiting.append(self._submit(function, chunk))
        except (BrokenProcessPool, EOFError, ConnectionError):
            # A signal to the whole process group ends the workers as well, or the server that starts them.
            stop.check()
            raise MachineError(self._who_died(name)) from None

    def _submit(self, function: Callable[[Task], Result], chunk: Sequence[tuple[int, Task]]) -> Future[list[Result]]:
        if self._pool is not None:
            return self._pool.submit(_work, function, chunk)
        future: Future[list[Result]] = Future()
        future.set_result([function(task) for _, task in chunk])
        return future

    def _who_died(self, name: Callable[[int], str]) -> str:
        names = [name(position) for position in self._working_on if position != NOBODY]
        return (
            "a worker process died (a crash in a decoder, or too little memory) while these were being worked on: "
            f"{', '.join(names) or 'none yet'}. Move the one at fault away, or lower --workers; then run it again."
        )


def default_workers() -> int:
    """As many processes as this one may use cores."""
    return len(os.sched_getaffinity(0))


def _chunks(jobs: Iterable[tuple[int, Task]]) -> Iterator[list[tuple[int, Task]]]:
    iterator = iter(jobs)
    while chunk := list(islice(iterator, CHUNK)):
        yield chunk


def _wait(future: Future[list[Result]], stop: StopRequest) -> list[Result]:
    while True:
        stop.check()
        try:
            return future.result(timeout=ASK_EVERY_SECONDS)
        except TimeoutError:
            continue


def _start_server() -> None:
    """Starts the process that forks the workers.

    Ctrl-C reaches every process of the terminal. The first decides; the others inherit that they are not disturbed.
    """
    # Before that, because starting it ends with signals unblocked.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# In a worker process: where it tells which picture it works on, and its place there.
_working_on: Any = None
_place = 0


def _begin(working_on: Any, places: Any) -> None:
    global _working_on, _place
    with places.get_lock():
        _place = places.value % len(working_on)
        places.value += 1
    _working_on = working_on
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent says nothing to its workers: they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _work(function: Callable[[Task], Result], chunk: Sequence[tuple[int, Task]]) -> list[Result]:
    results = []
    for position, task in chunk:
        _working_on[_place] = position
        results.append(function(task))
    _working_on[_place] = NOBODY
    return results
