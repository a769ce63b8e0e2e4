"""Analyses of a run: why training in generations works, where it does, beside what arXiv 1805.05551 says of it.

    python -m fastgen.evaluate RUN_FOLDER --analyse [--against RUN_FOLDER ...] [--section.key=value ...]

All networks of the run look at each batch together, in fp32 and evaluation views: one pass over the training set and
one over the evaluation set, of which a few numbers a sample are kept (`analysis_columns.py`). Memory: the weights of
all networks on the device, and 80 bytes a training image and network (0.6 GB for six networks and ILSVRC2012).

`analyse` gives plain values, which analysis.json holds too; `analysis_content.ABOUT` says what they mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.analysis_columns import EvaluationColumns, TrainingColumns, evaluation_columns, joined, training_columns
from fastgen.analysis_content import about_all, about_network, about_run, lacking, second_best
from fastgen.analysis_runs import (
    ANALYSIS_FILE,
    RunRecord,
    beside,
    describes,
    read_analysis,
    read_run,
    require_comparable,
)
from fastgen.config import Recipe
from fastgen.data import build_loader, open_dataset
from fastgen.data.groups import groups_of
from fastgen.data.split import Dataset
from fastgen.device import choose_device
from fastgen.errors import UserError
from fastgen.evaluate import examination, load_examined
from fastgen.files import write_json
from fastgen.measuring import EVALUATION_BATCH, Examination
from fastgen.nodes import Node
from fastgen.progress import Display
from fastgen.record import generations_in


@dataclass(frozen=True)
class Network:
    """A generation that is analysed.

    Attributes:
        row: of results.json.
        model: fp32, in eval mode, on the device.
    """

    row: Mapping[str, Any]
    model: nn.Module


def analyse(recipe: Recipe, folder: Path, against: Sequence[Path], display: Display) -> dict[str, Any]:
    """Analyses the networks of a run folder.

    Args:
        recipe: of the run; how it reads its data and on which device may differ.
        folder: the run folder.
        against: run folders to compare with, by what is written there.
        display: shows the progress.

    Returns:
        plain values; see `analysis_content.ABOUT`.

    Raises:
        UserError: a folder holds no measured run, or runs cannot be compared.
    """
    if recipe.data.backend == "synthetic":
        raise UserError("data.backend = synthetic: random images have nothing to analyse: name the data set's own")
    run, others = read_run(folder), [read_run(path) for path in against]
    require_comparable(run, others)
    dataset, device = open_dataset(recipe), choose_device(recipe.run)
    notes = _other_data(run, dataset)
    networks = _networks(recipe, run, dataset, device, notes)
    content = about_run(run, dataset)
    training = _training(recipe, dataset, networks, device, display)
    evaluation = _evaluation(recipe, dataset, networks, device, display)
    groups = groups_of(recipe.data.dataset)
    content["generations"] = [
        about_network(number, network.row, columns, evaluation, groups)
        for number, (network, columns) in enumerate(zip(networks, training, strict=True))
    ]
    content["second_best"] = second_best([network.row for network in networks], training, dataset.facts.classes)
    content |= about_all(evaluation, len(networks))
    content |= _compared(run, others, content, notes)
    content["notes"] = [*notes, *lacking(content)]
    return content


def write_analysis(folder: Path, content: Mapping[str, Any]) -> Path:
    """Writes analysis.json into a run folder.

    Raises:
        OSError: the disk is full, or the folder may not be written to.
    """
    path = folder / ANALYSIS_FILE
    write_json(path, content)
    return path


def _other_data(run: RunRecord, dataset: Dataset) -> list[str]:
    if run.data == dataset.train_hash:
        return []
    return ["the training images are not those that the run was trained on (another hash): look at data.root"]


def _networks(
    recipe: Recipe, run: RunRecord, dataset: Dataset, device: torch.device, notes: list[str]
) -> list[Network]:
    networks = []
    for row in run.results["generations"]:
        node = Node(run.folder / f"generation_{row['generation']}")
        if not node.finished:
            notes.append(f"left out: generation {row['generation']}: its weights are not there any more")
            continue
        networks.append(Network(row, load_examined(recipe, dataset, node.weights, device).eval()))
    if not networks:
        raise UserError(f"{run.folder}: holds no trained generation: train it first")
    told = [row["generation"] for row in run.results["generations"]]
    for index in sorted({*generations_in(run.folder)} - {*told}):
        notes.append(f"left out: generation {index}: is not trained and measured to its end")
    if told[0] != 0:
        notes.append(
            f"left out: generations before {told[0]}: are another run's (gen.teacher), or untrained; the "
            "seconds are without theirs"
        )
    return networks


def looked_at(
    networks: Sequence[nn.Module], on: Examination, what: str, display: Display, batch_size: int = EVALUATION_BATCH
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Passes all samples through all networks, batch by batch.

    Args:
        networks: fp32, in eval mode, on the device.
        on: which samples, in which views.
        what: is done, for the display.
        batch_size: samples of a batch.

    Yields:
        the logits of each network (B, C), fp32, and the labels, int64 (B,), on the device.

    Raises:
        UserError: a network gives scores that are not numbers.
    """
    with display.passes(what, len(on.loader), 1) as passed:
        done = 0
        passed(done)
        for batch in on.loader.batches(on.views, batch_size):
            images_NCHW = on.normalise(batch.images_NCHW)
            with torch.no_grad():
                logits = [network(images_NCHW).float() for network in networks]
            for number, logits_BC in enumerate(logits):
                if not logits_BC.isfinite().all():
                    raise UserError(f"network {number} of {len(networks)} gives scores that are no numbers")
            yield logits, batch.labels
            done += len(batch.labels)
            passed(done)


