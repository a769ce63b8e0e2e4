"""Proves on a GPU what the tests prove on a CPU, and measures the training step there.

python -m benchmarks.gpu_check [--minutes=8]
python -m benchmarks.gpu_check --device=cpu      # the same checks on the CPU, small

Needs the project with its core dependencies, no data set. Inputs are random and fresh; their seed is
printed. Each check is one line, PASS or FAIL; a failed one makes the exit code 1.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import checks_fused, checks_kernels, step
from benchmarks.checks import (
    BATCHES,
    CLASSES,
    PRECISIONS,
    SMALL_BATCHES,
    SMALL_CLASSES,
    Outcome,
    check_initial_weights,
    check_losses,
    check_teacher,
    check_views,
)
from benchmarks.checks_distributed import check_distributed
from benchmarks.checks_training import check_engines, check_resume, memorisable_split
from benchmarks.common import RESULTS, ROOT, append_rows, choose, facts_line, positive_minutes
from benchmarks.rigs import PLAIN_WAYS, Case, Precision, Way, hush_compiler, random_split
from benchmarks.verdicts import BATCHNORM, KERNELS, check_rows, fastest
from benchmarks.verdicts import FILE as CHECKS
from fastgen.arguments import Arguments, at_least_one
from fastgen.data.facts import DATASETS, Facts
from fastgen.errors import FastgenError, Stopped, command
from fastgen.kernels.runtime import interpreted

# Not square and of an odd width, so that a mix-up of the axes shows.
SMALL_FACTS = Facts(10, 3, 12, 9, 0, 0, 2, True, (0.5, 0.4, 0.3), (0.25, 0.3, 0.2))


Ways = tuple[tuple[Way, Precision], ...]


@dataclass(frozen=True)
class Size:
    """How large the checks are.

    Attributes:
        name: `full` or `small`.
        facts: of the images.
        model: name of the network.
        batch_size: images in a step.
        images: in the set.
        class_counts, batches: of the logits that the losses are given.
        learn: ways and precisions that shall learn.
        resume: ways and precisions of the runs that are stopped and resumed.
        speed: precisions that are timed, in order of worth.
        rounds, steps_per_round: of the timing.
    """

    name: str
    facts: Facts
    model: str
    batch_size: int
    images: int
    class_counts: tuple[int, ...]
    batches: tuple[int, ...]
    learn: Ways
    resume: Ways
    speed: tuple[Precision, ...]
    rounds: int
    steps_per_round: int


# Whole steps as CUDA graphs, every kernel in use.
GRAPH_OF_KERNELS = Way("graph", "triton", "triton")

FULL = Size(
    name="full",
    # The shapes that are timed as well: what is compiled for one is found again for the other.
    facts=DATASETS["cifar100"],
    model="resnet20",
    batch_size=128,
    images=1000,
    class_counts=CLASSES,
    batches=BATCHES,
    learn=(*itertools.product(PLAIN_WAYS, PRECISIONS), *itertools.product((GRAPH_OF_KERNELS,), PRECISIONS)),
    resume=(
        *itertools.product((Way("eager"), Way("graph"), GRAPH_OF_KERNELS), PRECISIONS),
        (Way("compile"), "bf16"),
    ),
    speed=("bf16", "fp16", "fp32"),
    rounds=20,
    # Graphs hold 8 steps.
    steps_per_round=24,
)
# Compilation takes most of the time on a CPU: it is done for one precision there.
SMALL = Size(
    name="small",
    facts=SMALL_FACTS,
    model="resnet8",
    batch_size=16,
    images=72,
    class_counts=SMALL_CLASSES,
    batches=SMALL_BATCHES,
    learn=(*itertools.product(PLAIN_WAYS[:1], PRECISIONS), (Way("compile"), "fp32"), (Way("graph"), "fp32")),
    resume=((Way("eager"), "fp32"), (Way("graph"), "fp32")),
    speed=("fp32",),
    rounds=2,
    steps_per_round=4,
)

# An epoch of the checks is then two graphs of three steps, or one, others of one step, and the smaller last batch.
GRAPH_STEPS = 3

# In order of worth.
TABLES = (
    "benchmarks.generation --model=resnet20",
    "benchmarks.generation --model=resnet18 --generations=1",
    "benchmarks.generation --model=resnet50 --generations=1",
    "benchmarks.ceilings",
    "benchmarks.losses",
    "benchmarks.teacher --model=resnet18 --batch_size=256",
    "benchmarks.teacher --model=resnet20",
    "benchmarks.side_by_side --networks=1,2,4,8 --by=streams --seconds=1",
)

Check = Callable[[], Iterator[Outcome]]
PARTS = (
    "losses",
    "kernels",
    "views",
    "init",
    "teacher",
    "labels",
    "resume",
    "engines",
    "distributed",
    "speed",
    "tables",
)


class ChecksFailed(FastgenError):
    """Something is not as it must be; told line by line before."""


def main(words: Sequence[str]) -> None:
    """The command."""
    arguments = _parse(words)
    # cuBLAS reads this once, when it starts; without it the deterministic runs could not take place.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = choose(arguments.device)
    if device is None:
        print("not measured (no GPU)")
        return
    hush_compiler()
    deadline = time.monotonic() + 60 * arguments.minutes
    seed = arguments.seed if arguments.seed is not None else int(np.random.default_rng().integers(2**31))
    size = FULL if device.type == "cuda" else SMALL
    print(facts_line(device))
    print(f"seed {seed}")
    with tempfile.TemporaryDirectory() as folder:
        groups = _groups(size, device, seed, Path(folder), arguments.results, deadline)
        chosen = {name: check for name, check in groups.items() if name in (arguments.only or groups)}
        _run(
            chosen,
            deadline,
            lambda found: append_rows(arguments.results / CHECKS, check_rows(found, device, size.name)),
        )
    for precision in size.speed:
        way = fastest(arguments.results, device, precision)
        print(f"benchmarks.queue runs steps in {precision} by {way.name if way else 'what their recipe says'}")


def _groups(
    size: Size,
    device: torch.device,
    seed: int,
    folder: Path,
    results: Path,
    deadline: float,
) -> dict[str, Check]:
    """The checks by name, in the order of their worth."""
    split = memorisable_split(size.facts, size.images, seed)
    case = Case(size.model, size.batch_size, "fp32", size.facts, split, device, graph_steps=GRAPH_STEPS)
    return {
        "losses": lambda: check_losses(device, seed, size.class_counts, size.batches),
        "kernels": lambda: _check_kernels(case, seed, size),
        "views": lambda: check_views(case),
        "init": lambda: check_initial_weights(case),
        "teacher": lambda: check_teacher(case),
        "labels": lambda: checks_fused.check_labels(case, folder / "labels"),
        "resume": lambda: check_resume(folder, seed, device, size.model, size.resume),
        "engines": lambda: check_engines(case, size.learn),
        "distributed": lambda: check_distributed(case),
        "speed": lambda: _measure_speed(size, device, results, deadline),
        "tables": lambda: _print_tables(device, results, deadline),
    }


def _check_kernels(case: Case, seed: int, size: Size) -> Iterator[Outcome]:
    """Every Triton kernel, on a GPU or in Triton's interpreter; nothing where neither is there."""
    on_gpu = case.device.type == "cuda"
    if not on_gpu and not interpreted():
        print("NOT CHECKED  kernels: no GPU; TRITON_INTERPRET=1 interprets them")
        return
    kernel_sizes = size.class_counts, size.batches
    if on_gpu:
        kernel_sizes = checks_kernels.KERNEL_CLASSES, checks_kernels.KERNEL_BATCHES
    of_kernels = itertools.chain(
        checks_fused.check_capture(case) if on_gpu else (),
        checks_kernels.check_loss_kernels(case.device, seed, *kernel_sizes),
        check_views(case, kernels=True),
        checks_fused.check_normalised_views(case),
    )
    yield from (replace(outcome, of=KERNELS) for outcome in of_kernels)
    shapes = checks_fused.BATCHNORM_SHAPES if on_gpu else checks_fused.SMALL_BATCHNORM_SHAPES
    found = checks_fused.check_batchnorm(case.device, seed, shapes)
    yield from (replace(outcome, of=BATCHNORM) for outcome in found)


