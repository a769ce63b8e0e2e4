"""Files that matter: written beside and renamed, so a kill at any instant leaves the old or the new. No torch."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def csv_text(rows: Sequence[Mapping[str, Any]], columns: Iterable[str] = ()) -> str:
    """Rows as CSV under the names of their columns; what a row does not know is empty.

    Args:
        columns: those that are there without any row; others follow in the order in which rows bring them.
    """
    text = io.StringIO()
    names = dict.fromkeys([*columns, *(name for row in rows for name in row)])
    writer = csv.DictWriter(text, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def size_text(size_bytes: float) -> str:
    """`9 GB`, `216 MB`."""
    return f"{size_bytes / 1e9:.3g} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.3g} MB"


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a whole file or nothing.

    Raises:
        OSError: the disk is full, or the folder may not be written to; the old file is untouched.
    """
    # Two processes may measure the same shared node at once: each writes beside under a name of its own.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON; refuses NaN, which JSON has no word for."""
    write_atomically(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())
