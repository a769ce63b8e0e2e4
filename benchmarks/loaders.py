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
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.common import (
    RESULTS,
    Timings,
    append_rows,
    facts_line,
    machine_facts,
    time_interleaved,
)
from benchmarks.loaders_cases import FILES, JPEG, RAW, Bench, Candidate, Case, Measured, Memory
from benchmarks.loaders_data import prepare
from benchmarks.loaders_report import report, result_rows
from benchmarks.loaders_stock import BATCHES_AHEAD, Epochs, stock_dali, stock_ffcv, torch_threads_kept
from fastgen.arguments import Arguments, at_least_one
from fastgen.config import DataSettings
from fastgen.crops import ResizedCrop
from fastgen.data.batch import Loader, usable_cores
from fastgen.data.dali_loader import DaliLoader
from fastgen.data.ffcv_loader import FfcvLoader
from fastgen.data.folder import FolderLoader
from fastgen.data.split import FileSplit
from fastgen.errors import MachineError, UserError, command
from fastgen.views import training_views

Int64 = npt.NDArray[np.int64]

CPU = torch.device("cpu")


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
