"""Where pictures come from: a listing of names and labels in a fixed order, and the pictures behind it.

| kind | what it is | classes |
|---|---|---|
| `folder` | one folder a class | the folders' names, sorted |
| `ilsvrc2012-val` | ILSVRC2012's validation pictures in one folder, labels beside | WordNet ids, sorted |
| `cifar10`, `cifar100` | the official files | as the official files name them |
| `torchvision:NAME` | a data set of `torchvision.datasets` that is on the disk | its `classes` |

The original tar files of ILSVRC2012 are unpacked by `data_prep.tars` and then are of the first two kinds.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastgen.data.cifar import LAYOUTS, read_cifar
from fastgen.data.manifest import read_manifest
from fastgen.data.photos import is_picture_name
from fastgen.errors import UserError
from fastgen.selection import class_balanced

VAL_NAME = re.compile(r"ILSVRC2012_val_\d{8}\.JPEG", re.IGNORECASE)
WNID = re.compile(r"n\d{8}")
TRAIN, TEST = "train", "test"

Int64 = npt.NDArray[np.int64]
UInt8 = npt.NDArray[np.uint8]
# A picture on its way to a decoder: a file to read, or pixels (height, width, 3).
Picture = Path | UInt8


@dataclass(frozen=True)
class Source:
    """A listing of N pictures, in an order that depends on names alone.

    Attributes:
        kind: as in the table above.
        folder: that `names` are relative to; None where the pictures come from no files of their own.
        class_names: one for each class.
        names: one for each picture.
        labels: int64 (N,).
        ignored: files below the folder that are no pictures by their names.
        pixels: gives a picture's RGB pixels by its number in the data set; None where there are files.
        numbers: int64 (N,), that number for each picture of the listing.
    """

    kind: str
    folder: Path | None
    class_names: tuple[str, ...]
    names: tuple[str, ...]
    labels: Int64
    ignored: tuple[str, ...] = ()
    pixels: Callable[[int], UInt8] | None = None
    numbers: Int64 | None = None

    def __len__(self) -> int:
        return len(self.names)

    def picture(self, position: int) -> Picture:
        """The file of a picture, or its pixels."""
        if self.pixels is not None and self.numbers is not None:
            return self.pixels(int(self.numbers[position]))
        assert self.folder is not None
        return self.folder / self.names[position]

    def at(self, positions: Int64) -> Source:
        """A listing of the pictures at the given positions."""
        numbers = None if self.numbers is None else self.numbers[positions]
        names = tuple(self.names[position] for position in positions)
        return replace(self, names=names, labels=self.labels[positions], numbers=numbers)

    def fingerprint(self) -> str:
        """SHA-256 that changes when the listing, or any file's size or time of change, does."""
        digest = hashlib.sha256(repr((self.kind, self.class_names)).encode())
        for position, (name, label) in enumerate(zip(self.names, self.labels.tolist(), strict=True)):
            picture = self.picture(position)
            if isinstance(picture, Path):
                state = picture.stat()
                content = f"{state.st_size} {state.st_mtime_ns}".encode()
            else:
                content = picture.tobytes()
            digest.update(b"%s\0%d\0%d\0" % (os.fsencode(name), label, len(content)) + content)
        return digest.hexdigest()


@dataclass(frozen=True)
class Request:
    """What the person asked for.

    Attributes:
        source: a folder.
        kind: of the source; None to find it from the content.
        split: `train` or `test`, for the kinds that have both in one place.
        val_labels: file or devkit folder that tells the classes of `ilsvrc2012-val`.
        classes_from: manifest (or .beton) whose classes these must be.
        limit: pictures to take, all classes alike; None for all.
        download: whether torchvision may fetch the data set.
    """

    source: Path
    kind: str | None = None
    split: str = TRAIN
    val_labels: Path | None = None
    classes_from: Path | None = None
    limit: int | None = None
    download: bool = False


def open_source(request: Request) -> Source:
    """Lists the pictures that were asked for.

    Raises:
        UserError: there are none, or their classes cannot be told.
    """
    if not request.source.is_dir() and not request.download:
        raise UserError(f"{request.source}: there is no such folder: name the source's folder with --source")
    # Labels of their own are given for nothing else.
    kind = request.kind or (find_kind(request.source) if request.val_labels is None else "ilsvrc2012-val")
    known = None if request.classes_from is None else read_class_names(request.classes_from)
    if kind == "folder":
        source = _open_folder(request.source, known)
    elif kind == "ilsvrc2012-val":
        source = _open_flat_val(request.source, request.val_labels, known)
    elif kind in LAYOUTS:
        source = _open_cifar(kind, request)
    elif kind.startswith("torchvision:"):
        source = _open_torchvision(kind.partition(":")[2], request)
    else:
        raise UserError(f"--kind={kind}: is none of folder, ilsvrc2012-val, {', '.join(LAYOUTS)}, torchvision:NAME")
    if known is not None and source.class_names != known:
        raise UserError(
            f"{request.source}: its classes are not those of {request.classes_from}: leave --classes-from out"
        )
    return _limited(source, request.limit)


