"""The store of generations: one folder a node, named by the hash of all that decides its weights.

<store>/<node>/checkpoint.pt        while it is being trained
<store>/<node>/model.safetensors    its weights
<store>/<node>/node.json            written last: it says that the node is finished
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgen.errors import UserError
from fastgen.files import write_json


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
    def checkpoint(self) -> Path:
        """State of a training under way."""
        return self.folder / "checkpoint.pt"

    @property
    def finished(self) -> bool:
        """Whether training and saving were brought to their end."""
        return (self.folder / "node.json").exists()

    def finish(self, identity: dict[str, Any], training: dict[str, Any]) -> None:
        """Marks the node as finished; the checkpoint is of no more use."""
        write_json(self.folder / "node.json", {"node": self.id, "identity": identity, "training": training})
        self.checkpoint.unlink(missing_ok=True)
        # Halves of files that kills in the middle of a save have left.
        for torn in self.folder.glob(f".{self.checkpoint.name}.*.partial"):
            torn.unlink()

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


def find_node(store: Path, node: str) -> Node | None:
    """A finished node, or None."""
    found = Node(store / node)
    return found if found.finished else None


class InUse(UserError):
    """Another process holds a folder."""


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Holds a folder for this process alone; the lock goes with the process, however it ends.

    Raises:
        InUse: another process holds it.
    """
    with open(folder / "lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise InUse(f"{folder}: {what} is in use by {holder}: wait for it, or name another folder") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield


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
