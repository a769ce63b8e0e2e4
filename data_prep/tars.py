"""Unpacks the original tar files of ILSVRC2012.

ILSVRC2012_img_train.tar    one tar of pictures for each class, n01440764.tar ...
ILSVRC2012_img_val.tar      the pictures, without folders
ILSVRC2012_devkit_t12.tar.gz    labels of the latter
"""

from __future__ import annotations

import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO

from data_prep.progress import Progress
from data_prep.sources import TRAIN, WNID, Request
from fastgen.errors import UserError
from fastgen.stop import StopRequest

TRAIN_TAR, VAL_TAR, DEVKIT_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
DEVKIT_FILES = ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
# Nothing else leaves a tar: no folders, no links, no names that lead elsewhere.
PICTURE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*\.JPEG")


def unpack(request: Request, target: Path) -> Request:
    """Unpacks what `request` asks for, unless it is there already, and gives the request for the unpacked folder.

    Raises:
        UserError: a tar file is missing or damaged.
        Stopped: a signal came; what is whole stays, and the same command goes on.
    """
    with StopRequest() as stop:
        if request.split == TRAIN:
            unpack_train(request.source / TRAIN_TAR, target / "train", stop)
            return replace(request, source=target / "train", kind=request.kind or "folder")
        unpack_val(request.source / VAL_TAR, target / "val", stop)
        labels = request.val_labels
        if labels is None and (request.source / DEVKIT_TAR).is_file():
            labels = target / "devkit"
            unpack_devkit(request.source / DEVKIT_TAR, labels)
    return replace(request, source=target / "val", kind=request.kind or "ilsvrc2012-val", val_labels=labels)


def unpack_train(path: Path, target: Path, stop: StopRequest) -> None:
    """A class at a time: a class folder is there as a whole or not at all."""
    with _opened(path) as outer:
        members = [member for member in _members(outer, path) if member.isfile()]
        with Progress("classes unpacked", len(members)) as progress:
            for member in members:
                wnid = member.name.removesuffix(".tar")
                if not WNID.fullmatch(wnid):
                    raise UserError(f"{path}: holds {member.name!r}, which is no class: fetch the official file again")
                content = outer.extractfile(member)
                assert content is not None  # isfile() says so
                with _opened(path, content) as inner:
                    _unpack_pictures(inner, path, target / wnid, stop)
                progress.add(1, member.size)


def unpack_val(path: Path, target: Path, stop: StopRequest) -> None:
    """All pictures into one folder."""
    with _opened(path) as archive:
        _unpack_pictures(archive, path, target, stop)


def unpack_devkit(path: Path, target: Path) -> None:
    """The two files that are needed."""
    with _opened(path) as archive:
        for member in _members(archive, path):
            name = os.path.basename(member.name)
            if member.isfile() and name in DEVKIT_FILES:
                target.mkdir(parents=True, exist_ok=True)
                _copy(archive, member, path, target / name)


def _unpack_pictures(archive: tarfile.TarFile, path: Path, target: Path, stop: StopRequest) -> None:
    members = list(_members(archive, path))
    for member in members:
        if not (member.isfile() and PICTURE.fullmatch(member.name)):
            raise UserError(f"{path}: holds {member.name!r}, which is no picture file: fetch the official file again")
    if all(_is_there(target / member.name, member.size) for member in members):
        return
    target.mkdir(parents=True, exist_ok=True)
    for member in members:
        stop.check()
        if not _is_there(target / member.name, member.size):
            _copy(archive, member, path, target / member.name)


def _is_there(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _copy(archive: tarfile.TarFile, member: tarfile.TarInfo, source: Path, path: Path) -> None:
    """Writes beside and renames: a file of the right name is whole."""
    partial = path.with_name(f".{path.name}.partial")
    content = archive.extractfile(member)
    assert content is not None  # only files come here
    try:
        with content, open(partial, "wb") as file:
            shutil.copyfileobj(content, file)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        partial.unlink()
        raise UserError(f"{source}: is cut short in {member.name} ({error}): fetch the official file again") from None
    os.replace(partial, path)


def _members(archive: tarfile.TarFile, path: Path) -> Iterator[tarfile.TarInfo]:
    try:
        yield from archive
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{path}: is damaged or cut short ({error}): fetch the official file again") from None


def _opened(path: Path, content: IO[bytes] | None = None) -> tarfile.TarFile:
    if content is None and not path.is_file():
        raise UserError(f"{path}: is missing: put ILSVRC2012's official tar files into --source")
    try:
        return tarfile.open(path, "r:*") if content is None else tarfile.open(fileobj=content, mode="r:")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{path}: is damaged or no tar file ({error}): fetch the official file again") from None
