"""What do several processes that train together make of a machine? Images/s at 1, 2, 4, .. of them, and what is lost.

python -m benchmarks.scaling [--cfg RECIPE --section.key=value ...] [--processes=1,2,4,8] [--role=student] [--rounds=N]

Strong scaling: the recipe's batch is shared out. Weak scaling: each process has a batch of this size. Processes are
started as the trainer's are, one a GPU; on a CPU they have one thread each. In turns, round by round, the same
processes take the same number of steps
- whole, as the trainer does: batches from the recipe's loader, gradients summed over the processes;
- without a word to each other (gradients, sums of synchronised batch-norms, wishes to save and to stop): the time that
  this saves is lost to communication, whatever of it backpropagation does not hide, waiting for the slowest included;
- whole, on a batch that is held on the device: the time that this saves is lost to data;
- in the first process alone, with the recipe's batch and all workers, while the others wait: what efficiency is over,
  images/s of N processes / (N x images/s of one).
Beside them a buffer of the network's gradients is summed by itself. Its bandwidth is that of the bus: 2 (N - 1) / N
times its bytes a second. What is left of a loss in efficiency is the smaller batch of strong scaling, and what
processes share: memory, clocks, the CPU.

Networks are untrained and stay so (learning rate 0). Where views grow over the run they are of the smallest side.
Without --cfg it is rcp/c100_r20_gen.yaml in bf16, on random images unless --data.root names real ones.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, ROOT, Floor, Spread, Timings, append_rows, columns, spread
from benchmarks.generation_floors import NotMeasured
from benchmarks.scaling_ranks import ALL_REDUCE, ALONE_PIECE, HELD, ROLES, SILENT, WHOLE
from benchmarks.scaling_steps import Mode, Setup, cut, read_setup
from fastgen.arguments import Arguments, at_least_one, split_words
from fastgen.data.batch import usable_cores
from fastgen.device import device_kind
from fastgen.errors import UserError, command
from fastgen.launch import launch
from fastgen.recipe import help_text, parse_words
from fastgen.tables import new_table, print_table

OWN_WORDS = ("--processes", "--role", "--rounds", "--steps", "--results")
RECIPE = ROOT / "rcp" / "c100_r20_gen.yaml"
PRECISION = "train.precision"
# Of one machine: they say nothing about what was measured.
PLACES = ("run.dir", "run.nodes", "data.root")
ON_A_CPU = "processes on one CPU: shows that it works and what gloo costs here; says nothing of GPUs"
# 16,621 images/s on 8 A100 over 2,470 on one: ResNet-50 with DALI, NVIDIA's DeepLearningExamples.
TARGET_GPUS, TARGET, PEERS = 8, 0.9, 0.84


@dataclass(frozen=True)
class Found:
    """What was measured of so many processes.

    Attributes:
        mode: how the batch was made.
        processes: that trained together.
        batch_size, one_batch_size: images in a step of all, and of the one process that they are set beside.
        steps: of a turn.
        workers: of each process's loader; None: images are in memory.
        gradient_bytes: that are summed in a step.
        machine: its facts, as the first process saw them.
        timings: seconds a step of the pieces; see the module.
    """

    mode: Mode
    processes: int
    batch_size: int
    one_batch_size: int
    steps: int
    workers: int | None
    gradient_bytes: int
    machine: Mapping[str, Any]
    timings: Timings

    @property
    def images_per_second(self) -> Spread:
        """Of all processes together."""
        return spread([self.batch_size / seconds for seconds in self._seconds(WHOLE)])

    @property
    def one_images_per_second(self) -> Spread:
        """Of one process by itself."""
        return spread([self.one_batch_size / seconds for seconds in self._seconds(self._one)])

    @property
    def efficiency(self) -> Spread:
        """Images/s over what as many processes would make if none knew of the others, round by round."""
        pairs = zip(self._seconds(WHOLE), self._seconds(self._one), strict=True)
        ideal = self.processes * self.one_batch_size
        return spread([self.batch_size / ours / (ideal / alone) for ours, alone in pairs])

    @property
    def lost_to_communication(self) -> Spread | None:
        """Share of the step that goes when processes tell each other nothing; None: there is one."""
        return self._lost(SILENT) if self.processes > 1 else None

    @property
    def lost_to_data(self) -> Spread:
        """Share of the step that goes when batches lie on the device already."""
        return self._lost(HELD)

    @property
    def all_reduce_ms(self) -> Spread | None:
        """Of summing the gradients alone, in one buffer; None: there is one process."""
        return self.timings.ms_per_step(ALL_REDUCE) if self.processes > 1 else None

    @property
    def bus_gb_per_second(self) -> Spread | None:
        """Bandwidth of that, as NVIDIA's nccl-tests count it; 1 GB is 1e9 bytes."""
        if self.processes == 1:
            return None
        moved = 2 * (self.processes - 1) / self.processes * self.gradient_bytes
        return spread([moved / seconds / 1e9 for seconds in self._seconds(ALL_REDUCE)])

    @property
    def _one(self) -> str:
        return ALONE_PIECE if self.processes > 1 else WHOLE

    def _lost(self, without: str) -> Spread:
        """Share of the whole step, round by round; below 0 where noise was larger."""
        pairs = zip(self._seconds(WHOLE), self._seconds(without), strict=True)
        return spread([1 - less / whole for whole, less in pairs])

    def _seconds(self, piece: str) -> tuple[float, ...]:
        return self.timings.seconds_per_step[piece]


