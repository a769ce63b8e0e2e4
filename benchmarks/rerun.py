"""What does a rerun of a generation cost? Its steps with the teacher asked live, from the label table, from the store.

python -m benchmarks.rerun [--cfg RECIPE --section.key=value ...] [--rounds=N] [--steps=N]

In turns, round by round, the trainer's steps of a student on the same views:
- live: the teacher is asked in each step, as the recipe says;
- filling: asked, truncated and kept, as the first student does that fills a store;
- store: everything is read, no teacher runs: the rerun;
- table: the same from a label table of all views, where the recipe's data set has one.
The store is filled before, on disk, by the same teacher; a table is of random logits, which cost as much to read.

Networks are untrained and stay so (learning rate 0). Without --cfg it is rcp/c100_r20_gen.yaml in bf16 with 6,400
images, random ones unless --data.root names real ones.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import (
    RESULTS,
    ROOT,
    Floor,
    Timings,
    append_rows,
    columns,
    facts_line,
    machine_facts,
    time_interleaved,
)
from benchmarks.feed_steps import Case, supply_of
from benchmarks.rigs import Rig, hush_compiler
from benchmarks.scaling_steps import Setup, case_of, make_rig, read_setup, teacher_of
from fastgen.arguments import Arguments, at_least_one, split_words
from fastgen.crops import ShiftCrop
from fastgen.device import choose_device
from fastgen.distributed import ALONE
from fastgen.errors import command
from fastgen.label_parts import epoch_folder, part_paths
from fastgen.label_store import LabelStore, StoreKind
from fastgen.labels import LabelTable, TableKind
from fastgen.lessons import LookAhead, StoreLoader
from fastgen.recipe import help_text, parse_words
from fastgen.supply import Supply
from fastgen.tables import new_table, print_table
from fastgen.teacher import FrozenTeacher
from fastgen.teaching import store_kind
from fastgen.views import WHOLE

OWN_WORDS = ("--rounds", "--steps", "--results")
RECIPE = ROOT / "rcp" / "c100_r20_gen.yaml"
DEFAULTS = {"train.precision": "bf16", "data.train_limit": "6400"}
LIVE, FILLING, STORE, TABLE = "live", "filling", "store", "table"
# Of a ResNet-20 on a CPU.
FLOOR_MODEL, FLOOR = "resnet20", 1.2
# A table of more bytes is not made for a benchmark.
MOST_TABLE_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Measured:
    """What was timed.

    Attributes:
        timings: seconds a step, by way.
        store_bytes: of an epoch's labels on disk.
        flush_seconds: that writing them took.
        divergence: of what is kept from the teacher's own word, in nats.
    """

    case: Case
    timings: Timings
    store_bytes: int
    flush_seconds: float
    divergence: float

    def images_per_second(self, way: str) -> float:
        """By the median step."""
        return 1e3 * self.case.batch_size / self.timings.ms_per_step(way).median


def kind_of(case: Case) -> StoreKind:
    """The store of this case; its teacher has no name."""
    return store_kind(case.recipe, case.dataset, "untrained")


def fill(case: Case, images: Supply, ahead: LookAhead, folder: Path) -> tuple[LabelStore, float]:
    """A store with all labels of the case's epoch, and the seconds that writing it took."""
    store = LabelStore(folder, kind_of(case), writes=True)
    for _ in StoreLoader(images.loader, store, ahead, images.prepare, case.device).batches(case.views, case.batch_size):
        pass
    start = time.perf_counter()
    store.flush()
    return store, time.perf_counter() - start


def random_table(case: Case) -> LabelTable | None:
    """A label table of random logits; None: the case's views are too many for one."""
    recipe, dataset = case.recipe, case.dataset
    if not isinstance(dataset.crop, ShiftCrop) or dataset.crop.jitter.active:
        return None
    kind = TableKind(
        teacher="random", images="", count=len(dataset.train), crop=dataset.crop, mean=dataset.facts.mean,
        std=dataset.facts.std, classes=dataset.facts.classes, precision=recipe.train.precision,
        engine=recipe.teacher.engine,
    )  # fmt: skip
    if kind.block_bytes * kind.views > MOST_TABLE_BYTES:
        return None
    rows = kind.views * kind.count
    return LabelTable(kind, torch.randn(rows, kind.classes, dtype=kind.dtype, device=case.device))


def make_rigs(case: Case, images: Supply, teacher: FrozenTeacher, store: LabelStore, folder: Path) -> dict[str, Rig]:
    """The trainings that are timed."""
    batches, classes = case.recipe.teacher.look_ahead_batches, case.dataset.facts.classes
    ahead = LookAhead(images.loader, teacher, images.prepare, batches, classes)
    # Another one, which never gets any label: what is noted is not written.
    unfilled = LabelStore(folder / "unfilled", store.kind, writes=True)
    supplies = {
        LIVE: images.with_teacher(teacher, batches, classes),
        FILLING: images.with_store(unfilled, case.device, ahead, ""),
        STORE: images.with_store(store, case.device, None, ""),
    }
    table = random_table(case)
    if table is not None:
        supplies[TABLE] = images.with_table(table)
    return {way: make_rig(case, supply, ALONE) for way, supply in supplies.items()}


