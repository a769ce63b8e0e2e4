"""Photographs: the indices of a training and a validation set, and what must hold between them."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fastgen.config import DataSettings, hash_of
from fastgen.data.beton import Beton, read_beton
from fastgen.data.manifest import Manifest, read_manifest
from fastgen.data.split import FileSplit
from fastgen.errors import UserError
from fastgen.files import write_json


@dataclass(frozen=True)
class Photographs:
    """A data set of photographs.

    Attributes:
        train, test: training and validation set, whole.
        class_names: one for each class.
        pixels: names what turns a view into pixels.
    """

    train: FileSplit
    test: FileSplit
    class_names: tuple[str, ...]
    pixels: str


@dataclass(frozen=True)
class _Opened:
    """An index file: its split, and its classes where it names them."""

    path: Path
    split: FileSplit
    class_names: tuple[str, ...] | None


def read_photographs(settings: DataSettings, k: int) -> Photographs:
    """Reads the indices that the backend needs: two .beton files for ffcv, two manifests for the others.

    Args:
        settings: dataset, root, backend.
        k: of the objective; no more than there are classes.

    Raises:
        UserError: a file is missing or damaged, or they do not belong together.
    """
    root = Path(settings.root)
    open_index = _open_beton if settings.backend == "ffcv" else _open_manifest
    train, test = open_index(root, "train"), open_index(root, "val")
    names = _common_names(train, test)
    for opened in (train, test):
        _check_labels(opened, names)
    if k > len(names):
        raise UserError(f"gen.k = {k}: give 2 to {len(names)}, the number of classes of {root}")
    train_split, test_split = (_of_classes(opened.split, len(names)) for opened in (train, test))
    return Photographs(train_split, test_split, names, _pixels(settings, train_split))


def read_beside(beton: Beton) -> Manifest | None:
    """The manifest that lies beside a .beton; None where there is none.

    Raises:
        UserError: it is damaged, or of another .beton.
    """
    path = Path(f"{beton.path}.manifest")
    if not path.exists():
        return None
    manifest = read_manifest(path)
    if manifest.header.get("beton_index_hash") != beton.index_hash or len(manifest) != len(beton):
        raise UserError(
            f"{path}: does not belong to the .beton beside it: make both again with python -m data_prep.beton, "
            "or remove this manifest"
        )
    return manifest


def names_or_numbers(names: Sequence[str] | None, classes: int) -> tuple[str, ...]:
    """The names of the classes, or their numbers where nobody named them."""
    return tuple(names) if names is not None else tuple(str(label) for label in range(classes))


def hash_of_file(path: Path) -> str:
    """SHA-256 of a whole file, computed once and kept beside it for as long as its size and time stay the same.

    For files by FFCV's own writer, whose index tells nothing of the pixels.
    """
    state = path.stat()
    beside = path.with_name(f"{path.name}.sha256.json")
    known = _read_mark(beside)
    mark = {"bytes": state.st_size, "mtime_ns": state.st_mtime_ns}
    if all(known.get(name) == value for name, value in mark.items()):
        return str(known["sha256"])
    told = f"{path}: tells nothing of its pixels: reading all of it once ({state.st_size / 1e9:.1f} GB)"
    print(told, file=sys.stderr)
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if os.access(path.parent, os.W_OK):
        write_json(beside, {**mark, "sha256": found})
    return found


def _read_mark(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        # Not there, or cut short: the file is read again, and its mark written anew.
        return {}
    return found if isinstance(found, dict) else {}


def _of_classes(split: FileSplit, classes: int) -> FileSplit:
    """The same pictures among another number of classes are another task: their hash says so."""
    return replace(split, index_hash=hash_of([split.index_hash, classes]))


def _open_manifest(root: Path, part: str) -> _Opened:
    path = root / f"{part}.manifest"
    again = f"python -m data_prep.manifest --source={root / part} --out={path}{_classes(root, part, 'manifest')}"
    if not path.is_file():
        raise UserError(f"{path}: is missing: make it with {again}")
    manifest = read_manifest(path)
    _check_folders(manifest, path, again)
    split = FileSplit(manifest, manifest.labels, _ids(len(manifest)), manifest.sizes, manifest.data_hash)
    return _Opened(path, split, manifest.class_names)


def _classes(root: Path, part: str, suffix: str) -> str:
    """Further words of a command that makes an index: classes are numbered as those of the training part."""
    return "" if part == "train" else f" --classes-from={root / 'train'}.{suffix}"


def _check_folders(manifest: Manifest, path: Path, again: str) -> None:
    if manifest.folder is None:
        raise UserError(f"{path}: names no files, its pictures are in a .beton: set data.backend=ffcv, or run {again}")
    stand_ins = manifest.stand_in_folder if (manifest.stand_ins != b"").any() else None
    for folder in (manifest.folder, stand_ins):
        if folder is not None and not folder.is_dir():
            raise UserError(f"{path}: its pictures were in {folder}, which is gone: put it back, or run {again}")


def _open_beton(root: Path, part: str) -> _Opened:
    path = root / f"{part}.beton"
    if not path.is_file():
        again = f"python -m data_prep.beton --source={root / part} --out={path}{_classes(root, part, 'beton')}"
        raise UserError(f"{path}: is missing: make it with {again}")
    beton = read_beton(path)
    manifest = read_beside(beton)
    # The stored pixels, not the originals they came from: two files may store the same pictures differently.
    stored_hash = beton.index_hash if beton.crc32 is not None else hash_of_file(path)
    split = FileSplit(beton, beton.labels, _ids(len(beton)), beton.sizes, stored_hash)
    return _Opened(path, split, None if manifest is None else manifest.class_names)


def _common_names(train: _Opened, test: _Opened) -> tuple[str, ...]:
    for opened in (train, test):
        if not len(opened.split):
            raise UserError(f"{opened.path}: holds no pictures: make it from a folder that does")
    of_train, of_test = train.class_names, test.class_names
    if of_train is not None and of_test is not None and of_train != of_test:
        raise UserError(
            f"{train.path} and {test.path} are of different classes ({_difference(of_train, of_test)}): "
            "make both from folders that hold the same class folders"
        )
    return names_or_numbers(of_train if of_train is not None else of_test, int(train.split.labels.max()) + 1)


def _difference(of_train: tuple[str, ...], of_test: tuple[str, ...]) -> str:
    only = sorted(set(of_train) ^ set(of_test))
    if not only:
        return "the same names in another order"
    return f"{only[0]} is only in {'the first' if only[0] in of_train else 'the second'}"


def _check_labels(opened: _Opened, names: tuple[str, ...]) -> None:
    outside = np.flatnonzero((opened.split.labels < 0) | (opened.split.labels >= len(names)))
    if len(outside):
        label = int(opened.split.labels[outside[0]])
        raise UserError(
            f"{opened.path}: sample {outside[0]} has label {label}, there are the classes 0 to {len(names) - 1}: "
            "make training and validation set again, from the same classes"
        )


def _pixels(settings: DataSettings, train: FileSplit) -> str:
    if isinstance(train.index, Beton):
        return {"native": ".beton, triangle filter", "ffcv": ".beton, FFCV's decoder and area filter"}[
            settings.beton_decoder
        ]
    if settings.backend == "dali":
        return f"DALI linear, {settings.dali_decoder} decoder"
    return {"folder": "Pillow bilinear", "synthetic": "random"}[settings.backend]


def _ids(count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.arange(count, dtype=np.int64)
