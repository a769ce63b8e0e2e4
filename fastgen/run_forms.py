"""Whether what a run folder's files hold has the form that is read elsewhere: a file may be JSON and yet be damaged.

No torch. Of each file, what is asked for is what reports and analyses look at.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

# Of a row of results.json; the others may be null, or not be there, as of older runs.
NUMBERS = ("top1_error", "top5_error", "train_seconds", "wall_seconds")
NUMBERS_OR_NULL = (
    "ensemble_top1_error", "ensemble_top5_error", "nll", "ece", "train_top1_error", "mean_confidence",
    "mean_label_confidence", "topk_share", "ideal_confidence", "ideal_confidence_at_share", "train_images_per_second",
    "wall_images_per_second", "eval_seconds",
)  # fmt: skip
OF_EPOCH = ("loss", "accuracy", "top1_error", "top5_error")
# No error, confidence, speed or time comes near it; infinities and what is not a number are beyond it, too.
LARGEST = 1e100


def results_are_whole(content: Mapping[str, Any]) -> bool:
    """Of results.json: at least one generation, and all in order."""
    match content:
        case {
            "dataset": str(),
            "model": str(),
            "evaluated_on": str(),
            "train_images": int(),
            "generations": [_, *_] as rows,
        }:
            if not all(map(_is_row, rows)):
                return False
            return all(one["generation"] < other["generation"] for one, other in itertools.pairwise(rows))
    return False


def _is_row(row: Any) -> bool:
    match row:
        case {"generation": int(), "role": str(), "node": str(), "samples_evaluated": int()}:
            numbers = all(_is_number(row.get(name)) for name in NUMBERS)
            others = all(_is_number_or_null(row.get(name)) for name in NUMBERS_OR_NULL)
            return numbers and others and isinstance(row.get("path", {}), dict)
    return False


def hash_in_plan(plan: Sequence[Any]) -> str | None:
    """Of plan.json: hash of the training images; None: it is damaged."""
    match plan:
        case [{"identity": {"data": {"hash": str(found)}}}, *_]:
            generations = [row for row in plan if isinstance(row, dict) and isinstance(row.get("index"), int)]
            return found if len(generations) == len(plan) and all("train" in row for row in plan) else None
    return None


def environment_is_whole(content: Mapping[str, Any]) -> bool:
    """Of environment.json."""
    match content:
        case {"device": str(), "command": [*command], "packages": dict(), "commit": str() | None}:
            return all(isinstance(word, str) for word in command)
    return False


def is_epoch(row: Any) -> bool:
    """A row of a training's history; a loss may be infinite there."""
    if not isinstance(row, dict) or not isinstance(row.get("epoch"), int):
        return False
    return all(row.get(name) is None or isinstance(row[name], int | float) for name in OF_EPOCH)


def analysis_is_whole(content: Mapping[str, Any]) -> bool:
    """Of analysis.json."""
    match content:
        case {
            "dataset": str(),
            "evaluated_on": {"part": str(), "samples": int()},
            "class_names": [*names],
            "groups": groups,
            "generations": [_, *_] as rows,
            "second_best": [_, *_] as maps,
            "ensembles": {"all": ensemble, "last_members_top1_error": [*last]},
        }:
            return (
                all(isinstance(name, str) for name in names)
                and all(map(_is_analysed, rows))
                and all(_is_map(found, names, groups) for found in maps)
                and (ensemble is None or _is_reliable(ensemble))
                and len(last) == len(rows)
                and all(map(_is_number_or_null, last))
            )
    return False


def _is_analysed(row: Any) -> bool:
    match row:
        case {
            "generation": int(),
            "node": str(),
            "training": {"sorted_scores": [first, *scores]},
            "evaluation": evaluation,
        }:
            positive = _is_number(first) and first > 0
            return positive and all(map(_is_number, scores)) and _is_reliable(evaluation)
    return False


def _is_reliable(told: Any) -> bool:
    match told:
        case {"reliability": {"images": [*images], "confidence": [*confidence], "accuracy": [*accuracy]}}:
            if not len(images) == len(confidence) == len(accuracy):
                return False
            # An empty bin has neither.
            filled = [both for count, *both in zip(images, confidence, accuracy, strict=True) if count != 0]
            return all(map(_is_number, images)) and all(_is_number(value) for both in filled for value in both)
    return False


def _is_map(found: Any, names: Sequence[Any], groups: Any) -> bool:
    match found:
        case {
            "generation": int(),
            "classes_per_cell": int(per_cell),
            "counts": [_, *_] as counts,
            "frequent": [*frequent],
        }:
            classes = len(counts)
            square = all(isinstance(row, list) and len(row) == classes for row in counts)
            named = per_cell != 1 or classes <= len(names)
            grouped = groups is None or per_cell != 1 or _is_grouped(groups, classes)
            frequent_ones = len(frequent) <= len(names) and all(_are_pairs(row, len(names)) for row in frequent)
            return square and named and grouped and frequent_ones and all(map(_is_count, itertools.chain(*counts)))
    return False


def _is_grouped(groups: Any, classes: int) -> bool:
    match groups:
        case {"of_class": [*of_class]}:
            return len(of_class) >= classes and all(isinstance(group, int) for group in of_class)
    return False


def _are_pairs(row: Any, classes: int) -> bool:
    """Another class, and so many images."""
    if not isinstance(row, list):
        return False
    for pair in row:
        match pair:
            case [int(other), int()] if 0 <= other < classes:
                continue
        return False
    return True


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < LARGEST


def _is_count(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _is_number_or_null(value: Any) -> bool:
    return value is None or _is_number(value)
