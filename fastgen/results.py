"""What is known of each generation once it is trained: the rows of results.json."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastgen.config import hash_of
from fastgen.data.batch import Loader
from fastgen.data.split import AnySplit
from fastgen.distributed import Group
from fastgen.evaluate import examination, load_network
from fastgen.laws import confidence_for_eta, ideal_confidence
from fastgen.measuring import Measurement, measure, measure_ensemble, own_part
from fastgen.meters import Stopwatch
from fastgen.nodes import Node
from fastgen.plan import Generation
from fastgen.workbench import Workbench

T = TypeVar("T")

# Raised whenever the same network starts to be measured otherwise.
MEASUREMENT_FORMAT = 5


class Results:
    """Rows of the generations of a run, in order, and the ensemble that they form.

    All processes measure; the main one alone reads and writes files, and the others are told. Memory: the probabilities
    of every network on this process's own samples stay on the device, 4 bytes a sample and class.
    """

    def __init__(self, bench: Workbench) -> None:
        self._bench = bench
        evaluation = bench.dataset.evaluation
        own = own_part(bench.dataset.evaluation_views(evaluation).order, bench.group)
        self._labels = torch.from_numpy(evaluation.labels[own]).to(bench.device)
        self._members: dict[int, Tensor] = {}
        self.rows: list[dict[str, Any]] = []

    def add(self, generation: Generation, node: Node) -> dict[str, Any]:
        """Measures a finished node and adds its row, the same everywhere; all processes call this.

        Raises:
            Stopped: a signal came, to this process or another one.
            Told: the main process could not read or write the node's files.
        """
        measured, self._members[generation.index] = _measure_node(self._bench, node)
        row = _told(self._bench.group, lambda: _row(self._bench, generation, node, measured))
        row |= self._ensemble(generation.index) | self._laws(generation, row)
        self.rows.append(row)
        return row

    def as_dict(self) -> dict[str, Any]:
        """Content of results.json."""
        recipe, dataset = self._bench.recipe, self._bench.dataset
        return {
            "recipe": recipe.as_dict(),
            "dataset": recipe.data.dataset,
            "model": recipe.model.name,
            "evaluated_on": dataset.evaluated_on,
            "train_images": len(dataset.train),
            "generations": self.rows,
        }

    def _ensemble(self, last: int) -> dict[str, Any]:
        members = [self._members.get(index) for index in range(last + 1)]
        # Synthetic batches carry random labels: an ensemble beside the data set's own would be no number at all.
        if any(member is None for member in members) or self._bench.recipe.data.backend == "synthetic":
            return {"ensemble_top1_error": None, "ensemble_top5_error": None}
        known = [member for member in members if member is not None]
        measured = measure_ensemble(known, self._labels, self._bench.recipe.gen.k, self._bench.group)
        return {"ensemble_top1_error": measured.top1_error, "ensemble_top5_error": measured.top5_error}

    def _laws(self, generation: Generation, row: dict[str, Any]) -> dict[str, Any]:
        """The confidence of exact minimisers, and the same from the patriarch's measured top-K share."""
        ideal = generation.ideal
        patriarch = self.rows[0] if self.rows else row
        # With a K of its own for each sample there is no one share, and to smoothed labels it is nothing.
        gen = self._bench.recipe.gen
        if ideal is None or patriarch["generation"] != 0 or gen.k_mass or gen.patriarch == "label_smoothing":
            return {"ideal_confidence": ideal, "ideal_confidence_at_share": None}
        recipe = self._bench.recipe
        start = confidence_for_eta(recipe.eta, recipe.gen.k, patriarch["topk_share"])
        weights = [recipe.teacher_weight(g) for g in range(1, generation.index + 1)]
        return {
            "ideal_confidence": ideal,
            "ideal_confidence_at_share": ideal_confidence(
                start, weights, generation.index, recipe.gen.ensemble_teachers
            ),
        }


def _measure_node(bench: Workbench, node: Node) -> tuple[dict[str, Any], Tensor]:
    """Measures a node on the evaluation set, and on the training set unless that is known already.

    What was measured on the training set is kept in the node, under a name that depends on all it depends on, with
    the seconds that both took.

    Returns:
        the measurements, and the probabilities of this process's own samples of the evaluation set.
    """
    recipe, dataset, group = bench.recipe, bench.dataset, bench.group
    model = load_network(recipe, dataset, node.weights, bench.device, group)

    def measured_on(split: AnySplit, loader: Loader, keep: bool) -> tuple[Measurement, Tensor]:
        on = examination(recipe, dataset, split, loader, bench.device, group)
        return measure(model, on, bench.stop, keep=keep)

    stopwatch = Stopwatch(bench.device)
    with stopwatch.phase("evaluate"):
        evaluation, probabilities = measured_on(dataset.evaluation, bench.evaluation_loader, keep=True)
        name = _measurement_name(bench)
        known = _told(group, lambda: node.cached(name))
        if known is None:
            train, _ = measured_on(dataset.train, bench.train_loader, keep=False)
    if known is None:
        found = {"train": asdict(train), "seconds": stopwatch.seconds()["evaluate"]}
        _told(group, lambda: node.keep(name, found))
        known = found
    return {**known, "evaluation": asdict(evaluation)}, probabilities


def _told(group: Group, call: Callable[[], T]) -> T:
    """What the call gives in the main process, which alone makes it, everywhere.

    Raises:
        Told: it failed there.
    """
    given = group.in_turn(lambda: [call()] if group.main else [])
    return group.agree(given)[0]


def _measurement_name(bench: Workbench) -> str:
    dataset = bench.dataset
    depends_on = [
        MEASUREMENT_FORMAT,
        dataset.train.content_hash,
        bench.recipe.gen.k,
        dataset.pixels,
        dataset.evaluation_px,
        bench.recipe.data.eval_crop_share,
        bench.recipe.data.backend,
    ]
    return f"measured-{hash_of(depends_on)[:8]}"


def _row(bench: Workbench, generation: Generation, node: Node, measured: dict[str, Any]) -> dict[str, Any]:
    training = node.facts()["training"]
    evaluation, train, seconds = measured["evaluation"], measured["train"], training["seconds"]
    eval_seconds = seconds.get("evaluate", 0.0) + measured["seconds"]
    wall_seconds = sum(seconds.values()) + measured["seconds"]
    return {
        "generation": generation.index,
        "role": generation.role,
        "node": node.id,
        "top1_error": evaluation["top1_error"],
        "top5_error": evaluation["top5_error"],
        "nll": evaluation["nll"],
        "ece": evaluation["ece"],
        "samples_evaluated": evaluation["samples"],
        "train_top1_error": train["top1_error"],
        "mean_confidence": train["mean_confidence"],
        "mean_label_confidence": train["mean_label_confidence"],
        "topk_share": train["topk_share"],
        "train_images_per_second": training["images"] / seconds["train"],
        "wall_images_per_second": training["images"] / wall_seconds,
        "train_seconds": seconds["train"],
        "wall_seconds": wall_seconds,
        "eval_seconds": eval_seconds,
        "backend": training["path"]["views"],
        "engine": bench.recipe.train.engine,
        "path": training["path"],
        "processes": training.get("processes", 1),
    }
