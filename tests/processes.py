"""Starts processes that train together, for tests: gloo on the CPU, each with a Group of its own."""

from __future__ import annotations

import datetime
import io
import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch

# Imported once, for all processes that tests fork. torch imports _inductor when it is told to be deterministic.
PRELOAD = [
    "pytest", "fastgen.train", "torch.distributed", "torch.utils.tensorboard", "torch._inductor", "sklearn.datasets",
]  # fmt: skip


def start_server() -> None:
    """Starts what multiprocessing forks processes from; there is one, and whoever starts it says what it imports.

    `data_prep` starts one that imports little, and is deaf to Ctrl-C: if it came first, each process of a test would
    spend seconds on imports.
    """
    forkserver.set_forkserver_preload(PRELOAD)
    forkserver.ensure_running()


def _one(call: Callable[..., Any], rank: int, world: int, store: str, pipe: Any, arguments: tuple[Any, ...]) -> None:
    import torch.distributed as dist

    from fastgen.distributed import Group

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=120)
        )
        groups = [dist.new_group(backend="gloo") for _ in range(3)]
        group = Group(rank, world, rank, world, *groups)
        answer = io.BytesIO()
        # By value: torch's own way of sending tensors needs the sender to live.
        torch.save(call(group, *arguments), answer)
        pipe.send((True, answer.getvalue()))
        dist.destroy_process_group()
    except BaseException:
        pipe.send((False, traceback.format_exc()))
        raise


def run_processes(
    folder: Path, world: int, call: Callable[..., Any], *arguments: Any, seconds: float = 240
) -> list[Any]:
    """What `call(group, *arguments)` gave in each of `world` processes, by rank; a failure is raised here.

    Args:
        folder: an empty one, for the file over which they find each other.
        world: how many.
        call: a function of a module.
        arguments: plain values.
        seconds: after which a process that does not answer fails the test.
    """
    context = multiprocessing.get_context("forkserver")
    pipes, processes = [], []
    for rank in range(world):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_one, args=(call, rank, world, str(folder / "store"), theirs, arguments))
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        answers = []
        for rank, pipe in enumerate(pipes):
            assert pipe.poll(seconds), f"process {rank} gave no answer within {seconds:g} s"
            answers.append(pipe.recv())
        for process in processes:
            process.join(30)
    finally:
        for process in processes:
            process.kill()
    failed = [text for good, text in answers if not good]
    assert not failed, "\n".join(failed)
    return [torch.load(io.BytesIO(value), weights_only=False) for _, value in answers]
