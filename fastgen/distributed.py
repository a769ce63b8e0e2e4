"""The processes that train together: who this one is, and what they tell each other. One process runs the same code.

What is told here is small and goes from host to host (gloo), whatever reduces the gradients: nothing of it waits for a
GPU. How processes are started: `launch.py`. How gradients are summed: `gradients.py`.
"""

from __future__ import annotations

import datetime
import gc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastgen.config import DistSettings
from fastgen.errors import FastgenError, LostProcess, Told
from fastgen.views import WHOLE, Share

T = TypeVar("T")

# What a host that is alive needs to answer a question, at most.
ROLL_CALL_SECONDS = 5.0
# How gloo and NCCL word the loss of another process, as their exceptions have no class of their own. Other errors of
# theirs, such as two processes on one GPU, are told as they are.
LOST_WORDS = ("gloo/transport/tcp", "ncclRemoteError")
LATE_WORDS = ("gloo/transport/tcp", "Timed out waiting")
# Downloading and reading may take the main process hours; that it dies is noticed at once.
SETUP_PATIENCE = datetime.timedelta(days=7)


@dataclass(frozen=True)
class Group:
    """The processes of a run, as one of them sees them.

    Attributes:
        rank, world: this process, of so many.
        local_rank, local_world: of those of this machine.
        control: what small things are told over; None: there is one process.
        setup: for what may take the main process long; None: as control.
        roll: kept for `roll_call` alone, as a group that has failed once answers no more.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    control: dist.ProcessGroup | None = field(default=None, compare=False)
    setup: dist.ProcessGroup | None = field(default=None, compare=False)
    roll: dist.ProcessGroup | None = field(default=None, compare=False)

    @property
    def main(self) -> bool:
        """Whether this is the one that writes files and talks."""
        return self.rank == 0

    @property
    def share(self) -> Share:
        """Its part of every global batch."""
        return Share(self.rank, self.world) if self.world > 1 else WHOLE

    def agree(self, value: T) -> T:
        """The main process's value, everywhere; plain values and tensors on the CPU."""
        return self._told(value, self.control)

    def gather(self, value: T) -> list[T]:
        """The values of all processes by rank, everywhere."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.control)
        return values

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the processes, the same bits everywhere; in place where there are several.

        Args:
            tensor: on the CPU.
        """
        if self.control is not None:
            dist.all_reduce(tensor, group=self.control)
        return tensor

    def told_by(self, rank: int, tensor: Tensor) -> Tensor:
        """One process's tensor, everywhere; in place in the others.

        Args:
            rank: of that process.
            tensor: on the CPU, contiguous, of one shape and dtype in all of them.
        """
        if self.control is not None:
            dist.broadcast(tensor, rank, group=self.control)
        return tensor

    def most(self, numbers: Sequence[int]) -> list[int]:
        """The largest value of each over the processes."""
        return self.ask_most(numbers)()

    def ask_most(self, numbers: Sequence[int]) -> Callable[[], list[int]]:
        """As `most`; gives what waits for the answer, so that something else can be done meanwhile."""
        if self.control is None:
            return lambda: list(numbers)
        told = torch.tensor(list(numbers), dtype=torch.int64)
        work = dist.all_reduce(told, dist.ReduceOp.MAX, self.control, async_op=True)

        def answer() -> list[int]:
            work.wait()
            return told.tolist()

        return answer

    def in_turn(self, call: Callable[[], T]) -> T:
        """Calls it in the main process, then in the others: what it downloads or writes is there for them.

        Raises:
            Told: the main process failed, and says itself how.
        """
        if self.control is None:
            return call()
        patient = self.setup or self.control
        if not self.main:
            code = self._told(0, patient)
            if code:
                raise Told(code)
            return call()
        try:
            done = call()
        except BaseException as error:
            self._told(error.exit_code if isinstance(error, FastgenError) else 1, patient)
            raise
        self._told(0, patient)
        return done

    def roll_call(self) -> str | None:
        """Who does not answer, after a question has remained without one; None: this process cannot tell.

        The main process knows best; where it is the one that hangs, the others find that out.
        """
        if self.roll is None:
            return None
        try:
            dist.monitored_barrier(
                self.roll, datetime.timedelta(seconds=ROLL_CALL_SECONDS * (1 if self.main else 3)), wait_all_ranks=True
            )
        except RuntimeError as error:
            text = str(error)
            if self.main and "failed to pass" in text:
                missing = text.partition("failed to pass")[0].rpartition("Rank")[2].lstrip("s ").strip()
                return missing
            return "0" if not self.main and _says_all(error, LATE_WORDS) else None
        return None

    def _told(self, value: T, over: dist.ProcessGroup | None) -> T:
        if over is None:
            return value
        told: list[Any] = [value if self.main else None]
        dist.broadcast_object_list(told, src=0, group=over)
        return told[0]


