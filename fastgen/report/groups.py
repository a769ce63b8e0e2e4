"""Runs of one recipe together, under a name that says what differs from the others."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import PurePath
from typing import Any, Literal

from fastgen.analysis_runs import by_recipe
from fastgen.config import SECTIONS
from fastgen.errors import UserError
from fastgen.report.runs import Row, Run, Seed
from fastgen.rules import PATRIARCHS_OWN
from fastgen.spread import Spread, spread_of

Kind = Literal["plain", "born-again", "other"]

# Told otherwise than as settings: the method in words by `_method`.
TOLD = {"gen.patriarch", "gen.confidence", "gen.teacher_weight", "gen.generations", "gen.only"}
SEEDS = {"run.init_seed", "data.seed"}
# Settings that decide weights, other than seeds: what tells recipes apart.
DECISIVE = {
    key
    for section, settings in SECTIONS.items()
    for f in fields(settings)
    if f.metadata["decides"] and (key := f"{section}.{f.name}") not in SEEDS
}
# What is off unless it is asked for, such as several teachers: of a recipe without it nobody says so.
UNSAID = {
    f"{section}.{f.name}": f.default
    for section, settings in SECTIONS.items()
    for f in fields(settings)
    if f.metadata["silent"]
}


@dataclass(frozen=True)
class Group:
    """Runs that differ in seeds alone.

    Attributes:
        name: no two alike.
        kind: `plain`: cross-entropy and no teachers; `born-again`: cross-entropy, then students.
        settings: of all runs, `section.key` -> value.
        runs: in the order of their seeds.
    """

    name: str
    kind: Kind
    settings: Mapping[str, Any]
    runs: tuple[Run, ...]

    @property
    def generations(self) -> list[int]:
        """That a run of it has measured."""
        return sorted({row["generation"] for run in self.runs for row in run.rows})

    @property
    def last(self) -> int:
        """Generation that was measured last."""
        return self.generations[-1]

    @property
    def planned(self) -> list[int]:
        """That its runs train, measured or not."""
        return sorted({generation for run in self.runs for generation in run.planned})

    def rows(self, generation: int) -> Iterator[tuple[Run, Row]]:
        """Of all runs that have it."""
        for run in self.runs:
            for row in run.rows:
                if row["generation"] == generation:
                    yield run, row

    def values(self, measure: str, generation: int) -> dict[Seed, float]:
        """What is known of a measure, by seed."""
        return {run.seed: row[measure] for run, row in self.rows(generation) if row.get(measure) is not None}

    def spread(self, measure: str, generation: int) -> Spread | None:
        """Over the seeds; None: nothing is known."""
        return spread_of(list(self.values(measure, generation).values()))

    def nodes(self, generation: int) -> dict[Seed, str]:
        """Names of its networks."""
        return {run.seed: row["node"] for run, row in self.rows(generation)}


def groups_of(runs: Sequence[Run]) -> list[Group]:
    """Recipes in the order in which they come.

    Raises:
        UserError: a training is named twice.
    """
    by_folder = {run.record.folder: run for run in runs}
    grouped = [[by_folder[record.folder] for record in records] for records in by_recipe([run.record for run in runs])]
    settings = [_flat(group[0]) for group in grouped]
    names = _names(settings)
    return [
        Group(name, _kind(own), own, tuple(_in_order(group)))
        for name, own, group in zip(names, settings, grouped, strict=True)
    ]


def _in_order(runs: Sequence[Run]) -> list[Run]:
    ordered = sorted(runs, key=lambda run: run.seed)
    for one, other in itertools.pairwise(ordered):
        if one.seed == other.seed:
            raise UserError(
                f"{one.record.folder} and {other.record.folder}: are the same training (one recipe, one seed): keep one"
            )
    return ordered


def _flat(run: Run) -> dict[str, Any]:
    recipe = run.record.recipe
    return {f"{section}.{key}": value for section, keys in recipe.items() for key, value in keys.items()}


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Decisive settings of which not all recipes have one value, in the order of the recipe."""
    keys = [key for key in settings[0] if key in DECISIVE]
    return [key for key in keys if any(own[key] != settings[0][key] for own in settings)]