def read_found(path: Path) -> Found:
    """What the first process wrote."""
    values = json.loads(path.read_text())
    seconds = values.pop("seconds_per_step")
    return Found(**values, timings=Timings({name: tuple(values) for name, values in seconds.items()}))


def measure(mode: Mode, processes: int, words: Sequence[str]) -> Found:
    """Starts the processes, waits for their end, and reads what they measured.

    Args:
        words: of `benchmarks.scaling_ranks`, but for the mode and the place of the answer.
    """
    with tempfile.TemporaryDirectory(prefix="fastgen_scaling_") as folder:
        out = Path(folder) / "found.json"
        launch([f"--mode={mode}", f"--out={out}", *words], processes, 0, module="benchmarks.scaling_ranks")
        return read_found(out)


def sides(counts: Sequence[int]) -> list[tuple[Mode, int]]:
    """Ways and numbers of processes: one process has a single way."""
    both: tuple[Mode, ...] = ("strong", "weak")
    return [(mode, count) for count in counts for mode in (both if count > 1 else ("one",))]


def default_counts(most: int) -> tuple[int, ...]:
    """1, 2, 4, .. and the number itself."""
    doubled = itertools.takewhile(lambda count: count < most, (2**power for power in itertools.count()))
    return (*doubled, most)


def counts_for(kind: str, wanted: Sequence[int] | None) -> tuple[int, ...]:
    """Numbers of processes.

    Raises:
        UserError: more than there are GPUs, or cores where there are none.
    """
    there = torch.cuda.device_count() if kind == "cuda" else usable_cores()
    counts = default_counts(there) if wanted is None else tuple(wanted)
    if max(counts) > there:
        raise UserError(
            f"--processes: {max(counts)} need as many {'GPUs' if kind == 'cuda' else 'cores'}, and there are {there}: "
            "lower it"
        )
    return counts


def recipe_words(words: Sequence[str]) -> tuple[list[str], bool]:
    """The command line of a recipe, with the default one where it names none, and whether images are random."""
    named = {word.partition("=")[0] for word in words}
    if "--cfg" in named:
        return list(words), False
    precision = [] if f"--{PRECISION}" in named else [f"--{PRECISION}=bf16"]
    return ["--cfg", str(RECIPE), *precision, *words], "--data.root" not in named


def target(found: Sequence[Found], kind: str) -> Floor | NotMeasured:
    """What is asked of 8 GPUs."""
    what = f"weak scaling on {TARGET_GPUS} GPUs, efficiency ({PEERS} of ResNet-50 in NVIDIA's published figures)"
    asked = NotMeasured(f"{what}, asked at least {TARGET:g}", "no GPU")
    if kind != "cuda":
        return asked
    ours = [one for one in found if (one.mode, one.processes) == ("weak", TARGET_GPUS)]
    if not ours:
        return NotMeasured(asked.what, f"at most {max(one.processes for one in found)} of them")
    return Floor(what, ours[0].efficiency.median, TARGET)


def report(setup: Setup, found: Sequence[Found]) -> None:
    """Prints the table, and what the sums take alone."""
    train, recipe = setup.recipe.train, setup.recipe
    title = (
        f"{recipe.model.name} {setup.generation.role} on {setup.images} images by {recipe.data.backend}, "
        f"{train.precision}, {train.engine}, kernels {train.kernels}; {found[0].timings.rounds} rounds; "
        "median (quartiles)"
    )
    headings = (
        "scaling", "N", "batch", "images/s", "efficiency", "% lost to communication", "% lost to data",
    )  # fmt: skip
    table = new_table(title, headings, wrap=True)
    for one in found:
        table.add_row(
            one.mode,
            str(one.processes),
            f"{one.batch_size:,}",
            one.images_per_second.text(0),
            one.efficiency.text(2),
            _told(one.lost_to_communication, 1, 100),
            _told(one.lost_to_data, 1, 100),
        )
    print_table(table)
    for one in found:
        if one.all_reduce_ms is not None and one.bus_gb_per_second is not None:
            print(
                f"{one.mode} {one.processes}: the gradients, {one.gradient_bytes / 1e6:.3g} MB, are summed alone in "
                f"{one.all_reduce_ms.text(2)} ms, {one.bus_gb_per_second.median:.3g} GB/s"
            )


