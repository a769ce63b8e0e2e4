"""Files of the label store: a part holds rows of one epoch, of one process.

<store>/seed_<s>_generation_<g>/epoch_<e>_<side>/*.part   safetensors, each written whole

Its metadata has a checksum of each column, and of the views.
"""

from __future__ import annotations

import json
import secrets
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors

from fastgen.errors import MachineError, UserError
from fastgen.files import write_atomically
from fastgen.views import EpochName

METADATA_KEY = "fastgen"
SUFFIX = ".part"
ROWS = "rows"

Bool = npt.NDArray[np.bool_]
Columns = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Part:
    """A file of the store, by its metadata.

    Attributes:
        name: of the epoch.
        views: their checksum.
        of: rows of the whole epoch.
        count: rows in it.
        divergence: sum over its rows of what truncation has lost, in nats.
        checksums: CRC-32 of each column.
    """

    path: Path
    name: EpochName
    views: int
    of: int
    count: int
    divergence: float
    checksums: dict[str, int]


def generation_folder(store: Path, data_seed: int, generation: int) -> Path:
    """Where the epochs of a generation's views are kept."""
    return store / f"seed_{data_seed}_generation_{generation}"


def epoch_folder(store: Path, name: EpochName) -> Path:
    """Where the parts of an epoch are kept."""
    size = f"{name.height_px}x{name.width_px}"
    return generation_folder(store, name.data_seed, name.generation) / f"epoch_{name.epoch:04d}_{size}"


def part_paths(folder: Path) -> list[Path]:
    """Parts in an epoch's folder, in the order of their first rows."""
    return sorted(folder.glob(f"*{SUFFIX}"))


def write_part(folder: Path, name: EpochName, views: int, of: int, columns: Columns, divergence: float) -> Path:
    """Writes a part whole, or nothing."""
    about = {
        "name": list(name),
        "views": views,
        "of": of,
        "count": len(columns[ROWS]),
        "divergence": divergence,
        "checksums": {key: _crc(column) for key, column in columns.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    # Not by rank and step alone: a training that was killed may come here again with other rows.
    path = folder / f"{int(columns[ROWS].min()):010d}_{secrets.token_hex(4)}{SUFFIX}"
    text = json.dumps(about)
    write_atomically(path, to_safetensors(columns, {METADATA_KEY: f"{zlib.crc32(text.encode()):08x} {text}"}))
    return path


def read_part(path: Path) -> Part:
    """What a part says of itself.

    Raises:
        UserError: it is damaged.
    """
    try:
        with _opened(path) as file:
            checksum, _, text = (file.metadata() or {})[METADATA_KEY].partition(" ")
        if zlib.crc32(text.encode()) != int(checksum, 16):
            raise ValueError("the checksum of its metadata differs")
        about = json.loads(text)
        name = EpochName(*about.pop("name"))
        return Part(path=path, name=name, **about)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from None


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Raises MachineError where a part has gone since its folder was read: somebody removes labels."""
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except FileNotFoundError:
        raise MachineError(f"{path}: has gone while labels were read: start again") from None


def read_columns(part: Part) -> Columns:
    """Rows, log-probabilities and classes of a part, each checked.

    Raises:
        UserError: it is damaged.
    """
    return {key: _column(part, key) for key in part.checksums}


def _column(part: Part, key: str) -> npt.NDArray[Any]:
    """A column of a part, checked."""
    try:
        with _opened(part.path) as file:
            column: npt.NDArray[Any] = file.get_tensor(key)
    except SafetensorError as error:
        raise _damaged(part.path, error) from None
    if _crc(column) != part.checksums.get(key) or len(column) != part.count:
        raise _damaged(part.path, f"the checksum of {key} differs")
    if key == ROWS and len(column) and not 0 <= column.min() <= column.max() < part.of:
        raise _damaged(part.path, "rows beyond the epoch's end")
    return column


def known_rows(folder: Path, count: int) -> Bool:
    """Which rows of an epoch are there, bool (N,); two parts may have the same.

    Args:
        folder: of the epoch.
        count: N.

    Raises:
        UserError: a part is damaged.
    """
    known = np.zeros(count, bool)
    for path in part_paths(folder):
        known[_column(read_part(path), ROWS)] = True
    return known


def missing_rows(known: Bool) -> Iterator[tuple[int, int]]:
    """Ranges of rows, each from its first one to before its end, that are not known."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], ~known, [False]]).astype(np.int8)))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def _crc(column: npt.NDArray[Any]) -> int:
    return zlib.crc32(np.ascontiguousarray(column).data)


def _damaged(path: Path, why: object) -> UserError:
    first = str(why).splitlines()[0][:200] if str(why) else type(why).__name__
    return UserError(f"{path}: is damaged ({first}): delete it, and its labels are asked of the teacher again")
