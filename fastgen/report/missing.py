"""What a reader must know that the results do not show: what is unfinished, lacking, or not comparable."""

from __future__ import annotations

from collections.abc import Sequence

from fastgen.report.advice import to_analyse
from fastgen.report.compare import Comparison
from fastgen.report.document import Listing, Words, words
from fastgen.report.figures import MOST_RECIPES, analysed
from fastgen.report.groups import Group


def missing(groups: Sequence[Group], comparison: Comparison, notes: Sequence[str]) -> tuple[Listing, ...]:
    """As points; none where nothing is missing."""
    items = [
        *(words(note, ".") for note in notes),
        *_unfinished(groups),
        *_seeds(groups, comparison),
        *_generations(groups, comparison),
        *_unknown(groups),
        *_not_analysed(groups),
        *_machines(groups),
    ]
    return (Listing(tuple(items)),) if items else ()


def _unfinished(groups: Sequence[Group]) -> list[Words]:
    told = [
        (run.record.name, text) for group in groups for run in group.runs for text in (run.lacking, *run.unfit) if text
    ]
    return [words(f"{name}: {text}.") for name, text in told]


def _seeds(groups: Sequence[Group], comparison: Comparison) -> list[Words]:
    most = max(len(group.runs) for group in groups)
    lines = [words(f"{group.name}: {len(group.runs)} of {most} seeds.") for group in groups if len(group.runs) < most]
    if most == 1:
        lines.append(words("One seed of each recipe: nothing is known of the noise."))
    return lines + [line for group in groups for line in _unpaired(group, comparison.baseline_of.get(group.name))]


def _unpaired(group: Group, baseline: Group | None) -> list[Words]:
    """Of what a baseline lacks, nothing can be compared."""
    if baseline is None:
        return []
    there = {run.seed for run in baseline.runs}
    seeds = [run.seed_name for run in group.runs if run.seed not in there]
    if not seeds:
        return []
    which = f"seed {seeds[0]} has" if len(seeds) == 1 else f"seeds {', '.join(seeds)} have"
    return [words(f"{group.name}: {which} no run of {baseline.name}.")]


def _generations(groups: Sequence[Group], comparison: Comparison) -> list[Words]:
    lines = []
    for group in groups:
        if group.generations[0] != 0:
            text = f"{group.name}: generations before {group.generations[0]} are another run's, and not told here."
            lines.append(words(text))
        baseline = comparison.baseline_of.get(group.name)
        if baseline is not None and baseline.last < group.last:
            text = (
                f"{baseline.name} ends with generation {baseline.last}: of {group.name}, later ones have no baseline."
            )
            lines.append(words(text))
    return lines


def _unknown(groups: Sequence[Group]) -> list[Words]:
    lines = []
    for group in groups:
        if group.spread("ensemble_top1_error", group.last) is None:
            lines.append(words(f"{group.name}: no ensembles, as networks before the last one are not there."))
        if group.settings["data.backend"] == "synthetic":
            lines.append(words(f"{group.name}: learned from random images: its errors mean nothing."))
    return lines


def _not_analysed(groups: Sequence[Group]) -> list[Words]:
    lacking = [group for group in groups[:MOST_RECIPES] if analysed(group) is None]
    if not lacking:
        return []
    which = "no run is" if len(lacking) == len(groups) else f"{', '.join(group.name for group in lacking)} not"
    ends = f" {'makes' if len(lacking) == 1 else 'make'} them."
    return [words(f"Scores, second-best classes and reliability: {which} analysed. ", *to_analyse(groups), ends)]


def _machines(groups: Sequence[Group]) -> list[Words]:
    runs = [run for group in groups for run in group.runs]
    processes = sorted({row.get("processes", 1) for run in runs for row in run.rows})
    local = any(group.settings.get("dist.batchnorm", "local") == "local" for group in groups)
    devices = sorted({run.record.device for run in runs})
    commits = sorted({str(run.environment["commit"]) for run in runs if run.environment})
    lines = []
    if len(processes) > 1 and local:
        counts = " or ".join(map(str, processes))
        lines.append(
            words(f"Trained by {counts} processes: batch-norm saw other parts of a batch, which may move errors.")
        )
    if len(devices) > 1:
        lines.append(words(f"Trained on {' and '.join(devices)}: seconds and images/s are not comparable."))
    if len(commits) > 1:
        lines.append(words(f"Trained by {len(commits)} different versions of fastgen: see where this comes from."))
    return lines
