"""The run folder: recipe, plan, environment, events, results, TensorBoard files; and who watches.

recipe.yaml  plan.json  environment.json  events.jsonl  results.json  tensorboard/
generation_<g> -> the node that holds model.safetensors (and checkpoint-<step>.pt while it trains)
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch
from rich.console import Console

from fastgen.config import Recipe
from fastgen.environment import describe_environment
from fastgen.errors import UserError
from fastgen.files import write_atomically, write_json
from fastgen.locks import locked
from fastgen.meters import Reading
from fastgen.nodes import Node
from fastgen.plan import Generation
from fastgen.progress import Display, Leg
from fastgen.recipe import dump, load_text
from fastgen.schedule import Schedule

GENERATION = re.compile(r"generation_(0|[1-9][0-9]*)")


def generations_in(run: Path) -> dict[int, Path]:
    """Generations that were begun, in their order; what a person has put there under another name is none."""
    found = ((GENERATION.fullmatch(path.name), path) for path in run.glob("generation_*"))
    return dict(sorted((int(match[1]), path) for match, path in found if match))


class RunFolder:
    """Files of one run; made by `open_run`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def link(self, generation: Generation, node: Node) -> None:
        """Lets generation_<g> lead to its node."""
        target = os.path.relpath(node.folder.resolve(), self.path.resolve())
        link, fresh = self.path / f"generation_{generation.index}", self.path / f".generation_{generation.index}"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(target)
        fresh.replace(link)

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Writes results.json."""
        write_json(self.path / "results.json", results)


@contextmanager
def open_run(
    recipe: Recipe,
    plan: Sequence[Generation],
    device: torch.device,
    processes: int = 1,
    check: Callable[[], None] = lambda: None,
) -> Iterator[RunFolder]:
    """Makes the run folder, or takes up the one that is there, and holds it for this process.

    Args:
        recipe: of the run.
        plan: its generations.
        device: that this process trains on.
        processes: of the run.
        check: called while a lock of a process that may be gone is waited for; what it raises ends the waiting.

    Raises:
        UserError: it holds another recipe, other files, or is in use; or resuming was ruled out.
    """
    path = run_dir(recipe)
    _refuse_strangers(path, recipe)
    path.mkdir(parents=True, exist_ok=True)
    with locked(path, "the run folder", say=lambda text: print(text, flush=True), check=check):
        write_atomically(path / "recipe.yaml", dump(recipe).encode())
        write_json(path / "plan.json", [{"node": g.node, **asdict(g)} for g in plan])
        write_json(path / "environment.json", describe_environment(device, processes))
        yield RunFolder(path)


def run_dir(recipe: Recipe) -> Path:
    """The run folder that a resolved recipe names."""
    if recipe.run.dir is None:
        raise ValueError("the recipe's run.dir is not filled in: recipe.read_recipe does that")
    return Path(recipe.run.dir)


def _refuse_strangers(path: Path, recipe: Recipe) -> None:
    stored = path / "recipe.yaml"
    if not stored.exists():
        if path.exists() and not path.is_dir():
            raise UserError(f"{path}: is a file, not a run folder: name another with run.dir")
        entries = [entry.name for entry in path.iterdir()] if path.is_dir() else []
        strangers = [name for name in entries if name != "lock" and not name.startswith(".")]
        if strangers:
            raise UserError(f"{path}: is no run folder of fastgen (found {strangers[0]}): name another with run.dir")
        return
    if not recipe.run.resume:
        raise UserError(f"{path}: this run is there already and run.resume is false: name another folder with run.dir")
    if load_text(stored.read_text(), str(stored)).identity() != recipe.identity():
        raise UserError(
            f"{path}: holds a run of another recipe ({_difference(stored, recipe)}): name another folder with run.dir"
        )


def _difference(stored: Path, recipe: Recipe) -> str:
    there, here = _flat(load_text(stored.read_text(), str(stored))), _flat(recipe)
    for name in {**here, **there}:
        theirs, ours = (settings.get(name, "its default") for settings in (there, here))
        if theirs != ours:
            return f"its {name} is {theirs}, not {ours}"
    return "it differs"


def _flat(recipe: Recipe) -> dict[str, Any]:
    return {f"{section}.{key}": value for section, keys in recipe.identity().items() for key, value in keys.items()}


def read_events(folder: Path) -> Iterator[dict[str, Any]]:
    """Events of a run folder; none where there is no events.jsonl.

    What is no event is left out: halves of lines, which kills leave, and whatever else has no `event`.
    """
    path = folder / "events.jsonl"
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError):
            found = json.loads(line)
            if isinstance(found, dict) and isinstance(found.get("event"), str):
                yield found


class Recorder:
    """Tells events to events.jsonl, to TensorBoard and to the display.

    Args:
        folder: run folder; None: tells nobody, as another process of the run does.
        console: of the display.
        to_train: indices of the generations that this session has still to train.
        last_index: of the run's last generation.
    """

    def __init__(self, folder: Path | None, console: Console, to_train: Sequence[int], last_index: int) -> None:
        self.folder = folder
        self.display = Display(console)
        self._to_train = tuple(to_train)
        self._last_index = last_index
        self._events = None if folder is None else (folder / "events.jsonl").open("a+b", buffering=0)
        if self._events is not None:
            _end_torn_line(self._events)
        self._board: Any = None

    def begin(
        self, generation: Generation, schedule: Schedule, images: int, first_step: int, facts: Mapping[str, Any]
    ) -> None:
        """A generation starts, or goes on at `first_step`."""
        if self.folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            folder = self.folder / "tensorboard" / f"generation_{generation.index}"
            self._board = SummaryWriter(str(folder), purge_step=first_step)
        self._generation = generation.index
        self.event("generation_begin", generation=generation.index, node=generation.node, step=first_step, **facts)
        left = sum(index > generation.index for index in self._to_train)
        self.display.begin(
            Leg(
                generation.index, self._last_index, generation.role, first_step, schedule.total_steps,
                schedule.steps_per_epoch, images, left,
            )
        )  # fmt: skip

    def stepped(self, step: int) -> None:
        """A step was issued; does not wait for the device."""
        self.display.stepped(step)

    def log(self, step: int, lr: float, reading: Reading, images_per_second: float) -> None:
        """A reading of the device's sums."""
        values = {"loss": reading.loss, "accuracy": reading.accuracy, "lr": lr, "images_per_second": images_per_second}
        self.event("step", generation=self._generation, step=step, **values)
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"train/{name}", value, step)
        self.display.log(reading, lr)

    def epoch(self, step: int, row: Mapping[str, Any]) -> None:
        """An epoch ended."""
        self.event("epoch", generation=self._generation, step=step, **row)
        for name in ("top1_error", "top5_error"):
            if name in row and self._board is not None:
                self._board.add_scalar(f"evaluation/{name}", row[name], step)

    def end_generation(self) -> None:
        """Training of a generation ended, or was broken off."""
        self.display.end()
        if self._board is not None:
            self._board.close()
            self._board = None

    def event(self, kind: str, **facts: Any) -> None:
        """Appends one line to events.jsonl."""
        if self._events is None:
            return
        line = json.dumps({"event": kind, "time": round(time.time(), 3), **facts})
        self._events.write(line.encode() + b"\n")

    def say(self, text: str) -> None:
        """Prints a line."""
        self.display.say(text)

    def close(self) -> None:
        """Closes the files."""
        self.end_generation()
        if self._events is not None:
            self._events.close()


def _end_torn_line(events: IO[bytes]) -> None:
    """A kill in the middle of a line leaves half of one: it is closed, so that the next stands alone."""
    if events.tell() and os.pread(events.fileno(), 1, events.tell() - 1) != b"\n":
        events.write(b"\n")