def _run(groups: dict[str, Check], deadline: float, keep: Callable[[list[Outcome]], None]) -> None:
    """Runs the groups one after the other; one that breaks counts as failed, and the next still runs.

    Args:
        groups: by name, which is the tag of outcomes that have none.
        deadline: on the clock of `time.monotonic`.
        keep: is given each group's outcomes when it has ended.

    Raises:
        ChecksFailed: at least one check did not pass, broke, or found no time.
    """
    count, failed = 0, []
    for name, check in groups.items():
        if time.monotonic() > deadline:
            print(f"NOT RUN  {name}: the time is up; give more --minutes")
            failed.append(f"{name} (not run)")
            continue
        start = time.monotonic()
        outcomes: list[Outcome] = []
        broke_off = False
        try:
            for outcome in check():
                print(outcome.line(), flush=True)
                outcomes.append(outcome if outcome.of else replace(outcome, of=name))
        except Stopped:
            raise
        except Exception:  # noqa: BLE001 (told in full, and counted as failed)
            print(f"FAIL  {name}: broke off\n{traceback.format_exc()}", flush=True)
            failed.append(f"{name} (broke off)")
            broke_off = True
        failed += [outcome.name for outcome in outcomes if not outcome.passed]
        keep([*outcomes, Outcome(f"{name}: parts that broke off", broke_off, 0, of=name)])
        count += len(outcomes)
        print(f"      {name}: {time.monotonic() - start:.1f} s", flush=True)
    if failed:
        raise ChecksFailed(f"{len(failed)} failed beside {count} checks that ran: {'; '.join(failed)}")
    print(f"all {count} checks passed")