def find_kind(folder: Path) -> str:
    """Tells from a folder's content what kind of source it is.

    Raises:
        UserError: it is none, or more than one.
    """
    found = [
        name
        for name, layout in LAYOUTS.items()
        if any((folder / part).is_dir() for part in (layout.binary, layout.python))
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{folder}: holds {' and '.join(found)}: say which with --kind")
    entries = _entries(folder)
    if any(entry.is_file() and VAL_NAME.fullmatch(entry.name) for entry in entries):
        return "ilsvrc2012-val"
    if any(entry.is_dir() for entry in entries):
        return "folder"
    tars = [entry.name for entry in entries if entry.name.endswith(".tar")]
    if tars:
        raise UserError(f"{folder}: holds {tars[0]}: say where to unpack it to with --unpack-to=DIR")
    if any(is_picture_name(entry.name) for entry in entries):
        raise UserError(
            f"{folder}: its pictures lie in no class folders: make one folder a class, or give --val-labels"
        )
    raise UserError(f"{folder}: holds neither class folders nor CIFAR's files: name another --source, or its --kind")


def read_class_names(path: Path) -> tuple[str, ...]:
    """Classes of a manifest, or of the manifest beside a .beton."""
    if path.suffix == ".beton":
        path = path.with_name(path.name + ".manifest")
    return read_manifest(path).class_names


def is_ilsvrc2012(class_names: Sequence[str]) -> bool:
    """Whether these are the thousand classes of ILSVRC2012: so many WordNet ids, with its first and its last."""
    return (
        len(class_names) == 1000
        and (class_names[0], class_names[-1]) == ("n01440764", "n15075141")
        and all(WNID.fullmatch(name) for name in class_names)
    )


def _limited(source: Source, limit: int | None) -> Source:
    if limit is None:
        return source
    try:
        return source.at(class_balanced(source.labels, limit, len(source.class_names)))
    except ValueError as error:
        raise UserError(f"--limit={limit}: {error}: give a smaller number") from None


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, hidden files apart, by name."""
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _open_folder(folder: Path, known: tuple[str, ...] | None) -> Source:
    """One folder a class; deeper folders belong to no class and are ignored, aloud."""
    entries = _entries(folder)
    found = tuple(entry.name for entry in entries if entry.is_dir())
    ignored = [entry.name for entry in entries if not entry.is_dir()]
    class_names = found if known is None else known
    label_of = {name: label for label, name in enumerate(class_names)}
    names, labels = [], []
    for class_name in found:
        if class_name not in label_of:
            raise UserError(f"{folder / class_name}: is no class of --classes-from: remove that folder, or the option")
        pictures: list[str] = []
        for entry in _entries(folder / class_name):
            path = f"{class_name}/{entry.name}"
            (pictures if entry.is_file() and is_picture_name(entry.name) else ignored).append(path)
        if not pictures:
            raise UserError(f"{folder / class_name}: holds no picture: fill or remove that class folder")
        names += pictures
        labels += [label_of[class_name]] * len(pictures)
    if not names:
        raise UserError(f"{folder}: holds no class folders: name the folder above them with --source")
    return Source("folder", folder, class_names, tuple(names), np.asarray(labels, np.int64), tuple(ignored))


def _open_flat_val(folder: Path, labels_from: Path | None, known: tuple[str, ...] | None) -> Source:
    entries = _entries(folder)
    pictures = [entry.name for entry in entries if entry.is_file() and is_picture_name(entry.name)]
    ignored = [entry.name for entry in entries if not (entry.is_file() and is_picture_name(entry.name))]
    if labels_from is None:
        raise UserError(
            f"{folder}: its pictures lie in no class folders: name their classes with "
            "--val-labels=FILE (lines of file and WordNet id, or Kaggle's LOC_val_solution.csv) or =DEVKIT_FOLDER"
        )
    wnids = _read_val_labels(labels_from, pictures)
    class_names = tuple(sorted(set(wnids.values()))) if known is None else known
    label_of = {name: label for label, name in enumerate(class_names)}
    unknown = [name for name in pictures if wnids.get(Path(name).stem) not in label_of]
    if unknown:
        told = wnids.get(Path(unknown[0]).stem)
        reason = "does not name it" if told is None else f"puts it into {told}, which is no class of --classes-from"
        raise UserError(f"{folder / unknown[0]}: {labels_from} {reason}: give the labels that belong to it")
    labels = np.asarray([label_of[wnids[Path(name).stem]] for name in pictures], np.int64)
    return Source("ilsvrc2012-val", folder, class_names, tuple(pictures), labels, tuple(ignored))


def _read_val_labels(path: Path, pictures: Sequence[str]) -> dict[str, str]:
    """WordNet id of each picture, by the picture's name without its suffix."""
    if path.is_dir():
        return _read_devkit(path, pictures)
    try:
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{path}: cannot be read as text: name a file or devkit folder with --val-labels") from None
    if lines and all(WNID.fullmatch(line) for line in lines):
        return _in_order(lines, pictures, path)
    found = {}
    for line in lines:
        # Kaggle's file: `ImageId,PredictionString`, then `ILSVRC2012_val_00048981,n03995372 85 1 499 272`.
        words = line.replace(",", " ").split()
        if len(words) < 2 or not WNID.fullmatch(words[1]):
            if line == lines[0]:
                continue
            raise UserError(
                f"{path}: has the line '{line[:60]}': each must be a file and a WordNet id such as n01440764"
            )
        found[Path(words[0]).stem] = words[1]
    return found


def _in_order(wnids: Sequence[str], pictures: Sequence[str], path: Path) -> dict[str, str]:
    if len(wnids) != len(pictures):
        raise UserError(
            f"{path}: has {len(wnids):,} labels for {len(pictures):,} pictures: give the file for all of them"
        )
    return {Path(name).stem: wnid for name, wnid in zip(pictures, wnids, strict=True)}


def _read_devkit(folder: Path, pictures: Sequence[str]) -> dict[str, str]:
    """ILSVRC2012_devkit_t12: the ground truth is in numbers of its own, which meta.mat explains."""
    data = folder / "data" if (folder / "data").is_dir() else folder
    truth, meta = data / "ILSVRC2012_validation_ground_truth.txt", data / "meta.mat"
    for file in (truth, meta):
        if not file.is_file():
            raise UserError(f"{file}: is missing: name the folder ILSVRC2012_devkit_t12 with --val-labels")
    wnid_of = _read_meta(meta)
    try:
        wnids = [wnid_of[int(line)] for line in truth.read_text().split()]
    except (ValueError, KeyError) as error:
        raise UserError(f"{truth}: is damaged ({error}): unpack the devkit again") from None
    return _in_order(wnids, pictures, truth)


def _read_meta(path: Path) -> dict[int, str]:
    """WordNet id by ILSVRC2012 id, of the synsets without children."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError(
            f"{path}: is read by scipy, which is not installed: pip install scipy, "
            "or give --val-labels a text file of file names and WordNet ids"
        ) from None
    try:
        synsets = loadmat(path, squeeze_me=True)["synsets"]
        found = {
            int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets if int(synset["num_children"]) == 0
        }
    except Exception as error:  # noqa: BLE001 (scipy's reader trips over damage in every way)
        raise UserError(f"{path}: is damaged ({error}): unpack the devkit again") from None
    return found


def _open_cifar(kind: str, request: Request) -> Source:
    train, test, class_names = read_cifar(kind, request.source, download=request.download)
    split = train if request.split == TRAIN else test
    names = tuple(f"{request.split}/{number:05d}" for number in range(len(split)))
    images = split.images_NHWC
    return Source(
        kind, None, class_names, names, split.labels, pixels=lambda number: images[number],
        numbers=np.arange(len(split), dtype=np.int64),
    )  # fmt: skip


def _open_torchvision(name: str, request: Request) -> Source:
    """Any data set of torchvision that gives (picture, number of the class)."""
    from torchvision import datasets

    maker = getattr(datasets, name, None)
    if not (isinstance(maker, type) and issubclass(maker, datasets.VisionDataset)):
        raise UserError(f"--kind=torchvision:{name}: torchvision has no data set of that name")
    try:
        dataset: Any = maker(str(request.source), **_torchvision_options(maker, request))
        labels = _torchvision_labels(dataset)
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{request.source}: torchvision cannot open its {name} there ({reason})") from None
    class_names = tuple(str(entry) for entry in getattr(dataset, "classes", range(int(labels.max()) + 1)))
    names = tuple(f"{request.split}/{number:07d}" for number in range(len(labels)))
    return Source(
        f"torchvision:{name}", None, class_names, names, labels, pixels=lambda number: _rgb(dataset[number][0]),
        numbers=np.arange(len(labels), dtype=np.int64),
    )  # fmt: skip


def _torchvision_options(maker: Callable[..., Any], request: Request) -> dict[str, Any]:
    """Names the split as this data set does: `train=True`, or `split="train"`."""
    known = inspect.signature(maker).parameters
    options: dict[str, Any] = {}
    if "train" in known:
        options["train"] = request.split == TRAIN
    elif "split" in known:
        options["split"] = request.split
    if "download" in known:
        options["download"] = request.download
    return options


def _torchvision_labels(dataset: Any) -> Int64:
    for attribute in ("targets", "labels", "_labels"):
        found = getattr(dataset, attribute, None)
        if found is not None and len(found) == len(dataset):
            break
    else:
        found = [dataset[number][1] for number in range(len(dataset))]
    labels = np.asarray(found)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels):
        raise ValueError("its labels are no numbers of classes")
    return labels.astype(np.int64)


def _rgb(picture: Any) -> UInt8:
    return np.ascontiguousarray(picture.convert("RGB"))


def sample_evenly(count: int, wanted: int) -> Int64:
    """At most so many positions, spread over a listing."""
    return np.unique(np.linspace(0, count - 1, min(wanted, count)).astype(np.int64))


def file_bytes(source: Source, positions: Iterable[int]) -> int:
    """Bytes of the pictures at these positions, as they lie there."""
    total = 0
    for position in positions:
        picture = source.picture(position)
        total += picture.stat().st_size if isinstance(picture, Path) else picture.nbytes
    return total
