"""The card of an export: what it is, how to load it, what images it takes, how good it is. As JSON, and to be read."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastgen import __version__
from fastgen.errors import UserError
from fastgen.export.check import FACTOR, Agreement, Reference
from fastgen.export.images import Images
from fastgen.export.onnx_file import IMAGES, Input
from fastgen.export.subject import Subject
from fastgen.export.weights_file import maker_of, weights_name
from fastgen.nodes import read_json

# Raised whenever what the card tells gets another meaning.
CARD_FORMAT = 1
# How an ONNX file takes images: type, and range of the values.
TAKES: dict[Input, tuple[str, str]] = {
    "pixels": ("uint8", "pixels 0..255; it normalises them itself"),
    "pixels-float": ("float32", "pixels 0..255; it normalises them itself"),
    "normalised": ("float32", "(pixel / 255 - mean) / std of each channel"),
}


def measured_by(run: Path, subject: Subject) -> dict[str, Any] | None:
    """What the run's results.json tells of the very networks; None: nothing.

    Raises:
        UserError: that file is damaged.
    """
    path = run / "results.json"
    if not path.is_file():
        return None
    results = read_json(path)
    try:
        return _row_of(results, subject)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: is damaged ({error!r}): start the run's own command again") from None


def _row_of(results: Mapping[str, Any], subject: Subject) -> dict[str, Any] | None:
    rows = {row["generation"]: row for row in results["generations"]}
    found = [rows.get(member.generation) for member in subject.members]
    nodes = [None if row is None else row["node"] for row in found]
    if nodes != [member.node for member in subject.members]:
        return None
    last = found[-1] or {}
    on = {"part": str(results["evaluated_on"]), "images": _number(last, "samples_evaluated")}
    if not subject.is_ensemble:
        likely = {name: None if last.get("nll") is None else _number(last, name) for name in ("nll", "ece")}
        return on | {name: _number(last, name) for name in ("top1_error", "top5_error")} | likely
    if subject.members[0].generation != 0 or last.get("ensemble_top1_error") is None:
        # Runs measure ensembles of all generations from the first on.
        return None
    return on | {name: _number(last, f"ensemble_{name}") for name in ("top1_error", "top5_error")}


def _number(row: Mapping[str, Any], name: str) -> float:
    value = row[name]
    # The card's JSON has finite numbers alone.
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}")
    return value


def card_of(
    subject: Subject, images: Images, reference: Reference, agreements: Mapping[str, Agreement], given: Input,
    files: Mapping[str, bytes], measured: Mapping[str, Any] | None,
) -> dict[str, Any]:  # fmt: skip
    """Content of the JSON card.

    Args:
        subject: what is exported.
        images: that it was checked on.
        reference: that it was compared with.
        agreements: by format, what came of it.
        given: input of the ONNX file.
        files: content by name.
        measured: by the run.
    """
    facts, view = subject.facts, subject.view
    return {
        "format": CARD_FORMAT,
        "fastgen": __version__,
        "run": subject.run,
        **subject.describe(subject.members),
        "class_names": None if images.class_names is None else list(images.class_names),
        "output": subject.output,
        "preprocessing": {
            "picture": view.text,
            "side_px": view.side_px,
            "share_of_shorter_side": view.share,
            "layout": f"NCHW, {'RGB' if facts.channels == 3 else 'grey'}",
            "normalisation": "(pixel / 255 - mean) / std of each channel",
        },
        "measured_by_the_run": None if measured is None else dict(measured),
        "checked": {
            "on": images.what,
            "images": len(images),
            "why_random": images.why_random,
            "fp32_from_fp64": reference.rounding,
            "factor": FACTOR,
            "tolerance": reference.tolerance,
            "images_of_clear_first_class": int(reference.clear.sum()),
            **{name: found.as_dict() for name, found in agreements.items()},
        },
        "files": {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in files.items()
        },
        "load": loading(subject, given, list(agreements)),
    }  # fmt: skip


def loading(subject: Subject, given: Input, formats: Sequence[str]) -> dict[str, list[str]]:
    """Lines of Python, by format; of an ensemble's weights, those of each member."""
    found: dict[str, list[str]] = {}
    if "onnx" in formats:
        shape = f"(N, {subject.facts.channels}, {subject.view.side_px}, {subject.view.side_px})"
        found["onnx"] = [
            "import onnxruntime",
            f'session = onnxruntime.InferenceSession("{subject.stem}.onnx")',
            f'{subject.output} = session.run(None, {{"{IMAGES}": images}})[0]  # {TAKES[given][0]} {shape}',
        ]
    if "safetensors" in formats:
        maker = maker_of(subject)
        found["safetensors"] = maker.code(weights_name(subject, subject.members[-1]))
    return found


