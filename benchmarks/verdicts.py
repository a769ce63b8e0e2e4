"""Which ways to run a step have passed `gpu_check` on a machine, and which of them is the fastest there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.checks import Outcome
from benchmarks.common import Timings, machine_facts, read_rows
from benchmarks.rigs import Precision, Way, timed_ways
from fastgen.environment import device_name

FILE = "verdicts.csv"
KERNELS, BATCHNORM = "kernels", "batchnorm"


def learns(way: Way, precision: Precision) -> str:
    """Tag of a check: by this way, in this precision, losses fall."""
    return f"{way.name} {precision} learns"


def resumes(way: Way, precision: Precision) -> str:
    """Tag of a check: a run by this way ends with the same bits, however often it was stopped."""
    return f"{way.name} {precision} resumes"


def agrees(way: Way) -> str:
    """Tag of a check: this way gives the losses of plain PyTorch, eager."""
    return f"{way.name} agrees"


def needed(way: Way, precision: Precision) -> set[str]:
    """Tags of all checks that a way must have passed. Plain PyTorch, eager, is what the others are held against."""
    tags = {learns(way, precision), resumes(way, precision)}
    tags |= set() if way == Way("eager") else {agrees(way)}
    tags |= {KERNELS} if way.kernels == "triton" else set()
    return tags | ({BATCHNORM} if way.batchnorm == "triton" else set())


def has_passed(way: Way, precision: Precision, outcomes: Iterable[Outcome]) -> bool:
    """Whether every check that the way needs took place and none of them, nor one that all need, failed."""
    tags, seen = needed(way, precision), set()
    for outcome in outcomes:
        if not outcome.of or outcome.of in tags:
            if not outcome.passed:
                return False
            seen.add(outcome.of)
    return tags <= seen


def verdict_rows(
    outcomes: Sequence[Outcome], speeds: Mapping[Precision, Timings], device: torch.device, size: str
) -> list[dict[str, Any]]:
    """One row a way and precision that was timed, for verdicts.csv.

    Args:
        outcomes: of all checks of this session.
        speeds: seconds of a step, by precision; candidates are named `way role`.
        device: where it was.
        size: of the checks; only `full` ones count.
    """
    machine = machine_facts(device)
    return [
        {
            **machine,
            "size": size,
            **way._asdict(),
            "precision": precision,
            "passed": has_passed(way, precision, outcomes),
            "patriarch_ms": round(timings.ms_per_step(f"{way.name} patriarch").median, 4),
            "student_ms": round(timings.ms_per_step(f"{way.name} student").median, 4),
        }
        for precision, timings in speeds.items()
        for way in timed_ways(device)
    ]


def fastest(results: Path, device: torch.device, precision: str) -> Way | None:
    """The way with the shortest step of a student among those whose last verdict here is that they passed.

    Here: on a device of this name, with this torch. None: there is no such verdict.
    """
    last: dict[Way, Mapping[str, str]] = {}
    for row in read_rows(results / FILE):
        here = row["device"] == device_name(device) and row["torch"] == torch.__version__
        if here and row["size"] == "full" and row["precision"] == precision:
            last[Way(row["engine"], row["kernels"], row["batchnorm"])] = row  # type: ignore[arg-type]
    passed = {way: float(row["student_ms"]) for way, row in last.items() if row["passed"] == "True"}
    return min(passed, key=lambda way: passed[way]) if passed else None
