"""The command: trains a grid of recipes, each generation that runs share once, and tells which cell is best.

python -m fastgen.sweep --cfg rcp/c100_r20_gen.yaml --data.holdout=5000 \
    --grid gen.teacher_weight=0.5,0.6,0.7 --grid gen.confidence=0.6,1.0 --seeds 3 [--section.key=value ...]

Cells are chosen between by images that are held out of the training set, never by the test set. Each generation is a
process of its own, one on each GPU at a time; a teacher is trained before its students, and once for all of them. The
same command goes on where it was. It ends with mean and standard deviation of a cell's errors, generation by
generation: a table, sweep.csv, and sweep.png in the form of arXiv 1805.05551's Figure 2.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastgen.arguments import Arguments, at_least_one, split_words
from fastgen.config import Recipe, hash_of
from fastgen.crew import Crew
from fastgen.data import open_dataset
from fastgen.device import choose_device
from fastgen.errors import FastgenError, UserError, command
from fastgen.files import write_atomically, write_json
from fastgen.grid import (
    Axis,
    Run,
    Training,
    cells_of,
    parse_axis,
    recipe_path,
    recipes_of,
    run_folder,
    runs_of,
    trainings_of,
)
from fastgen.locks import Watch, locked
from fastgen.nodes import find_node, nodes_folder, read_json
from fastgen.recipe import dump, help_text, parse_words
from fastgen.stop import StopRequest
from fastgen.sweep_report import is_measured, report
from fastgen.sweep_slurm import Wanted, submit
from fastgen.trainings import POLL_SECONDS

SLURM_MINUTES, SLURM_MORE = "--slurm_minutes", "--slurm_more"
SLURM_WORDS = (SLURM_MINUTES, "--slurm_partition", "--slurm_cpus", SLURM_MORE)
# How a sweep is run, and not which one it is.
NOT_IN_THE_NAME = ("run.dry", "run.stop_after_minutes")
OWN_WORDS = ("--grid", "--seeds", "--at_once", "--dir", *SLURM_WORDS)
# Without a value.
REPORT = "--report"


class TrainingsFailed(FastgenError):
    """Trainings that ended with an error of their own; told line by line before."""


class Places:
    """Where trainings run: GPUs, each for as many at a time, and shares of the cores.

    Args:
        device: that the recipe asks for.
        at_once: trainings at the same time; None: one on each GPU, or one on a CPU.
        workers: data.workers of the recipe; None: a training's share of the cores.

    Attributes:
        words: for the command line of every training.
    """

    def __init__(self, device: torch.device, at_once: int | None, workers: int | None = None) -> None:
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        count = torch.cuda.device_count() if device.type == "cuda" else 0
        self._gpus = named.split(",")[:count] if named else [str(gpu) for gpu in range(count)]
        self.at_once = at_once or max(1, count)
        self._cores = max(1, len(os.sched_getaffinity(0)) // self.at_once)
        self.words = (f"--data.workers={self._cores}",) if self.at_once > 1 and workers is None else ()
        self._free = list(range(self.at_once))
        self._taken: dict[str, int] = {}

    def take(self, name: str) -> Mapping[str, str]:
        """A place for a training; gives what its process is told of it."""
        place = self._taken[name] = self._free.pop(0)
        gpu = {"CUDA_VISIBLE_DEVICES": self._gpus[place % len(self._gpus)]} if self._gpus else {}
        if self.at_once == 1 or "OMP_NUM_THREADS" in os.environ:
            return gpu
        return {**gpu, "OMP_NUM_THREADS": str(self._cores)}

    def leave(self, name: str) -> None:
        """Its training has ended."""
        self._free.append(self._taken.pop(name))


class Others:
    """Processes of other commands that train what is to be trained here: they are waited for."""

    def __init__(self) -> None:
        self._watch = Watch()
        self._told = set[str]()

    def hold(self, training: Training) -> bool:
        """Whether one holds a folder that a training needs; told once."""
        for folder in training.folders:
            holder = self._watch.holder(folder)
            if holder and training.name not in self._told:
                self._told.add(training.name)
                print(f"{training.name} waits for {holder}, which holds {folder}", flush=True)
            if holder:
                return True
        return False


def run_all(trainings: Sequence[Training], finished: Iterable[str], places: Places, stop: StopRequest) -> list[str]:
    """Runs all trainings, each when what it needs is trained; on a signal, stops those that run and starts no more.

    Those that a sweep which was killed left behind, or that another one runs, are waited for.

    Args:
        trainings: in the order in which they are started where they can be.
        finished: nodes that are trained already.
        places: where they run.
        stop: asked for signals.

    Returns:
        what failed, and what could not be begun for that, a line each.
    """
    waiting, crew, others, there = list(trainings), Crew[Training](), Others(), {*finished}
    failed: list[str] = []
    began, done = time.monotonic(), 0
    try:
        while (waiting or crew) and not stop.requested:
            for training in [one for one in waiting if one.needs <= there]:
                if len(crew) < places.at_once and not others.hold(training):
                    waiting.remove(training)
                    crew.start(replace(training, words=training.words + places.words), places.take(training.name))
            for ended in crew.reap():
                places.leave(ended.task.name)
                if ended.code and not stop.requested and others.hold(ended.task):
                    # Another command was first, between our look and the training's own.
                    waiting.append(next(one for one in trainings if one.name == ended.task.name))
                    continue
                done += 1
                if ended.code:
                    failed.append(f"{ended.task.name} {ended.how}")
                elif ended.task.makes is not None:
                    there.add(ended.task.makes)
                print(_progress(done, len(trainings), time.monotonic() - began), flush=True)
            if not crew and waiting and not any(one.needs <= there for one in waiting):
                return failed + [f"{one.name} was not begun" for one in waiting]
            time.sleep(POLL_SECONDS)
    finally:
        crew.stop()
        crew.reap()
    return failed


def _progress(done: int, count: int, seconds: float) -> str:
    left = seconds / done * (count - done)
    return f"{done} of {count} processes done, {3600 * done / seconds:.0f} an hour, about {left / 60:.0f} minutes left"


def main(words: Sequence[str]) -> None:
    """The command.

    Raises:
        UserError: words, a recipe or data are wrong; nothing was started.
        Stopped: a signal came; what ran has saved and ended.
        TrainingsFailed: some failed; the others ran all the same.
    """
    if {"--help", "-h"} & set(words):
        print(f"{_parser().format_help()}\n{help_text('python -m fastgen.sweep --grid section.key=value,value')}")
        return
    own, rest = split_words([word for word in words if word != REPORT], OWN_WORDS, many=("--grid", SLURM_MORE))
    own += [REPORT] * (REPORT in words)
    options = _parser().parse_args(own)
    _require_minutes(own)
    cells = cells_of(options.grid)
    runs = runs_of(recipes_of(rest, cells, options.seeds), open_dataset)
    nodes = nodes_folder(runs[0].recipe)
    folder = options.dir or _folder(nodes, rest, options.grid)
    trainings = trainings_of(
        runs, folder, lambda node: find_node(nodes, node) is not None, lambda run: is_measured(folder, run)
    )
    _announce(runs, trainings, folder)
    if runs[0].recipe.run.dry:
        return
    _require_one_grid(folder, options.grid)
    if options.report:
        report(folder, _name(rest), runs)
        return
    with StopRequest() as stop:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, "this sweep", check=stop.check):
            _write_recipes(folder, runs, options.grid)
            there = {g.node for run in runs for g in run.plan if find_node(nodes, g.node) is not None}
            if options.slurm_minutes is not None and trainings:
                _submit(trainings, there, folder, runs[0].recipe, options, words)
                return
            first = runs[0].recipe
            places = Places(choose_device(first.run), options.at_once, first.data.workers)
            failed = run_all(trainings, there, places, stop)
            if stop.requested:
                print(f"go on with: python -m fastgen.sweep {shlex.join(words)}", flush=True)
            stop.check()
            report(folder, _name(rest), runs)
    if failed:
        raise TrainingsFailed(f"{len(failed)} of {len(trainings)} failed: {'; '.join(failed)}")


def _submit(
    trainings: Sequence[Training],
    there: Iterable[str],
    folder: Path,
    recipe: Recipe,
    options: Any,
    words: Sequence[str],
) -> None:
    wanted = Wanted(
        minutes=options.slurm_minutes,
        partition=options.slurm_partition,
        gpus=0 if recipe.run.device == "cpu" else 1,
        cpus=options.slurm_cpus or Wanted.cpus,
        at_once=options.at_once,
        more=tuple(options.slurm_more),
    )
    arrays = submit(trainings, there, folder, nodes_folder(recipe), wanted)
    _, rest = split_words(words, SLURM_WORDS, many=(SLURM_MORE,))
    print(
        f"submitted {len(trainings)} trainings as Slurm arrays {', '.join(arrays)}, logs in {folder / 'slurm'}; what "
        f"has come of them: python -m fastgen.sweep {shlex.join(rest)} --report"
    )


def _folder(nodes: Path, words: Sequence[str], axes: Sequence[Axis]) -> Path:
    """Where a sweep is kept unless it is told: beside its generations. Other seeds are the same sweep."""
    line = parse_words(words)
    decisive = sorted((key, value) for key, value in line.overrides.items() if key not in NOT_IN_THE_NAME)
    what: list[Any] = [decisive, line.cfg.read_text(), _grid(axes)]
    return nodes.parent / f"sweep-{line.cfg.stem}-{hash_of(what)[:8]}"


def _require_one_grid(folder: Path, axes: Sequence[Axis]) -> None:
    """Refuses a folder of another sweep: its runs would stand under other cells' names."""
    path = folder / "sweep.json"
    if path.exists() and read_json(path)["grid"] != _grid(axes):
        raise UserError(f"{folder}: holds a sweep of another grid: name another folder with --dir")