def _measure_speed(size: Size, device: torch.device, results: Path, deadline: float) -> Iterator[Outcome]:
    """Times each engine beside the bare loop; a check only in that every loss is finite."""
    split = random_split(size.facts, max(size.images, size.facts.train_images))
    for precision in size.speed:
        if time.monotonic() > deadline:
            print(f"NOT MEASURED  speed, {precision}: the time is up")
            continue
        case = Case(size.model, size.batch_size, precision, size.facts, split, device)
        measured = step.measure(case, rounds=size.rounds, steps_per_round=size.steps_per_round, until=deadline)
        step.report(measured)
        append_rows(results / "step.csv", step.result_rows(measured, size.steps_per_round, "random"))
        yield Outcome(f"speed, {precision}: candidates whose loss was not finite", 0, 0)


def _print_tables(device: torch.device, results: Path, deadline: float) -> Iterator[Outcome]:
    """The benchmarks of this GPU, each in a process of its own. A missed floor is told, and is no failed check."""
    if device.type != "cuda":
        print("tables: not measured (no GPU)")
        return
    broke_off = 0
    for line in TABLES:
        left = deadline - time.monotonic()
        if left <= 0:
            print(f"NOT MEASURED  {line}: the time is up")
            continue
        print(f"python -m {line}", flush=True)
        words = [sys.executable, "-m", *line.split(), f"--results={results.absolute()}"]
        try:
            ended = subprocess.run(words, cwd=ROOT, timeout=left, stderr=subprocess.PIPE, text=True)
        except subprocess.TimeoutExpired:
            print(f"NOT FINISHED  {line}: the time is up")
            continue
        missed = "floors missed" in ended.stderr
        if ended.returncode:
            print(f"{'MISSED' if missed else 'BROKE OFF'}  {line}\n{ended.stderr.strip()}", flush=True)
        broke_off += bool(ended.returncode) and not missed
    yield Outcome("tables: benchmarks that broke off", broke_off, 0)


def _parse(words: Sequence[str]) -> Any:
    parser = Arguments("benchmarks.gpu_check", "Proves on a GPU what the tests prove on a CPU.")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: the same checks, small")
    parser.add_argument("--minutes", type=positive_minutes, default=8.0, help="no new part is begun after this time")
    parser.add_argument("--only", action="append", choices=PARTS, help="this part alone; may be given several times")
    parser.add_argument("--seed", type=at_least_one, help="of the random inputs; default: a fresh one")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of step.csv")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(command(main, sys.argv[1:]))