def _names(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each recipe does, and what else differs; numbered where that is not enough."""
    others = [key for key in differing(settings) if key not in TOLD and _tells_apart(key, settings)]
    told = [[setting_text(key, own[key]) for key in others if _is_said(key, own)] for own in settings]
    names = [", ".join([_method(own), *texts]) for own, texts in zip(settings, told, strict=True)]
    counts = Counter(names)
    names = [
        f"{name}, generations={own['gen.generations']}" if counts[name] > 1 else name
        for name, own in zip(names, settings, strict=True)
    ]
    return [f"{name} ({names[: n + 1].count(name)})" if names.count(name) > 1 else name for n, name in enumerate(names)]


def _tells_apart(key: str, settings: Sequence[Mapping[str, Any]]) -> bool:
    values = [own[key] for own in settings if _has_say(key, own)]
    return any(value != values[0] for value in values)


def _is_said(key: str, own: Mapping[str, Any]) -> bool:
    # What is null is not set.
    unset = own[key] is None or (key in UNSAID and own[key] == UNSAID[key])
    return not unset and _has_say(key, own)


def _has_say(key: str, own: Mapping[str, Any]) -> bool:
    """Whether a setting decides anything in this recipe; of one that does not, the value says nothing."""
    patriarch = own["gen.patriarch"]
    section, _, name = key.partition(".")
    if section == "gen" and name in PATRIARCHS_OWN:
        return bool(patriarch == PATRIARCHS_OWN[name])
    if key == "gen.k":
        tolerant = patriarch == "tolerant" and own["gen.confidence"] != 1
        return tolerant or (_has_tolerant_students(own) and own["gen.student_k"] is None)
    if key == "gen.temperature" or section == "teacher":
        return _is_taught(own)
    return True


def setting_text(key: str, value: Any) -> str:
    """`epochs=60`; of a teacher's path its end."""
    text = PurePath(value).name if key == "gen.teacher" else value_text(value)
    return f"{key.partition('.')[2]}={text}"


def value_text(value: Any) -> str:
    """As short as can be."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return "/".join(value_text(entry) for entry in value)
    return "null" if value is None else str(value)


def _method(settings: Mapping[str, Any]) -> str:
    """In the notation of arXiv 1805.05551: D(confidence of the patriarch, weight of the teacher)."""
    kind = _kind(settings)
    # Of plain training, whatever is set: there is no student, or none has a teacher.
    weight = "0.0" if kind == "plain" else _decimal(settings["gen.teacher_weight"])
    if _is_cross_entropy(settings):
        return f"{'cross-entropy' if kind == 'other' else kind} D(1.0, {weight})"
    patriarch = settings["gen.patriarch"]
    if patriarch == "tolerant":
        return f"tolerant D({_decimal(settings['gen.confidence'])}, {weight})"
    return f"{patriarch.replace('_', ' ')}, teacher_weight={weight}"


def _decimal(value: Any) -> str:
    if isinstance(value, list):
        return "/".join(map(_decimal, value))
    return f"{value:.1f}" if round(value, 1) == value else f"{value:g}"


def _is_cross_entropy(settings: Mapping[str, Any]) -> bool:
    patriarch = settings["gen.patriarch"]
    return patriarch == "cross_entropy" or (patriarch == "tolerant" and settings["gen.confidence"] == 1)


def _kind(settings: Mapping[str, Any]) -> Kind:
    if not _is_cross_entropy(settings) or _has_tolerant_students(settings):
        return "other"
    return "born-again" if _is_taught(settings) else "plain"


def _has_tolerant_students(settings: Mapping[str, Any]) -> bool:
    return bool(settings["gen.generations"]) and settings.get("gen.student_confidence", 1) != 1


def _is_taught(settings: Mapping[str, Any]) -> bool:
    """Whether a student has a teacher."""
    weights = settings["gen.teacher_weight"]
    return bool(settings["gen.generations"]) and (any(weights) if isinstance(weights, list) else bool(weights))
