"""Does the loader keep up? What a recipe's steps need, over what its loader gives, in images/s.

python -m benchmarks.feed --cfg rcp/r18_gen.yaml --data.root=DIR [--section.key=value ...] [--batches=N]

A turn of the loader is a short epoch: the same samples in the same views each time, brought to the device and thrown
away, in full batches of the recipe's size. Starting and ending the epoch is part of it, so a turn should be long: at
least 3,000 images. The first round is dropped; after it the system has the files in its cache, unless the recipe says
otherwise. For data.backend=resident the loader is what executes the views on the device.

A turn of a step is a few steps of the trainer, of the recipe's patriarch and of its first student, on one batch that
is held on the device. Networks are untrained and stay so (learning rate 0). Where views grow over the run, both are
measured at their smallest side: there a step is shortest. CPU seconds are of this process and its workers.
"""

from __future__ import annotations

import itertools
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

from benchmarks.common import (
    RESULTS,
    Spread,
    Step,
    Timings,
    append_rows,
    columns,
    facts_line,
    machine_facts,
    positive_minutes,
    spread,
    time_interleaved,
)
from benchmarks.generation import with_look_ahead
from benchmarks.loaders import used_cpu_seconds
from benchmarks.rigs import Rig, calibrate, hush_compiler
from fastgen.arguments import Arguments, at_least_one
from fastgen.config import Recipe
from fastgen.crops import JITTER_COLUMNS, TABLE_COLUMNS, Int64
from fastgen.data import build_loader, open_dataset
from fastgen.data.batch import Batch, Columns, Loader, usable_cores
from fastgen.data.split import Dataset
from fastgen.device import choose_device
from fastgen.engines import Plant, make_engine
from fastgen.errors import UserError, command
from fastgen.grade import make_grade
from fastgen.learner import Learner, make_learner
from fastgen.meters import Stopwatch, Tally
from fastgen.models import build_model, initialise
from fastgen.nodes import Node
from fastgen.plan import Generation, make_plan
from fastgen.progress import PatientConsole
from fastgen.recipe import help_text, parse_words, read_recipe
from fastgen.record import Recorder
from fastgen.repeat import split_words
from fastgen.schedule import resolution_px
from fastgen.shapes import part_shapes
from fastgen.step import DTYPES
from fastgen.stop import StopRequest
from fastgen.supply import Supply, make_supply
from fastgen.tables import print_table
from fastgen.teacher import FrozenTeacher, make_teacher
from fastgen.views import WHOLE, EpochViews, Share, batch_positions
from fastgen.workbench import Workbench

OWN_WORDS = ("--batches", "--steps", "--rounds", "--minutes", "--results")
LEAST_IMAGES = 3_000
STEPS_ON_GPU, STEPS_ON_CPU = 32, 2
LOADER = "loader"
# Of one machine: they say nothing about what was measured.
PLACES = ("run.dir", "run.nodes", "data.root")
# Backends that decode with workers.
WITH_WORKERS = ("ffcv", "dali", "folder")


@dataclass(frozen=True)
class Turns:
    """How long a turn is.

    Attributes:
        batches: of the loader.
        steps: of a generation.
    """

    batches: int
    steps: int


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        recipe: resolved.
        dataset: its data.
        device: where it runs.
        side_px: height and width of the views.
        views: of an epoch, at this side.
        generations: the patriarch and, where the recipe has one, the first student.
    """

    recipe: Recipe
    dataset: Dataset
    device: torch.device
    side_px: tuple[int, int]
    views: EpochViews
    generations: Mapping[str, Generation]

    @property
    def batch_size(self) -> int:
        """Images in a full batch."""
        return min(self.recipe.train.batch_size, len(self.dataset.train))

    @property
    def workers(self) -> int | None:
        """That decode; None: images are in memory, and the recipe's own process brings them along."""
        data = self.recipe.data
        return (data.workers or usable_cores()) if data.backend in WITH_WORKERS else None

    @property
    def program_steps(self) -> int:
        """Steps that are launched together, from batches that are made on the device."""
        train = self.recipe.train
        return train.graph_steps if train.engine == "graph" and self.recipe.data.backend == "resident" else 1

    @property
    def steps_at_once(self) -> int:
        """Steps that are launched, or whose teacher is asked, together."""
        return math.lcm(self.program_steps, self.recipe.teacher.look_ahead_batches)

    def part(self, images: int) -> EpochViews:
        """The first images of the epoch."""
        return replace(self.views, order=self.views.order[:images])


