"""How long until a network is this good? Seconds until its top-1 error at the end of an epoch is first low enough.

python -m benchmarks.time_to_accuracy --cfg rcp/c100_r20_gen.yaml --top1_error=35 [--generation=0] [--gen.k=5 ...]

Trains the recipe as `fastgen.train` does, in a process of its own, evaluating after every epoch, and reads the seconds
off the run folder's events. So the same command goes on where a run was, and the seconds with it; of a run that is
finished they are read again. Rows go to results/time_to_accuracy.csv.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, append_rows, facts_line, machine_facts, read_rows
from fastgen.arguments import Arguments, split_words
from fastgen.config import Recipe
from fastgen.device import choose_device
from fastgen.errors import FastgenError, Stopped, UserError, command
from fastgen.nodes import Node, read_json
from fastgen.recipe import help_text, parse_words, read_recipe
from fastgen.record import read_events, run_dir
from fastgen.stop import StopRequest
from fastgen.tables import new_table, print_table
from fastgen.trainings import POLL_SECONDS, stop_trainings, training_command

OWN_WORDS = ("--top1_error", "--generation", "--results")
# Of one machine: they say nothing about what was trained.
PLACES = ("run.dir", "run.nodes", "data.root")
# What node.json tells of the machine that finished the training, which need not be this one, nor now.
TRAINED_BY = ("commit", "python", "device", "cpu", "cpu_cores", "threads")
# Of events about the whole run.
NO_GENERATION = -1
CLOCKS = (
    "train_seconds: the steps, their batches and the teacher's passes. wall_seconds: all that is charged to the "
    "generation so far: besides those warm-up and compilation, views, a teacher's label table where this generation "
    "made it, saving, and the evaluation after every epoch; with the last epoch, the final measurement of test and "
    "training set too. Sums over all sessions; what a kill lost and was trained again counts once. Not in them: start "
    "of the process, reading the data, and the generations before."
)


class TrainingFailed(FastgenError):
    """The training ended with an error of its own, which it told."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the training ended with exit code {code}")
        self.exit_code = code if code in (1, 2) else 1


@dataclass(frozen=True)
class Point:
    """A network at the end of an epoch, evaluated.

    Attributes:
        epochs: trained so far.
        top1_error: percent.
        train_seconds, wall_seconds: see CLOCKS.
    """

    epochs: int
    top1_error: float
    train_seconds: float
    wall_seconds: float


@dataclass(frozen=True)
class Curve:
    """What is known of a generation.

    Attributes:
        role: `patriarch`, `student` or `independent`.
        node: its id.
        points: in the order of the epochs; those that were not evaluated are missing.
        sessions: in which it was trained, in this run folder; 0: it was trained by another run.
    """

    generation: int
    role: str
    node: str
    points: tuple[Point, ...]
    sessions: int

    def first_at(self, top1_error: float) -> Point | None:
        """The first evaluated epoch whose error is the target or less."""
        return next((point for point in self.points if point.top1_error <= top1_error), None)

    @property
    def best(self) -> Point:
        """The evaluated epoch with the lowest error; the first of equals."""
        return min(self.points, key=lambda point: point.top1_error)

    def unknown_before(self, point: Point) -> int:
        """Epochs before this one that were not evaluated, any of which may have been good enough."""
        return point.epochs - 1 - sum(other.epochs < point.epochs for other in self.points)


@dataclass(frozen=True)
class Asked:
    """What is measured.

    Attributes:
        recipe: resolved.
        cfg: its file.
        words: command line of `fastgen.train`.
        overrides: `section.key=value` as given, without the places of this machine.
        top1_error: the target, in percent.
        generation: the only one to be told; None: all that are trained.
    """

    recipe: Recipe
    cfg: Path
    words: tuple[str, ...]
    overrides: tuple[str, ...]
    top1_error: float
    generation: int | None

    @property
    def folder(self) -> Path:
        """The run folder."""
        return run_dir(self.recipe)


