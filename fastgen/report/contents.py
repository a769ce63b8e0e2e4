"""Puts a report together: which sections there are, and what stands in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastgen.errors import UserError
from fastgen.report.advice import to_analyse
from fastgen.report.compare import Comparison, compare
from fastgen.report.document import Block, Document, Paragraph, Section, words
from fastgen.report.figures import (
    calibration_figure,
    confidence_figure,
    curve_figures,
    error_figure,
    score_figure,
    second_best_figures,
)
from fastgen.report.groups import Group, groups_of
from fastgen.report.headline import details, headline
from fastgen.report.missing import missing
from fastgen.report.origin import origin
from fastgen.report.runs import Found
from fastgen.report.samples import gallery
from fastgen.report.tables import (
    COMPARED,
    calibration_table,
    confidence_table,
    difference_table,
    error_tables,
    path_table,
    speed_table,
    table_of_tests,
)


@dataclass(frozen=True)
class Wanted:
    """What the person asks for.

    Attributes:
        title: of the report; None: from the runs.
        samples: how many images are shown.
        root: folder of the data; None: where the recipe says.
        baseline: run folder with whose recipe the others are compared; None: plain runs.
    """

    title: str | None
    samples: int
    root: str | None
    baseline: Path | None = None


def report_of(found: Found, wanted: Wanted) -> Document:
    """The whole report.

    Raises:
        UserError: a training is named twice, or the baseline is none of the runs.
    """
    groups = groups_of(found.runs)
    chosen = None if wanted.baseline is None else _baseline(groups, wanted.baseline)
    comparison = compare(groups, tuple(COMPARED), chosen)
    sections = (
        Section("missing", "What is missing", missing(groups, comparison, found.notes)),
        Section("errors", "Errors", _errors(groups, comparison)),
        Section("training", "Training", tuple(curve_figures(groups, _part(groups)))),
        Section("confidence", "Confidence beside the law", _confidence(groups)),
        Section("scores", "Scores and second-best classes", _scores(groups)),
        Section("calibration", "Calibration", _calibration(groups)),
        Section("speed", "Speed", (speed_table(groups), path_table(groups))),
        Section("samples", "Samples", (gallery(groups, wanted.samples, wanted.root),)),
        Section("origin", "Where this comes from", origin(groups)),
    )
    return Document(
        title=wanted.title or _title(groups),
        facts=_facts(groups),
        headline=headline(groups, comparison),
        details=details(groups, comparison),
        sections=tuple(section for section in sections if section.blocks),
    )


def _baseline(groups: Sequence[Group], folder: Path) -> Group:
    for group in groups:
        if any(run.record.folder.resolve() == folder.resolve() for run in group.runs):
            if len(groups) == 1:
                raise UserError(f"--baseline {folder}: there is no other recipe to compare with it: name more runs")
            return group
    raise UserError(f"--baseline {folder}: is none of the runs that are measured: name one of them")


def _part(groups: Sequence[Group]) -> str:
    return str(groups[0].runs[0].record.evaluation[1])


def _images(groups: Sequence[Group]) -> str:
    dataset, part, samples = groups[0].runs[0].record.evaluation
    return f"{samples:,} {part} images of {dataset}"


def _training_images(groups: Sequence[Group]) -> str:
    counts = sorted({run.record.results["train_images"] for group in groups for run in group.runs})
    return f"{' or '.join(f'{count:,}' for count in counts)} training images"


def _title(groups: Sequence[Group]) -> str:
    models = sorted({run.record.results["model"] for group in groups for run in group.runs})
    return f"{', '.join(models)} on {groups[0].runs[0].record.results['dataset']}, in generations"


def _facts(groups: Sequence[Group]) -> str:
    runs = [run for group in groups for run in group.runs]
    seeds = sorted({run.seed for run in runs})
    recipes = "1 recipe" if len(groups) == 1 else f"{len(groups)} recipes"
    counted = "1 seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
    networks = len({row["node"] for run in runs for row in run.rows})
    return (
        f"{recipes}, {counted}, {networks} networks; trained on {_training_images(groups)}, evaluated on "
        f"{_images(groups)}."
    )


def _errors(groups: Sequence[Group], comparison: Comparison) -> tuple[Block, ...]:
    images = _images(groups)
    top1, top5 = error_tables(groups, comparison, images)
    differences = *difference_table(groups, comparison), *table_of_tests(comparison)
    return top1, *differences, error_figure(groups, images), top5


def _confidence(groups: Sequence[Group]) -> tuple[Block, ...]:
    images = _training_images(groups)
    figure = confidence_figure(groups, images)
    return (*((figure,) if figure is not None else ()), confidence_table(groups, images))


def _scores(groups: Sequence[Group]) -> tuple[Block, ...]:
    figure = score_figure(groups)
    if figure is None:
        return (_not_drawn(groups),)
    return figure, *second_best_figures(groups)


def _calibration(groups: Sequence[Group]) -> tuple[Block, ...]:
    figure = calibration_figure(groups)
    drawn = (figure,) if figure is not None else (_not_drawn(groups),)
    return (*drawn, calibration_table(groups, _images(groups)))


def _not_drawn(groups: Sequence[Group]) -> Paragraph:
    """What makes the figures that are left out."""
    each = "This makes" if len(groups) == 1 else "These make, one a recipe,"
    return Paragraph(words(f"Not drawn: no run is analysed. {each} what is needed: ", *to_analyse(groups)))
