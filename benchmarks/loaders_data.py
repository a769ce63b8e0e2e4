"""Makes the samples of `benchmarks.loaders`: photographs, repeated, in the forms that loaders read."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

import data_prep.beton
import data_prep.manifest
from benchmarks.loaders_cases import JPEG, RAW, SHORT_PX, STORED, Bench
from data_prep.sources import Request, Source, open_source
from fastgen.data.beton import Beton, BetonWriter, Sample, page_bytes_for, read_beton
from fastgen.data.manifest import Manifest, read_manifest
from fastgen.errors import MachineError, UserError

Int64 = npt.NDArray[np.int64]


def prepare(images_from: Path, work: Path, images: int, batch_size: int, resolution_px: int, forms: set[str]) -> Bench:
    """Makes the samples in the forms that are needed, after saying what room they take.

    Photographs that are damaged or cannot be read are left out.

    Args:
        images_from: folder of photographs, one folder a class.
        work: folder to write to; what a former call left there is used again.
        images: at least so many samples; rounded up to whole batches.
        batch_size, resolution_px: of the candidates.
        forms: of FILES, JPEG and RAW.

    Raises:
        UserError: there are no photographs.
        MachineError: the disk has too little room.
    """
    samples = -(-images // batch_size) * batch_size
    source = open_source(Request(images_from))
    estimate(source, work, samples, forms)
    words = [f"--source={images_from}", "--on-error=skip", "--damaged=refuse"]
    # Named by the photographs, so that one work folder may serve for several folders of them.
    name = source.fingerprint()[:12]
    data_prep.manifest.main([*words, f"--out={work / name}.manifest"])
    manifest = read_manifest(work / f"{name}.manifest")
    if not len(manifest):
        raise UserError(f"{images_from}: holds no photograph that can be read")
    rows = np.arange(samples, dtype=np.int64) % len(manifest)
    betons = {}
    for form, options in ((JPEG, ["--mode=jpeg"]), (RAW, ["--mode=raw", f"--shortest-px={SHORT_PX}"])):
        if form in forms:
            once = work / f"{name}-{form}.beton"
            data_prep.beton.main([*words, *options, f"--out={once}"])
            betons[form] = repeat_beton(read_beton(once), rows)
    return Bench(repeat_manifest(manifest, rows), betons, len(manifest), batch_size, resolution_px)


def estimate(source: Source, work: Path, samples: int, forms: set[str]) -> None:
    """Prints what room the samples take in a folder, from files' sizes and headers.

    Raises:
        MachineError: it has too little.
    """
    pictures = [picture for picture in map(source.picture, range(len(source))) if isinstance(picture, Path)]
    if not pictures:
        raise UserError(f"{source.folder}: name a folder of photographs, one folder a class")
    raw = data_prep.beton.Storage("raw", 0.0, 90, None, SHORT_PX, False)
    sizes = [raw.size(*data_prep.beton.measure(picture)) for picture in pictures]
    each = {JPEG: np.mean([p.stat().st_size for p in pictures]), RAW: np.mean([3 * h * w for h, w in sizes])}
    # All samples, and every photograph once, from which they are copied.
    wanted = {form: float(each[form]) * (samples + len(pictures)) for form in each if form in forms}
    free, total = shutil.disk_usage(work).free, sum(wanted.values())
    parts = ", ".join(f"{size / 1e9:.2f} GB for {STORED[form]}" for form, size in wanted.items())
    print(
        f"{len(pictures):,} photographs as {samples:,} samples take about {total / 1e9:.2f} GB in {work} "
        f"({parts or 'files are read where they are'}); {free / 1e9:.1f} GB free"
    )
    if total > free:
        raise MachineError(f"{work}: has too little room: name another --work, or lower --images")


def repeat_manifest(manifest: Manifest, rows: Int64) -> Manifest:
    """The manifest of these rows of another."""
    columns = ("paths", "stand_ins", "labels", "heights", "widths", "modes", "file_bytes", "digests", "conditions")
    return replace(manifest, **{name: getattr(manifest, name)[rows] for name in columns})


def repeat_beton(beton: Beton, rows: Int64) -> Path:
    """A .beton beside another, with these of its samples; used again where it is there."""
    path = beton.path.with_name(f"{beton.path.stem}-{len(rows)}-samples-{beton.index_hash[:12]}.beton")
    if path.exists():
        return path
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        writer = BetonWriter(file, len(rows), page_bytes_for(int(beton.stored_bytes.max())))
        for row in rows.tolist():
            writer.add(_sample(beton, row))
        writer.finish()
        # Else the system would be writing it out while the first rounds are timed.
        file.flush()
        os.fsync(file.fileno())
    return partial.replace(path)


def _sample(beton: Beton, row: int) -> Sample:
    stored_height, stored_width = beton.stored_sizes[row].tolist()
    height, width = beton.sizes[row].tolist()
    assert beton.crc32 is not None
    return Sample(
        stored=beton.bytes_of(row).tobytes(),
        mode=int(beton.modes[row]),
        stored_size=(stored_height, stored_width),
        size=(height, width),
        label=int(beton.labels[row]),
        crc32=int(beton.crc32[row]),
    )
