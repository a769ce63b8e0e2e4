"""Where the commands of README.md and docs/ are run: tiny data and recipes, in processes forked from the tests' server.

Commands share what they make: a run that one trains is the RUN of the next. Each runs once, after those that it names.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.abc import InspectLoader
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml
from docs_book import ROOT
from pictures import write_folder
from small_cifar import small_layouts, write_small_cifar100

SECONDS = 120
RECIPE = {
    "data": {"dataset": "digits", "train_limit": 200, "val_limit": 100},
    "model": {"name": "resnet8"},
    "train": {"epochs": 1, "batch_size": 100},
    "gen": {"generations": 3},
    "run": {"device": "cpu", "eval_every_epochs": 0},
}
# What stands for something in the commands, and where that is in the workshop.
PLACES = {
    "RECIPE": "tiny.yaml",
    "RUN": "runs/base",
    "OTHER_RUN": "runs/other",
    "PLAIN_RUN": "runs/other",
    "WEIGHTS.safetensors": "runs/base/generation_1/model.safetensors",
    "FOLDER": "made",
    "IMAGEWOOF": "photographs",
    "HOST": "localhost",
    "NAME": "somebody",
    "M": "30",
}
CIFAR, PHOTOGRAPHS = {"DIR": "cifar"}, {"DIR": "photographs"}


@dataclass(frozen=True)
class Run:
    """A command that is run to its end.

    Attributes:
        more: words after those of the docs, which make it small.
        places: what stands for what, beside PLACES.
        instead: parts of the command, and what makes them small.
        after: commands that must have been run.
        says: what its output must hold.
        library: of Python, without which the command is skipped.
    """

    more: str = ""
    places: Mapping[str, str] = field(default_factory=dict)
    instead: Mapping[str, str] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    says: str = ""
    library: str = ""


@dataclass(frozen=True)
class Planned(Run):
    """A command that trains, whose data are opened and whose plan is made, with `--run.dry=true`.

    Attributes:
        why: it is not run.
    """

    why: str = ""


@dataclass(frozen=True)
class Parsed:
    """A command whose words are read by its own parser, and nothing more.

    Attributes:
        why: it is not run.
    """

    why: str


@dataclass(frozen=True)
class Copied:
    """A command that is run in a copy of the package, after the changes of its page.

    Attributes:
        more: see `Run`.
    """

    more: str


class Ended(NamedTuple):
    """How a command ended; `out` holds its errors too."""

    code: int
    out: str


class Workshop:
    """A folder with tiny data, in which commands are run.

    Args:
        folder: an empty one.
        table: how each command is run.
    """

    def __init__(self, folder: Path, table: Mapping[str, Any]) -> None:
        self.folder = folder
        self._table = table
        self._ended: dict[str, Ended] = {}
        (folder / "rcp").symlink_to(ROOT / "rcp")
        (folder / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
        write_small_cifar100(folder / "cifar")
        for seed, part in enumerate(("train", "val")):
            write_folder(folder / "photographs" / part, classes=5, per_class=4, seed=seed)

    def run(self, command: str) -> Ended:
        """What came of a command of the table; it is run when it is first asked for."""
        if command not in self._ended:
            way = self._table[command]
            for earlier in way.after:
                assert self.run(earlier).code == 0, self.run(earlier).out
            words = self.words(command, way)
            self._ended[command] = self.call(words + (["--run.dry=true"] if isinstance(way, Planned) else []))
        return self._ended[command]

    def words(self, command: str, way: Run | Parsed) -> list[str]:
        """The command's words behind `python -m`, with everything in its place."""
        text, places = command.removeprefix("python -m "), dict(PLACES)
        if isinstance(way, Run):
            for part, small in way.instead.items():
                assert part in text, f"{part} does not stand in {command}"
                text = text.replace(part, small)
            text, places = f"{text} {way.more}", {**PLACES, **way.places}
        if "KEY" in text:
            places["KEY"] = sorted(path.name for path in (self.folder / "runs/nodes/labels").iterdir())[0]
        names = "|".join(sorted(map(re.escape, places), key=len, reverse=True))
        return shlex.split(re.sub(rf"(?<![\w-])({names})(?![\w.-])", lambda found: places[found[1]], text))

    def call(self, words: Sequence[str], *, parse: bool = False) -> Ended:
        """Runs `python -m WORDS` in a process of its own; with `parse` it ends as soon as its words are read."""
        log = self.folder / "log.txt"
        server = multiprocessing.get_context("forkserver")
        process = server.Process(target=_called, args=(list(words), str(self.folder), str(log), parse))
        process.start()
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
        return Ended(process.exitcode or 0, log.read_text())


def in_a_copy(folder: Path, words: Sequence[str]) -> Ended:
    """Runs Python with these words where another copy of the package lies."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS
    )
    return Ended(done.returncode, done.stdout + done.stderr)


def _called(words: Sequence[str], folder: str, log: str, parse: bool) -> NoReturn:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.chdir(folder)
    # What the command starts itself imports this package, too.
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    from fastgen.data import cifar

    cifar.LAYOUTS.update(small_layouts())
    if parse:
        argparse.ArgumentParser.parse_args = _parse_and_end(argparse.ArgumentParser.parse_args)  # type: ignore[method-assign]
    sys.argv = list(words)
    run_as_main(words[0])
    sys.exit(0)


def run_as_main(name: str) -> None:
    """What `python -m NAME` does. Not runpy's way: processes that the command starts send what they pickle back by
    the name that multiprocessing gives the main module when Python starts."""
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = importlib.util.find_spec(f"{name}.__main__")
    assert spec is not None, f"there is no module {name}"
    assert isinstance(spec.loader, InspectLoader)
    main = types.ModuleType("__main__", None)
    main.__spec__, main.__file__, main.__package__ = spec, spec.origin, spec.parent
    sys.modules["__main__"] = sys.modules["__mp_main__"] = main
    code = spec.loader.get_code(spec.name)
    assert code is not None
    exec(code, main.__dict__)


def _parse_and_end(right: Any) -> Any:
    def parse_args(self: argparse.ArgumentParser, *arguments: Any) -> NoReturn:
        right(self, *arguments)
        sys.exit(0)

    return parse_args
