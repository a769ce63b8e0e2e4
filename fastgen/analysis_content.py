"""What an analysis tells, as plain values: the content of analysis.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from fastgen.analysis_columns import EvaluationColumns, TrainingColumns
from fastgen.analysis_measures import (
    PERCENTILES,
    agreement,
    error_percent,
    in_blocks,
    others_in_group,
    others_in_group_by_chance,
    reliability,
    second_best_counts,
    secondary_mass,
    sorted_scores,
    top5_in_group,
)
from fastgen.analysis_runs import ANALYSIS_FORMAT, LAST_MEMBERS, RunRecord
from fastgen.data.groups import Groups, groups_of
from fastgen.data.split import Dataset
from fastgen.measuring import CALIBRATION_BINS

# Of more classes, the matrix of second-best classes is told in blocks of neighbours.
MOST_CELLS = 100
# Of each class, so many of its second-best classes are told.
TOLD_SECOND_BEST = 5

ABOUT = {
    "recipe": "resolved settings of the run, by section",
    "training_images": "how many training images the networks were asked about: those that they learned from",
    "evaluated_on": "part (test, or holdout: a part of the training set) and its samples",
    "class_names": "of class 0, 1, ...",
    "groups": "names of groups of classes and each class's group; null: none are known",
    "generations": "a row a network, in order; `training` and `evaluation` say what of",
    "training": "means over the training images, in evaluation views: mean_confidence (p_a1, of the class that ranks "
    "first), mean_label_confidence (p_y), top1_error in percent, sorted_scores (mean of the r-th largest probability, "
    "r = 1, 2, ...), sorted_scores_percentiles ([r][percentile], see `percentiles`), secondary_mass (of classes 2..5)",
    "ideal_confidence": "f_g, p_a1 of exact minimisers; ideal_confidence_at_share: the same from the patriarch's "
    "measured share s of the mass beside the first class that lies in classes 2..K; null: no law is known",
    "in_group": "others: mean number, of the four highest-scored classes other than the label, that are of the "
    "label's group; top5: of the five that rank first, the label among them; mass: mean mass of the other classes of "
    "the label's group; *_by_chance: the same if the other classes were ranked at random and shared their mass evenly, "
    "and, for top5, the label were among the five",
    "second_best": "of the images of each class, how often another one is the highest-scored class other than the "
    "label: generation; classes_per_cell (1 up to 100 classes, else so many neighbours are one row and column); counts "
    "([label][second-best], images); images (of each class); frequent (of each class, up to five [class, images], the "
    "most frequent first)",
    "evaluation": "on the evaluation images: top1_error in percent; nll, mean -ln p_y in nats; ece, expected "
    "calibration error of p_a1 in equal bins, 0..1; reliability: images, mean confidence and accuracy of each bin",
    "pairs": "of generations, in the order of `generations`: agreement[a][b], share of the evaluation images that both "
    "rank the same class first of; kl[a][b], mean KL(p_a || p_b) in nats; null for a single network",
    "ensembles": "top-1 errors, in percent, of the mean softmax of 1, 2, ... networks: first_members_top1_error (the "
    "first so many), last_members_top1_error (the last so many); all: evaluation of the ensemble of all, null for one",
    "comparison": "this run and those it is compared with, by recipe (seeds aside): `runs`, and `points`, a row a "
    "generation: mean and deviation (n - 1 in the denominator; null of one run) of each measure of results.json; "
    "members: networks of the ensemble of generations 0..g; last_members_top1_error: of the last so many members, "
    "where all runs are analysed; seconds_alone: training steps that this network takes, with those of its teachers; "
    "seconds_together: of all generations 0..g. A measure that a run lacks is null",
    "patriarchs": "of runs beside this one that are analysed themselves: sorted_scores of their first generation",
    "notes": "what is left out, and why; and what else is to be known",
}


def about_run(run: RunRecord, dataset: Dataset) -> dict[str, Any]:
    groups = groups_of(run.recipe["data"]["dataset"])
    return {
        "format": ANALYSIS_FORMAT,
        "about": ABOUT,
        "run": run.name,
        "recipe": run.recipe,
        "dataset": run.results["dataset"],
        "model": run.results["model"],
        "training_images": len(dataset.train),
        "evaluated_on": {"part": dataset.evaluated_on, "samples": len(dataset.evaluation)},
        "class_names": list(dataset.class_names),
        "groups": None if groups is None else {"names": list(groups.names), "of_class": groups.of_class.tolist()},
        "percentiles": list(PERCENTILES),
        "bins": CALIBRATION_BINS,
    }


def about_network(
    number: int,
    row: Mapping[str, Any],
    columns: TrainingColumns,
    evaluation: EvaluationColumns,
    groups: Groups | None,
) -> dict[str, Any]:
    means, percentiles = sorted_scores(columns.top_NR)
    return {
        "generation": row["generation"],
        "role": row["role"],
        "node": row["node"],
        "training": {
            "top1_error": error_percent(columns.rank_N == 0),
            "mean_confidence": means[0],
            "mean_label_confidence": columns.label_p_N.double().mean().item(),
            "ideal_confidence": row["ideal_confidence"],
            "ideal_confidence_at_share": row["ideal_confidence_at_share"],
            "sorted_scores": means,
            "sorted_scores_percentiles": percentiles,
            "secondary_mass": secondary_mass(columns.top_NR),
            "in_group": None if groups is None else _in_group(columns, torch.from_numpy(groups.of_class)),
        },
        "evaluation": _calibration(evaluation, number),
    }


def _in_group(columns: TrainingColumns, group_of_class_C: Tensor) -> dict[str, float]:
    labels_N = columns.labels_N
    by_chance = others_in_group_by_chance(labels_N, group_of_class_C)
    kin_share = by_chance / min(4, len(group_of_class_C) - 1)
    return {
        "others": others_in_group(labels_N, columns.others_NJ, group_of_class_C),
        "others_by_chance": by_chance,
        "top5": top5_in_group(labels_N, columns.rank_N, columns.others_NJ, group_of_class_C),
        "top5_by_chance": 1 + by_chance,
        "mass": columns.kin_p_N.double().mean().item(),
        "mass_by_chance": (1 - columns.label_p_N.double()).mean().item() * kin_share,
    }


def _calibration(columns: EvaluationColumns, number: int) -> dict[str, Any]:
    hit_N = columns.hit_NE[:, number]
    told = asdict(reliability(columns.confidence_NE[:, number], hit_N))
    return {
        "top1_error": error_percent(hit_N),
        "nll": columns.nll_NE[:, number].mean().item(),
        "ece": told.pop("ece"),
        "reliability": told,
    }


def second_best(
    rows: Sequence[Mapping[str, Any]], training: Sequence[TrainingColumns], classes: int
) -> list[dict[str, Any]]:
    """Of the first network and the last one."""
    per_cell = -(-classes // MOST_CELLS)
    told = []
    for number in sorted({0, len(rows) - 1}):
        counts_CC = second_best_counts(training[number].labels_N, training[number].others_NJ, classes)
        most = counts_CC.sort(dim=1, descending=True, stable=True)
        frequent = torch.stack([most.indices, most.values], 2)[:, :TOLD_SECOND_BEST].tolist()
        told.append(
            {
                "generation": rows[number]["generation"],
                "classes_per_cell": per_cell,
                "counts": in_blocks(counts_CC, per_cell).tolist(),
                "images": counts_CC.sum(1).tolist(),
                "frequent": [[pair for pair in row if pair[1]] for row in frequent],
            }
        )
    return told


def about_all(columns: EvaluationColumns, members: int) -> dict[str, Any]:
    pairs = {"agreement": agreement(columns.first_NM).tolist(), "kl": columns.kl_NMM.mean(0).tolist()}
    ensembles = {
        "first_members_top1_error": [error_percent(hit_N) for hit_N in columns.first_members_hit_NM.unbind(1)],
        LAST_MEMBERS: [error_percent(hit_N) for hit_N in columns.last_members_hit_NM.unbind(1)],
        "all": _calibration(columns, members) if members > 1 else None,
    }
    return {"pairs": pairs if members > 1 else None, "ensembles": ensembles}


def lacking(content: Mapping[str, Any]) -> list[str]:
    """What this run cannot tell, and why."""
    lines = []
    rows = content["generations"]
    unlawful = [row["generation"] for row in rows if row["training"]["ideal_confidence"] is None]
    if unlawful:
        which = ", ".join(map(str, unlawful))
        lines.append(
            f"left out: ideal law of generation {which}: none is known (temperatures other than 1, tolerant "
            "students, a named teacher, another patriarch)"
        )
    if content["groups"] is None:
        lines.append(f"left out: groups of classes: none are known of {content['dataset']}")
    if len(rows) == 1:
        lines.append("left out: pairs of generations, and ensembles: there is one network")
    per_cell = content["second_best"][0]["classes_per_cell"]
    if per_cell > 1:
        lines.append(f"left out: single classes in the matrix of second-best ones: a cell is of {per_cell} neighbours")
    return lines