def _grid(axes: Sequence[Axis]) -> list[list[str]]:
    """A list, as the order of axes numbers the cells."""
    return [[axis.key, *axis.values] for axis in axes]


def _require_minutes(own: Sequence[str]) -> None:
    given = {word.partition("=")[0] for word in own}
    alone = sorted(given & {*SLURM_WORDS} - {SLURM_MINUTES})
    if alone and SLURM_MINUTES not in given:
        raise UserError(f"{alone[0]} has no say without {SLURM_MINUTES}, which submits the sweep to Slurm: give both")


def _announce(runs: Sequence[Run], trainings: Sequence[Training], folder: Path) -> None:
    generations = sum(len(run.plan) for run in runs)
    nodes = len({generation.node for run in runs for generation in run.plan})
    left = sum(training.makes is not None for training in trainings)
    cells = len({run.cell.number for run in runs})
    print(
        f"{folder}: {cells} cells x {len(runs) // cells} seeds = {len(runs)} runs of {generations} generations: "
        f"{nodes} different ones ({generations - nodes} shared), {nodes - left} of them trained already",
        flush=True,
    )


def _write_recipes(folder: Path, runs: Sequence[Run], axes: Sequence[Axis]) -> None:
    for run in runs:
        path = recipe_path(folder, run)
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, dump(run.recipe).encode())
    about: dict[str, Any] = {"grid": _grid(axes)}
    about["runs"] = [
        {"folder": str(run_folder(folder, run).relative_to(folder)), "cell": dict(run.cell.values), "seed": run.seed,
         "nodes": [generation.node for generation in run.plan]}
        for run in runs
    ]  # fmt: skip
    write_json(folder / "sweep.json", about)


