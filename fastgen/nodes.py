"""The store of generations: one folder a node, named by the hash of all that decides its weights.

<store>/<node>/checkpoint-<step>.pt            the last two, while it is being trained
<store>/<node>/checkpoint-<step>.pt.damaged    one that could not be read, for whoever wants to look at it
<store>/<node>/model.safetensors               its weights
<store>/<node>/node.json                       written last: it says that the node is finished
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgen.config import Recipe
from fastgen.errors import UserError
from fastgen.files import write_json

# Without a step: the only one that an older version kept.
CHECKPOINT = re.compile(r"checkpoint(?:-([0-9]{9,}))?\.pt")
DAMAGED = re.compile(CHECKPOINT.pattern + r"\.damaged")
# What `files.write_atomically` leaves of a checkpoint if it is killed.
HALF = re.compile(r"\.checkpoint.*\.partial")


@dataclass(frozen=True)
class Node:
    """Folder of one generation."""

    folder: Path

    @property
    def id(self) -> str:
        """Name of the node."""
        return self.folder.name

    @property
    def weights(self) -> Path:
        """Weights of a finished node."""
        return self.folder / "model.safetensors"

    @property
    def checkpoints(self) -> list[Path]:
        """States of a training under way, newest first."""
        return checkpoints(self.folder)

    @property
    def finished(self) -> bool:
        """Whether training and saving were brought to their end."""
        return (self.folder / "node.json").exists()

    def finish(self, identity: dict[str, Any], training: dict[str, Any]) -> None:
        """Marks the node as finished; checkpoints, and whatever is left of them, are of no more use."""
        write_json(self.folder / "node.json", {"node": self.id, "identity": identity, "training": training})
        for path in [*halves(self.folder), *damaged_checkpoints(self.folder), *reversed(self.checkpoints)]:
            path.unlink(missing_ok=True)

    def facts(self) -> dict[str, Any]:
        """What `finish` wrote: `node`, `identity`, `training`."""
        return read_json(self.folder / "node.json")

    def cached(self, name: str) -> dict[str, Any] | None:
        """A measurement of the finished node that was kept under this name."""
        path = self.folder / f"{name}.json"
        return read_json(path) if path.exists() else None

    def keep(self, name: str, value: dict[str, Any]) -> None:
        """Keeps a measurement of the finished node."""
        write_json(self.folder / f"{name}.json", value)


def open_node(store: Path, node: str) -> Node:
    """The folder of a node, made if it is not there."""
    folder = store / node
    folder.mkdir(parents=True, exist_ok=True)
    return Node(folder)


def nodes_folder(recipe: Recipe) -> Path:
    """Where a recipe's nodes are.

    Raises:
        ValueError: the recipe did not come from `recipe.read_recipe`, which fills that in.
    """
    if recipe.run.nodes is None:
        raise ValueError("the recipe's run.nodes is not filled in: recipe.read_recipe does that")
    return Path(recipe.run.nodes)


def find_node(store: Path, node: str) -> Node | None:
    """A finished node, or None."""
    found = Node(store / node)
    return found if found.finished else None


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where a node's state after so many steps is kept."""
    return folder / f"checkpoint-{step:09d}.pt"


def step_of(checkpoint: Path) -> int:
    """How many steps were taken before this checkpoint, by its name; -1: it is of an older version, and does not say.

    Raises:
        ValueError: it has no name of a checkpoint.
    """
    found = CHECKPOINT.fullmatch(checkpoint.name)
    if found is None:
        raise ValueError(f"{checkpoint}: no name of a checkpoint")
    return -1 if found[1] is None else int(found[1])


def checkpoints(folder: Path) -> list[Path]:
    """A node's checkpoints, newest first, that of an older version last; [] where there is no such folder."""
    return sorted(_named(folder, CHECKPOINT), key=step_of, reverse=True)


def damaged_checkpoints(folder: Path) -> list[Path]:
    """Those that could not be read and were set aside."""
    return _named(folder, DAMAGED)


def halves(folder: Path) -> list[Path]:
    """Halves of checkpoints that kills in the middle of a save have left."""
    return _named(folder, HALF)


def _named(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    # Not glob: that finds nothing in a folder which may not be read, and the training would start afresh.
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    return [folder / name for name in sorted(names) if pattern.fullmatch(name)]


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is damaged ({error}): delete it, and what it tells is made anew") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: is damaged (no JSON object): delete it, and what it tells is made anew")
    return value