def measure(setup: Setup, device: torch.device, rounds: int, steps: int) -> Measured:
    """Times all ways in turns."""
    case = case_of(setup, "one", ALONE, device)
    images = supply_of(case)
    teacher = teacher_of(case, images, WHOLE)
    batches, classes = case.recipe.teacher.look_ahead_batches, case.dataset.facts.classes
    with tempfile.TemporaryDirectory(prefix="fastgen_rerun_") as name:
        folder = Path(name)
        ahead = LookAhead(images.loader, teacher, images.prepare, batches, classes)
        store, flush_seconds = fill(case, images, ahead, folder)
        rigs = make_rigs(case, images, teacher, store, folder)
        steps = -(-steps // case.steps_at_once) * case.steps_at_once
        timings = time_interleaved(
            {way: rig.step for way, rig in rigs.items()}, device, rounds=rounds, steps_per_round=steps
        )
        for rig in rigs.values():
            rig.require_finite()
        if case.views.name is None:
            raise ValueError("the views are of no epoch")
        parts = part_paths(epoch_folder(store.folder, case.views.name))
        lost = store.divergence([case.views.name])
        return Measured(case, timings, sum(part.stat().st_size for part in parts), flush_seconds, lost or 0.0)


def report(setup: Setup, measured: Measured) -> None:
    """Prints the table."""
    recipe, timings, kind = setup.recipe, measured.timings, kind_of(measured.case)
    title = (
        f"rerun of a student {recipe.model.name} on {setup.images} images by {recipe.data.backend}, batch "
        f"{measured.case.batch_size}, {recipe.train.precision}, {recipe.train.engine}; {timings.rounds} rounds; "
        "median (quartiles)"
    )
    table = new_table(title, ("labels", "ms", "images/s", "over live"))
    for way in timings.seconds_per_step:
        speed = timings.speed_ratio(way, LIVE).text(3)
        table.add_row(way, timings.ms_per_step(way).text(2), f"{measured.images_per_second(way):,.0f}", speed)
    print_table(table)
    print(
        f"the store: {measured.store_bytes / 1e6:.3g} MB an epoch of {kind.count:,} images, {kind.truncation.how}, "
        f"written in {measured.flush_seconds:.3f} s, {measured.divergence:.2g} nats (KL) from the teacher"
    )
    for floor in floors(measured):
        print(floor.line())


def floors(measured: Measured) -> list[Floor]:
    """What is asked of a CPU."""
    case = measured.case
    if case.device.type != "cpu" or case.recipe.model.name != FLOOR_MODEL:
        return []
    return [Floor("rerun from the store over live", measured.timings.speed_ratio(STORE, LIVE).median, FLOOR)]


def result_rows(setup: Setup, measured: Measured, overrides: Mapping[str, str]) -> list[dict[str, Any]]:
    """A row a way, for rerun.csv."""
    recipe, kind, timings = setup.recipe, kind_of(measured.case), measured.timings
    return [
        {
            **machine_facts(measured.case.device),
            "overrides": " ".join(f"{key}={value}" for key, value in overrides.items() if key != "data.root"),
            "images": setup.images,
            "backend": recipe.data.backend,
            "model": recipe.model.name,
            "precision": recipe.train.precision,
            "engine": recipe.train.engine,
            "batch_size": measured.case.batch_size,
            "teacher": f"{recipe.teacher.engine}_x{recipe.teacher.look_ahead_batches}",
            "labels": way,
            "kept": kind.truncation.how,
            "rounds": timings.rounds,
            **columns("ms", timings.ms_per_step(way), 3),
            **columns("over_live", timings.speed_ratio(way, LIVE), 4),
            "images_per_second": round(measured.images_per_second(way), 1),
            "store_bytes": measured.store_bytes,
            "flush_seconds": round(measured.flush_seconds, 4),
            "divergence_nats": measured.divergence,
        }
        for way in timings.seconds_per_step
    ]


def main(words: Sequence[str]) -> None:
    """The command."""
    if {"--help", "-h"} & set(words):
        print(f"{_parser().format_help()}\n{help_text('python -m benchmarks.rerun')}")
        return
    own, rest = split_words(words, OWN_WORDS)
    options, named = _parser().parse_args(own), {word.partition("=")[0] for word in rest}
    random = not named & {"--cfg", "--data.root"}
    if "--cfg" not in named:
        missing = (f"--{key}={value}" for key, value in DEFAULTS.items() if f"--{key}" not in named)
        rest = ["--cfg", str(RECIPE), *missing, *rest]
    hush_compiler()
    setup = read_setup(rest, "student", random=random)
    device = choose_device(setup.recipe.run)
    print(facts_line(device), flush=True)
    measured = measure(setup, device, options.rounds, options.steps)
    report(setup, measured)
    append_rows(options.results / "rerun.csv", result_rows(setup, measured, parse_words(rest).overrides))


def _parser() -> Arguments:
    parser = Arguments("benchmarks.rerun", "Images/s of a rerun: live teacher, label table, label store.")
    parser.add_argument("--rounds", type=at_least_one, default=9, help="rounds that are kept, after one that is not")
    parser.add_argument("--steps", type=at_least_one, default=8, help="steps of a turn")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of rerun.csv")
    return parser


if __name__ == "__main__":
    sys.exit(command(main, sys.argv[1:]))
