"""What each process of `benchmarks.scaling` does: the same pieces as all others, in the same turns.

Started by `fastgen.launch`, as the trainer's processes are. The clock of rank 0 counts.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist

from benchmarks.common import machine_facts, time_interleaved, wait_for
from benchmarks.feed_steps import WITH_WORKERS, Case, supply_of
from benchmarks.rigs import Rig, hush_compiler
from benchmarks.scaling_steps import (
    Mode,
    Setup,
    alone,
    case_of,
    gradient_bytes,
    held,
    make_rig,
    read_setup,
    taught,
)
from fastgen.arguments import Arguments, at_least_one, split_words
from fastgen.device import choose_device, device_kind
from fastgen.distributed import ALONE, Group, joined
from fastgen.files import write_json

WHOLE, SILENT, HELD, ALONE_PIECE, ALL_REDUCE = "whole", "without sums", "without a loader", "one process", "all-reduce"
ROLES = ("patriarch", "student")
STEPS_ON_GPU, STEPS_ON_CPU = 32, 4
# Sums of one turn. Each multiplies the numbers by that of the processes: few enough that they stay finite.
ALL_REDUCES, LEADING_ALL_REDUCES = 10, 2
# Trainings in a process, each of which is compiled.
MOST_TRAININGS = 4
OWN_WORDS = ("--mode", "--role", "--rounds", "--steps", "--random", "--out")


def nothing() -> None:
    """Does nothing."""


@dataclass(frozen=True)
class Piece:
    """What is timed in a turn.

    Attributes:
        step: what is done `count` times by the clock.
        count: 0: this process waits for the others.
        lead: how often it is done before, off the clock, so that loaders have as much ready as they have in the
            middle of an epoch.
        begin: called before that.
    """

    step: Callable[[], None]
    count: int
    lead: int
    begin: Callable[[], None] = nothing


WAITING = Piece(nothing, 0, 0)


def timed(piece: Piece, group: Group, device: torch.device) -> float:
    """Seconds of a turn, from when all processes have begun it to when all have ended it."""
    piece.begin()
    for _ in range(piece.lead):
        piece.step()
    wait_for(device)
    group.most([0])
    start = time.perf_counter()
    for _ in range(piece.count):
        piece.step()
    wait_for(device)
    group.most([0])
    return time.perf_counter() - start


def measure(
    pieces: Mapping[str, Piece], group: Group, device: torch.device, rounds: int, counts: Mapping[str, int]
) -> dict[str, list[float]]:
    """Lets all pieces take turns, in the same order in all processes; the first round is dropped.

    Args:
        counts: steps of each piece, for those that wait, too.

    Returns:
        seconds a step, one value a round.
    """
    taken: dict[str, list[float]] = {name: [] for name in pieces}

    def turn(name: str) -> None:
        taken[name].append(timed(pieces[name], group, device) / counts[name])

    turns = {name: partial(turn, name) for name in pieces}
    # No end by the clock: processes would not agree on the round.
    time_interleaved(turns, device, rounds=rounds, steps_per_round=1)
    return {name: seconds[1:] for name, seconds in taken.items()}


def make_rigs(setup: Setup, mode: Mode, group: Group, case: Case) -> dict[str, Rig]:
    """All trainings of this process; those that tell each other something are built in the same order everywhere."""
    images = supply_of(case)
    teach, own = taught(case, images, group.share), held(case, images, group.share)
    rigs = {
        WHOLE: make_rig(case, teach(images), group),
        HELD: make_rig(case, teach(own), group),
    }
    if group.world == 1:
        return rigs
    rigs[SILENT] = make_rig(case, teach(images), group, summed=False)
    if group.main:
        single = alone(setup, case)
        images = supply_of(single) if single.workers != case.workers else images
        rigs[ALONE_PIECE] = make_rig(single, taught(single, images, ALONE.share)(images), ALONE)
    return rigs


def steps_of(case: Case, wanted: int | None) -> int:
    """Steps of a turn: whole programs and groups of a look ahead."""
    steps = wanted or (STEPS_ON_GPU if case.device.type == "cuda" else STEPS_ON_CPU)
    return -(-steps // case.steps_at_once) * case.steps_at_once


def lead_of(case: Case) -> int:
    """Steps before the clock starts: as many as may have been decoded while other pieces had their turns."""
    ahead = case.recipe.data.batches_ahead if case.recipe.data.backend in WITH_WORKERS else 0
    return math.ceil((ahead + 1) / case.steps_at_once) * case.steps_at_once


def all_reduce(size_bytes: int, device: torch.device) -> Piece:
    """Sums a buffer over the processes, by whatever sums their gradients."""
    buffer = torch.empty(size_bytes // torch.float32.itemsize, device=device)

    def begin() -> None:
        # Never zeros, which some hardware moves faster.
        buffer.normal_()

    def step() -> None:
        dist.all_reduce(buffer)

    return Piece(step, ALL_REDUCES, LEADING_ALL_REDUCES, begin)


def found_by(setup: Setup, mode: Mode, group: Group, device: torch.device, rounds: int, wanted: int | None) -> Any:
    """Measures, in all processes at once; what rank 0 tells."""
    case = case_of(setup, mode, group, device)
    steps, lead, size_bytes = steps_of(case, wanted), lead_of(case), gradient_bytes(case)
    rigs = make_rigs(setup, mode, group, case)
    pieces = {name: Piece(rig.step, steps, lead) for name, rig in rigs.items()}
    counts = dict.fromkeys((WHOLE, SILENT, HELD, ALONE_PIECE), steps) | {ALL_REDUCE: ALL_REDUCES}
    if group.world > 1:
        pieces = {ALONE_PIECE: WAITING, **pieces, ALL_REDUCE: all_reduce(size_bytes, device)}
    machine = machine_facts(device)
    seconds = measure(pieces, group, device, rounds, counts)
    for rig in rigs.values():
        rig.require_finite()
    return {
        "mode": mode,
        "processes": group.world,
        "batch_size": case.batch_size,
        "one_batch_size": setup.recipe.train.batch_size,
        "steps": steps,
        "workers": case.workers,
        "gradient_bytes": size_bytes,
        "machine": machine,
        "seconds_per_step": seconds,
    }


def main(words: Sequence[str]) -> None:
    """A process from its start to its end."""
    own, rest = split_words(words, OWN_WORDS)
    options = _parser().parse_args(own)
    setup = read_setup(rest, options.role, random=options.random == "yes")
    kind = device_kind(setup.recipe.run)
    hush_compiler()
    if kind == "cpu":
        # Also where there is one process: several of one thread each are set beside it.
        torch.set_num_threads(1)
    if "compile" in (setup.recipe.train.engine, setup.recipe.teacher.engine):
        # They share their code, and each counts against Dynamo's limit.
        torch._dynamo.config.recompile_limit *= MOST_TRAININGS
    with joined(setup.recipe.dist, kind) as group:
        device = choose_device(setup.recipe.run, group.local_rank if group.world > 1 else None)
        try:
            found = found_by(setup, options.mode, group, device, options.rounds, options.steps)
        except torch.OutOfMemoryError as full:
            raise MemoryError(str(full).splitlines()[0]) from None
        # Engines refer to themselves, and NCCL cannot end before the graphs that captured it.
        gc.collect()
        if group.main:
            write_json(options.out, found)


def _parser() -> Arguments:
    parser = Arguments("benchmarks.scaling_ranks", "One of the processes of benchmarks.scaling, which starts it.")
    parser.add_argument("--mode", choices=get_args(Mode), required=True)
    parser.add_argument("--role", choices=ROLES, required=True)
    parser.add_argument("--rounds", type=at_least_one, required=True)
    parser.add_argument("--steps", type=at_least_one)
    parser.add_argument("--random", choices=["yes", "no"], required=True)
    parser.add_argument("--out", type=Path, required=True)
    return parser