def ask(words: Sequence[str], top1_error: float, generation: int | None) -> Asked:
    """Reads the recipe.

    Raises:
        UserError: the recipe or an override is wrong, or will not give what is asked for.
    """
    line = parse_words(words)
    if "run.eval_every_epochs" in line.overrides:
        raise UserError("--run.eval_every_epochs: every epoch is evaluated here: leave it out")
    all_words = (*words, "--run.eval_every_epochs=1")
    recipe = read_recipe(all_words)
    if recipe.run.dry:
        raise UserError("run.dry: there is nothing to measure in a plan: leave it out")
    if recipe.data.backend == "synthetic":
        raise UserError("data.backend = synthetic: its labels are random, so its errors mean nothing: name another")
    trained = range(recipe.gen.generations + 1) if recipe.gen.only is None else (recipe.gen.only,)
    if generation is not None and generation not in trained:
        raise UserError(f"--generation={generation}: the recipe trains {', '.join(map(str, trained))}")
    overrides = tuple(f"{key}={text}" for key, text in line.overrides.items() if key not in PLACES)
    return Asked(recipe, line.cfg, all_words, overrides, top1_error, generation)


def train(words: Sequence[str]) -> None:
    """Trains in a process of its own, to its end.

    Raises:
        Stopped: a signal came; the training has saved and ended.
        TrainingFailed: it ended with an error.
    """
    with StopRequest() as stop:
        # A session of its own: a Ctrl-C in the terminal reaches this process alone, which passes it on once.
        process = subprocess.Popen(training_command(words), start_new_session=True)
        try:
            while process.poll() is None and not stop.requested:
                time.sleep(POLL_SECONDS)
        finally:
            stop_trainings([process])
        stop.check()
    if process.returncode != 0:
        raise TrainingFailed(process.returncode)


def read_curves(events: Iterable[Mapping[str, Any]], epochs: int) -> list[Curve]:
    """What a run's events tell of each generation that has a result.

    An epoch that was trained twice, before a kill and after the resume, counts as it was the second time: that is the
    training that went on, and its clock. What was told of another node under the same number is left out.

    Args:
        events: of events.jsonl, in order.
        epochs: of a generation.
    """
    curves: dict[int, Curve] = {}
    trained: dict[int, _Trained] = {}
    for event in events:
        kind, generation = event["event"], event.get("generation", NO_GENERATION)
        if kind in ("generation_begin", "result"):
            if generation not in trained or trained[generation].node != event["node"]:
                trained[generation] = _Trained(event["node"])
            trained[generation].sessions += kind == "generation_begin"
        if kind == "epoch" and generation in trained:
            trained[generation].note(event)
        if kind == "result":
            curves[generation] = trained[generation].curve(event, epochs)
    return [curves[generation] for generation in sorted(curves)]


@dataclass
class _Trained:
    """What was told of a node so far."""

    node: str
    points: dict[int, Point] = field(default_factory=dict)
    sessions: int = 0

    def note(self, event: Mapping[str, Any]) -> None:
        """An epoch ended; what an earlier session told of it does not hold any more, evaluated again or not."""
        number = event["epoch"] + 1
        self.points.pop(number, None)
        if "top1_error" in event:
            self.points[number] = _point(number, event)

    def curve(self, result: Mapping[str, Any], epochs: int) -> Curve:
        """All of it, with the last epoch, which is measured when the generation is finished."""
        points = self.points | {epochs: _point(epochs, result)}
        in_order = tuple(points[number] for number in sorted(points))
        return Curve(result["generation"], result["role"], self.node, in_order, self.sessions)


def _point(epochs: int, event: Mapping[str, Any]) -> Point:
    return Point(epochs, event["top1_error"], event["train_seconds"], event["wall_seconds"])


def report(asked: Asked, curves: Sequence[Curve]) -> None:
    """Prints a row a generation, and what the seconds mean."""
    target = asked.top1_error
    title = f"{asked.cfg.stem}: until the top-1 error at the end of an epoch is {target:g} % or less"
    table = new_table(title, ("generation", "top-1 %", "epochs", "train seconds", "wall seconds"))
    for curve in curves:
        table.add_row(f"{curve.generation} {curve.role}", *_cells(curve, target, asked.recipe.train.epochs))
    print_table(table)
    for curve in curves:
        for note in notes(curve, target):
            print(f"generation {curve.generation}: {note}")
    print(CLOCKS)


def _cells(curve: Curve, target: float, epochs: int) -> tuple[str, ...]:
    point = curve.first_at(target)
    if point is None:
        best = curve.best
        return f"not reached, best {best.top1_error:.2f}", f"{best.epochs} of {epochs}", "-", "-"
    seconds = (f"{value:,.1f}" for value in (point.train_seconds, point.wall_seconds))
    return f"{point.top1_error:.2f}", f"{point.epochs} of {epochs}", *seconds