@dataclass(frozen=True)
class Measured:
    """What was measured of a case.

    Attributes:
        case: the shared facts.
        turns: how long they were.
        timings: seconds of a turn: of the loader, and by role.
        cpu_seconds: of each turn of the loader that was kept.
    """

    case: Case
    turns: Turns
    timings: Timings
    cpu_seconds: tuple[float, ...]

    @property
    def roles(self) -> list[str]:
        """Whose steps were measured."""
        return [name for name in self.timings.seconds_per_step if name != LOADER]

    def images(self, name: str) -> int:
        """Of a turn."""
        return self.case.batch_size * (self.turns.batches if name == LOADER else self.turns.steps)

    def images_per_second(self, name: str) -> Spread:
        """Of the loader, or of the steps of a role."""
        return spread([self.images(name) / seconds for seconds in self.timings.seconds_per_step[name]])

    def need_over_give(self, role: str) -> Spread:
        """Images/s of the steps alone over those of the loader alone, round by round."""
        pairs = zip(*(self.timings.seconds_per_step[name] for name in (role, LOADER)), strict=True)
        return spread([self.images(role) / step / (self.images(LOADER) / give) for step, give in pairs])

    @property
    def cpu_seconds_per_1000_images(self) -> Spread:
        """Of the loader."""
        return spread([1e3 * seconds / self.images(LOADER) for seconds in self.cpu_seconds])

    def cores_needed(self, role: str) -> float:
        """CPU seconds that the loader would use in a second, were it to give what the steps need."""
        return self.cpu_seconds_per_1000_images.median / 1e3 * self.images_per_second(role).median


class Held:
    """A loader, and source of programs, whose batches lie on the device already: the steps have it to themselves.

    Args:
        batch: as many samples as are ever asked for at once.
        samples: that an epoch pretends to have.
    """

    def __init__(self, batch: Batch, samples: int) -> None:
        self._batch = batch
        self._samples = samples

    def __len__(self) -> int:
        return self._samples

    def batches(
        self, views: EpochViews, batch_size: int, first_batch: int = 0, share: Share = WHOLE
    ) -> Iterator[Batch]:
        """See `Loader.batches`; what the views say has no say."""
        for positions in batch_positions(views.order, batch_size, first_batch, share):
            yield self._batch[: len(positions)]

    def columns(self, views: EpochViews, positions: Int64) -> dict[str, Tensor]:
        """See `DeviceSource.columns`."""
        return {"labels": self._batch.labels[:1].expand(len(positions))}

    def execute(self, columns: Columns) -> Batch:
        """See `DeviceSource.execute`: no work."""
        return self._batch[: len(columns["labels"])]

    def blank(self, count: int, jitter: bool) -> dict[str, Tensor]:
        """See `DeviceSource.blank`."""
        return {"labels": self._batch.labels[:1].repeat(count)}


def read_case(words: Sequence[str]) -> Case:
    """The recipe's data and generations.

    Raises:
        UserError: the recipe or its data is wrong, or has no loader to measure.
    """
    recipe = read_recipe(words)
    if recipe.data.backend == "synthetic":
        raise UserError("data.backend = synthetic loads nothing: name resident, ffcv, dali or folder")
    if recipe.run.dry or recipe.gen.only is not None:
        raise UserError("run.dry and gen.only have no say here, nothing is trained: leave them out")
    dataset, epochs = open_dataset(recipe), recipe.train.epochs
    # Refuses what no network could be trained on.
    part_shapes(recipe, dataset)
    plan = make_plan(recipe, dataset.train_hash, None, dataset.pixels)
    student = next((generation for generation in plan if generation.role == "student"), None)
    side_px = min(resolution_px(recipe.data, epochs, epoch) for epoch in range(epochs))
    views = dataset.training_views(plan[0].data_seed, 0, 0, side_px)
    generations = {"patriarch": plan[0]} | ({"student": student} if student else {})
    return Case(recipe, dataset, choose_device(recipe.run), (views.height_px, views.width_px), views, generations)


