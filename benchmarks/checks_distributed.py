"""The sum of gradients over processes, as far as one GPU can show it: a group of one process, which runs all of it."""

from __future__ import annotations

import datetime
import gc
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.checks import Outcome, full_fp32
from benchmarks.checks_training import AGREE_LR, AGREE_RELATIVE, AGREE_STEPS, OBJECTIVES, losses_of
from benchmarks.rigs import PLAIN_WAYS, Case, Precision
from fastgen.distributed import Group

# Of a 16-bit step the sums are the same and nothing else changes; what a GPU adds up in no fixed order moves losses.
BOUNDS: dict[Precision, float] = {"fp32": AGREE_RELATIVE, "bf16": 2.0**-6}


def check_distributed(case: Case) -> Iterator[Outcome]:
    """Every engine with DistributedDataParallel and its hook, captured where there are graphs.

    One process sums what it has itself: losses must be those of the same engine without any of it. NCCL is set up and
    called, but what it launches for one process is no proof of what it does with several.
    """
    with _joined_alone(case.device) as group, full_fp32():
        # Compilation takes most of the time on a CPU: it is done for one precision there.
        for precision, bound in list(BOUNDS.items())[: 1 if case.device.type == "cpu" else None]:
            for way in PLAIN_WAYS:
                torch.compiler.reset()
                for role, objective in OBJECTIVES.items():
                    same = replace(case, precision=precision)
                    alone = losses_of(same, way, objective, AGREE_STEPS, AGREE_LR)
                    summed = losses_of(same, way, objective, AGREE_STEPS, AGREE_LR, group=group)
                    error = float(np.max(np.abs(summed - alone) / np.abs(alone)))
                    yield Outcome(f"{way.name} {role} with gradients summed, {precision}: relative loss", error, bound)


@contextmanager
def _joined_alone(device: torch.device) -> Iterator[Group]:
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            backend,
            init_method=f"file://{folder}/store",
            rank=0,
            world_size=1,
            timeout=datetime.timedelta(minutes=2),
        )
        try:
            control = dist.new_group(backend="gloo")
            if not isinstance(control, dist.ProcessGroup):
                raise TypeError("this process is not one of the group")
            yield Group(control=control)
        finally:
            # NCCL waits for all graphs that were captured with it; engines are in cycles.
            gc.collect()
            dist.destroy_process_group()
