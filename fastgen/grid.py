"""A grid of recipes: cells, seeds, and what has to be trained for them, each generation once."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fastgen.config import Recipe
from fastgen.data.split import Dataset
from fastgen.errors import UserError
from fastgen.lookup import find_teacher
from fastgen.nodes import nodes_folder
from fastgen.plan import Generation, make_plan
from fastgen.recipe import parse_words, read_recipe

# Given for each run by the sweep itself, or the same for all.
FIXED = (
    "run.seed", "run.dir", "run.nodes", "run.dry", "run.stop_after_minutes", "gen.only", "gen.teacher", "data.holdout",
    "dist.processes",
)  # fmt: skip
COMMAS = re.compile(r",(?![^\[]*\])")


@dataclass(frozen=True)
class Axis:
    """A setting and the values that it takes, as text."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """A point of the grid.

    Attributes:
        number: counted from 0.
        values: of each axis.
    """

    number: int
    values: Mapping[str, str]

    @property
    def name(self) -> str:
        """For people: settings without their sections."""
        return ", ".join(f"{key.partition('.')[2]}={value}" for key, value in self.values.items()) or "the recipe"


@dataclass(frozen=True)
class Run:
    """A whole recipe: of a cell, with a seed.

    Attributes:
        recipe: resolved.
        plan: its generations.
    """

    cell: Cell
    seed: int
    recipe: Recipe
    plan: tuple[Generation, ...]

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.cell.name}, seed {self.seed}"

    @property
    def label(self) -> str:
        """For files."""
        return f"cell_{self.cell.number:02d}_seed_{self.seed}"


def parse_axis(text: str) -> Axis:
    """Reads `section.key=value,value`; commas within brackets belong to a value.

    Raises:
        ValueError: it is of another form.
    """
    key, equals, values = text.partition("=")
    found = tuple(COMMAS.split(values))
    if not equals or "." not in key or not all(found):
        raise ValueError(f"'{text}' is no setting with values such as gen.teacher_weight=0.5,0.7")
    if len({*found}) < len(found):
        raise ValueError(f"'{text}' has a value twice: keep one")
    if key in FIXED:
        raise ValueError(f"{key} is not for a grid: all runs of a sweep have one, or each has its own")
    return Axis(key, found)


def cells_of(axes: Sequence[Axis]) -> list[Cell]:
    """All points, the last axis running fastest.

    Raises:
        UserError: two axes have one key.
    """
    keys = [axis.key for axis in axes]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"--grid: {key} is given twice: give all its values at once")
    points = itertools.product(*(axis.values for axis in axes))
    return [Cell(number, dict(zip(keys, point, strict=True))) for number, point in enumerate(points)]


def recipes_of(words: Sequence[str], cells: Sequence[Cell], seeds: Sequence[int]) -> Iterator[tuple[Cell, int, Recipe]]:
    """The recipe of each cell with each seed.

    Raises:
        UserError: one is wrong, two are the same, or they would choose by the test set.
    """
    given = parse_words(words).overrides
    for key in ("run.seed", "run.dir", *itertools.chain(*(cell.values for cell in cells))):
        if key in given:
            raise UserError(f"--{key}={given[key]}: the sweep gives each run its own: leave it out")
    if "dist.processes" in given:
        raise UserError("--dist.processes: each training of a sweep is one process: leave it out")
    words, seen = [*words, "--dist.processes=1"], dict[str, str]()
    for seed in seeds:
        for cell in cells:
            its = (f"--{key}={value}" for key, value in cell.values.items())
            recipe = read_recipe([*words, *its, f"--run.seed={seed}"])
            if not recipe.data.holdout:
                raise UserError(
                    "a sweep chooses, and choosing on the test set is a fault: hold images of the training set out "
                    "with --data.holdout=5000"
                )
            _require_one_or_all(recipe)
            other = seen.setdefault(recipe.short_hash, f"{cell.name}, seed {seed}")
            if other != f"{cell.name}, seed {seed}":
                raise UserError(f"{cell.name}, seed {seed} is the same training as {other}: leave one of them out")
            yield cell, seed, recipe


def _require_one_or_all(recipe: Recipe) -> None:
    if (recipe.gen.only is None) != (recipe.gen.teacher is None):
        raise UserError(
            "a sweep is of whole recipes, or of one generation under one teacher: give gen.only and gen.teacher both"
        )
    if recipe.run.stop_after_minutes is not None:
        raise UserError("run.stop_after_minutes: a sweep has no end of its time: leave it out, and end it by a signal")


def runs_of(recipes: Iterable[tuple[Cell, int, Recipe]], open_data: Callable[[Recipe], Dataset]) -> list[Run]:
    """Plans of all runs; each data set is opened once."""
    opened: dict[str, Dataset] = {}
    runs = []
    for cell, seed, recipe in recipes:
        key = repr((replace(recipe.data, seed=None), recipe.train.kernels))
        if key not in opened:
            opened[key] = open_data(recipe)
        dataset = opened[key]
        plan = make_plan(recipe, dataset.train_hash, find_teacher(recipe, dataset), dataset.pixels)
        runs.append(Run(cell, seed, recipe, plan))
    return runs


@dataclass(frozen=True)
class Training:
    """A process of a sweep: trains one generation for all runs that share it, or measures a run that is trained.

    Attributes:
        name: for people.
        words: of `fastgen.train`.
        needs: nodes that must be finished before it starts.
        makes: node that it trains; None: it measures.
        folders: that it holds while it runs.
    """

    name: str
    words: tuple[str, ...]
    needs: frozenset[str]
    makes: str | None
    folders: tuple[Path, ...] = ()


def trainings_of(
    runs: Sequence[Run], folder: Path, finished: Callable[[str], bool], measured: Callable[[Run], bool]
) -> list[Training]:
    """All that is to be done, patriarchs first: each node that is not there once, and measurements that are not.

    Who trains the last generation of a run measures it as well, unless another run has that generation, too.

    Args:
        runs: of the sweep.
        folder: of the sweep; recipes are in it.
        finished: whether a node is trained.
        measured: whether a run is.
    """
    found: dict[str, Training] = {}
    known = {run.label for run in runs if measured(run)}
    for generation, run in sorted(_generations(runs), key=lambda pair: pair[0].index):
        if generation.node in found or finished(generation.node):
            continue
        whole = generation == run.plan[-1]
        known |= {run.label} if whole else set()
        found[generation.node] = _whole(run, folder, run.plan) if whole else _part(run, folder, generation)
    return [*found.values(), *(_whole(run, folder, ()) for run in runs if run.label not in known)]


def _generations(runs: Sequence[Run]) -> Iterator[tuple[Generation, Run]]:
    for run in runs:
        yield from ((generation, run) for generation in run.plan)


def _part(run: Run, folder: Path, generation: Generation) -> Training:
    """Trains a generation that is not the last one."""
    place = folder / "trainings" / generation.node
    words = ("--cfg", str(recipe_path(folder, run)), f"--gen.only={generation.index}", f"--run.dir={place}")
    needs = frozenset(generation.members)
    name = f"generation {generation.index} of {run.name}"
    return Training(name, words, needs, generation.node, (place, _node_folder(run, generation)))


def _whole(run: Run, folder: Path, trained: Sequence[Generation]) -> Training:
    """Measures a run, after it has trained the last of these generations; none: all are there."""
    place = run_folder(folder, run)
    words = ("--cfg", str(recipe_path(folder, run)), f"--run.dir={place}")
    if trained:
        last, needs = trained[-1], frozenset(generation.node for generation in trained[:-1])
        return Training(
            f"generation {last.index} of {run.name}", words, needs, last.node, (place, _node_folder(run, last))
        )
    return Training(f"measurement of {run.name}", words, frozenset(g.node for g in run.plan), None, (place,))


def _node_folder(run: Run, generation: Generation) -> Path:
    return nodes_folder(run.recipe) / generation.node


def recipe_path(folder: Path, run: Run) -> Path:
    """Where a run's resolved recipe is."""
    return folder / "recipes" / f"{run.label}.yaml"


def run_folder(folder: Path, run: Run) -> Path:
    """The run folder of a run."""
    return folder / "runs" / run.label