def notes(curve: Curve, target: float) -> list[str]:
    """What the reader has to know beside the figures."""
    point = curve.first_at(target) or curve.points[-1]
    unknown = curve.unknown_before(point)
    found = []
    if curve.sessions == 0:
        found.append("was trained by another run, whose epochs are not told here")
    if unknown:
        found.append(f"{unknown} of the {point.epochs - 1} epochs before were not evaluated; it may have been earlier")
    if curve.sessions > 1:
        found.append(f"trained in {curve.sessions} sessions")
    return found


def result_rows(asked: Asked, curves: Sequence[Curve], device: torch.device) -> list[dict[str, Any]]:
    """One row a generation, for time_to_accuracy.csv. A target that was not reached has no seconds."""
    return [_row(asked, curve, device) for curve in curves]


def _row(asked: Asked, curve: Curve, device: torch.device) -> dict[str, Any]:
    recipe, point, best = asked.recipe, curve.first_at(asked.top1_error), curve.best
    environment = Node(asked.folder / f"generation_{curve.generation}").facts()["training"]["environment"]
    trained_by = {name: environment[name] for name in TRAINED_BY} | {"torch": environment["packages"]["torch"]}
    results = read_json(asked.folder / "results.json")
    return {
        **machine_facts(device),
        **trained_by,
        "recipe": asked.cfg.name,
        "overrides": " ".join(asked.overrides),
        "seed": recipe.run.seed,
        "model": recipe.model.name,
        "engine": recipe.train.engine,
        "precision": recipe.train.precision,
        "batch_size": recipe.train.batch_size,
        "evaluated_on": results["evaluated_on"],
        "generation": curve.generation,
        "role": curve.role,
        "node": curve.node,
        "target_top1_error_percent": asked.top1_error,
        "reached": point is not None,
        "epochs": point and point.epochs,
        "epochs_of_the_run": recipe.train.epochs,
        "top1_error_percent": point and round(point.top1_error, 5),
        "train_seconds": point and round(point.train_seconds, 3),
        "wall_seconds": point and round(point.wall_seconds, 3),
        "best_top1_error_percent": round(best.top1_error, 5),
        "best_epochs": best.epochs,
        "epochs_not_evaluated_before": curve.unknown_before(point or curve.points[-1]),
        "sessions": curve.sessions,
    }


def append_new_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Appends the rows that do not stand in the file already: a finished run may be asked again."""
    known = {_key(row) for row in read_rows(path)}
    new = [row for row in rows if _key(row) not in known]
    append_rows(path, new)
    print(f"{path}: {len(new)} of {len(rows)} rows are new")


def _key(row: Mapping[str, Any]) -> tuple[str, ...]:
    # The best epoch and the seconds tell two trainings of one node apart.
    names = ("node", "target_top1_error_percent", "epochs", "train_seconds", "wall_seconds", "best_epochs", "device")
    return tuple("" if row.get(name) is None else str(row[name]) for name in names)


def main(words: Sequence[str]) -> None:
    """The command."""
    if {"--help", "-h"} & set(words):
        print(f"{_parser().format_help()}\n{help_text('python -m benchmarks.time_to_accuracy --top1_error=35')}")
        return
    own, rest = split_words(words, OWN_WORDS)
    options = _parser().parse_args(own)
    asked = ask(rest, options.top1_error, options.generation)
    device = choose_device(asked.recipe.run)
    print(facts_line(device), flush=True)
    try:
        train(asked.words)
    except Stopped:
        print(f"go on with: python -m benchmarks.time_to_accuracy {shlex.join(words)}", flush=True)
        raise
    curves = read_curves(read_events(asked.folder), asked.recipe.train.epochs)
    wanted = asked.recipe.gen.only if asked.generation is None else asked.generation
    told = [curve for curve in curves if wanted in (None, curve.generation)]
    report(asked, told)
    append_new_rows(options.results / "time_to_accuracy.csv", result_rows(asked, told, device))


def _percent(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no number") from None
    if not 0 <= value < 100:
        raise argparse.ArgumentTypeError(f"'{text}' is no error in percent, from 0 to below 100")
    return value


def _parser() -> Arguments:
    parser = Arguments("benchmarks.time_to_accuracy", "Seconds until a network's error is first low enough.")
    parser.add_argument("--top1_error", type=_percent, required=True, help="the target, in percent")
    parser.add_argument(
        "--generation", type=int, help="tell this one alone; gen.generations says how many are trained; default all"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of time_to_accuracy.csv")
    return parser


if __name__ == "__main__":
    sys.exit(command(main, sys.argv[1:]))
