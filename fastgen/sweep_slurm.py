"""A sweep over many nodes: its trainings as Slurm arrays, one for each generation, submitted by submitit."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgen.errors import MachineError, UserError
from fastgen.grid import Training
from fastgen.trainings import GRACE_SECONDS, POLL_SECONDS, training_command


@dataclass(frozen=True)
class Wanted:
    """What each training asks Slurm for.

    Attributes:
        minutes: of its time limit.
        partition: empty: the cluster's default.
        gpus, cpus: of each training.
        at_once: trainings of an array that run at the same time; None: as many as Slurm lets.
    """

    minutes: int
    partition: str = ""
    gpus: int = 1
    cpus: int = 8
    at_once: int | None = None


class Job:
    """What a task of an array runs: one training, in a process of its own.

    Where Slurm preempts the task or its time is over, submitit puts it back into the queue: the training saves before,
    and the same words go on from there.
    """

    def __init__(self) -> None:
        self._training: subprocess.Popen[bytes] | None = None

    def __call__(self, name: str, words: Sequence[str]) -> None:
        """Trains.

        Raises:
            MachineError: it failed; its own lines, in the task's log, say why.
        """
        self._training = subprocess.Popen(training_command(words))
        code = self._training.wait()
        if code:
            raise MachineError(f"{name} ended with exit code {code}")

    def checkpoint(self, name: str, words: Sequence[str]) -> Any:
        """Asked by submitit, in a handler of Slurm's signal, before it puts a task back into the queue."""
        if self._training is not None and self._training.returncode is None:
            _save_and_end(self._training.pid)
        return _submitit().helpers.DelayedSubmission(Job(), name, words)


def _save_and_end(pid: int) -> None:
    """Asks a training to save and end, and waits for that; kills it where it does not.

    By the system's calls: the handler of a signal may have interrupted `Popen.wait`, whose lock is held then.
    """
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_SECONDS)


def levels_of(trainings: Sequence[Training], there: Iterable[str]) -> list[list[Training]]:
    """Trainings in arrays, each of which needs nothing but what is there and the arrays before it."""
    known, left, levels = {*there}, list(trainings), list[list[Training]]()
    while left:
        ready = [training for training in left if training.needs <= known]
        if not ready:
            raise ValueError(f"{left[0].name} needs what no training makes")
        levels.append(ready)
        left = [training for training in left if training not in ready]
        known |= {training.makes for training in ready if training.makes is not None}
    return levels


def submit(
    trainings: Sequence[Training], there: Iterable[str], folder: Path, wanted: Wanted, cluster: str = "slurm"
) -> list[str]:
    """Submits all arrays, each to begin when the one before has ended.

    Args:
        trainings: of the sweep.
        there: nodes that are trained already.
        folder: of the sweep, which all nodes see; logs go to its `slurm`.
        wanted: of Slurm.
        cluster: submitit's name of the scheduler.

    Returns:
        the arrays' job numbers.

    Raises:
        UserError: submitit is not installed.
    """
    submitit, arrays = _submitit(), list[str]()
    for number, level in enumerate(levels_of(trainings, there)):
        executor = submitit.AutoExecutor(folder=folder / "slurm", cluster=cluster)
        # Not afterok: one failure would hold back all that does not depend on it.
        after = {"dependency": f"afterany:{arrays[-1]}"} if arrays else {}
        executor.update_parameters(
            name=f"fastgen-{number}",
            timeout_min=wanted.minutes,
            nodes=1,
            tasks_per_node=1,
            gpus_per_node=wanted.gpus,
            cpus_per_task=wanted.cpus,
            **({"slurm_partition": wanted.partition} if wanted.partition else {}),
            **({"slurm_array_parallelism": wanted.at_once} if wanted.at_once else {}),
            slurm_additional_parameters=after,
        )
        jobs = executor.map_array(Job(), [one.name for one in level], [list(one.words) for one in level])
        arrays.append(str(jobs[0].job_id).partition("_")[0])
    return arrays


def _submitit() -> Any:
    try:
        import submitit
    except ImportError:
        raise UserError("--slurm needs submitit: pip install 'fastgen[slurm]'") from None
    return submitit