def _training(
    recipe: Recipe, dataset: Dataset, networks: Sequence[Network], device: torch.device, display: Display
) -> list[TrainingColumns]:
    """The columns of each network."""
    loader = build_loader(recipe, dataset, dataset.train, device)
    on = examination(recipe, dataset, dataset.train, loader, device)
    groups = groups_of(recipe.data.dataset)
    group_of_class = None if groups is None else torch.from_numpy(groups.of_class).to(device)
    parts: list[list[TrainingColumns]] = [[] for _ in networks]
    models = [network.model for network in networks]
    for logits, labels_B in looked_at(models, on, _what(networks, "training"), display):
        for part, logits_BC in zip(parts, logits, strict=True):
            part.append(_on_cpu(training_columns(logits_BC, labels_B, group_of_class)))
    return [joined(part) for part in parts]


def _on_cpu(columns: TrainingColumns) -> TrainingColumns:
    """Frees the device's memory batch by batch."""
    return joined([columns])


def _evaluation(
    recipe: Recipe, dataset: Dataset, networks: Sequence[Network], device: torch.device, display: Display
) -> EvaluationColumns:
    loader = build_loader(recipe, dataset, dataset.evaluation, device)
    on = examination(recipe, dataset, dataset.evaluation, loader, device)
    models = [network.model for network in networks]
    batches = looked_at(models, on, _what(networks, "evaluation"), display)
    return joined([joined([evaluation_columns(logits, labels_B)]) for logits, labels_B in batches])


def _what(networks: Sequence[Network], part: str) -> str:
    return f"{len(networks)} network{'s' if len(networks) > 1 else ''}, {part} images"


def _compared(
    run: RunRecord, others: Sequence[RunRecord], content: Mapping[str, Any], notes: list[str]
) -> dict[str, Any]:
    """Tables of results.json by recipe, and what the others' own analyses add."""
    own = describes(content, run)
    if not own:
        notes.append("left out: the last networks' ensembles, compared: results.json is of other samples or networks")
    analyses = [(other, read_analysis(other)) for other in others]
    bare = [str(other.folder) for other, analysis in analyses if analysis is None]
    if bare:
        notes.append(
            f"left out: sorted scores and last networks' ensembles of runs without an analysis.json of their networks "
            f"and samples (python -m fastgen.evaluate RUN --analyse makes it): {', '.join(bare)}"
        )
    devices = sorted({one.device for one in (run, *others)})
    if len(devices) > 1:
        notes.append(f"seconds are not comparable: runs were trained on {' and '.join(devices)}")
    patriarchs = [
        {"run": str(other.folder), "sorted_scores": analysis["generations"][0]["training"]["sorted_scores"]}
        for other, analysis in analyses
        if analysis is not None
    ]
    return {"comparison": beside([(run, content if own else None), *analyses]), "patriarchs": patriarchs}
