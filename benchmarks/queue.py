"""Takes the next pieces of a list of long experiments, so that minutes on a borrowed machine add up.

python -m benchmarks.queue --minutes=8 --data.root=DIR [--out=runs/queue]
python -m benchmarks.queue --data.root=DIR --list

Each entry of queue.yaml is a run of `fastgen.train` in a process of its own. When the minutes are
up it is stopped by SIGTERM: it saves and ends, and a later call goes on there. What is done is read
off the run folders under --out and nowhere else, so carrying that folder carries the progress. The
rows of a finished run are appended to results/queue.csv, once.

Steps are run by the fastest way that has passed `gpu_check` on a device of this name with this torch
(results/checks.csv, results/step.csv), told for each entry; where none has, as the recipe says. The way is part of what
decides the weights: an entry that was begun goes on as it was begun.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import RESULTS, ROOT, append_rows, positive_minutes, read_rows
from benchmarks.rigs import Way
from benchmarks.verdicts import fastest
from fastgen.arguments import Arguments
from fastgen.config import Recipe, hash_of
from fastgen.device import choose_device
from fastgen.errors import FastgenError, UserError, command
from fastgen.nodes import Node, read_json, step_of
from fastgen.recipe import load_text, read_recipe
from fastgen.stop import StopRequest
from fastgen.trainings import POLL_SECONDS, STOPPED_CODES, stop_trainings, training_command

QUEUE = ROOT / "benchmarks" / "queue.yaml"


@dataclass(frozen=True)
class Entry:
    """One experiment of the list.

    Attributes:
        recipe: path of the recipe file, from the repository's root.
        seed: run.seed.
        overrides: `section.key` -> text, as on the command line.
    """

    recipe: str
    seed: int
    overrides: Mapping[str, str]

    @property
    def name(self) -> str:
        """Name of its run folder: another one for each recipe, seed and set of overrides."""
        changed = f"-{hash_of(dict(self.overrides))[:6]}" if self.overrides else ""
        return f"{Path(self.recipe).stem}-seed{self.seed}{changed}"

    def words(self, data_root: Path, out: Path, way: Way | None = None) -> list[str]:
        """Command line of `fastgen.train`.

        Args:
            data_root, out: data.root, and the folder of runs and nodes.
            way: how steps are run, where the entry does not say so itself; None: as the recipe says.
        """
        settings = {
            "run.dir": str(out.resolve() / self.name),
            "run.nodes": str(out.resolve() / "nodes"),
            "run.seed": str(self.seed),
            "data.root": str(data_root.resolve()),
            **({} if way is None else {f"train.{name}": value for name, value in way._asdict().items()}),
            **self.overrides,
        }
        return [f"--cfg={ROOT / self.recipe}", *(f"--{key}={value}" for key, value in settings.items())]


@dataclass(frozen=True)
class Experiment:
    """An entry with its recipe, resolved for this machine's folders."""

    entry: Entry
    recipe: Recipe
    words: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """The run folder."""
        if self.recipe.run.dir is None:
            raise ValueError("the recipe's run.dir is not filled in")
        return Path(self.recipe.run.dir)

    @property
    def measured(self) -> int:
        """Generations whose row stands in results.json."""
        path = self.folder / "results.json"
        return len(read_json(path)["generations"]) if path.exists() else 0

    @property
    def done(self) -> bool:
        """Whether all generations are trained and measured."""
        return self.measured == self.recipe.gen.generations + 1

    def state(self) -> str:
        """`done`, `generation g step s`, or `not begun`."""
        if self.done:
            return "done"
        if not self.folder.exists():
            return "not begun"
        generation = self.measured
        saved = Node(self.folder / f"generation_{generation}").checkpoints
        step = step_of(saved[0]) if saved else 0
        return f"generation {generation} step {step}"


class EntriesFailed(FastgenError):
    """Runs that ended with an error of their own; told line by line before."""


def read_queue(path: Path) -> list[Entry]:
    """Reads the list, strictly.

    Raises:
        UserError: it is missing, is no such list, or names an experiment twice.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such list") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, list):
        raise UserError(f"{path}: must be a list of entries with recipe, seed and overrides")
    entries = [_entry(path, number, value) for number, value in enumerate(content, start=1)]
    names = [entry.name for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: {name} stands twice: keep one")
    return entries


def _entry(path: Path, number: int, value: Any) -> Entry:
    if not isinstance(value, dict) or not {"recipe", "seed"} <= set(value) <= {"recipe", "seed", "overrides"}:
        raise UserError(f"{path}: entry {number} must have recipe and seed, and may have overrides; found {value}")
    recipe, seed, overrides = value["recipe"], value["seed"], value.get("overrides", {})
    if not isinstance(recipe, str) or type(seed) is not int or not isinstance(overrides, dict):
        raise UserError(f"{path}: entry {number}: recipe is a path, seed an integer, overrides a mapping")
    return Entry(recipe, seed, {str(key): _text(override) for key, override in overrides.items()})


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def take_pieces(experiments: Sequence[Experiment], seconds: float, results: Path) -> None:
    """Works on the list until the time is up or all is done.

    Raises:
        Stopped: a signal came; the running training has saved and ended.
        EntriesFailed: a training ended with an error; those after it were worked on all the same.
    """
    deadline, failed = time.monotonic() + seconds, []
    with StopRequest() as stop:
        for experiment in experiments:
            # Also of those that were done before: a kill may have come between a run's end and its rows.
            if not experiment.done and time.monotonic() < deadline and not stop.requested:
                way = Way(*(getattr(experiment.recipe.train, name) for name in Way._fields))
                print(f"{experiment.entry.name}: {experiment.state()}, by {way.name}", flush=True)
                code = _train(experiment, deadline, stop)
                print(f"{experiment.entry.name}: {experiment.state()}", flush=True)
                if code != 0 and code not in STOPPED_CODES:
                    print(f"{experiment.entry.name}: FAILED with exit code {code}", flush=True)
                    failed.append(experiment.entry.name)
            if experiment.done:
                append_new_rows(results / "queue.csv", experiment)
        stop.check()
    if failed:
        raise EntriesFailed(f"{len(failed)} of the entries failed: {', '.join(failed)}")


def _train(experiment: Experiment, deadline: float, stop: StopRequest) -> int:
    """Runs the training as a process until it ends, or until the time is up or a signal comes.

    Returns:
        its exit code; negative: the signal that ended it.
    """
    # A session of its own: a Ctrl-C in the terminal reaches this process alone, which passes it on once.
    process = subprocess.Popen(training_command(experiment.words), cwd=ROOT, start_new_session=True)
    try:
        while process.poll() is None and time.monotonic() < deadline and not stop.requested:
            time.sleep(POLL_SECONDS)
    finally:
        stop_trainings([process])
    return process.returncode


def append_new_rows(path: Path, experiment: Experiment) -> None:
    """Appends a finished run's rows, unless they stand in the file already."""
    known = {(row["entry"], row["node"]) for row in read_rows(path)}
    rows = [row for row in _rows(experiment) if (row["entry"], row["node"]) not in known]
    append_rows(path, rows)
    if rows:
        print(f"{experiment.entry.name}: {len(rows)} rows appended to {path}")


