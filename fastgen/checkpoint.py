"""Checkpoints and weights: files of tensors that are checked when they are read, and that run no code."""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from fastgen.errors import UserError
from fastgen.files import write_atomically

CHECKPOINT_FORMAT = 1
METADATA_KEY = "fastgen"


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Saves a training's whole state: tensors and plain values."""
    buffer = io.BytesIO()
    torch.save({"format": CHECKPOINT_FORMAT, **state}, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Loads what `save_checkpoint` saved; a file from elsewhere runs no code.

    Raises:
        UserError: the file is damaged, or of another format.
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
    except Exception as error:  # noqa: BLE001 (readers trip over damage in every way; all of them mean the same)
        raise UserError(
            f"{path}: is damaged ({_first_line(error)}): delete it, and this generation starts afresh"
        ) from None
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
        raise UserError(f"{path}: is no safetensors file, or damaged ({_first_line(error)})") from None
    return tensors, description


def load_weights(path: Path, model: nn.Module) -> None:
    """Loads a network's weights from a safetensors file.

    Raises:
        UserError: they belong to another architecture or another number of classes; the line
            names the first tensor that differs.
    """
    tensors, _ = read_weights(path)
    expected = model.state_dict()
    for name in [*expected, *tensors]:
        wanted, found = _shape(expected.get(name)), _shape(tensors.get(name))
        if wanted != found:
            raise UserError(f"{path}: is of another network: {name} is {found}, the recipe's model has {wanted}")
    model.load_state_dict(tensors)


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{tuple(tensor.shape)}"


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__
