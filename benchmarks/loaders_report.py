"""Rows, tables and floors of `benchmarks.loaders`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from PIL import features
from rich.table import Table

from benchmarks.common import Spread, Timings, columns, spread
from benchmarks.loaders_cases import FOLDER_NAME, JPEG, STORED, Bench, Case, Measured, Memory, case_key
from fastgen.tables import new_table, print_table

# What reproducible views may cost at most (lower quartile), and the goal for our own decoder on JPEG (median).
FLOOR_OVER_STOCK = 0.97
GOAL_ON_JPEG = 1.5


def bases(case: Case) -> dict[str, str]:
    """Keys of the cases that a case is compared with, by what they are called in columns."""
    candidate, others = case.candidate, {}
    if candidate.stock is not None:
        others["stock"] = f"{candidate.stock}/{candidate.stored}"
        if candidate.stock == "stock-ffcv":
            others["stock_no_flip"] = f"stock-ffcv-no-flip/{candidate.stored}"
    others["folder"] = FOLDER_NAME
    return {column: case_key(name, case.workers) for column, name in others.items() if name != candidate.name}


def ratio(timings: Timings, case: Case, column: str) -> Spread | None:
    """How many times as fast as (or as cheap as, for CPU seconds) one of its bases; None where that was not timed."""
    base = bases(case).get(column)
    if base is None or base not in timings.seconds_per_step:
        return None
    return timings.speed_ratio(case.key, base)


def images_per_second(measured: Measured, case: Case, samples: int) -> Spread:
    """Of each round, then median and quartiles."""
    return spread([samples / seconds for seconds in measured.wall.seconds_per_step[case.key]])


def cpu_seconds_per_1000(measured: Measured, case: Case, samples: int) -> Spread:
    """CPU seconds a 1,000 images."""
    return spread([1e3 * seconds / samples for seconds in measured.cpu.seconds_per_step[case.key]])


def cores_used(measured: Measured, case: Case) -> Spread:
    """CPU seconds over seconds: well below the number of workers where something held them up."""
    seconds = (timings.seconds_per_step[case.key] for timings in (measured.cpu, measured.wall))
    return spread([cpu / wall for cpu, wall in zip(*seconds, strict=True)])


RATIOS = ("stock", "stock_no_flip", "folder")


def result_rows(
    cases: Sequence[Case], measured: Measured, memory: Mapping[str, Memory], bench: Bench, machine: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """One row a case, for the results file."""
    shared = {**machine, **library_versions(), **_photograph_facts(bench)}
    return [{**shared, **_case_columns(case, measured, memory, bench)} for case in cases]


def _case_columns(
    case: Case, measured: Measured, memory: Mapping[str, Memory], bench: Bench
) -> dict[str, str | int | float | None]:
    found = memory.get(case.key)
    speed = images_per_second(measured, case, bench.samples)
    cost = cpu_seconds_per_1000(measured, case, bench.samples)
    row: dict[str, str | int | float | None] = {
        "candidate": case.candidate.name,
        "stored": STORED[case.candidate.stored],
        "workers": case.workers,
        "rounds": measured.wall.rounds,
        **columns("images_per_second", speed, 1),
        **columns("cpu_seconds_per_1000_images", cost, 4),
        **columns("cores_used", cores_used(measured, case), 3),
        "peak_memory_mb": None if found is None else round(found.peak_mb),
        "of_it_mapped_files_mb": None if found is None else round(found.mapped_mb),
        "peak_memory_of_a_worker_mb": None if found is None or found.worker_mb is None else round(found.worker_mb),
    }
    for column in RATIOS:
        row |= columns(f"speed_over_{column}", ratio(measured.wall, case, column), 4)
        row |= columns(f"images_per_cpu_second_over_{column}", ratio(measured.cpu, case, column), 4)
    return row


def _photograph_facts(bench: Bench) -> dict[str, int | float]:
    manifest, once = bench.manifest, slice(0, bench.distinct)
    return {
        "distinct_photographs": bench.distinct,
        "mean_file_bytes": round(float(manifest.file_bytes[once].mean())),
        "mean_height_px": round(float(manifest.heights[once].mean()), 1),
        "mean_width_px": round(float(manifest.widths[once].mean()), 1),
        "samples": bench.samples,
        "batch_size": bench.batch_size,
        "resolution_px": bench.resolution_px,
    }


def library_versions() -> dict[str, str | None]:
    """Versions of what decodes and resamples; of system libraries, those that are loaded by now."""
    packages = ("ffcv", "nvidia-dali-cuda120", "pillow", "numba")
    ffcv, dali, pillow, numba = (_version(package) for package in packages)
    libjpeg = [f"Pillow's {features.version('libjpeg_turbo')}", *_loaded("libjpeg.so"), *_loaded("libturbojpeg.so")]
    return {
        "ffcv": ffcv,
        "dali": dali or _version("nvidia-dali-cuda130"),
        "pillow": pillow,
        "numba": numba,
        "opencv": " ".join(_loaded("libopencv_core.so")) or None,
        "libjpeg": " ".join(libjpeg),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _loaded(prefix: str) -> list[str]:
    """File names of libraries in this process; they end in the version."""
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    return sorted({Path(name).name for name in mapped if Path(name).name.startswith(prefix)})


def report(cases: Sequence[Case], measured: Measured, memory: Mapping[str, Memory], bench: Bench, load: str) -> None:
    """Prints what was measured, the ratios, and each floor beside them."""
    size = f"{bench.samples:,} samples of {bench.distinct:,} photographs, {bench.resolution_px} px"
    title = f"{size}; {measured.wall.rounds} rounds, median (quartiles); load average {load}"
    table = _table(title, ("images/s", "CPU seconds per 1,000 images", "cores used"))
    for case in cases:
        speed = images_per_second(measured, case, bench.samples)
        cost = cpu_seconds_per_1000(measured, case, bench.samples)
        cores = cores_used(measured, case)
        table.add_row(case.candidate.name, str(case.workers), speed.text(0), cost.text(3), cores.text(2))
    print_table(table)
    for what, timings in (("speed", measured.wall), ("images per CPU second", measured.cpu)):
        print_table(_ratio_table(f"{what}, over", timings, cases))
    print_table(_memory_table(cases, memory))
    for line in floor_lines(cases, measured):
        print(line)


def _ratio_table(title: str, timings: Timings, cases: Sequence[Case]) -> Table:
    table = _table(title, ("stock", "stock without flip", "folder"))
    for case in cases:
        found = [ratio(timings, case, column) for column in RATIOS]
        if any(found):
            table.add_row(case.candidate.name, str(case.workers), *(one.text(3) if one else "" for one in found))
    return table


def _memory_table(cases: Sequence[Case], memory: Mapping[str, Memory]) -> Table:
    title = "MB of memory at most, of a process with this loader alone, its imports and compilation included"
    table = _table(title, ("resident", "of it mapped files", "a worker process"))
    for case in cases:
        if (found := memory.get(case.key)) is not None:
            numbers = (found.peak_mb, found.mapped_mb, found.worker_mb)
            texts = ("" if number is None else f"{number:,.0f}" for number in numbers)
            table.add_row(case.candidate.name, str(case.workers), *texts)
    return table


def _table(title: str, headings: Sequence[str]) -> Table:
    return new_table(title, ("loader", "workers", *headings))


def floor_lines(cases: Sequence[Case], measured: Measured) -> list[str]:
    """A line for each floor: what is asked for, what was measured, met or missed."""
    lines = []
    for case in cases:
        found = ratio(measured.wall, case, "stock")
        if found is None or not case.candidate.loader.startswith("fastgen-"):
            continue
        over = f"{case.key} over {case.candidate.stock}: {found.text(3)}"
        met = found.low >= FLOOR_OVER_STOCK
        lines.append(f"floor {FLOOR_OVER_STOCK:.2f}, lower quartile  {over}  {'met' if met else 'MISSED'}")
        if case.candidate.name == f"fastgen-ffcv-native/{JPEG}":
            met = found.median >= GOAL_ON_JPEG
            lines.append(f"goal  {GOAL_ON_JPEG:.2f}, median          {over}  {'met' if met else 'MISSED'}")
    return lines
