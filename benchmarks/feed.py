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

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

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
from benchmarks.feed_steps import Case, make_rig, supply_of
from benchmarks.loaders import used_cpu_seconds
from benchmarks.rigs import Rig, hush_compiler
from fastgen.arguments import Arguments, at_least_one, split_words
from fastgen.config import Recipe
from fastgen.data import open_dataset
from fastgen.data.batch import Loader, usable_cores
from fastgen.device import choose_device
from fastgen.errors import UserError, command
from fastgen.plan import make_plan
from fastgen.recipe import help_text, parse_words, read_recipe
from fastgen.schedule import resolution_px
from fastgen.shapes import part_shapes
from fastgen.tables import new_table, print_table

OWN_WORDS = ("--batches", "--rounds", "--minutes", "--results")
LEAST_IMAGES = 3_000
STEPS_ON_GPU, STEPS_ON_CPU = 32, 2
LOADER = "loader"
# Of one machine: they say nothing about what was measured.
PLACES = ("run.dir", "run.nodes", "data.root")


class Turns(NamedTuple):
    """How long a turn is: batches of the loader, steps of a generation."""

    batches: int
    steps: int


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
    side_px = min(resolution_px(recipe.data, epochs, epoch) for epoch in range(epochs))
    views = dataset.training_views(plan[0].data_seed, 0, 0, side_px)
    student = next((generation for generation in plan if generation.role == "student"), None)
    generations = {"patriarch": plan[0]} | ({"student": student} if student else {})
    return Case(recipe, dataset, choose_device(recipe.run), views, generations)


def turns_of(case: Case, batches: int | None) -> Turns:
    """How long turns are: whole programs and groups of a look ahead, and the loader's batches where they are given."""
    # In memory an epoch takes no time, and its start is worth more images than a few thousand.
    images = LEAST_IMAGES if case.workers is not None else max(LEAST_IMAGES, len(case.dataset.train))
    steps = STEPS_ON_GPU if case.device.type == "cuda" else STEPS_ON_CPU
    at_once = case.steps_at_once
    return Turns(batches or -(-images // case.batch_size), -(-steps // at_once) * at_once)


def measure(case: Case, turns: Turns, *, rounds: int, until: float = math.inf) -> Measured:
    """Times loader and steps in turns.

    Args:
        case, turns: what is timed, and how long.
        rounds, until: see `time_interleaved`.

    Raises:
        UserError: a sample cannot be read, or what the loader needs is not here.
        ValueError: a loss was not finite, or the loader gave other samples than were asked for.
    """
    torch.compiler.reset()
    supply = supply_of(case)
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


def _steps(rig: Rig, count: int) -> Step:
    def turn() -> None:
        for _ in range(count):
            rig.step()

    return turn


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
    headings = ("alone", "images a turn", "images/s", "need / give", "cores that the loader would need")
    table = new_table(title, headings, wrap=True)
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
    turns = turns_of(case, options.batches)
    print(facts_line(case.device), flush=True)
    measured = measure(case, turns, rounds=options.rounds, until=time.monotonic() + 60 * options.minutes)
    report(measured)
    append_rows(options.results / "feed.csv", result_rows(measured, line.cfg, line.overrides))


def _parser() -> Arguments:
    parser = Arguments("benchmarks.feed", "Does the loader of a recipe (--cfg) give what its steps need?")
    parser.add_argument(
        "--batches", type=at_least_one, help=f"of the loader in a turn; default: at least {LEAST_IMAGES} images"
    )
    parser.add_argument("--rounds", type=at_least_one, default=7, help="rounds that are kept")
    parser.add_argument("--minutes", type=positive_minutes, default=8.0, help="after it no kept round is begun")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of feed.csv")
    return parser


if __name__ == "__main__":
    sys.exit(command(main, sys.argv[1:]))