def _rows(experiment: Experiment) -> list[dict[str, Any]]:
    """One row a generation; machine and versions are those of the run's last piece."""
    results = read_json(experiment.folder / "results.json")
    environment = read_json(experiment.folder / "environment.json")
    entry = experiment.entry
    return [
        {
            "entry": entry.name,
            "recipe": entry.recipe,
            "seed": entry.seed,
            "overrides": " ".join(f"{key}={value}" for key, value in entry.overrides.items()),
            "precision": experiment.recipe.train.precision,
            "epochs": experiment.recipe.train.epochs,
            **{_CSV_NAMES.get(key, key): _rounded(row[key]) for key in _RESULT_KEYS},
            "device": environment["device"],
            "cpu": environment["cpu"],
            "cpu_cores": environment["cpu_cores"],
            "commit": environment["commit"],
            "torch": environment["packages"]["torch"],
            "python": environment["python"],
        }
        for row in results["generations"]
    ]


_RESULT_KEYS = (
    "generation", "role", "node", "top1_error", "top5_error", "ensemble_top1_error", "ensemble_top5_error",
    "samples_evaluated", "train_top1_error", "mean_confidence", "mean_label_confidence", "topk_share",
    "ideal_confidence", "ideal_confidence_at_share", "train_images_per_second", "wall_images_per_second",
    "train_seconds", "wall_seconds", "engine", "backend",
)  # fmt: skip
# results.json keeps the names of its contract; a column says its unit.
_CSV_NAMES = {key: f"{key}_percent" for key in _RESULT_KEYS if key.endswith("_error")}


def _rounded(value: Any) -> Any:
    return round(value, 5) if isinstance(value, float) else value


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder, each counted once."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def main(words: Sequence[str]) -> None:
    """The command."""
    arguments = _parse(words)
    experiments = [_experiment(entry, arguments) for entry in read_queue(arguments.queue)]
    if arguments.list:
        for experiment in experiments:
            print(f"{experiment.entry.name:<40} {experiment.state()}")
        return
    try:
        take_pieces(experiments, 60 * arguments.minutes, arguments.results)
    finally:
        undone = sum(not experiment.done for experiment in experiments)
        print(f"{len(experiments) - undone} of {len(experiments)} entries are done")
        print(f"{arguments.out}: {size_of(arguments.out) / 1e6:.1f} MB")


def _experiment(entry: Entry, arguments: Any) -> Experiment:
    words = entry.words(arguments.data_root, arguments.out)
    recipe = read_recipe(words)
    begun = Path(str(recipe.run.dir)) / "recipe.yaml"
    way = way_of(begun) if begun.exists() else _fastest(recipe, arguments)
    if way is None:
        return Experiment(entry, recipe, tuple(words))
    by_way = entry.words(arguments.data_root, arguments.out, way)
    try:
        return Experiment(entry, read_recipe(by_way), tuple(by_way))
    except UserError as error:
        print(f"{entry.name}: not by {way.name} ({error}), but as the recipe says")
        return Experiment(entry, recipe, tuple(words))


def way_of(stored: Path) -> Way:
    """How the steps of a run that was begun are run, from its recipe.yaml."""
    train = load_text(stored.read_text(encoding="utf-8"), str(stored)).train
    return Way(train.engine, train.kernels, train.batchnorm)


def _fastest(recipe: Recipe, arguments: Any) -> Way | None:
    return fastest(arguments.results, choose_device(recipe.run), recipe.train.precision)


def _parse(words: Sequence[str]) -> Any:
    parser = Arguments("benchmarks.queue", "Takes the next pieces of a list of long experiments.")
    parser.add_argument("--minutes", type=positive_minutes, default=8.0, help="then the running training is stopped")
    parser.add_argument("--data.root", dest="data_root", type=Path, required=True, help="as in a recipe")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "queue", help="folder of runs and nodes")
    parser.add_argument("--list", action="store_true", help="print the entries with their state and stop")
    parser.add_argument("--queue", type=Path, default=QUEUE, help="another list than the committed one")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of queue.csv")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(command(main, sys.argv[1:]))
