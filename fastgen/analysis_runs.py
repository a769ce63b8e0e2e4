"""Runs beside each other, from what their folders tell: errors by ensemble size and by training time, recipe by recipe.

Nothing passes through a network here.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgen.config import Recipe, hash_of
from fastgen.errors import UserError
from fastgen.nodes import read_json
from fastgen.recipe import load_text
from fastgen.run_forms import analysis_is_whole, environment_is_whole, hash_in_plan, results_are_whole
from fastgen.spread import spread_of

# Version of analysis.json: raised whenever what it tells gets another meaning.
ANALYSIS_FORMAT = 1
ANALYSIS_FILE = "analysis.json"
# Of a row of results.json; the rest of a row is made here.
TOLD = ("top1_error", "ensemble_top1_error", "nll", "ece", "mean_confidence", "mean_label_confidence", "topk_share")
TIMES = ("seconds_alone", "seconds_together")
# Where environment.json does not tell.
UNKNOWN_DEVICE = "an unknown device"
LAST_MEMBERS = "last_members_top1_error"


@dataclass(frozen=True)
class RunRecord:
    """A run that has been measured.

    Attributes:
        folder: its run folder.
        recipe: all settings by section, resolved.
        key: the same for runs that differ in seeds, places and the like alone.
        results: content of results.json, with at least one generation.
        data: hash of the training images that it is of.
        device: name of what it trained on.
    """

    folder: Path
    recipe: Mapping[str, Any]
    key: str
    results: Mapping[str, Any]
    data: str
    device: str

    @property
    def name(self) -> str:
        """Of the folder."""
        return self.folder.resolve().name

    @property
    def evaluation(self) -> tuple[str, str, int]:
        """What it was measured on: data set, which part of it, how many samples."""
        dataset, part = self.results["dataset"], self.results["evaluated_on"]
        return dataset, part, self.results["generations"][-1]["samples_evaluated"]


def read_run(folder: Path) -> RunRecord:
    """Reads a run folder.

    Raises:
        UserError: it is none, nothing of it is measured yet, or a file of it is damaged.
    """
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder}: is no run folder (it has no recipe.yaml)")
    if not (folder / "results.json").is_file():
        raise UserError(f"{folder}: no generation is measured yet (it has no results.json): train it first")
    results = read_json(folder / "results.json")
    if not results_are_whole(results):
        raise _damaged(folder / "results.json", "no whole results")
    data = hash_in_plan(_read_list(folder / "plan.json"))
    if data is None:
        raise _damaged(folder / "plan.json", "no whole plan")
    recipe = _read_recipe(folder / "recipe.yaml")
    device = read_environment(folder).get("device", UNKNOWN_DEVICE)
    return RunRecord(folder, recipe.as_dict(), _key(recipe.identity()), results, data, device)


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path}: is damaged ({what}): start the run's own command again")


def _read_recipe(path: Path) -> Recipe:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _damaged(path, str(error)) from None
    return load_text(text, str(path))


def read_environment(folder: Path) -> Mapping[str, Any]:
    """What environment.json tells; nothing where it is not there or damaged: no result depends on it."""
    try:
        found = read_json(folder / "environment.json")
    except UserError:
        return {}
    return found if environment_is_whole(found) else {}


def _read_list(path: Path) -> list[Any]:
    """plan.json holds a list, which `read_json` refuses."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file: start the run's own command again") from None
    except ValueError as error:
        raise _damaged(path, str(error)) from None
    if not isinstance(value, list):
        raise _damaged(path, "no list of generations")
    return value


def _key(identity: Mapping[str, Mapping[str, Any]]) -> str:
    seeds = {"run": {"init_seed"}, "data": {"seed"}}
    kept = {
        section: {name: value for name, value in settings.items() if name not in seeds.get(section, ())}
        for section, settings in identity.items()
    }
    return hash_of(kept)


def require_comparable(first: RunRecord, others: Sequence[RunRecord], option: str = "--against ") -> None:
    """Errors are compared on the same images alone, of networks that learned from the same data set.

    Args:
        first: what the others are compared with.
        others: runs.
        option: by which the others were given, for the line that refuses one.

    Raises:
        UserError: a run was measured on others, or is named twice.
    """
    seen = {first.folder.resolve()}
    for other in others:
        if other.folder.resolve() in seen:
            raise UserError(f"{option}{other.folder}: this run is named twice: keep one")
        seen.add(other.folder.resolve())
        if other.evaluation != first.evaluation:
            raise UserError(
                f"{option}{other.folder}: was measured on {_told(other)}, {first.folder} on {_told(first)}: "
                "name runs of the same data, holdout and val_limit"
            )
        if other.data != first.data:
            raise UserError(
                f"{option}{other.folder}: its training images are not those of {first.folder} (another hash): "
                "name runs of the same data"
            )


def _told(run: RunRecord) -> str:
    dataset, part, samples = run.evaluation
    return f"{samples:,} {part} images of {dataset}"