def turns_of(case: Case, batches: int | None, steps: int | None) -> Turns:
    """How long turns are; what is not given is chosen.

    Raises:
        UserError: a turn would end within a program or a group of a look ahead.
    """
    at_once, images = case.steps_at_once, LEAST_IMAGES
    if steps is not None and steps % at_once:
        raise UserError(f"--steps={steps}: {at_once} steps are taken at once: give a multiple of them")
    if steps is None:
        least = STEPS_ON_GPU if case.device.type == "cuda" else STEPS_ON_CPU
        steps = -(-least // at_once) * at_once
    if case.workers is None:
        # In memory an epoch takes no time, and its start is worth more images than a few thousand.
        images = max(images, len(case.dataset.train))
    return Turns(batches or -(-images // case.batch_size), steps)


def measure(case: Case, turns: Turns, *, rounds: int, until: float = math.inf) -> Measured:
    """Times loader and steps in turns.

    Args:
        case: the shared facts.
        turns: how long they are.
        rounds: that are kept.
        until: see `time_interleaved`.

    Raises:
        UserError: a sample cannot be read, or what the loader needs is not here.
        ValueError: a loss was not finite, or the loader gave other samples than were asked for.
    """
    torch.compiler.reset()
    supply = _supply(case)
    rigs = {role: make_rig(case, supply, generation, turns.steps) for role, generation in case.generations.items()}
    cpu_seconds: list[float] = []
    turn = loader_turn(case, supply.loader, turns.batches, cpu_seconds)
    steps: dict[str, Step] = {LOADER: turn} | {role: _steps(rig, turns.steps) for role, rig in rigs.items()}
    timings = time_interleaved(steps, case.device, rounds=rounds, steps_per_round=1, until=until)
    for rig in rigs.values():
        rig.require_finite()
    # Without those of the round that was dropped.
    return Measured(case, turns, timings, tuple(cpu_seconds[-timings.rounds :]))


def loader_turn(case: Case, loader: Loader, batches: int, cpu_seconds: list[float]) -> Step:
    """A short epoch, or several of a small set, in full batches; notes the CPU seconds of each."""
    size = case.batch_size
    in_an_epoch = min(batches, len(case.dataset.train) // size)

    def turn() -> None:
        before, left, given = used_cpu_seconds(), batches, 0
        while left:
            views = case.part(min(left, in_an_epoch) * size)
            given += sum(len(batch.labels) for batch in loader.batches(views, size))
            left -= min(left, in_an_epoch)
        if given != batches * size:
            raise ValueError(f"the loader gave {given} images, {batches * size} were asked for")
        cpu_seconds.append(used_cpu_seconds() - before)

    return turn


def _steps(rig: Rig, count: int) -> Callable[[], None]:
    def turn() -> None:
        for _ in range(count):
            rig.step()

    return turn


def _supply(case: Case) -> Supply:
    """The loader as the trainer would use it."""
    recipe, dataset, device = case.recipe, case.dataset, case.device
    loader = build_loader(recipe, dataset, dataset.train, device)
    with tempfile.TemporaryDirectory(prefix="fastgen-feed-") as folder:
        recorder = Recorder(Path(folder), PatientConsole(), (), 0)
        # Not entered: signals end this command at once.
        bench = Workbench(recipe, dataset, device, loader, loader, recorder, StopRequest())
        supply = make_supply(
            bench, case.generations["patriarch"], Node(Path(folder)), None, Stopwatch(device), [case.side_px]
        )
        recorder.close()
    return supply


def make_rig(case: Case, supply: Supply, generation: Generation, steps: int) -> Rig:
    """The trainer's steps for a generation, on one batch that is held on the device.

    Args:
        supply: of the patriarch.
        steps: of an epoch, whole programs.
    """
    recipe, facts, size = case.recipe, case.dataset.facts, case.batch_size
    batch = held_batch(case, supply.loader)
    held = Held(batch, steps * size)
    supply = replace(supply, loader=held, source=None if supply.source is None else held)
    if generation.role == "student":
        supply = _taught(case, supply, batch)
    learner = _learner(case, supply, generation)
    shapes = [(size, *case.side_px)]
    jitter = case.dataset.crop.jitter.active
    plant = Plant(learner, supply, recipe.train, steps * size, shapes, facts.channels, jitter, case.device)
    engine = make_engine(plant)
    table = np.zeros((steps * size, len(TABLE_COLUMNS)), np.int32)
    drawn = np.zeros((steps * size, len(JITTER_COLUMNS)), np.float32) if jitter else None
    views = EpochViews(np.arange(steps * size), table, *case.side_px, drawn)

    def tallies() -> Iterator[Tally]:
        for _ in itertools.count():
            yield from engine.epoch(views, 0, [0.0] * steps)

    return Rig(tallies())


def held_batch(case: Case, loader: Loader) -> Batch:
    """A full batch as the loader gives it, as often as a program takes steps."""
    (batch,) = loader.batches(case.part(case.batch_size), case.batch_size)
    count = case.program_steps
    images_NCHW = torch.cat([batch.images_NCHW] * count).contiguous(memory_format=torch.channels_last)
    jitter = None if batch.jitter is None else batch.jitter.repeat(count, 1)
    return Batch(images_NCHW, batch.labels.repeat(count), batch.ids.repeat(count), jitter)


def _taught(case: Case, supply: Supply, batch: Batch) -> Supply:
    """The held batches with the recipe's way to ask a teacher, as `fastgen.supply` puts them together."""
    settings, classes = case.recipe.teacher, case.dataset.facts.classes
    teacher = _teacher(case, supply, batch[: case.batch_size])
    if settings.labels == "table":
        inputs_NCHW = supply.prepare(batch.images_NCHW, batch.jitter)
        held = Held(replace(batch, teacher_logits_BC=teacher(inputs_NCHW)), len(supply.loader))
        logits_BC = inputs_NCHW.new_zeros((case.batch_size, classes))

        def dress(raw: Batch) -> Batch:
            return replace(supply.dress(raw), teacher_logits_BC=logits_BC)

        return replace(supply, loader=held, source=None if supply.source is None else held, dress=dress)
    if settings.engine == "folded" and settings.look_ahead_batches == 1:
        return replace(supply, live_teacher=teacher)
    return with_look_ahead(supply, teacher, settings.look_ahead_batches, classes)


def _teacher(case: Case, supply: Supply, batch: Batch) -> FrozenTeacher:
    """An untrained network, whose batch-norms know the images."""
    recipe, facts = case.recipe, case.dataset.facts
    inputs_NCHW = supply.prepare(batch.images_NCHW, batch.jitter).float()
    network = calibrate(_network(case, case.generations["patriarch"].init_seed), inputs_NCHW)
    table = recipe.teacher.labels == "table"
    images = case.batch_size * recipe.teacher.look_ahead_batches
    return make_teacher(
        network,
        case.device,
        DTYPES[recipe.train.precision],
        "folded" if table else recipe.teacher.engine,
        shape=(images, facts.channels, *case.side_px),
        timed=not recipe.run.deterministic,
    )


def _network(case: Case, init_seed: int) -> nn.Module:
    model, facts = case.recipe.model, case.dataset.facts
    network = initialise(build_model(model.name, facts.classes, facts.channels, model.downsample), init_seed)
    return network.to(case.device).to(memory_format=torch.channels_last)


def _learner(case: Case, supply: Supply, generation: Generation) -> Learner:
    train = case.recipe.train
    network = _network(case, generation.init_seed).train()
    if train.batchnorm == "triton":
        from fastgen.models.norm_act import fuse_norm_act

        network = fuse_norm_act(network)
    grade = make_grade(generation.objective, fused=train.kernels == "triton")
    shapes = len(part_shapes(case.recipe, case.dataset))
    return make_learner(network, grade, supply.live_teacher, supply.prepare, train, case.device, shapes)


def verdict(need_over_give: float) -> str:
    """In words."""
    if need_over_give < 1:
        return "the loader keeps up"
    return f"THE LOADER DOES NOT KEEP UP: steps would wait for {1 - 1 / need_over_give:.0%} of the time"


def report(measured: Measured) -> None:
    """Prints what is given and needed, and the verdict."""
    case, data = measured.case, measured.case.recipe.data
    workers = "in memory" if case.workers is None else f"{case.workers} workers"
    title = (
        f"{case.recipe.model.name} on {data.dataset} by {data.backend} ({workers}), {case.side_px[0]} px, "
        f"batch {case.batch_size}, {measured.timings.rounds} rounds; median (quartiles)"
    )
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for heading in ("alone", "images a turn", "images/s", "need / give", "cores that the loader would need"):
        table.add_column(heading, justify="left" if heading == "alone" else "right")
    for name in measured.timings.seconds_per_step:
        told = ("-", "-") if name == LOADER else (
            measured.need_over_give(name).text(3), f"{measured.cores_needed(name):.1f} of {usable_cores()}",
        )  # fmt: skip
        table.add_row(name, f"{measured.images(name):,}", measured.images_per_second(name).text(0), *told)
    print_table(table)
    print(f"loader: {measured.cpu_seconds_per_1000_images.text(3)} CPU seconds per 1,000 images")
    if measured.images(LOADER) < LEAST_IMAGES:
        print(f"fewer than {LEAST_IMAGES:,} images a turn: an epoch's start and end weigh much in it")
    for role in measured.roles:
        print(f"{role}: {verdict(measured.need_over_give(role).median)}")
    if "student" not in measured.roles:
        print("student: not measured (the recipe has none)")
    if case.device.type != "cuda":
        print("on a CPU loader and steps share the cores: together both are slower than alone")
        print("what a GPU's steps need: not measured (no GPU)")


def result_rows(measured: Measured, cfg: Path, overrides: Mapping[str, str]) -> list[dict[str, Any]]:
    """One row a role, for feed.csv."""
    case, recipe, machine = measured.case, measured.case.recipe, machine_facts(measured.case.device)
    given = " ".join(f"{key}={text}" for key, text in overrides.items() if key not in PLACES)
    return [
        {
            **machine,
            "recipe": cfg.name,
            "overrides": given,
            "dataset": recipe.data.dataset,
            "train_images": len(case.dataset.train),
            "backend": recipe.data.backend,
            "workers": case.workers,
            "usable_cores": usable_cores(),
            "image_px": case.side_px[0],
            "model": recipe.model.name,
            "batch_size": case.batch_size,
            "precision": recipe.train.precision,
            "engine": recipe.train.engine,
            "kernels": recipe.train.kernels,
            "batchnorm": recipe.train.batchnorm,
            "role": role,
            "teacher": _teaching(recipe) if role == "student" else None,
            "rounds": measured.timings.rounds,
            "loader_images_per_round": measured.images(LOADER),
            "step_images_per_round": measured.images(role),
            **columns("loader_images_per_second", measured.images_per_second(LOADER), 1),
            **columns("step_images_per_second", measured.images_per_second(role), 1),
            **columns("need_over_give", measured.need_over_give(role), 4),
            **columns("loader_cpu_seconds_per_1000_images", measured.cpu_seconds_per_1000_images, 4),
            "cores_needed": round(measured.cores_needed(role), 2),
        }
        for role in measured.roles
    ]


def _teaching(recipe: Recipe) -> str:
    teacher = recipe.teacher
    return "table" if teacher.labels == "table" else f"{teacher.engine}_x{teacher.look_ahead_batches}"


def main(words: Sequence[str]) -> None:
    """The command."""
    if {"--help", "-h"} & set(words):
        print(f"{_parser().format_help()}\n{help_text('python -m benchmarks.feed')}")
        return
    own, rest = split_words(words, OWN_WORDS)
    options, case, line = _parser().parse_args(own), read_case(rest), parse_words(rest)
    hush_compiler()
    turns = turns_of(case, options.batches, options.steps)
    print(facts_line(case.device), flush=True)
    measured = measure(case, turns, rounds=options.rounds, until=time.monotonic() + 60 * options.minutes)
    report(measured)
    append_rows(options.results / "feed.csv", result_rows(measured, line.cfg, line.overrides))


def _parser() -> Arguments:
    parser = Arguments("benchmarks.feed", "Does the loader of a recipe (--cfg) give what its steps need?")
    parser.add_argument(
        "--batches", type=at_least_one, help=f"of the loader in a turn; default: at least {LEAST_IMAGES} images"
    )
    parser.add_argument("--steps", type=at_least_one, help="of each generation in a turn; default by device")
    parser.add_argument("--rounds", type=at_least_one, default=7, help="rounds that are kept")
    parser.add_argument("--minutes", type=positive_minutes, default=8.0, help="after it no kept round is begun")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of feed.csv")
    return parser


if __name__ == "__main__":
    sys.exit(command(main, sys.argv[1:]))