ALONE = Group()


def started_by_launcher(environment: Mapping[str, str]) -> bool:
    """Whether torch's elastic launcher started this process: fastgen's own, or `torchrun`."""
    return "TORCHELASTIC_RUN_ID" in environment


@contextmanager
def joined(settings: DistSettings, device_kind: str, environment: Mapping[str, str] = os.environ) -> Iterator[Group]:
    """Joins the processes that a launcher started; alone where there was none, or where it started one.

    Args:
        settings: of the recipe.
        device_kind: `cpu` or `cuda`, of what gradients are summed on.
        environment: where the launcher says which process this is.

    Raises:
        LostProcess: another process hung or went away, whatever error that gave here.
    """
    if not started_by_launcher(environment) or int(environment["WORLD_SIZE"]) == 1:
        yield ALONE
        return
    patience = datetime.timedelta(minutes=settings.timeout_minutes)
    backend = "gloo" if device_kind == "cpu" else "cpu:gloo,cuda:nccl"
    # Hosts notice first (`ask_most` in each step): NCCL's own watchdog would end the process without a word.
    dist.init_process_group(backend, timeout=patience if device_kind == "cpu" else 2 * patience)
    control, setup, roll = (_group_of_all(each) for each in (patience, SETUP_PATIENCE, patience))
    rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    local_rank, local_world = int(environment["LOCAL_RANK"]), int(environment["LOCAL_WORLD_SIZE"])
    group = Group(rank, world, local_rank, local_world, control, setup, roll)
    try:
        yield group
    except RuntimeError as error:
        explained = _explained(error, group, settings.timeout_minutes)
        if explained is None:
            raise
        raise explained from error
    # Graphs that captured NCCL's work go first; engines hold theirs in a cycle.
    gc.collect()
    # Not after an error: NCCL would wait for what will never come.
    dist.destroy_process_group()


def _group_of_all(patience: datetime.timedelta) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=patience)
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError("this process is not one of the group")
    return group


def _explained(error: RuntimeError, group: Group, timeout_minutes: float) -> LostProcess | None:
    """Tells the loss of another process as what it is; None: the error is of another kind."""
    me = f"process {group.rank} of {group.world}"
    if isinstance(error, torch.OutOfMemoryError) or not any(word in str(error) for word in LOST_WORDS):
        return None
    if not _says_all(error, LATE_WORDS):
        return LostProcess(f"{me} lost the connection to another one", primary=False)
    missing = group.roll_call()
    if missing is None:
        return LostProcess(f"{me} waited {timeout_minutes:g} minutes for another one", primary=False)
    return LostProcess(
        f"process {missing} of {group.world} hangs: it has not answered for {timeout_minutes:g} minutes "
        "(dist.timeout_minutes); nothing is lost but the steps since the last save",
        primary=True,
    )


def _says_all(error: BaseException, words: Sequence[str]) -> bool:
    return all(word in str(error) for word in words)
