"""What features are transferred to: labelled pictures of a folder, or of a small data set, as a network sees them.

A folder is of the form that torchvision's ImageFolder reads: train/ and val/ with a folder a class. Files are decoded
as everywhere in fastgen (`data/photos.py`): grey, palette, alpha, CMYK and 16-bit files become RGB, EXIF turns nothing.

The view of a picture is its centre square, resampled to the network's own evaluation size by Pillow's bilinear filter,
which widens where it shrinks (antialiased). The square's side is the picture's shorter side for networks of small
images; for networks of photographs it is the share of it that the recipe evaluates on.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from fastgen.config import Recipe
from fastgen.crops import ResizedCrop, centre_squares
from fastgen.data.batch import usable_cores
from fastgen.data.cifar import LAYOUTS, read_cifar
from fastgen.data.digits import read_digits
from fastgen.data.facts import DATASETS
from fastgen.data.folder import resampled
from fastgen.data.manifest import DIGEST_BYTES
from fastgen.data.photos import Refused, decode_plain, is_picture_name
from fastgen.data.split import Int64, Split, UInt8
from fastgen.errors import MACHINE_FAULTS, MachineError, UserError

SMALL_DATASETS = ("cifar10", "cifar100", "digits")
PARTS = ("train", "val")
# A file to read, or pixels (height, width, 3).
Picture = Path | UInt8


@dataclass(frozen=True)
class View:
    """How pictures are shown to a network.

    Attributes:
        side_px: of the view, a square.
        share: side of the picture's centre square that it shows, over the shorter side.
        channels: 3, or 1 for Pillow's luma (ITU-R 601-2), which leaves grey as it is.
    """

    side_px: int
    share: float
    channels: int

    @property
    def text(self) -> str:
        """The rule, for people."""
        square = "the shorter side" if self.share == 1 else f"{self.share:g} of the shorter side"
        grey = ", grey" if self.channels == 1 else ""
        return f"centre square of {square}, resampled to {self.side_px} px (bilinear, antialiased){grey}"


@dataclass(frozen=True)
class Part:
    """Labelled pictures of one purpose.

    Attributes:
        pictures: N of them.
        labels: int64 (N,).
    """

    pictures: tuple[Picture, ...]
    labels: Int64

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def content_hash(self) -> str:
        """SHA-256 of files, or pixels, and labels, in order.

        Raises:
            UserError, MachineError: a file cannot be read.
        """
        digest = hashlib.sha256()
        for picture, label in zip(self.pictures, self.labels.tolist(), strict=True):
            content = _content(picture) if isinstance(picture, Path) else picture.tobytes()
            digest.update(hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest() + b"%d;" % label)
        return digest.hexdigest()


@dataclass(frozen=True)
class ImageSet:
    """A training part, on which classifiers are fitted, and another one, on which they are measured.

    Attributes:
        name: for files' names and headings.
        place: folder, or the data set's name.
        class_names: one for each class; both parts hold all of them.
        train, val: pictures.
        ignored: files that are no pictures by their names, and folders within those of the classes.
    """

    name: str
    place: str
    class_names: tuple[str, ...]
    train: Part
    val: Part
    ignored: tuple[str, ...] = ()


def evaluation_view(recipe: Recipe) -> View:
    """The view in which a recipe's networks are evaluated."""
    facts, settings = DATASETS[recipe.data.dataset], recipe.data
    if facts.height_px:
        return View(facts.height_px, 1.0, facts.channels)
    return View(settings.eval_resolution_px or settings.resolution_px, settings.eval_crop_share, facts.channels)


def open_images(to: str, root: Path, limit: int | None) -> ImageSet:
    """Lists the pictures that the person asked for.

    Args:
        to: a folder, or one of SMALL_DATASETS.
        root: folder above the official files of a small data set.
        limit: images of each class that are taken, the first of each part; None: all.

    Raises:
        UserError: there are none, or a class is not in both parts.
    """
    found = _open_small(to, root) if to in SMALL_DATASETS else _open_folder(Path(to))
    if len(found.class_names) < 2:
        raise UserError(f"{found.place}: holds one class, {found.class_names[0]}: a classifier needs two or more")
    if limit is None:
        return found
    return replace(found, train=_limited(found.train, limit), val=_limited(found.val, limit))


def view_batches(pictures: Sequence[Picture], view: View, batch: int) -> Iterator[UInt8]:
    """Views of pictures, uint8 (B, side, side, channels), in order; a batch is decoded while the one before is used.

    Memory: two batches of views, and a whole picture for each core.

    Raises:
        UserError: a file cannot be decoded; the line names it.
        MachineError: the disk failed.
    """
    with ThreadPoolExecutor(usable_cores()) as pool:
        try:
            ahead = pool.map(lambda picture: picture_view(picture, view), pictures[:batch])
            for begin in range(batch, len(pictures) + batch, batch):
                ready = list(ahead)
                ahead = pool.map(lambda picture: picture_view(picture, view), pictures[begin : begin + batch])
                yield np.stack(ready)
        finally:
            # Whoever leaves early, by an error or Ctrl-C, does not wait for what nobody will see.
            pool.shutdown(wait=False, cancel_futures=True)


