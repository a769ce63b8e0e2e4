"""Trainings in processes of their own, which save and end when whoever started them is gone."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from fastgen.errors import command

# Longer than any save takes. A training that outlives it is killed, and loses what it did since its last save.
GRACE_SECONDS = 60.0
POLL_SECONDS = 0.1
STOPPED_CODES = {128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGTERM}
PR_SET_PDEATHSIG = 1


def training_command(words: Sequence[str]) -> list[str]:
    """Command line of a process that trains, and that is told to stop when this one dies."""
    return [sys.executable, "-c", "from fastgen.trainings import train_under; train_under()", str(os.getpid()), *words]


def end_with(parent: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Has a signal sent to this process when the process that started it ends.

    The process asks for the signal itself. Between fork and exec, where a `preexec_fn` would do so, no Python may
    run safely in a process that has threads, and whoever imports torch has some. The system sends it when the thread
    that started the process ends, so such processes are started from the main thread.

    Args:
        parent: its number. Where it is gone already, this process ends here.
        number: of the signal.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl: the end of the parent cannot be watched")
    if os.getppid() != parent:
        # It died before it could be watched.
        sys.exit(128 + number)


def train_under() -> None:
    """What such a process runs: `python -m fastgen.train`, saved and ended when its parent is gone."""
    parent, *words = sys.argv[1:]
    # Slurm may send it to all processes of a task; submitit's handler, in the parent, stops this one in order.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    end_with(int(parent))
    from fastgen import train

    # As if called by -m: the run's record keeps the command line.
    sys.argv = [train.__file__, *words]
    sys.exit(command(train.main, words))


def stop_trainings(processes: Sequence[subprocess.Popen[Any]]) -> None:
    """Asks each process once to save and end, waits for all of them, and kills those that do not end in time."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            print(f"process {process.pid} did not end within {GRACE_SECONDS:g} s of SIGTERM: killed", flush=True)