def rows_of(run: RunRecord) -> list[dict[str, Any]]:
    """A row a generation: what results.json tells of it (None: not known), and the training that it took.

    `seconds_alone` is what this network alone takes: its own training and, of a student, that of all
    teachers before it.
    `seconds_together` is the training of all generations so far, which their ensemble takes.
    Both count `train_seconds`, the training steps, and no evaluation or saving.
    """
    rows: list[dict[str, Any]] = []
    seconds = [given["train_seconds"] for given in run.results["generations"]]
    teachers, needed = run.recipe["gen"].get("ensemble_teachers", 1), list[set[int]]()
    for number, given in enumerate(run.results["generations"]):
        taught_by = needed[-teachers:] if given["role"] == "student" else []
        needed.append({number}.union(*taught_by))
        row = {"generation": given["generation"], "role": given["role"], "node": given["node"]}
        row |= {name: given.get(name) for name in TOLD}
        alone, together = sum(seconds[own] for own in sorted(needed[-1])), sum(seconds[: number + 1])
        rows.append(row | {"members": number + 1, "seconds_alone": alone, "seconds_together": together})
    return rows


def read_analysis(run: RunRecord) -> dict[str, Any] | None:
    """What `--analyse` wrote for this run; None: it did not, or not of these very networks and samples, or not all."""
    path = run.folder / ANALYSIS_FILE
    found = read_json(path) if path.is_file() else None
    if found is None or found.get("format") != ANALYSIS_FORMAT:
        return None
    return found if analysis_is_whole(found) and describes(found, run) else None


def describes(content: Mapping[str, Any], run: RunRecord) -> bool:
    """Whether an analysis is of the very networks and evaluation samples that results.json tells of."""
    networks = [(row["generation"], row["node"]) for row in content["generations"]]
    on = content["dataset"], content["evaluated_on"]["part"], content["evaluated_on"]["samples"]
    return on == run.evaluation and networks == [(row["generation"], row["node"]) for row in run.results["generations"]]


def by_recipe(runs: Sequence[RunRecord]) -> list[list[RunRecord]]:
    """Runs of one recipe together, seeds aside, in the order in which they come."""
    by_key: dict[str, list[RunRecord]] = {}
    for run in runs:
        by_key.setdefault(run.key, []).append(run)
    return list(by_key.values())


def names_of(runs: Sequence[RunRecord]) -> list[tuple[str, list[RunRecord]]]:
    """Runs by recipe, seeds aside, in order; each recipe under a name of its own, taken from its folders' names."""
    named: list[tuple[str, list[RunRecord]]] = []
    for group in by_recipe(runs):
        name = _common_begin([run.name for run in group]).rstrip("-_. ") or group[0].name
        taken = {other for other, _ in named}
        # Another recipe may have had the very name: the folder's whole path tells them apart.
        named.append((str(group[0].folder) if name in taken else name, group))
    return named


def _common_begin(names: Sequence[str]) -> str:
    """What all names begin with."""
    letters = itertools.takewhile(lambda same: len(set(same)) == 1, zip(*names, strict=False))
    return "".join(letter for letter, *_ in letters)


def beside(runs: Sequence[tuple[RunRecord, Mapping[str, Any] | None]]) -> list[dict[str, Any]]:
    """Recipes beside each other: mean and standard deviation over their runs, generation by generation.

    Args:
        runs: each with its analysis, where there is one.

    Returns:
        of each recipe: `name`, `runs` (folders), and `points`, a row a generation with `generation`, `members`, `runs`
        (how many have it) and, of each measure that all of these tell, `mean` and `deviation` (n - 1 in the
        denominator; None of a single run), else None.
    """
    analyses = {run.folder: analysis for run, analysis in runs}
    recipes = []
    for name, group in names_of([run for run, _ in runs]):
        rows = [row for run in group for row in _with_last_members(rows_of(run), analyses[run.folder])]
        generations = sorted({row["generation"] for row in rows})
        points = [_point([row for row in rows if row["generation"] == generation]) for generation in generations]
        recipes.append({"name": name, "runs": [str(run.folder) for run in group], "points": points})
    return recipes


def _with_last_members(rows: list[dict[str, Any]], analysis: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    told = analysis["ensembles"][LAST_MEMBERS] if analysis is not None else [None] * len(rows)
    return [row | {LAST_MEMBERS: error} for row, error in zip(rows, told, strict=True)]


def _point(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    point: dict[str, Any] = {name: rows[0][name] for name in ("generation", "members", "role")}
    point["runs"] = len(rows)
    for name in (*TOLD, *TIMES, LAST_MEMBERS):
        known = [row[name] for row in rows if row[name] is not None]
        found = spread_of(known) if len(known) == len(rows) else None
        point[name] = None if found is None else {"mean": found.mean, "deviation": found.deviation}
    return point
