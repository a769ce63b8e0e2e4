"""`benchmarks.generation --process`: a recipe trained from nothing, with everything counted."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, Floor, append_rows, facts_line, machine_facts
from benchmarks.generation_floors import SMOKE, NotMeasured, smoke, tell_floors
from benchmarks.time_to_accuracy import train
from fastgen.arguments import Arguments, split_words
from fastgen.config import Recipe
from fastgen.data.facts import DATASETS
from fastgen.device import choose_device
from fastgen.errors import UserError
from fastgen.nodes import Node, read_json
from fastgen.recipe import help_text, parse_words, read_recipe
from fastgen.tables import new_table, print_table

# Made here for each process.
PLACES = ("run.dir", "run.nodes")
PHASES = ("warm_up", "labels", "views", "evaluate", "save")
# Data set, network, epochs and students that the floor is of, and the most seconds that are asked for.
FLOOR_OF, FLOOR_SECONDS = ("cifar100", "resnet20", 164, 5), 600.0


@dataclass(frozen=True)
class Trained:
    """What a generation was charged with.

    Attributes:
        images: that it learned from, over all epochs.
        train_seconds: of its steps, with their batches and the teacher's passes.
        seconds: of everything else, by phase; `evaluate` with the final measurement.
        wall_seconds: all of it.
    """

    generation: int
    role: str
    images: int
    train_seconds: float
    seconds: Mapping[str, float]
    wall_seconds: float

    @property
    def train_images_per_second(self) -> float:
        """Over the steps."""
        return self.images / self.train_seconds

    @property
    def wall_images_per_second(self) -> float:
        """Over everything."""
        return self.images / self.wall_seconds


@dataclass(frozen=True)
class Whole:
    """A recipe that was trained from nothing.

    Attributes:
        recipe: resolved.
        cfg: its file.
        overrides: `section.key=value` as given.
        train_images: of an epoch.
        generations: in order.
        seconds: from the start of the process to its end.
    """

    recipe: Recipe
    cfg: Path
    overrides: tuple[str, ...]
    train_images: int
    generations: tuple[Trained, ...]
    seconds: float

    @property
    def images(self) -> int:
        """That all generations learned from."""
        return sum(generation.images for generation in self.generations)

    @property
    def images_per_second(self) -> float:
        """With everything counted."""
        return self.images / self.seconds

    @property
    def outside_seconds(self) -> float:
        """That no generation is charged with: start and end of the process, reading the data."""
        return self.seconds - sum(generation.wall_seconds for generation in self.generations)

    def over_first(self, one: Trained) -> tuple[float, float]:
        """A generation's speed over generation 0's: of the steps, and of everything."""
        first = self.generations[0]
        return (
            one.train_images_per_second / first.train_images_per_second,
            one.wall_images_per_second / first.wall_images_per_second,
        )


def read_process_recipe(words: Sequence[str]) -> Recipe:
    """Reads the recipe.

    Raises:
        UserError: it is wrong, or would not be trained from nothing.
    """
    given = parse_words(words).overrides
    for key in PLACES:
        if key in given:
            raise UserError(f"--{key}={given[key]}: a process is timed in folders of its own: leave it out")
    recipe = read_recipe(words)
    if recipe.run.dry:
        raise UserError("run.dry: there is nothing to time in a plan: leave it out")
    if recipe.gen.only is not None:
        raise UserError(f"gen.only = {recipe.gen.only}: all generations are trained, from nothing: leave it out")
    return recipe


def train_whole(recipe: Recipe, words: Sequence[str]) -> Whole:
    """Trains a recipe in a process of its own, in fresh folders.

    Args:
        recipe: see `read_process_recipe`.
        words: that it was read from.

    Raises:
        Stopped: a signal came; nothing is kept.
        TrainingFailed: the training ended with an error, which it told.
    """
    line = parse_words(words)
    with tempfile.TemporaryDirectory(prefix="fastgen-generation-") as temporary:
        run = Path(temporary) / "run"
        began = time.monotonic()
        train([*words, f"--run.dir={run}", f"--run.nodes={Path(temporary) / 'nodes'}"])
        seconds = time.monotonic() - began
        results = read_json(run / "results.json")
        generations = tuple(_trained(run, row) for row in results["generations"])
    overrides = tuple(f"{key}={text}" for key, text in line.overrides.items() if key != "data.root")
    return Whole(recipe, line.cfg, overrides, results["train_images"], generations, seconds)


def _trained(run: Path, row: Mapping[str, Any]) -> Trained:
    training = Node(run / f"generation_{row['generation']}").facts()["training"]
    # The final measurement is no part of the node's seconds, and is charged to the generation all the same.
    seconds = {phase: training["seconds"].get(phase, 0.0) for phase in PHASES} | {"evaluate": row["eval_seconds"]}
    clocks = row["train_seconds"], seconds, row["wall_seconds"]
    return Trained(row["generation"], row["role"], training["images"], *clocks)


def process_floor(whole: Whole, device: torch.device) -> Floor | NotMeasured:
    """The floor of a whole process, or why this one says nothing about it."""
    dataset, network, epochs, students = FLOOR_OF
    what = f"seconds of the whole process ({dataset}, {network}, {epochs} epochs, {students} students), all counted"
    if device.type != "cuda":
        return NotMeasured(f"{what}, asked at most {FLOOR_SECONDS:g}", "no GPU")
    recipe = whole.recipe
    found = recipe.data.dataset, recipe.model.name, recipe.train.epochs, recipe.gen.generations
    complete = whole.train_images == DATASETS[dataset].train_images and recipe.data.backend != "synthetic"
    if found != FLOOR_OF or not complete:
        return NotMeasured(f"{what}, asked at most {FLOOR_SECONDS:g}", "another recipe")
    return Floor(what, whole.seconds, FLOOR_SECONDS, at_most=True)


def report(whole: Whole) -> None:
    """Prints the speeds and the seconds of each generation, and the whole."""
    speeds, seconds = [], []
    for one in whole.generations:
        name, (over_train, over_wall) = f"{one.generation} {one.role}", whole.over_first(one)
        of_train, of_wall = f"{one.train_images_per_second:,.0f}", f"{one.wall_images_per_second:,.0f}"
        speeds.append((name, of_train, f"{over_train:.3f}", of_wall, f"{over_wall:.3f}"))
        clocks = (one.train_seconds, *(one.seconds[phase] for phase in PHASES), one.wall_seconds)
        seconds.append((name, *(f"{clock:,.1f}" for clock in clocks)))
    headings = ("generation", "in training", "over generation 0", "all charged", "over generation 0")
    _print_rows(f"{whole.cfg.stem}: student images/s", headings, speeds)
    _print_rows(f"{whole.cfg.stem}: seconds", ("generation", "train", *PHASES, "all"), seconds)
    print(
        f"whole process: {whole.seconds:,.1f} s with everything counted, {whole.images:,} student images, "
        f"{whole.images / whole.train_images:g} passes over the data: {whole.images_per_second:,.0f} images/s; "
        f"{whole.outside_seconds:,.1f} s of it outside of the generations (start, reading the data, end)"
    )


def _print_rows(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = new_table(title, headings)
    for row in rows:
        table.add_row(*row)
    print_table(table)


def result_rows(whole: Whole, device: torch.device) -> list[dict[str, Any]]:
    """One row a generation, and one of the whole, which has neither role nor phases."""
    train, teacher, data = whole.recipe.train, whole.recipe.teacher, whole.recipe.data
    shared = {
        **machine_facts(device),
        "recipe": whole.cfg.name,
        "overrides": " ".join(whole.overrides),
        "model": whole.recipe.model.name,
        "images": data.backend if data.backend == "synthetic" else data.dataset,
        "batch_size": train.batch_size,
        "precision": train.precision,
        "engine": train.engine,
        "smoke_run": smoke(train.engine, device),
        "kernels": train.kernels,
        "batchnorm": train.batchnorm,
        "teacher": "table" if teacher.labels == "table" else teacher.engine,
        "look_ahead_batches": teacher.look_ahead_batches,
    }
    rows = [
        {
            **shared,
            "generation": one.generation,
            "role": one.role,
            "student_images": one.images,
            "train_images_per_second": round(one.train_images_per_second, 1),
            "train_speed_over_generation_0": round(whole.over_first(one)[0], 4),
            "wall_images_per_second": round(one.wall_images_per_second, 1),
            "wall_speed_over_generation_0": round(whole.over_first(one)[1], 4),
            "train_seconds": round(one.train_seconds, 3),
            **{f"{phase}_seconds": round(one.seconds[phase], 3) for phase in PHASES},
            "wall_seconds": round(one.wall_seconds, 3),
        }
        for one in whole.generations
    ]
    total = {
        "generation": "all",
        "student_images": whole.images,
        "wall_images_per_second": round(whole.images_per_second, 1),
        "wall_seconds": round(whole.seconds, 3),
    }
    return [*rows, {**dict.fromkeys(rows[0]), **shared, **total}]


def main(words: Sequence[str]) -> None:
    """The command, without its word `--process`."""
    parser = Arguments("benchmarks.generation --process", "Trains the recipe of --cfg from nothing, and times it all.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of generation_process.csv")
    if {"--help", "-h"} & set(words):
        print(f"{parser.format_help()}\n{help_text('python -m benchmarks.generation --process')}")
        return
    own, rest = split_words(words, ["--results"])
    results, recipe = parser.parse_args(own).results, read_process_recipe(rest)
    device = choose_device(recipe.run)
    print(facts_line(device), flush=True)
    whole = train_whole(recipe, rest)
    report(whole)
    if smoke(recipe.train.engine, device):
        print(SMOKE)
    append_rows(results / "generation_process.csv", result_rows(whole, device))
    tell_floors([process_floor(whole, device)])
