"""CIFAR-10 and CIFAR-100 from their official files, in the binary or the python layout.

Both layouts hold the same records in the same order, so both give the same data hash.
Source: Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastgen.data.split import Int64, Split, UInt8
from fastgen.errors import UserError

PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Layout:
    """Files of one data set.

    Attributes:
        binary, python: names of the two folders under data.root.
        binary_train, binary_test, python_train, python_test: files and the images in each.
        classes: how many there are.
        label_bytes: bytes before the pixels of a binary record; the last is the label.
        label_key: of the labels in a python file.
        binary_names, python_names: file that lists the classes, and the key in the python one.
    """

    binary: str
    python: str
    binary_train: tuple[tuple[str, int], ...]
    binary_test: tuple[tuple[str, int], ...]
    python_train: tuple[tuple[str, int], ...]
    python_test: tuple[tuple[str, int], ...]
    classes: int
    label_bytes: int
    label_key: str
    binary_names: str
    python_names: tuple[str, str]


LAYOUTS = {
    "cifar100": Layout(
        binary="cifar-100-binary",
        python="cifar-100-python",
        binary_train=(("train.bin", 50_000),),
        binary_test=(("test.bin", 10_000),),
        python_train=(("train", 50_000),),
        python_test=(("test", 10_000),),
        classes=100,
        label_bytes=2,
        label_key="fine_labels",
        binary_names="fine_label_names.txt",
        python_names=("meta", "fine_label_names"),
    ),
    "cifar10": Layout(
        binary="cifar-10-batches-bin",
        python="cifar-10-batches-py",
        binary_train=tuple((f"data_batch_{n}.bin", 10_000) for n in range(1, 6)),
        binary_test=(("test_batch.bin", 10_000),),
        python_train=tuple((f"data_batch_{n}", 10_000) for n in range(1, 6)),
        python_test=(("test_batch", 10_000),),
        classes=10,
        label_bytes=1,
        label_key="labels",
        binary_names="batches.meta.txt",
        python_names=("batches.meta", "label_names"),
    ),
}


def read_cifar(dataset: str, root: Path, *, download: bool = False) -> tuple[Split, Split, tuple[str, ...]]:
    """Reads the training and the test split.

    Args:
        dataset: `cifar100` or `cifar10`.
        root: folder that holds the official folder of either layout.
        download: fetch the python layout through torchvision when neither is there.

    Returns:
        training split, test split, names of the classes.

    Raises:
        UserError: files are missing, cut short or damaged; the line names the file and both sizes.
    """
    layout = LAYOUTS[dataset]
    if not (root / layout.binary).is_dir() and not (root / layout.python).is_dir():
        if not download:
            raise UserError(
                f"{root}: holds neither {layout.binary}/ nor {layout.python}/: "
                "set data.root to the folder above one of them, or data.download=true"
            )
        _download(dataset, root)
    if (root / layout.binary).is_dir():
        folder = root / layout.binary
        train, test = (_read_binary(folder, files, layout) for files in (layout.binary_train, layout.binary_test))
        named_in = folder / layout.binary_names
        listed: Any = _lines(named_in)
    else:
        folder = root / layout.python
        train, test = (_read_python(folder, files, layout) for files in (layout.python_train, layout.python_test))
        file, key = layout.python_names
        listed, named_in = _unpickle(folder / file, 1).get(key), folder / file
    if not isinstance(listed, list) or len(listed) != layout.classes:
        raise UserError(f"{named_in}: does not name {layout.classes} classes: fetch the official file again")
    return train, test, tuple(str(name) for name in listed)


def _read_binary(folder: Path, files: tuple[tuple[str, int], ...], layout: Layout) -> Split:
    images, labels = [], []
    for name, count in files:
        record_bytes = layout.label_bytes + PIXELS
        content = _read_bytes(folder / name, count * record_bytes, exact=True)
        records = np.frombuffer(content, np.uint8).reshape(count, record_bytes)
        images.append(records[:, layout.label_bytes :])
        labels.append(_checked_labels(records[:, layout.label_bytes - 1], layout, folder / name))
    return _split(images, labels)


def _read_python(folder: Path, files: tuple[tuple[str, int], ...], layout: Layout) -> Split:
    images, labels = [], []
    for name, count in files:
        content = _unpickle(folder / name, count * PIXELS)
        pixels, numbers = content.get("data"), content.get(layout.label_key)
        if not isinstance(pixels, np.ndarray) or pixels.shape != (count, PIXELS) or pixels.dtype != np.uint8:
            raise UserError(
                f"{folder / name}: does not hold {count} images of {PIXELS} bytes: fetch the official file again"
            )
        if not isinstance(numbers, list) or len(numbers) != count:
            raise UserError(f"{folder / name}: does not hold {count} {layout.label_key}: fetch the official file again")
        images.append(pixels)
        labels.append(_checked_labels(numbers, layout, folder / name))
    return _split(images, labels)


def _checked_labels(labels: Any, layout: Layout, path: Path) -> Int64:
    """int64 labels, all of them of a class that there is."""
    found = np.asarray(labels)
    if found.dtype.kind not in "iu" or found.min() < 0 or found.max() >= layout.classes:
        raise UserError(f"{path}: holds labels outside 0..{layout.classes - 1}: fetch the official file again")
    return found.astype(np.int64)


def _split(images: list[UInt8], labels: list[Int64]) -> Split:
    planes_NCHW = np.concatenate(images).reshape(-1, 3, 32, 32)
    images_NHWC = np.ascontiguousarray(planes_NCHW.transpose(0, 2, 3, 1))
    return Split(images_NHWC, np.concatenate(labels), np.arange(len(images_NHWC), dtype=np.int64))


def _read_bytes(path: Path, expected_bytes: int, *, exact: bool = False) -> bytes:
    """Reads a file whose size is known: exactly, or at least."""
    if not path.is_file():
        raise UserError(f"{path}: is missing (expected {expected_bytes:,} bytes): fetch the official files again")
    found_bytes = path.stat().st_size
    if found_bytes < expected_bytes or (exact and found_bytes != expected_bytes):
        least = "" if exact else "at least "
        raise UserError(
            f"{path}: expected {least}{expected_bytes:,} bytes, found {found_bytes:,}: fetch the official file again"
        )
    try:
        return path.read_bytes()
    except PermissionError:
        raise UserError(f"{path}: may not be read: change its permissions, or data.root") from None


def _lines(path: Path) -> list[str]:
    try:
        return _read_bytes(path, 1).decode().split()
    except UnicodeDecodeError:
        raise UserError(f"{path}: is damaged (no text): fetch the official file again") from None


class _ArraysOnly(pickle.Unpickler):
    """Unpickles lists, numbers, text and numpy arrays: a file from elsewhere runs no code."""

    _ALLOWED = frozenset({"_reconstruct", "ndarray", "dtype", "_frombuffer"})

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in self._ALLOWED:
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _unpickle(path: Path, least_bytes: int) -> dict[str, Any]:
    content = _read_bytes(path, least_bytes)
    try:
        result = _ArraysOnly(io.BytesIO(content), encoding="latin1").load()
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        ImportError,
    ) as error:
        raise UserError(f"{path}: is damaged or not an official file ({error}): fetch it again") from None
    if not isinstance(result, dict):
        raise UserError(f"{path}: is not an official file: fetch it again")
    return result


def _download(dataset: str, root: Path) -> None:
    from torchvision import datasets

    source = {"cifar100": datasets.CIFAR100, "cifar10": datasets.CIFAR10}[dataset]
    try:
        source(str(root), train=True, download=True)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{dataset} could not be fetched into {root} ({reason}): copy the official files there by hand"
        ) from None