def _name(words: Sequence[str]) -> str:
    return parse_words(words).cfg.stem


def _seeds(text: str) -> list[int]:
    """How many, from 0 on; or a list of them."""
    words = text.removesuffix(",").split(",")
    if all(word.isascii() and word.isdigit() for word in words):
        seeds = [int(word) for word in words] if "," in text else list(range(int(text)))
        if seeds and len({*seeds}) == len(seeds):
            return seeds
    raise argparse.ArgumentTypeError(
        f"'{text}' is neither a number of seeds, such as 3, nor a list such as 0,1,2 or 7,"
    )


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"'{text}' is no option of sbatch with its value, such as account=NAME")
    return name, value


def _axis(text: str) -> Axis:
    try:
        return parse_axis(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _parser() -> Arguments:
    parser = Arguments("fastgen.sweep", "Trains a grid of recipes; generations that runs share are trained once.")
    parser.add_argument(
        "--grid", type=_axis, action="append", required=True,
        help="a setting and its values, as gen.teacher_weight=0.5,0.7; may be given several times",
    )  # fmt: skip
    parser.add_argument("--seeds", type=_seeds, default=[0], help="how many, from 0 on, or a list as 3,5; default 1")
    parser.add_argument("--at_once", type=at_least_one, help="processes at a time; default one a GPU, 1 on a CPU")
    parser.add_argument(SLURM_MINUTES, type=at_least_one, help="submit Slurm arrays with this time limit a training")
    parser.add_argument("--slurm_partition", default="", help="of the cluster; default its own")
    parser.add_argument("--slurm_cpus", type=at_least_one, help=f"cores of each training; default {Wanted.cpus}")
    parser.add_argument(
        SLURM_MORE, type=_pair, action="append", default=[],
        help="another option of sbatch, as account=NAME; may be given several times",
    )  # fmt: skip
    parser.add_argument(REPORT, action="store_true", help="train nothing, only tell what has come of it so far")
    parser.add_argument("--dir", type=Path, help="folder of the sweep; default runs/sweep-<recipe>-<hash>")
    return parser


if __name__ == "__main__":
    sys.exit(command(main, sys.argv[1:]))
