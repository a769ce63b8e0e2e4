"""Everything that this machine can honestly measure, one benchmark after the other, each in a process of its own.

python -m benchmarks [--images_from=DIR] [--only=opcount]

What needs a GPU is said to be not measured where there is none. Others are called by themselves: `benchmarks.loaders`
wants photographs, `benchmarks.feed` and `benchmarks.time_to_accuracy` a recipe, `benchmarks.queue` hours, and
`benchmarks.gpu_check` proves more than it times.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.common import RESULTS, ROOT
from fastgen.arguments import Arguments
from fastgen.errors import FastgenError, command
from fastgen.tables import new_table, print_table


@dataclass(frozen=True)
class Benchmark:
    """One of the benchmarks.

    Attributes:
        needs_gpu: whether it measures nothing without one.
        takes_images: whether it has --images_from.
        results: whether its --results is a folder, or the file itself.
    """

    needs_gpu: bool = False
    takes_images: bool = False
    results: Literal["folder", "file"] = "folder"


BENCHMARKS = {
    "ceilings": Benchmark(),
    "opcount": Benchmark(),
    "kernels_static": Benchmark(results="file"),
    "losses": Benchmark(needs_gpu=True),
    "teacher": Benchmark(takes_images=True),
    "step": Benchmark(takes_images=True),
    "generation": Benchmark(takes_images=True),
    "side_by_side": Benchmark(),
    "scaling": Benchmark(),
    "rerun": Benchmark(),
}
NOT_MEASURED = "not measured (no GPU)"


class BenchmarksFailed(FastgenError):
    """At least one of them ended with another exit code than 0."""


@dataclass(frozen=True)
class Ended:
    """A benchmark that is over; `code` is None where it was not begun."""

    name: str
    code: int | None
    seconds: float


def words_of(name: str, images_from: Path | None, results: Path) -> list[str]:
    """Its command line."""
    benchmark = BENCHMARKS[name]
    place = results / f"{name}.csv" if benchmark.results == "file" else results
    images = [f"--images_from={images_from.absolute()}"] if benchmark.takes_images and images_from else []
    return [sys.executable, "-m", f"benchmarks.{name}", f"--results={place.absolute()}", *images]


def run(name: str, images_from: Path | None, results: Path) -> Ended:
    """Runs one to its end; what it prints goes where our own lines go."""
    print(f"\n== {name}", flush=True)
    if BENCHMARKS[name].needs_gpu and not torch.cuda.is_available():
        print(NOT_MEASURED, flush=True)
        return Ended(name, None, 0.0)
    start = time.monotonic()
    # Found from any folder.
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(words_of(name, images_from, results), env={**os.environ, "PYTHONPATH": path})
    return Ended(name, done.returncode, time.monotonic() - start)


def report(ended: Sequence[Ended]) -> None:
    """Prints how each of them ended."""
    table = new_table("benchmarks", ("benchmark", "exit code", "seconds"), wrap=True)
    for one in ended:
        begun = one.code is not None
        table.add_row(one.name, str(one.code) if begun else NOT_MEASURED, f"{one.seconds:.0f}" if begun else "")
    print_table(table)


def main(words: Sequence[str]) -> None:
    """The command.

    Raises:
        BenchmarksFailed: one of them failed; the others ran all the same.
    """
    arguments = _parse(words)
    chosen = [name for name in BENCHMARKS if name in (arguments.only or BENCHMARKS)]
    ended = [run(name, arguments.images_from, arguments.results) for name in chosen]
    report(ended)
    failed = [one.name for one in ended if one.code]
    if failed:
        raise BenchmarksFailed(f"{len(failed)} of {len(ended)} failed: {', '.join(failed)}")


def _parse(words: Sequence[str]) -> Any:
    parser = Arguments("benchmarks", "Runs every benchmark that this machine can honestly run.")
    parser.add_argument("--only", action="append", choices=list(BENCHMARKS), help="may be given several times")
    parser.add_argument("--images_from", type=Path, help="folder above the official CIFAR-100 files; default: random")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(command(main, sys.argv[1:]))
