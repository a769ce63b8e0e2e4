"""A sweep over many nodes: its trainings as Slurm arrays, one for each generation, submitted by submitit."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgen.errors import MachineError, UserError
from fastgen.extras import install_line
from fastgen.grid import Training
from fastgen.nodes import find_node
from fastgen.stop import SIGNALS
from fastgen.trainings import GRACE_SECONDS, POLL_SECONDS, training_command

# A training may need the time limit many times over; submitit's own number is 3.
MAX_TIMEOUTS = 1000


@dataclass(frozen=True)
class Wanted:
    """What each training asks Slurm for.

    Attributes:
        minutes: of its time limit.
        partition: empty: the cluster's default.
        gpus, cpus: of each training.
        at_once: trainings of an array that run at the same time; None: as many as Slurm lets.
        more: options of sbatch, each with its value.
    """

    minutes: int
    partition: str = ""
    gpus: int = 1
    cpus: int = 8
    at_once: int | None = None
    more: tuple[tuple[str, str], ...] = ()


class Job:
    """What a task of an array runs: one training, in a process of its own.

    Where Slurm preempts the task or its time is over, submitit puts it back into the queue: the training saves before,
    and the same words go on from there.
    """

    def __init__(self) -> None:
        self._training: subprocess.Popen[bytes] | None = None

    def __call__(self, name: str, words: Sequence[str], needs: Sequence[str], nodes: str) -> None:
        """Trains.

        Args:
            name: of the training.
            words: of `fastgen.train`.
            needs: generations that must be trained before; an array waits for the end of another, not for its success.
            nodes: folder of trained generations.

        Raises:
            MachineError: it failed; its own lines, in the task's log, say why. Or what it needs is not there.
        """
        lacking = [node for node in needs if find_node(Path(nodes), node) is None]
        if lacking:
            raise MachineError(f"{name} was not begun: generation {lacking[0]}, which it needs, is not in {nodes}")
        self._training = subprocess.Popen(training_command(words))
        code = self._training.wait()
        if code - 128 in SIGNALS:
            # Slurm tells all processes of a task of its end; submitit heeds another signal, which may come later.
            time.sleep(GRACE_SECONDS)
        if code:
            raise MachineError(f"{name} ended with exit code {code}")

    def checkpoint(self, name: str, words: Sequence[str], needs: Sequence[str], nodes: str) -> Any:
        """Asked by submitit, in a handler of Slurm's signal, before it puts a task back into the queue."""
        if self._training is not None and self._training.returncode is None:
            _save_and_end(self._training.pid)
        return _submitit().helpers.DelayedSubmission(Job(), name, words, needs, nodes)


def _save_and_end(pid: int) -> None:
    """Asks a training to save and end, and waits for that; kills it where it does not.

    By the system's calls: the handler of a signal may have interrupted `Popen.wait`, whose lock is held then.
    """
    deadline = time.monotonic() + GRACE_SECONDS
    # `Popen.wait` may have seen its end, and been interrupted before it could say so.
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGTERM)
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
    trainings: Sequence[Training],
    there: Iterable[str],
    folder: Path,
    nodes: Path,
    wanted: Wanted,
    cluster: str = "slurm",
) -> list[str]:
    """Submits all arrays, each to begin when the one before has ended.

    Args:
        trainings: of the sweep.
        there: nodes that are trained already.
        folder: of the sweep, which all nodes see; logs go to its `slurm`.
        nodes: folder of trained generations.
        wanted: of Slurm.
        cluster: submitit's name of the scheduler.

    Returns:
        the arrays' job numbers.

    Raises:
        UserError: submitit is not installed, or Slurm refuses; what was submitted before that is named.
    """
    arrays = list[str]()
    for number, level in enumerate(levels_of(trainings, there)):
        try:
            executor = _executor(f"fastgen-{number}", folder / "slurm", wanted, arrays[-1:], cluster)
            columns = zip(*((one.name, list(one.words), sorted(one.needs), str(nodes)) for one in level), strict=True)
            jobs = executor.map_array(Job(), *columns)
        # What submitit raises where there is no Slurm, and where sbatch refuses.
        except (RuntimeError, OSError) as error:
            before = f" (submitted before that: {', '.join(arrays)}: cancel them with scancel)" if arrays else ""
            raise UserError(f"Slurm takes no array: {error}{before}") from None
        arrays.append(str(jobs[0].job_id).partition("_")[0])
    return arrays


def _executor(name: str, logs: Path, wanted: Wanted, after: Sequence[str], cluster: str) -> Any:
    executor = _submitit().AutoExecutor(folder=logs, cluster=cluster, slurm_max_num_timeout=MAX_TIMEOUTS)
    # Not afterok: one failure would hold back all that does not depend on it.
    waits = {"dependency": f"afterany:{after[-1]}"} if after else {}
    executor.update_parameters(
        name=name,
        timeout_min=wanted.minutes,
        nodes=1,
        tasks_per_node=1,
        gpus_per_node=wanted.gpus,
        cpus_per_task=wanted.cpus,
        **({"slurm_partition": wanted.partition} if wanted.partition else {}),
        **({"slurm_array_parallelism": wanted.at_once} if wanted.at_once else {}),
        slurm_additional_parameters={**dict(wanted.more), **waits},
    )
    return executor


def _submitit() -> Any:
    try:
        import submitit
    except ImportError:
        raise UserError(f"--slurm_minutes needs submitit: {install_line('submitit')}") from None
    return submitit