def as_json(card: Mapping[str, Any]) -> bytes:
    """The card as a file."""
    return (json.dumps(card, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def as_text(card: Mapping[str, Any], subject: Subject, given: Input) -> bytes:
    """The card to be read, in Markdown."""
    facts, names = subject.facts, card["class_names"]
    which = f"ensemble of generations {_listed(card['generations'])}" if subject.is_ensemble else _alone(card)
    lines = [
        f"# {card['model']['name']} on {card['dataset']}, {which}",
        "",
        f"Trained by fastgen (run {card['run']}; node {_listed(card['nodes'])}). It gives {card['output']} of "
        f"{facts.classes} classes" + (", the mean of the members' softmax." if subject.is_ensemble else "."),
        "",
        *_loading_text(card, subject, given),
        "## Images",
        "",
        f"- {card['preprocessing']['picture']}; {card['preprocessing']['layout']}",
        f"- normalisation: {card['preprocessing']['normalisation']}; mean {_listed(facts.mean)}, "
        f"std {_listed(facts.std)}",
        "",
        "## Errors, as the run measured them",
        "",
        _errors_text(card["measured_by_the_run"]),
        "",
        "## Checked",
        "",
        *_check_text(card),
        "",
        "## Classes",
        "",
        "not known: the data could not be read"
        if names is None
        else ", ".join(f"{i} {n}" for i, n in enumerate(names)),
    ]
    return ("\n".join(lines) + "\n").encode()


def _alone(card: Mapping[str, Any]) -> str:
    return f"generation {card['generation']}"


def _loading_text(card: Mapping[str, Any], subject: Subject, given: Input) -> list[str]:
    lines = list[str]()
    for name, code in card["load"].items():
        # A network of a library takes what it was trained on.
        dtype, values = TAKES[given if name == "onnx" else "normalised"]
        each = " Each member has a file of its own." if name == "safetensors" and subject.is_ensemble else ""
        lines += [f"## {name}", "", *(f"    {line}" for line in code), "", f"It takes {dtype}: {values}.{each}", ""]
    return lines


def _errors_text(measured: Mapping[str, Any] | None) -> str:
    if measured is None:
        return "not measured"
    told = [f"top-1 error {measured['top1_error']:.2f} %", f"top-5 error {measured['top5_error']:.2f} %"]
    if measured.get("nll") is not None:
        told += [f"NLL {measured['nll']:.4f} nats", f"ECE {measured['ece']:.4f}"]
    return f"{', '.join(told)}, on {measured['images']:,} {measured['part']} images"


def _check_text(card: Mapping[str, Any]) -> list[str]:
    checked, own = card["checked"], card["checked"]["fp32_from_fp64"]
    random = "" if checked["why_random"] is None else f" (not the run's own: {checked['why_random']})"
    lines = [
        f"On {checked['images']} {checked['on']}{random}, beside the run's network in fp64. PyTorch's own fp32 is "
        f"{own:.3g} off at most; {checked['tolerance']:.3g} is allowed ({checked['factor']} times as much).",
        "",
    ]
    for name in ("onnx", "safetensors"):
        if name in checked:
            found = checked[name]
            lines.append(
                f"- {name}: {found['largest_difference']:.3g} off at most; the first class is the same on "
                f"{found['same_first_class']} of {found['images']} images"
            )
    return lines


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))
