"""Checkpoints and weights: files of tensors that are checked when they are read, and that run no code.

Of a training under way the last two checkpoints are kept: where the newest is damaged, it goes on from the one before.
"""

from __future__ import annotations

import errno
import io
import json
import os
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from fastgen.errors import UserError, first_line
from fastgen.files import write_atomically
from fastgen.nodes import checkpoint_path, checkpoints, damaged_checkpoints, halves, step_of

CHECKPOINT_FORMAT = 2
KEPT = 2
METADATA_KEY = "fastgen"


class Damaged(UserError):
    """A checkpoint does not hold what was saved.

    Attributes:
        why: in a few words.
    """

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path}: is damaged ({why}): delete it, and this generation starts afresh")
        self.why = why


def save_checkpoint(folder: Path, state: Mapping[str, Any]) -> Path:
    """Saves a training's whole state, and removes what that makes superfluous: all but the last two.

    A kill at any instant leaves those of before, or the new one and at least the one before it: none is removed before
    the new one is on the disk. The caller holds the folder (`locked`).

    Args:
        folder: of the node.
        state: tensors and plain values; `step` tells how many steps were taken.

    Returns:
        the file.

    Raises:
        OSError: the disk is full, or the folder may not be written to; all checkpoints of before are still there.
    """
    # Before and not after: nobody can use them, and theirs may be the room that this save needs.
    for half in halves(folder):
        half.unlink(missing_ok=True)
    buffer = io.BytesIO()
    torch.save({"format": CHECKPOINT_FORMAT, **state}, buffer)
    path = checkpoint_path(folder, state["step"])
    write_atomically(path, buffer.getvalue())
    _prune(folder, state["step"])
    return path


def _prune(folder: Path, step: int) -> None:
    """Removes what no longer counts once the state after `step` is saved."""
    # A higher step that is not known to be damaged is not ours to remove: whoever resumes next tries it first.
    past = [path for path in checkpoints(folder) if step_of(path) <= step]
    # The oldest first, so that a kill in between leaves no gap.
    for path in reversed(past[KEPT:]):
        path.unlink(missing_ok=True)
    if len(past) >= KEPT:
        for path in damaged_checkpoints(folder):
            path.unlink(missing_ok=True)


def load_newest(folder: Path, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Loads the newest checkpoint of a node that is whole; damaged ones after it are set aside, and said.

    Where none is whole they stay in place: whether all is to begin anew is for the user to decide.

    Args:
        folder: of the node; the caller holds it (`locked`).
        say: takes a line for the user.

    Returns:
        what was saved; None: there is no checkpoint.

    Raises:
        UserError: all are damaged, or the newest that is whole is of another version's format.
        OSError: one may not be read, or the disk fails. That is no damage: it may be over when it is tried again.
    """
    damaged: dict[Path, Damaged] = {}
    for path in checkpoints(folder):
        try:
            state = load_checkpoint(path)
        except Damaged as error:
            damaged[path] = error
            continue
        for torn, found in damaged.items():
            aside = _set_aside(torn)
            kept = f" (the damaged one is now {aside.name})" if aside else ""
            say(f"{torn}: is damaged ({found.why}): going on from the one before it, step {state['step']}{kept}")
        return state
    if damaged:
        raise _hopeless(damaged)
    return None


def _hopeless(damaged: Mapping[Path, Damaged]) -> UserError:
    """What is told where each checkpoint, newest first, is damaged."""
    (newest, found), *others = damaged.items()
    if not others:
        return found
    names = ", ".join(path.name for path, _ in others)
    return UserError(
        f"{newest}: is damaged ({found.why}), and so is what there is before it ({names}): "
        "delete it and them, and this generation starts afresh"
    )


def _set_aside(path: Path) -> Path | None:
    """Renames a damaged checkpoint, so that it stands in the way of no later one; None: it could not be renamed."""
    aside = path.with_name(f"{path.name}.damaged")
    try:
        os.replace(path, aside)
    except OSError as error:
        # A folder that may only be read: nothing is saved there either, so it stands in nobody's way.
        if error.errno not in (errno.EROFS, errno.EACCES):
            raise
        return None
    return aside


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Loads what `save_checkpoint` saved; a file from elsewhere runs no code.

    Raises:
        Damaged: it does not hold what was saved.
        UserError: it is of another version's format.
        OSError: it may not be read, or the disk fails.
    """
    content = path.read_bytes()
    try:
        # torch's reader does not look at the checksums that its own files carry.
        torn = zipfile.ZipFile(io.BytesIO(content)).testzip()
        if torn is not None:
            raise ValueError(f"the checksum of {torn} differs")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except MemoryError:
        # Says nothing about the file.
        raise
    except Exception as error:  # noqa: BLE001 (readers trip over damage in every way; all of them mean the same)
        raise Damaged(path, first_line(error)) from None
    if not isinstance(state, dict) or state.get("format") != CHECKPOINT_FORMAT:
        raise UserError(
            f"{path}: is no checkpoint of this version of fastgen: delete it, and this generation starts afresh"
        )
    return state


def save_weights(path: Path, model: nn.Module, description: Mapping[str, Any]) -> None:
    """Saves a network's parameters and buffers as safetensors, with its description as metadata."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    # One key alone: safetensors writes several in random order, and equal weights shall be equal files.
    metadata = {METADATA_KEY: json.dumps(dict(description))}
    write_atomically(path, to_safetensors(tensors, metadata))


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a safetensors file.

    Returns:
        tensors by name, and the description that `save_weights` wrote ({} where there is none).

    Raises:
        UserError: there is no such file, or it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            description = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such weights file") from None
    except (SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: is no safetensors file, or damaged ({first_line(error)})") from None
    return tensors, description


def load_weights(path: Path, model: nn.Module) -> dict[str, Any]:
    """Loads a network's weights from a safetensors file.

    Returns:
        the description that the file holds.

    Raises:
        UserError: they belong to another architecture or another number of classes; the line
            names the first tensor that differs.
    """
    tensors, description = read_weights(path)
    expected = model.state_dict()
    for name in [*expected, *tensors]:
        wanted, found = _shape(expected.get(name)), _shape(tensors.get(name))
        if wanted != found:
            raise UserError(f"{path}: is of another network: {name} is {found}, the recipe's model has {wanted}")
    model.load_state_dict(tensors)
    return description


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{tuple(tensor.shape)}"
