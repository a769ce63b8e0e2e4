"""Gives a run's network, or the ensemble of its generations, as ONNX and safetensors. A command.

    python -m fastgen.export RUN [--generation G | --ensemble[=0..3]] [--to FOLDER] [--format onnx,safetensors]
        [--input pixels|pixels-float|normalised] [--opset N] [--images N] [--force] [--section.key=value ...]

Every file is read again after it was written, and run on images of the run, by onnxruntime or in a fresh network of the
library that it is for; where it is further from the run's own network in fp64 than rounding explains (`check.py`),
nothing is put in place, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastgen.arguments import Arguments, at_least_one, split_words
from fastgen.errors import UserError
from fastgen.export import card, onnx_file, weights_file
from fastgen.export.check import Agreement, Reference, agreement, passes_of, reference_of
from fastgen.export.images import Images, images_of
from fastgen.export.onnx_file import INPUTS, OLDEST_OPSET, Input
from fastgen.export.place import Stage, put_in_place, require_free, staged, write
from fastgen.export.subject import Subject, chosen, load_subject, stem_of, whole_ensemble
from fastgen.progress import Display, PatientConsole
from fastgen.source import Source, open_source

COMMAND = "python -m fastgen.export"
USAGE = f"{COMMAND} RUN_FOLDER [--generation G | --ensemble[=FIRST..LAST]] [--to FOLDER] [--format onnx,safetensors]"
NAMES = ("--generation", "--to", "--format", "--input", "--opset", "--images")
FORMATS = ("onnx", "safetensors")
RANGE = re.compile(r"([0-9]+)\.\.([0-9]+)")
WHOLE = "whole"


@dataclass(frozen=True)
class Asked:
    """What the person asked for.

    Attributes:
        formats: of FORMATS.
        given: what the ONNX file takes.
        opset: of the ONNX file.
        images: how many to check with.
        folder: where the files go.
        force: whether files that are there may be replaced.
    """

    formats: tuple[str, ...]
    given: Input
    opset: int
    images: int
    folder: Path
    force: bool


def main(words: Sequence[str]) -> None:
    """The command."""
    arguments, overrides = _read(words)
    run = Path(arguments.run)
    if not run.is_dir():
        raise UserError(f"{run}: is no run folder")
    asked = _asked(arguments, run)
    if "onnx" in asked.formats:
        onnx_file.require_packages()
        onnx_file.require_opset(asked.opset)
    source = open_source(arguments.run, None, overrides, COMMAND)
    generations = chosen(source, arguments.generation, _range(arguments.ensemble, source))
    # Before any work.
    _require_free(asked, stem_of(generations))
    for line in export(load_subject(source, generations), asked, run):
        print(line)


def export(subject: Subject, asked: Asked, run: Path) -> list[str]:
    """Makes, checks and puts in place all files.

    Returns:
        lines for the person.

    Raises:
        MachineError: a file failed its check, or the disk is full; nothing is left.
        UserError: the networks cannot be exported, or the place is not to be written to; nothing is left.
        Stopped: a signal came; nothing is left.
    """
    display = Display(PatientConsole(stderr=True))
    measured = card.measured_by(run, subject)
    images = images_of(subject, asked.images)
    if images.why_random is not None:
        display.say(f"checked on random images, as the run's own cannot be read: {images.why_random}")
    with staged(asked.folder, subject.stem) as stage:
        passes = passes_of(subject, len(images))
        with display.passes("reference in fp64", passes, len(images) * 2 * len(subject.members) // passes) as passed:
            reference = reference_of(subject, images.pixels_NCHW, passed)
        files, agreements = dict[str, bytes](), dict[str, Agreement]()
        if "onnx" in asked.formats:
            display.say(f"{subject.stem}: tracing for ONNX: seconds, and some minutes for deep networks")
            agreements["onnx"] = _export_onnx(subject, asked, stage, images, reference, files)
        if "safetensors" in asked.formats:
            agreements["safetensors"] = _export_weights(subject, stage, images, reference, files)
        content = card.card_of(subject, images, reference, agreements, asked.given, files, measured)
        json_name, text_name = _card_names(subject.stem)
        write(stage, json_name, card.as_json(content))
        write(stage, text_name, card.as_text(content, subject, asked.given))
        # Others may have put files there since.
        _require_free(asked, subject.stem)
        put_in_place(stage, asked.folder, subject.stem, [*files, text_name], json_name)
    return [
        *_told(images, reference, agreements),
        *(str(asked.folder / name) for name in [*files, json_name, text_name]),
    ]


def _export_onnx(
    subject: Subject, asked: Asked, stage: Stage, images: Images, reference: Reference, files: dict[str, bytes]
) -> Agreement:
    name = f"{subject.stem}.onnx"
    files[name] = onnx_file.to_onnx(subject, asked.given, asked.opset)
    path = write(stage, name, files[name])
    return agreement(name, onnx_file.run_onnx(path, subject, asked.given, asked.opset, images.pixels_NCHW), reference)


def _export_weights(
    subject: Subject, stage: Stage, images: Images, reference: Reference, files: dict[str, bytes]
) -> Agreement:
    found: list[Tensor] = []
    for member in subject.members:
        name = weights_file.weights_name(subject, member)
        files[name] = weights_file.to_weights(subject, member)
        found.append(weights_file.run_weights(write(stage, name, files[name]), subject, member, images.pixels_NCHW))
    together = weights_file.probabilities(found) if subject.is_ensemble else found[0]
    return agreement(f"{subject.stem}.safetensors", together, reference)


def _told(images: Images, reference: Reference, agreements: dict[str, Agreement]) -> list[str]:
    lines = [
        f"checked on {len(images)} {images.what}: PyTorch's fp32 is {reference.rounding:.2e} off fp64 at most; "
        f"allowed {reference.tolerance:.2e}"
    ]
    for name, found in agreements.items():
        lines.append(f"{name}: {found.difference:.2e} off; same first class on {found.same_first} of {found.images}")
    return lines


def _card_names(stem: str) -> tuple[str, str]:
    """Of the card as JSON, and to be read."""
    return f"{stem}.json", f"{stem}.md"


def _require_free(asked: Asked, stem: str) -> None:
    require_free(asked.folder, stem, _card_names(stem), asked.force)


def _asked(arguments: Any, run: Path) -> Asked:
    given: Input = arguments.input or "pixels"
    if arguments.to == "":
        # As of a variable that is not set; it would mean the current folder.
        raise UserError("--to: is empty: name a folder")
    folder = run / "export" if arguments.to is None else Path(arguments.to)
    if "onnx" not in arguments.format:
        for name, value in (("--input", arguments.input), ("--opset", arguments.opset)):
            if value is not None:
                raise UserError(f"{name} is of the ONNX file: leave it out, or give --format=onnx too")
    opset = OLDEST_OPSET if arguments.opset is None else arguments.opset
    return Asked(arguments.format, given, opset, arguments.images, folder, arguments.force)


def _range(text: str | None, source: Source) -> tuple[int, int] | None:
    if text is None:
        return None
    if text == WHOLE:
        return whole_ensemble(source)
    found = RANGE.fullmatch(text)
    if found is None or int(found[1]) >= int(found[2]):
        raise UserError(f"--ensemble={text}: give the first and the last member, as --ensemble=0..3")
    return int(found[1]), int(found[2])


def _formats(text: str) -> tuple[str, ...]:
    """Type of --format."""
    names = text.split(",")
    unknown = [name for name in names if name not in FORMATS]
    if unknown or len(set(names)) != len(names):
        raise argparse.ArgumentTypeError(f"'{text}' is no list of {' and '.join(FORMATS)}")
    return tuple(name for name in FORMATS if name in names)


def _read(words: Sequence[str]) -> tuple[Any, list[str]]:
    parser = Arguments("fastgen.export", (__doc__ or "").split("\n\n")[0])
    parser.add_argument("run", help="run folder")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--generation", type=int, help="which one; default the last that is trained")
    which.add_argument(
        "--ensemble",
        nargs="?",
        const=WHOLE,
        metavar="FIRST..LAST",
        help="mean softmax of these generations; default all",
    )
    parser.add_argument("--to", help="folder of the files; default RUN_FOLDER/export")
    parser.add_argument("--format", type=_formats, default=FORMATS, help="onnx, safetensors, or both (default)")
    parser.add_argument(
        "--input", choices=INPUTS,
        help="of the ONNX file: pixels 0..255 in uint8 (default), the same in float32, or what the network takes",
    )  # fmt: skip
    parser.add_argument("--opset", type=int, help=f"version of ONNX's operators; default {OLDEST_OPSET}")
    parser.add_argument("--images", type=at_least_one, default=64, help="how many to check with; default 64")
    parser.add_argument("--force", action="store_true", help="replace an export that is there, all its formats")
    if "--help" in words or "-h" in words:
        parser.epilog = (
            "Any setting of the run's recipe can be overridden as --section.key=value: data.root, if it moved."
        )
        parser.parse_args(["--help"])
    if not words or words[0].startswith("-"):
        raise UserError(f"usage: {USAGE} (--help lists all arguments)")
    joined = _with_ranges(words[1:])
    _require_once(joined, "--ensemble")
    flags = [word for word in joined if word.partition("=")[0] in ("--ensemble", "--force")]
    own, overrides = split_words([word for word in joined if word not in flags], NAMES)
    return parser.parse_args([words[0], *own, *flags]), overrides


def _require_once(words: Sequence[str], name: str) -> None:
    if sum(word.partition("=")[0] == name for word in words) > 1:
        raise UserError(f"{name} is given twice: keep one")


def _with_ranges(words: Sequence[str]) -> list[str]:
    """`--ensemble 0..3` as one word, like `--ensemble=0..3`; without a range it has no value."""
    joined = list[str]()
    for word in words:
        if joined and joined[-1] == "--ensemble" and RANGE.fullmatch(word):
            joined[-1] = f"--ensemble={word}"
        else:
            joined.append(word)
    return joined
