"""Writes the index of an image folder: what the loaders `folder` and `dali` read by.

    python -m data_prep.manifest --source=DIR --out=FILE

Every file is decoded fully. Files that decoders do not agree on get a stand-in, a lossless RGB copy, in
`<out>.stand_ins/`; so does every picture of a source without files of its own, such as CIFAR.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_prep.judge import Refusal, Row, Rules, as_png, check_count, findings, judge, make_manifest, summary
from data_prep.options import add_source, request_of, run, say, shown
from data_prep.progress import Progress
from data_prep.sources import Picture, Source, open_source
from data_prep.work import Workers
from fastgen.arguments import Arguments
from fastgen.data.manifest import Manifest, read_manifest, to_bytes
from fastgen.errors import UserError
from fastgen.stop import StopRequest


@dataclass(frozen=True)
class Task:
    """One picture to inspect.

    Attributes:
        picture: file or pixels.
        rules: how it is judged.
        stand_ins: folder for its stand-in.
    """

    picture: Picture
    rules: Rules
    stand_ins: Path


def main(words: Sequence[str]) -> None:
    """The command."""
    arguments = _read_arguments(words)
    if arguments.show is not None:
        manifest, path = read_manifest(arguments.show), arguments.show
    else:
        manifest, path = make(arguments), arguments.out
    say(f"{path}:", *(f"  {line}" for line in [*summary(manifest), *shown(findings(manifest))]))
    if arguments.csv is not None:
        _write(arguments.csv, _as_csv(manifest))
    if arguments.dali is not None:
        from fastgen.data.dali_loader import export_pipeline

        export_pipeline(manifest, arguments.dali)


def make(arguments: argparse.Namespace) -> Manifest:
    """Inspects a source and writes its manifest."""
    if arguments.out is None:
        raise UserError("--out is missing: name the file to write, such as DIR/train.manifest")
    source = open_source(request_of(arguments))
    check_count(len(source), arguments.expect)
    rules = Rules(arguments.on_error == "skip", arguments.damaged == "keep", arguments.exif == "apply")
    stand_ins = arguments.out.with_name(arguments.out.name + ".stand_ins")
    results = inspect_all(source, rules, stand_ins, arguments.workers)
    used = any(isinstance(result, Row) and result.stand_in for result in results)
    options = {**rules.as_options(), "limit": arguments.limit, "split": arguments.split}
    manifest = make_manifest(source, results, {"kind": "manifest", "options": options}, stand_ins if used else None)
    # The manifest must not be safe from a power cut before what it refers to is.
    os.sync()
    _write(arguments.out, to_bytes(manifest, arguments.out))
    _remove_unused(stand_ins, manifest)
    return manifest


def inspect_all(source: Source, rules: Rules, stand_ins: Path, workers: int) -> list[Row | Refusal]:
    """Judges every picture, in order, and writes stand-ins.

    Raises:
        UserError: one is refused, and the rules do not skip those.
        Stopped: a signal came.
    """
    results: list[Row | Refusal] = []
    with StopRequest() as stop, Workers(workers) as pool, Progress("inspected", len(source)) as progress:
        tasks = ((position, Task(source.picture(position), rules, stand_ins)) for position in range(len(source)))
        for result in pool.map(inspect_one, tasks, stop, source.names.__getitem__):
            if isinstance(result, Refusal) and not rules.skip_refused:
                raise UserError(
                    f"{source.names[len(results)]}: {result.reason}: "
                    "mend or remove it, or leave such files out with --on-error=skip"
                )
            results.append(result)
            progress.add(1, result.file_bytes if isinstance(result, Row) else 0)
        print(f"{progress.pace}, {progress.seconds:.1f} s", file=sys.stderr)
    return results


def inspect_one(task: Task) -> Row | Refusal:
    """Judges one picture; in a worker process."""
    judged = judge(task.picture, task.rules)
    if isinstance(judged, Refusal):
        return judged
    if judged.inspected is not None and judged.inspected.plain:
        return judged.row
    # Named by content: what a former manifest refers to is never overwritten with something else.
    digest = judged.row.digest.hex()
    name = f"{digest[:2]}/{digest}{'.turned' if task.rules.exif else ''}.png"
    path = task.stand_ins / name
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, as_png(judged.pixels))
    return replace(judged.row, stand_in=name)


def _read_arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = Arguments(
        "data_prep.manifest", "Inspects pictures and writes their index, for the loaders folder and dali."
    )
    add_source(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="manifest to write")
    parser.add_argument(
        "--expect",
        metavar="COUNT",
        help="ilsvrc2012-train, ilsvrc2012-val or a number: refuse a source of another count",
    )
    parser.add_argument(
        "--show", type=Path, metavar="FILE", help="print what is in an existing manifest instead of making one"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the rows as CSV")
    parser.add_argument(
        "--dali", type=Path, metavar="FILE", help="also write a serialised DALI pipeline that reads these files"
    )
    return parser.parse_args(words)


def _as_csv(manifest: Manifest) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ("id", "path", "label", "class", "width", "height", "mode", "bytes", "condition", "stand_in", "blake2b")
    )
    for number in range(len(manifest)):
        label = int(manifest.labels[number])
        writer.writerow(
            (
                number, manifest.name(number), label, manifest.class_names[label], int(manifest.widths[number]),
                int(manifest.heights[number]), manifest.modes[number].decode(), int(manifest.file_bytes[number]),
                ("read", "damaged")[manifest.conditions[number]], os.fsdecode(manifest.stand_ins[number]),
                manifest.digests[number].tobytes().hex(),
            )
        )  # fmt: skip
    # File names need not be UTF-8.
    return text.getvalue().encode(errors="surrogateescape")


def _remove_unused(stand_ins: Path, manifest: Manifest) -> None:
    """Stand-ins of a former manifest of the same name; after the new one is in its place."""
    used = {stand_ins / os.fsdecode(name) for name in set(manifest.stand_ins.tolist()) if name}
    for path in stand_ins.glob("??/*"):
        if path not in used:
            path.unlink()
    for folder in [*stand_ins.glob("??"), *([stand_ins] if stand_ins.is_dir() else [])]:
        if not any(folder.iterdir()):
            folder.rmdir()


def _write(path: Path, content: bytes) -> None:
    # Brings torch with it, which worker processes need not load.
    from fastgen.files import write_atomically

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)


def _replace(path: Path, content: bytes) -> None:
    """Writes a whole file or nothing; whether it is on the disk already is `make`'s care."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