def _told(value: Spread | None, digits: int, times: float = 1) -> str:
    """Median and quartiles, `times` as large."""
    if value is None:
        return "-"
    return Spread(value.median * times, value.low * times, value.high * times).text(digits)


def result_row(setup: Setup, found: Found, overrides: Mapping[str, str], cfg: Path) -> dict[str, Any]:
    """For scaling.csv."""
    recipe, train = setup.recipe, setup.recipe.train
    teacher = recipe.teacher
    return {
        **found.machine,
        "recipe": cfg.name,
        "overrides": " ".join(f"{key}={text}" for key, text in overrides.items() if key not in PLACES),
        "images": setup.images,
        "backend": recipe.data.backend,
        "workers": found.workers,
        "model": recipe.model.name,
        "precision": train.precision,
        "engine": train.engine,
        "kernels": train.kernels,
        "batchnorm": train.batchnorm,
        "dist_batchnorm": recipe.dist.batchnorm,
        "role": setup.generation.role,
        "teacher": f"{teacher.engine}_x{teacher.look_ahead_batches}" if setup.generation.role == "student" else None,
        "scaling": found.mode,
        "processes": found.processes,
        "batch_size": found.batch_size,
        "one_batch_size": found.one_batch_size,
        "rounds": found.timings.rounds,
        "steps_per_round": found.steps,
        **columns("images_per_second", found.images_per_second, 1),
        **columns("one_images_per_second", found.one_images_per_second, 1),
        **columns("efficiency", found.efficiency, 4),
        **columns("lost_to_communication", found.lost_to_communication, 4),
        **columns("lost_to_data", found.lost_to_data, 4),
        "gradient_bytes": found.gradient_bytes,
        **columns("all_reduce_ms", found.all_reduce_ms, 4),
        **columns("bus_gb_per_second", found.bus_gb_per_second, 3),
    }


def main(words: Sequence[str]) -> None:
    """The command."""
    if {"--help", "-h"} & set(words):
        print(f"{_parser().format_help()}\n{help_text('python -m benchmarks.scaling')}")
        return
    own, rest = split_words(words, OWN_WORDS)
    options, (rest, random) = _parser().parse_args(own), recipe_words(rest)
    setup, line = read_setup(rest, options.role, random=random), parse_words(rest)
    kind = device_kind(setup.recipe.run)
    counts = counts_for(kind, options.processes)
    _require_sound(setup, kind, counts)
    steps = [] if options.steps is None else [f"--steps={options.steps}"]
    told = [f"--role={options.role}", f"--rounds={options.rounds}", f"--random={'yes' if random else 'no'}", *steps]
    found: list[Found] = []
    for mode, processes in sides(counts):
        found.append(measure(mode, processes, [*told, *rest]))
        if len(found) == 1:
            facts = found[0].machine.items()
            print(", ".join(f"{name} {value}" for name, value in facts if value is not None))
        print(f"{mode} {processes}: {found[-1].images_per_second.text(0)} images/s", flush=True)
        # At once: many GPUs cost too much to lose what is done.
        append_rows(options.results / "scaling.csv", [result_row(setup, found[-1], line.overrides, line.cfg)])
    report(setup, found)
    if kind == "cpu":
        print(f"{ON_A_CPU}; all of one thread each, the one process, too")
    print(target(found, kind).line())


def _require_sound(setup: Setup, kind: str, counts: Sequence[int]) -> None:
    """Refuses what would only fail in the processes, one after the other."""
    for key in ("kernels", "batchnorm"):
        if kind == "cpu" and getattr(setup.recipe.train, key) == "triton":
            raise UserError(f"train.{key} = triton is timed on an NVIDIA GPU alone: set --train.{key}=torch")
    for mode, processes in sides(counts):
        cut(setup, mode, processes)


def process_counts(text: str) -> tuple[int, ...]:
    """Type of --processes: whole numbers with commas between, no two alike; in order."""
    counts = [at_least_one(part) for part in text.split(",")]
    if len({*counts}) < len(counts):
        raise argparse.ArgumentTypeError(f"'{text}' names a number twice")
    return tuple(sorted(counts))


def _parser() -> Arguments:
    parser = Arguments("benchmarks.scaling", "Images/s of a training in 1, 2, 4, .. processes, and what is lost.")
    parser.add_argument(
        "--processes", type=process_counts, help="how many, as 1,2,4; default: up to one a GPU, on a CPU one a core"
    )
    parser.add_argument("--role", default="student", choices=ROLES)
    parser.add_argument("--rounds", type=at_least_one, default=9, help="rounds that are kept, after one that is not")
    parser.add_argument("--steps", type=at_least_one, help="of a turn; default: 32 on GPUs, 4 on a CPU")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of scaling.csv")
    return parser


if __name__ == "__main__":
    sys.exit(command(main, sys.argv[1:]))
