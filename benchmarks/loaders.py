"""How fast are the loaders of photographs, beside stock FFCV, stock DALI and torch's DataLoader?

python -m benchmarks.loaders --images_from=DIR [--images=3000 --rounds=7 --workers=1,2]

A candidate's repetition is one epoch: every sample once, decoded, randomly cropped, resampled, mirrored half of the
time, as uint8 with its label. All candidates take turns in one process; the first round (compilation, page cache) is
dropped. Ours draw a fresh view table for every epoch, within their time. The same photographs, repeated in turn, lie
in three forms: image files; a .beton of the files' own JPEG bytes; and one of raw pixels whose SHORT side is 256 px
(FFCV's own max_resolution would bound the longest). Repeated files are one file that is read again; a .beton holds
every repetition.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import features
from rich import box
from rich.table import Table
from torch import Tensor

import data_prep.beton
import data_prep.manifest
from benchmarks.common import (
    RESULTS,
    Spread,
    Timings,
    append_rows,
    facts_line,
    machine_facts,
    spread,
    time_interleaved,
)
from benchmarks.loaders_stock import BATCHES_AHEAD, Epochs, stock_dali, stock_ffcv, torch_threads_kept
from data_prep.sources import Request, Source, open_source
from fastgen.arguments import Arguments, at_least_one
from fastgen.config import DataSettings
from fastgen.data.batch import Loader, usable_cores
from fastgen.data.beton import Beton, BetonWriter, Sample, page_bytes_for, read_beton
from fastgen.data.dali_loader import DaliLoader
from fastgen.data.ffcv_loader import FfcvLoader
from fastgen.data.folder import FolderLoader
from fastgen.data.manifest import Manifest, read_manifest
from fastgen.data.split import FileSplit
from fastgen.errors import MachineError, UserError, command
from fastgen.tables import print_table
from fastgen.views import ResizedCrop, training_views

Int64 = npt.NDArray[np.int64]

CPU = torch.device("cpu")
SHORT_PX = 256
FILES, JPEG, RAW = "files", "jpeg", "raw256"
STORED = {
    FILES: "image files",
    JPEG: ".beton of the files' own JPEG bytes",
    RAW: f".beton of raw pixels, short side {SHORT_PX} px",
}
# What reproducible views may cost at most (lower quartile), and the goal for our own decoder on JPEG (median).
FLOOR_OVER_STOCK = 0.97
GOAL_ON_JPEG = 1.5


@dataclass(frozen=True)
class Bench:
    """What all candidates share: samples in all three forms, and what is made of them.

    Attributes:
        manifest: rows of image files, repeated.
        betons: .beton files of the same samples, by how they are stored.
        distinct: photographs that are repeated.
        batch_size: images in a batch; the samples are whole batches.
        resolution_px: side of the crops.
    """

    manifest: Manifest
    betons: Mapping[str, Path]
    distinct: int
    batch_size: int
    resolution_px: int

    @property
    def samples(self) -> int:
        """Samples of an epoch."""
        return len(self.manifest)

    def split(self, stored: str) -> FileSplit:
        """The samples in one of their forms, for our loaders."""
        index = read_beton(self.betons[stored]) if stored in self.betons else self.manifest
        ids = np.arange(len(index), dtype=np.int64)
        return FileSplit(index, index.labels, ids, index.sizes, index_hash="")


@dataclass(frozen=True)
class Candidate:
    """A loader on one form of the samples.

    Attributes:
        loader: its name.
        stored: form of the samples.
        make: gives its epochs with so many workers; UserError where it needs what is not installed.
        stock: loader to compare it with, which does the same work.
        process_workers: whether its workers are processes.
    """

    loader: str
    stored: str
    make: Callable[[Bench, int], Epochs]
    stock: str | None = None
    process_workers: bool = False

    @property
    def name(self) -> str:
        """Loader and form."""
        return f"{self.loader}/{self.stored}"


@dataclass(frozen=True)
class Case:
    """A candidate with a number of workers."""

    candidate: Candidate
    workers: int

    @property
    def key(self) -> str:
        """Its name in timings."""
        return _key(self.candidate.name, self.workers)


def _key(name: str, workers: int) -> str:
    return f"{name} workers={workers}"


@dataclass(frozen=True)
class Measured:
    """Seconds an epoch of each case, by `Case.key`.

    Attributes:
        wall: on the clock.
        cpu: user and system seconds of this process and of its ended children.
    """

    wall: Timings
    cpu: Timings


@dataclass(frozen=True)
class Memory:
    """Peak memory of a process that makes one candidate and runs one epoch, all that it imports and compiles included.

    Attributes:
        peak_mb: VmHWM, the most that was resident, of the process itself.
        mapped_mb: RssFile at the end: pages of mapped files (the .beton, libraries) within that, which the system
            may take back.
        worker_mb: the most that was resident in any worker process, pages shared with the others included; None
            where workers are threads.
    """

    peak_mb: float
    mapped_mb: float
    worker_mb: float | None


def _ffcv(stored: str, decoder: str) -> Callable[[Bench, int], Epochs]:
    def make(bench: Bench, workers: int) -> Epochs:
        split = bench.split(stored)
        return _own_epochs(FfcvLoader(split, _settings(workers, beton_decoder=decoder), CPU), split, bench)

    return make


def _of_files(loader_class: type[DaliLoader] | type[FolderLoader]) -> Callable[[Bench, int], Epochs]:
    def make(bench: Bench, workers: int) -> Epochs:
        split = bench.split(FILES)
        return _own_epochs(loader_class(split, _settings(workers), CPU), split, bench)

    return make


def _stock_ffcv(stored: str, *, flip: bool) -> Callable[[Bench, int], Epochs]:
    return lambda bench, workers: stock_ffcv(
        bench.betons[stored], bench.batch_size, bench.resolution_px, workers, flip=flip
    )


def _stock_dali(bench: Bench, workers: int) -> Epochs:
    files = [bench.manifest.file(n) for n in range(bench.samples)]
    return stock_dali(files, bench.manifest.labels, bench.batch_size, bench.resolution_px, workers)


def _of_betons(stored: str) -> tuple[Candidate, ...]:
    return (
        Candidate("fastgen-ffcv-native", stored, _ffcv(stored, "native"), stock="stock-ffcv"),
        Candidate("fastgen-ffcv-decoder", stored, _ffcv(stored, "ffcv"), stock="stock-ffcv"),
        Candidate("stock-ffcv", stored, _stock_ffcv(stored, flip=True)),
        Candidate("stock-ffcv-no-flip", stored, _stock_ffcv(stored, flip=False), stock="stock-ffcv"),
    )


FOLDER = Candidate("folder", FILES, _of_files(FolderLoader), process_workers=True)
CANDIDATES = (
    *_of_betons(JPEG),
    *_of_betons(RAW),
    Candidate("fastgen-dali", FILES, _of_files(DaliLoader), stock="stock-dali"),
    Candidate("stock-dali", FILES, _stock_dali),
    FOLDER,
)


def _settings(workers: int, **others: Any) -> DataSettings:
    return DataSettings(dataset="imagenet", workers=workers, batches_ahead=BATCHES_AHEAD, **others)


def _own_epochs(loader: Loader, split: FileSplit, bench: Bench) -> Epochs:
    def epochs(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        views = training_views(
            split.ids, ResizedCrop(), 0, 0, epoch, sizes=split.sizes, resolution_px=bench.resolution_px
        )
        for batch in loader.batches(views, bench.batch_size):
            yield batch.images_NCHW, batch.labels

    return epochs


def consume(batches: Iterator[tuple[Tensor, Tensor]], bench: Bench) -> None:
    """Takes an epoch's batches and touches a few pixels of every image; what is not an epoch is a ValueError."""
    side, shown, label_sum = bench.resolution_px, 0, 0
    for images_NCHW, labels in batches:
        if images_NCHW.shape != (len(labels), 3, side, side) or images_NCHW.dtype != torch.uint8:
            raise ValueError(f"a batch of {tuple(images_NCHW.shape)} {images_NCHW.dtype}")
        images_NCHW[:, :, :: side // 4, :: side // 4].sum().item()
        shown += len(labels)
        label_sum += int(labels.sum())
    wanted = (bench.samples, int(bench.manifest.labels.sum()))
    if (shown, label_sum) != wanted:
        raise ValueError(f"an epoch of {shown} samples, labels {label_sum}; not {wanted[0]}, {wanted[1]}")


class Turns:
    """Epochs of one case, one a call, with what each cost in CPU seconds."""

    def __init__(self, epochs: Epochs, bench: Bench) -> None:
        self.cpu_seconds: list[float] = []
        self._epochs, self._bench = epochs, bench

    def __call__(self) -> None:
        """Runs the next epoch."""
        before = used_cpu_seconds()
        consume(self._epochs(len(self.cpu_seconds)), self._bench)
        self.cpu_seconds.append(used_cpu_seconds() - before)


def used_cpu_seconds() -> float:
    """User and system time of this process and of its ended children, so far."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def make_all(cases: Sequence[Case], bench: Bench) -> dict[Case, Epochs]:
    """Makes the loaders; one that cannot be made here is told and left out."""
    made = {}
    for case in cases:
        try:
            with torch_threads_kept():
                made[case] = case.candidate.make(bench, case.workers)
        except UserError as error:
            print(f"{case.key}: not measured ({error})")
    return made


def measure(made: Mapping[Case, Epochs], bench: Bench, rounds: int) -> Measured:
    """Times epochs in turns; round r of all cases belongs together."""
    turns = {case.key: Turns(epochs, bench) for case, epochs in made.items()}
    count = itertools.count()

    def told(turn: Turns) -> Callable[[], None]:
        def step() -> None:
            round_, place = divmod(next(count), len(turns))
            if place == 0:
                load = f"load average {os.getloadavg()[0]:.2f}"
                print(f"round {round_} of {rounds}{'' if round_ else ', dropped'}; {load}", file=sys.stderr)
            turn()

        return step

    steps = {key: told(turn) for key, turn in turns.items()}
    wall = time_interleaved(steps, CPU, rounds=rounds, steps_per_round=1, warm_up_rounds=1)
    return Measured(wall, Timings({key: tuple(turn.cpu_seconds[1:]) for key, turn in turns.items()}))


def measure_memory(cases: Sequence[Case], bench: Bench) -> dict[str, Memory]:
    """Peak memory of each case in a process of its own, by `Case.key`; a case whose process is killed is left out."""
    found = {}
    for number, case in enumerate(cases):
        print(f"memory of {number + 1} of {len(cases)}: {case.key}", file=sys.stderr)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                found[case.key] = pool.submit(peak_memory, case.candidate.name, case.workers, bench).result()
            except BrokenProcessPool:
                print(f"{case.key}: memory not measured (the process was killed)")
    return found


def peak_memory(name: str, workers: int, bench: Bench) -> Memory:
    """Makes a candidate, runs one epoch, and tells this process' peak memory."""
    candidate = next(candidate for candidate in CANDIDATES if candidate.name == name)
    consume(candidate.make(bench, workers)(0), bench)
    children_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6
    return Memory(_status_mb("VmHWM"), _status_mb("RssFile"), children_mb if candidate.process_workers else None)


def _status_mb(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024 / 1e6
    raise MachineError(f"/proc/self/status: tells no {field}")


def prepare(images_from: Path, work: Path, images: int, batch_size: int, resolution_px: int, forms: set[str]) -> Bench:
    """Makes the samples in the forms that are needed, after saying what room they take.

    Photographs that are damaged or cannot be read are left out.

    Args:
        images_from: folder of photographs, one folder a class.
        work: folder to write to; what a former call left there is used again.
        images: at least so many samples; rounded up to whole batches.
        batch_size, resolution_px: of the candidates.
        forms: of FILES, JPEG and RAW.

    Raises:
        UserError: there are no photographs.
        MachineError: the disk has too little room.
    """
    samples = -(-images // batch_size) * batch_size
    source = open_source(Request(images_from))
    estimate(source, work, samples, forms)
    words = [f"--source={images_from}", "--on-error=skip", "--damaged=refuse"]
    # Named by the photographs, so that one work folder may serve for several folders of them.
    name = source.fingerprint()[:12]
    data_prep.manifest.main([*words, f"--out={work / name}.manifest"])
    manifest = read_manifest(work / f"{name}.manifest")
    if not len(manifest):
        raise UserError(f"{images_from}: holds no photograph that can be read")
    rows = np.arange(samples, dtype=np.int64) % len(manifest)
    betons = {}
    for form, options in ((JPEG, ["--mode=jpeg"]), (RAW, ["--mode=raw", f"--shortest-px={SHORT_PX}"])):
        if form in forms:
            once = work / f"{name}-{form}.beton"
            data_prep.beton.main([*words, *options, f"--out={once}"])
            betons[form] = repeat_beton(read_beton(once), rows)
    return Bench(repeat_manifest(manifest, rows), betons, len(manifest), batch_size, resolution_px)


def estimate(source: Source, work: Path, samples: int, forms: set[str]) -> None:
    """Prints what room the samples take in a folder, from files' sizes and headers.

    Raises:
        MachineError: it has too little.
    """
    pictures = [picture for picture in map(source.picture, range(len(source))) if isinstance(picture, Path)]
    if not pictures:
        raise UserError(f"{source.folder}: name a folder of photographs, one folder a class")
    raw = data_prep.beton.Storage("raw", 0.0, 90, None, SHORT_PX, False)
    sizes = [raw.size(*data_prep.beton.measure(picture)) for picture in pictures]
    each = {JPEG: np.mean([p.stat().st_size for p in pictures]), RAW: np.mean([3 * h * w for h, w in sizes])}
    # All samples, and every photograph once, from which they are copied.
    wanted = {form: float(each[form]) * (samples + len(pictures)) for form in each if form in forms}
    free, total = shutil.disk_usage(work).free, sum(wanted.values())
    parts = ", ".join(f"{size / 1e9:.2f} GB for {STORED[form]}" for form, size in wanted.items())
    print(
        f"{len(pictures):,} photographs as {samples:,} samples take about {total / 1e9:.2f} GB in {work} "
        f"({parts or 'files are read where they are'}); {free / 1e9:.1f} GB free"
    )
    if total > free:
        raise MachineError(f"{work}: has too little room: name another --work, or lower --images")


def repeat_manifest(manifest: Manifest, rows: Int64) -> Manifest:
    """The manifest of these rows of another."""
    columns = ("paths", "stand_ins", "labels", "heights", "widths", "modes", "file_bytes", "digests", "conditions")
    return replace(manifest, **{name: getattr(manifest, name)[rows] for name in columns})


def repeat_beton(beton: Beton, rows: Int64) -> Path:
    """A .beton beside another, with these of its samples; used again where it is there."""
    path = beton.path.with_name(f"{beton.path.stem}-{len(rows)}-samples-{beton.index_hash[:12]}.beton")
    if path.exists():
        return path
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        writer = BetonWriter(file, len(rows), page_bytes_for(int(beton.stored_bytes.max())))
        for row in rows.tolist():
            writer.add(_sample(beton, row))
        writer.finish()
        # Else the system would be writing it out while the first rounds are timed.
        file.flush()
        os.fsync(file.fileno())
    return partial.replace(path)


def _sample(beton: Beton, row: int) -> Sample:
    stored_height, stored_width = beton.stored_sizes[row].tolist()
    height, width = beton.sizes[row].tolist()
    assert beton.crc32 is not None
    return Sample(
        stored=beton.bytes_of(row).tobytes(),
        mode=int(beton.modes[row]),
        stored_size=(stored_height, stored_width),
        size=(height, width),
        label=int(beton.labels[row]),
        crc32=int(beton.crc32[row]),
    )


def bases(case: Case) -> dict[str, str]:
    """Keys of the cases that a case is compared with, by what they are called in columns."""
    candidate, others = case.candidate, {}
    if candidate.stock is not None:
        others["stock"] = f"{candidate.stock}/{candidate.stored}"
        if candidate.stock == "stock-ffcv":
            others["stock_no_flip"] = f"stock-ffcv-no-flip/{candidate.stored}"
    others["folder"] = FOLDER.name
    return {column: _key(name, case.workers) for column, name in others.items() if name != candidate.name}


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
        **_columns("images_per_second", speed, 1),
        **_columns("cpu_seconds_per_1000_images", cost, 4),
        **_columns("cores_used", cores_used(measured, case), 3),
        "peak_memory_mb": None if found is None else round(found.peak_mb),
        "of_it_mapped_files_mb": None if found is None else round(found.mapped_mb),
        "peak_memory_of_a_worker_mb": None if found is None or found.worker_mb is None else round(found.worker_mb),
    }
    for column in RATIOS:
        row |= _columns(f"speed_over_{column}", ratio(measured.wall, case, column), 4)
        row |= _columns(f"images_per_cpu_second_over_{column}", ratio(measured.cpu, case, column), 4)
    return row


def _columns(name: str, value: Spread | None, digits: int) -> dict[str, float | None]:
    if value is None:
        return {f"{name}_median": None, f"{name}_q25": None, f"{name}_q75": None}
    median, low, high = (round(number, digits) for number in (value.median, value.low, value.high))
    return {f"{name}_median": median, f"{name}_q25": low, f"{name}_q75": high}


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
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for heading in ("loader", "workers", *headings):
        table.add_column(heading, justify="left" if heading == "loader" else "right", no_wrap=True)
    return table


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


def main(words: Sequence[str]) -> None:
    """The command."""
    arguments = _parse(words)
    if arguments.images_from is None:
        raise UserError("--images_from is missing: name a folder of photographs (--help lists all arguments)")
    if arguments.results.is_dir():
        raise UserError(f"{arguments.results}: is a folder: name a file with --results")
    chosen = [candidate for candidate in CANDIDATES if candidate.name in arguments.only]
    if max(arguments.workers) > usable_cores():
        # FFCV cannot have more threads than numba, which reads this when it is imported.
        os.environ.setdefault("NUMBA_NUM_THREADS", str(max(arguments.workers)))
    machine = machine_facts(CPU)
    print(facts_line(CPU))
    with _folder(arguments.work) as work:
        bench = prepare(
            arguments.images_from, work, arguments.images, arguments.batch_size, arguments.resolution_px,
            {candidate.stored for candidate in chosen},
        )  # fmt: skip
        made = make_all([Case(candidate, workers) for workers in arguments.workers for candidate in chosen], bench)
        if not made:
            return
        measured = measure(made, bench, arguments.rounds)
        machine["load_average_1min_after"] = round(os.getloadavg()[0], 2)
        cases = list(made)
        made.clear()
        memory = measure_memory(cases, bench)
        rows = result_rows(cases, measured, memory, bench, machine)
    load = f"{machine['load_average_1min']} before, {machine['load_average_1min_after']} after"
    report(cases, measured, memory, bench, load)
    append_rows(arguments.results, rows)


@contextmanager
def _folder(work: Path | None) -> Iterator[Path]:
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
        yield work
        return
    with tempfile.TemporaryDirectory(prefix="fastgen-loaders-") as temporary:
        yield Path(temporary)


def _parse(words: Sequence[str]) -> Any:
    parser = Arguments("benchmarks.loaders", "Times loaders of photographs beside stock FFCV, stock DALI and torch's.")
    parser.add_argument("--images_from", type=Path, metavar="DIR", help="photographs, one folder a class")
    parser.add_argument("--images", type=at_least_one, default=3000, help="samples of an epoch, at least")
    parser.add_argument("--rounds", type=at_least_one, default=7, help="rounds that are kept, after one that is not")
    parser.add_argument("--workers", type=_counts, default=(1, 2), help="numbers of workers, such as 1,2")
    parser.add_argument("--batch_size", type=at_least_one, default=256, help="images in a batch")
    parser.add_argument("--resolution_px", type=_side, default=224, help="side of the crops")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep what is made there; default: a temporary folder")
    names = [candidate.name for candidate in CANDIDATES]
    parser.add_argument("--only", type=_names, default=names, help=f"some of {','.join(names)}")
    parser.add_argument("--results", type=Path, default=RESULTS / "loaders.csv", metavar="FILE")
    return parser.parse_args(words)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(at_least_one(word) for word in text.split(",")))


def _side(text: str) -> int:
    if int(text) < 4:
        raise argparse.ArgumentTypeError(f"'{text}' is below 4")
    return int(text)


def _names(text: str) -> list[str]:
    names = [candidate.name for candidate in CANDIDATES]
    unknown = sorted(set(text.split(",")) - set(names))
    if unknown:
        raise argparse.ArgumentTypeError(f"there is no {unknown[0]}, there are {', '.join(names)}")
    return text.split(",")


if __name__ == "__main__":
    sys.exit(command(main, sys.argv[1:]))
