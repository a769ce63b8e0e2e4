"""Transfers frozen features to other pictures: accuracy of a linear classifier, generation by generation. A command.

    python -m fastgen.transfer RUN_FOLDER --to FOLDER [--baseline RUN_FOLDER] [--section.key=value ...]
    python -m fastgen.transfer WEIGHTS.safetensors --cfg RECIPE.yaml --to FOLDER

Features are the input of a network's last linear layer, in eval mode and fp32 (`features.py`); the classifier is
multinomial logistic regression on standardised features, its C chosen within the training part alone (`probe.py`);
FOLDER has train/ and val/ with a folder a class, or is the name of a small data set (`transfer_data.py`).

This compares the features of two networks under one classifier. It is no benchmark of transfer learning where the
network was trained on small images, such as CIFAR's of 32 px: pictures are shrunk to that size. And its uncertainty is
that of the test pictures alone: other seeds of the networks, or other training pictures, may differ by more.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastgen.arguments import Arguments, at_least_one, split_words
from fastgen.augment import Normaliser
from fastgen.checkpoint import read_weights
from fastgen.data.facts import Facts
from fastgen.device import choose_device
from fastgen.errors import UserError, command
from fastgen.evaluate import load_network
from fastgen.features import Float32, Network, Tap, extract, last_linear, passes_of
from fastgen.nodes import Node
from fastgen.probe import CS, classify, fits_of, require_enough, require_sklearn
from fastgen.progress import Display, PatientConsole, counted
from fastgen.source import OwnFacts, Source, facts_of, open_source
from fastgen.transfer_data import ImageSet, evaluation_view, open_images
from fastgen.transfer_report import Measured, print_rows, rows_of, write_all

NO_BENCHMARK = (
    "This compares the features of two networks under one classifier. It is no benchmark of transfer where the source "
    "network was trained on small images."
)
UNCERTAINTY = (
    "Intervals, standard errors and McNemar's exact p (Holm's procedure over the generations, 5 %) are of the test "
    "pictures alone; other seeds of the networks may differ by more."
)
NAMES = ("--to", "--to_root", "--baseline", "--cfg", "--limit", "--batch", "--folds", "--seed", "--out")
COMMAND = "python -m fastgen.transfer"
USAGE = f"{COMMAND} RUN_FOLDER --to FOLDER [--baseline RUN_FOLDER] [--section.key=value ...]"


@dataclass(frozen=True)
class Trained:
    """A generation's network; `facts` of its data set."""

    generation: int
    node: str | None
    facts: Facts
    network: Network


def main(words: Sequence[str]) -> None:
    """The command."""
    asked, overrides = _read(words)
    require_sklearn()
    run = open_source(asked.run, asked.cfg, overrides, COMMAND)
    baseline = None if asked.baseline is None else open_source(asked.baseline, asked.cfg, overrides, COMMAND)
    if baseline is not None and len(run.weights) == len(baseline.weights) == 1:
        # Two single networks are meant to be compared, whatever their numbers.
        baseline = replace(baseline, weights=dict(zip(run.weights, baseline.weights.values(), strict=True)))
    sources = [run] if baseline is None else [run, baseline]
    images = open_images(asked.to, Path(asked.to_root), asked.limit)
    require_enough(images.train.labels, images.class_names, asked.folds)
    stem = _stem(asked.out, asked.run, images.name)
    print(NO_BENCHMARK)
    for line in _remarks(sources, images):
        print(line)
    measured = _measure(sources, images, asked.batch, asked.folds, asked.seed)
    rows = rows_of(measured[0], measured[1] if len(measured) > 1 else {})
    names = _names(sources)
    facts = {
        "note": NO_BENCHMARK,
        "uncertainty": UNCERTAINTY,
        "run": run.as_dict(),
        "baseline": None if baseline is None else baseline.as_dict(),
        "to": _facts_of(images, asked.limit),
        "classifier": {"cs": list(CS), "folds": asked.folds, "seed": asked.seed},
    }
    paths = write_all(stem, facts, names, rows)
    counted = f"{len(images.train):,} training, {len(images.val):,} test pictures, {len(images.class_names)} classes"
    print_rows(f"{images.name}: accuracy in percent [95 % interval]; {counted}", names, rows)
    print(UNCERTAINTY)
    print("  ".join(str(path) for path in paths))


def load_networks(source: Source, device: torch.device) -> Iterator[Trained]:
    """A source's networks, in order.

    Raises:
        UserError: weights are of another network than the recipe's, or it does not end in a linear layer.
    """
    recipe, view = source.recipe, evaluation_view(source.recipe)
    for generation, path in source.weights.items():
        _, description = read_weights(path)
        facts = facts_of(recipe, description.get("classes"))
        model = load_network(recipe, OwnFacts(facts), path, device)
        name = f"{source.name} generation {generation}"
        tap = Tap(model, last_linear(model, view, device, name))
        normalise = Normaliser(facts.mean, facts.std, device, torch.float32)
        node = description.get("node")
        yield Trained(generation, node, facts, Network(name, tap, normalise, view, device))


