"""Which ways to run a step have passed `gpu_check` on a machine, and which of them is the fastest there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.checks import Outcome
from benchmarks.common import machine_facts, read_rows
from benchmarks.rigs import Precision, Way, timed_ways
from fastgen.environment import device_name

FILE = "checks.csv"
MODEL = "resnet20"
KERNELS, BATCHNORM = "kernels", "batchnorm"
# Parts of `gpu_check` that every way needs: what they check is shared, and they must not have broken off.
OF_ALL = ("losses", "views", "init", "teacher", "labels", "resume", "engines")


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
    tags = {*OF_ALL, learns(way, precision), resumes(way, precision)}
    tags |= set() if way == Way("eager") else {agrees(way)}
    tags |= {KERNELS} if way.kernels == "triton" else set()
    return tags | ({BATCHNORM} if way.batchnorm == "triton" else set())


def check_rows(outcomes: Sequence[Outcome], device: torch.device, size: str) -> list[dict[str, Any]]:
    """One row a tag, for checks.csv.

    Args:
        outcomes: all that the tags stand for; one that is no number, or too large, fails its tag.
        device: where it was.
        size: of the checks; only `full` ones count.
    """
    passed: dict[str, bool] = {}
    for outcome in outcomes:
        passed[outcome.of] = passed.get(outcome.of, True) and outcome.passed
    counts = Counter(outcome.of for outcome in outcomes)
    machine = machine_facts(device)
    return [{**machine, "size": size, "tag": tag, "checks": counts[tag], "passed": passed[tag]} for tag in passed]


def passed_tags(results: Path, device: torch.device) -> set[str]:
    """Tags whose last full check passed here: on a device of this name, with this torch."""
    rows = [row for row in read_rows(results / FILE) if is_here(row, device) and row["size"] == "full"]
    last = {row["tag"]: row["passed"] == "True" for row in rows}
    return {tag for tag, passed in last.items() if passed}


def is_here(row: Mapping[str, str], device: torch.device) -> bool:
    """Whether a row is of a device of this name and of this torch."""
    return row["device"] == device_name(device) and row["torch"] == torch.__version__


def student_ms(results: Path, device: torch.device, precision: str) -> dict[str, float]:
    """Milliseconds of a student's step here, as last measured by `benchmarks.step` on MODEL, by way."""
    return {
        row["candidate"].removesuffix(" student"): float(row["ms_per_step_median"])
        for row in read_rows(results / "step.csv")
        if is_here(row, device)
        and (row["model"], row["precision"]) == (MODEL, precision)
        and row["candidate"].endswith(" student")
    }


def fastest(results: Path, device: torch.device, precision: Precision) -> Way | None:
    """The way with the shortest step of a student among those that have passed here; None: there is none."""
    passed, speeds = passed_tags(results, device), student_ms(results, device, precision)
    ways = [way for way in timed_ways(device) if way.name in speeds and needed(way, precision) <= passed]
    return min(ways, key=lambda way: speeds[way.name]) if ways else None