def picture_view(picture: Picture, view: View) -> UInt8:
    """View of a picture, uint8 (side, side, channels).

    Raises:
        UserError: its file cannot be decoded.
        MachineError: the disk failed.
    """
    pixels = _decoded(picture) if isinstance(picture, Path) else picture
    size = np.array([pixels.shape[:2]], np.int32)
    ((top, left, height, width, _),) = centre_squares(size, ResizedCrop(evaluation_share=view.share)).tolist()
    seen = resampled(pixels[top : top + height, left : left + width], view.side_px, view.side_px)
    return seen if view.channels == 3 else np.asarray(Image.fromarray(seen).convert("L"))[:, :, None]


def _decoded(path: Path) -> UInt8:
    try:
        return decode_plain(_content(path))
    except Refused as error:
        raise UserError(f"{path}: {error}: repair or remove that file") from None


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        if error.errno in MACHINE_FAULTS:
            raise MachineError(f"{path}: cannot be read ({error.strerror})") from None
        raise UserError(f"{path}: cannot be read ({error.strerror}): repair or remove that file") from None


def _open_small(name: str, root: Path) -> ImageSet:
    if name == "digits":
        return _small_set(name, *read_digits())
    layout = LAYOUTS[name]
    if not any((root / folder).is_dir() for folder in (layout.binary, layout.python)):
        raise UserError(
            f"{root}: holds neither {layout.binary}/ nor {layout.python}/: "
            "set --to_root to the folder above one of them"
        )
    return _small_set(name, *read_cifar(name, root))


def _small_set(name: str, train: Split, test: Split, class_names: tuple[str, ...]) -> ImageSet:
    return ImageSet(name, name, class_names, _in_memory(train), _in_memory(test))


def _in_memory(split: Split) -> Part:
    images_NHWC = split.images_NHWC
    if images_NHWC.shape[3] == 1:
        images_NHWC = np.repeat(images_NHWC, 3, axis=3)
    return Part(tuple(images_NHWC), split.labels)


def _open_folder(folder: Path) -> ImageSet:
    if not folder.is_dir():
        raise UserError(
            f"--to={folder}: is no folder, and none of {', '.join(SMALL_DATASETS)}: "
            "name a folder that holds train/ and val/, with a folder a class in each"
        )
    classes = [_class_folders(folder / part) for part in PARTS]
    _require_same_classes(folder, *classes)
    ignored: list[str] = []
    train, val = (_list_part(folder / part, names, ignored) for part, names in zip(PARTS, classes, strict=True))
    return ImageSet(folder.resolve().name, str(folder), classes[0], train, val, tuple(ignored))


def _class_folders(folder: Path) -> tuple[str, ...]:
    """Names of the classes, sorted."""
    if not folder.is_dir():
        raise UserError(
            f"{folder}: is missing: --to names a folder with train/ and val/, with a folder a class in each"
        )
    names = tuple(entry.name for entry in _entries(folder) if entry.is_dir())
    if not names:
        raise UserError(f"{folder}: holds no class folders: put the pictures into a folder a class")
    return names


def _require_same_classes(folder: Path, train: tuple[str, ...], val: tuple[str, ...]) -> None:
    only = sorted(set(train) ^ set(val))
    if only:
        there, lacking = PARTS if only[0] in train else PARTS[::-1]
        raise UserError(
            f"{folder}: the class {only[0]} is in {there}/ and not in {lacking}/ (in one of them alone: {len(only)}): "
            "give both the same class folders"
        )


def _list_part(folder: Path, class_names: tuple[str, ...], ignored: list[str]) -> Part:
    pictures: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(class_names):
        entries = _entries(folder / name)
        found = [folder / name / entry.name for entry in entries if entry.is_file() and is_picture_name(entry.name)]
        if not found:
            raise UserError(f"{folder / name}: holds no picture: fill or remove that class folder")
        ignored += sorted({str(folder / name / entry.name) for entry in entries} - {str(path) for path in found})
        pictures += found
        labels += [label] * len(found)
    return Part(tuple(pictures), np.asarray(labels, np.int64))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, hidden files apart, by name."""
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _limited(part: Part, limit: int) -> Part:
    """The first `limit` pictures of each class, or all where there are fewer."""
    kept = np.sort(np.concatenate([np.flatnonzero(part.labels == label)[:limit] for label in np.unique(part.labels)]))
    return Part(tuple(part.pictures[position] for position in kept), part.labels[kept])