def _measure(
    sources: Sequence[Source], images: ImageSet, batch: int, folds: int, seed: int
) -> list[dict[int, Measured]]:
    """What the classifier makes of each source's generations."""
    device = choose_device(sources[0].recipe.run)
    trained = [list(load_networks(source, device)) for source in sources]
    networks = [one.network for of_source in trained for one in of_source]
    display = Display(PatientConsole(stderr=True))
    parts = []
    for what, part in (("training", images.train), ("test", images.val)):
        passes = passes_of(networks, len(part), batch)
        with display.passes(f"features of the {what} pictures", passes, min(batch, len(part))) as passed:
            parts.append(extract(networks, part.pictures, batch, passed))
    probes = iter(_probes(display, networks, images, parts[0], parts[1], folds, seed))
    return [{one.generation: Measured(one.node, *next(probes)) for one in of_source} for of_source in trained]


def _probes(
    display: Display, networks: Sequence[Network], images: ImageSet, train: Sequence[Float32], val: Sequence[Float32],
    folds: int, seed: int,
) -> Iterator[tuple[int, Any]]:  # fmt: skip
    """Dimensions of the features, and the classifier's measurement, of each network."""
    for network, train_ND, val_ND in zip(networks, train, val, strict=True):
        with display.passes(f"classifiers of {network.name}", fits_of(folds), len(train_ND)) as passed:
            fitted = counted(passed)
            probe = classify(train_ND, images.train.labels, val_ND, images.val.labels, folds, seed, fitted)
        yield train_ND.shape[1], probe


def _facts_of(images: ImageSet, limit: int | None) -> dict[str, Any]:
    return {
        "name": images.name,
        "place": images.place,
        "classes": len(images.class_names),
        "train_images": len(images.train),
        "val_images": len(images.val),
        "limit": limit,
        "ignored_files": len(images.ignored),
        "train_hash": images.train.content_hash,
        "val_hash": images.val.content_hash,
    }


def _names(sources: Sequence[Source]) -> list[str]:
    """Of the sources, for headings: unlike each other."""
    names = [source.name for source in sources]
    return names if len(set(names)) == len(names) else [source.place for source in sources]


def _remarks(sources: Sequence[Source], images: ImageSet) -> Iterator[str]:
    """What the person must know of these very networks and pictures."""
    for name, source in zip(_names(sources), sources, strict=True):
        told = source.as_dict()
        yield f"{name}: {told['model']}, trained on {told['dataset']}; sees each picture as: {told['view']}"
        if source.recipe.data.dataset == images.name:
            yield f"{name}: was trained on {images.name} itself, so this is no transfer"
    if images.ignored:
        yield f"ignored, no pictures by name: {len(images.ignored)} files or folders, the first {images.ignored[0]}"


def _stem(out: str | None, target: str, name: str) -> Path:
    """Where the results go, without the suffixes.

    Raises:
        UserError: the folder is not there, or may not be written to.
    """
    path = Path(target)
    folder = Path(out) if out is not None else path if path.is_dir() else path.parent
    if not folder.is_dir():
        raise UserError(f"--out={folder}: is no folder: make it first, or name another")
    if out is None and Node(folder).finished:
        raise UserError(f"{folder}: is a node, to which nothing is added: name a folder for the results with --out")
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder}: may not be written to: name another folder for the results with --out")
    return folder / (f"transfer-{name}" if path.is_dir() else f"transfer-{name}-{path.stem}")


def _read(words: Sequence[str]) -> tuple[Any, list[str]]:
    parser = Arguments("fastgen.transfer", (__doc__ or "").split("\n\n")[0])
    parser.add_argument("run", help="run folder, or a weights file with --cfg")
    parser.add_argument("--to", required=True, help="folder with train/ and val/, or cifar10, cifar100, digits")
    parser.add_argument("--to_root", default="data", help="folder above the files of cifar10 or cifar100; default data")
    parser.add_argument("--baseline", help="run folder, or weights file, to compare with: plain training, for example")
    parser.add_argument("--cfg", help="recipe of a weights file")
    parser.add_argument("--limit", type=at_least_one, help="images of each class, the first of each part; default all")
    parser.add_argument("--batch", type=at_least_one, default=256, help="images at once through a network; default 256")
    parser.add_argument("--folds", type=at_least_one, default=5, help="parts of the cross-validation; default 5")
    parser.add_argument("--seed", type=int, default=0, help="of the cross-validation's shuffle; default 0")
    parser.add_argument("--out", help="folder of the results; default the run folder, or the weights file's")
    if "--help" in words or "-h" in words:
        parser.epilog = "Any setting of the networks' recipes can be overridden as --section.key=value."
        parser.parse_args(["--help"])
    if not words or words[0].startswith("-"):
        raise UserError(f"usage: {USAGE} (--help lists all arguments)")
    own, overrides = split_words(words[1:], NAMES)
    asked = parser.parse_args([words[0], *own])
    if asked.cfg is not None and not any(Path(place).is_file() for place in (asked.run, asked.baseline) if place):
        raise UserError("--cfg is the recipe of a weights file, and a run folder has its own: leave it out")
    if asked.folds < 2:
        raise UserError("--folds=1: cross-validation needs 2 or more")
    if not 0 <= asked.seed < 2**32:
        raise UserError(f"--seed={asked.seed}: give a number from 0 to 2^32 - 1")
    return asked, overrides


if __name__ == "__main__":
    sys.exit(command(main, sys.argv[1:]))
