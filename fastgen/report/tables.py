"""Tables of a report: errors in the form of arXiv 1805.05551's Tables 1 and 2, and what else was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from fastgen.report.compare import Comparison, Contrast
from fastgen.report.document import Span, Table, strong, words
from fastgen.report.groups import Group
from fastgen.report.runs import Row
from fastgen.report.stats import DASH, difference_text, p_text, spread_text
from fastgen.spread import spread_of

TOP1 = {"top1_error": "single", "ensemble_top1_error": "ensemble"}
TOP5 = {"top5_error": "single", "ensemble_top5_error": "ensemble"}
COMPARED = {
    "top1_error": "top-1, single",
    "ensemble_top1_error": "top-1, ensemble",
    "top5_error": "top-5, single",
    "ensemble_top5_error": "top-5, ensemble",
}
PATH = ("backend", "engine", "step", "loss", "batchnorm", "teacher", "optimizer")


def generations_of(groups: Iterable[Group]) -> list[int]:
    """That any of them has."""
    return sorted({generation for group in groups for generation in group.generations})


def error_tables(groups: Sequence[Group], comparison: Comparison, images: str) -> list[Table]:
    """Top-1 and top-5 errors: a row a recipe, a column a generation."""
    numbered = (("top1", "Top-1", TOP1), ("top5", "Top-5", TOP5))
    return [
        _errors(groups, comparison, images, f"errors-{name}", title, measures) for name, title, measures in numbered
    ]


def _errors(
    groups: Sequence[Group], comparison: Comparison, images: str, name: str, title: str, measures: dict[str, str]
) -> Table:
    generations = generations_of(groups)

    def row(group: Group, measure: str) -> tuple[Span, ...]:
        cells = [_error(group, comparison, g, measure) for g in generations]
        return (Span(group.name), Span(measures[measure]), Span(_seeds(group)), *cells)

    bold = any(contrast.apart for contrast in comparison.tested) and title == "Top-1"
    return Table(
        name=name,
        caption=words(
            f"{title} error in percent of {images}, generation by generation: each network alone (single) and the mean "
            "softmax of generations 0 to g (ensemble). Mean ± standard deviation over seeds.",
            " Bold: told apart from what it is compared with." if bold else "",
        ),
        headings=("recipe", "networks", "seeds", *(f"gen {g}" for g in generations)),
        rows=tuple(row(group, measure) for group in groups for measure in measures),
        text_columns=2,
        merged_columns=1,
        in_paper=True,
    )


def _error(group: Group, comparison: Comparison, generation: int, measure: str) -> Span:
    text = spread_text(group.spread(measure, generation))
    contrast = comparison.find(group, generation, measure)
    return strong(text) if contrast is not None and contrast.apart else Span(text)


def _seeds(group: Group) -> str:
    """How many runs have all its generations, and how many have not."""
    whole = len(group.values("top1_error", group.last))
    return str(whole) if whole == len(group.runs) else f"{whole} of {len(group.runs)}"


def difference_table(groups: Sequence[Group], comparison: Comparison) -> list[Table]:
    """Recipes minus their baselines, in points; without those students minus patriarchs, if there are students."""
    if comparison.within:
        return [_within(comparison)] if comparison.contrasts else []
    compared = [group for group in groups if group.name in comparison.baseline_of]
    if not compared:
        return []
    generations = generations_of(compared)

    def cell(group: Group, generation: int, measure: str) -> Span:
        contrast = comparison.find(group, generation, measure)
        if contrast is None:
            return Span(DASH)
        if contrast.same_networks:
            return Span("same")
        text = difference_text(contrast.difference)
        return strong(text) if contrast.apart else Span(text)

    baselines = {group.name: comparison.baseline_of[group.name].name for group in compared}
    several = len({*baselines.values()}) > 1

    def row(group: Group, measure: str) -> tuple[Span, ...]:
        named = (Span(group.name), *((Span(baselines[group.name]),) if several else ()), Span(COMPARED[measure]))
        return (*named, *(cell(group, g, measure) for g in generations))

    return [
        Table(
            name="differences",
            caption=words(
                f"Difference to the same generation of {'the baseline' if several else baselines[compared[0].name]}, "
                "in points: mean ± standard error over pairs of runs with one seed. Negative: fewer "
                "errors. Tested are the top-1 errors of the last generation that both train; bold: told apart. Same: "
                "both are the very same networks."
            ),
            headings=("recipe", *(("minus",) if several else ()), "error", *(f"gen {g}" for g in generations)),
            rows=tuple(row(group, measure) for group in compared for measure in COMPARED),
            text_columns=2 + several,
            merged_columns=1 + several,
            in_paper=True,
        )
    ]


def table_of_tests(comparison: Comparison) -> list[Table]:
    """Each test beside a baseline, with its pairs and p; where students stand beside patriarchs, it is told there."""
    if comparison.within or not comparison.tested:
        return []
    return [
        Table(
            name="tests",
            caption=words(
                "What is tested: the last generation that both recipes train, by paired t-tests and Holm's procedure "
                "over all of them; recipe minus baseline, in points: mean ± standard error over pairs of runs with one "
                "seed. Bold: told apart."
            ),
            headings=("recipe", "baseline", "error", "generation", "difference", "pairs", "p"),
            rows=tuple(
                (Span(c.group.name), Span(c.baseline.name), Span(COMPARED[c.measure]), *_tested(c))
                for c in comparison.tested
            ),
            text_columns=3,
            merged_columns=2,
            in_paper=True,
        )
    ]


def _tested(contrast: Contrast) -> tuple[Span, ...]:
    difference = contrast.difference
    text = difference_text(difference)
    pairs, p = ("0", None) if difference is None else (str(difference.pairs), difference.p)
    told = strong(text) if contrast.apart else Span(text)
    return Span(str(contrast.generation)), told, Span(pairs), Span(p_text(p).removeprefix("p = ").removeprefix("p "))


def _within(comparison: Comparison) -> Table:
    """Of each recipe, its last generation minus its first one."""

    def row(contrast: Contrast) -> tuple[Span, ...]:
        return (Span(contrast.group.name), Span(COMPARED[contrast.measure]), *_tested(contrast))

    return Table(
        name="differences",
        caption=words(
            "Last generation minus the patriarch of the same run, in points: mean ± standard error over seeds. "
            "Negative: fewer errors. Bold: told apart."
        ),
        headings=("recipe", "error", "generation", "minus patriarch", "seeds", "p"),
        rows=tuple(row(contrast) for contrast in comparison.contrasts),
        text_columns=2,
        merged_columns=1,
        in_paper=True,
    )


def _by_generation(
    groups: Sequence[Group], cells: Callable[[Group, int, list[Row]], tuple[Span, ...]]
) -> tuple[tuple[Span, ...], ...]:
    """A row a recipe and generation."""
    rows = []
    for group in groups:
        for generation in group.generations:
            own = [row for _, row in group.rows(generation)]
            rows.append((Span(group.name), Span(f"{generation} {own[0]['role']}"), *cells(group, generation, own)))
    return tuple(rows)


def _mean(rows: Iterable[Row], measure: str, digits: int) -> Span:
    found = spread_of([row[measure] for row in rows if row.get(measure) is not None])
    # A law that follows from the recipe alone has no spread over seeds.
    certain = found is not None and measure == "ideal_confidence"
    return Span(spread_text(replace(found, deviation=None) if found and certain else found, digits))


def confidence_table(groups: Sequence[Group], images: str) -> Table:
    """Confidence on the training set beside the laws."""
    measures = {
        "train_top1_error": 2, "mean_confidence": 3, "mean_label_confidence": 3, "ideal_confidence": 3,
        "ideal_confidence_at_share": 3, "topk_share": 3,
    }  # fmt: skip
    return Table(
        name="confidence",
        caption=words(
            f"Confidence on {images}, plain views: mean probability of the class that ranks first (p_a1) and of the "
            "label (p_y), beside the laws f_g and, at the measured share s of the patriarch, f_g(s). The laws hold for "
            "networks that fit their training set: see the error. Mean ± standard deviation over seeds."
        ),
        headings=("recipe", "generation", "training error %", "p_a1", "p_y", "f_g", "f_g(s)", "share s"),
        rows=_by_generation(
            groups, lambda _group, _g, own: tuple(_mean(own, name, digits) for name, digits in measures.items())
        ),
        text_columns=2,
        merged_columns=1,
    )


def calibration_table(groups: Sequence[Group], images: str) -> Table:
    """How sure networks are of their mistakes."""
    return Table(
        name="calibration",
        caption=words(
            f"Calibration on {images}: negative log-likelihood of the label in nats, and expected calibration error of "
            "p_a1 in 15 equal bins. Mean ± standard deviation over seeds."
        ),
        headings=("recipe", "generation", "NLL, nats", "ECE"),
        rows=_by_generation(groups, lambda _group, _g, own: (_mean(own, "nll", 3), _mean(own, "ece", 3))),
        text_columns=2,
        merged_columns=1,
    )


def speed_table(groups: Sequence[Group]) -> Table:
    """Images per second, and what they cost."""

    def cells(_group: Group, _generation: int, own: list[Row]) -> tuple[Span, ...]:
        speeds = (_mean(own, "train_images_per_second", 0), _mean(own, "wall_images_per_second", 0))
        seconds = (_mean(own, "train_seconds", 1), _mean(own, "wall_seconds", 1))
        return Span("/".join(sorted({str(row.get("processes", 1)) for row in own}))), *speeds, *seconds

    return Table(
        name="speed",
        caption=words(
            "Student images a second over the training steps, and over everything charged to the generation (teacher, "
            "warm-up, evaluation, saving); seconds of both. Mean ± standard deviation over seeds; whatever else ran on "
            "the machine is in it."
        ),
        headings=("recipe", "generation", "processes", "images/s", "images/s, all", "seconds", "seconds, all"),
        rows=_by_generation(groups, cells),
        text_columns=2,
        merged_columns=1,
    )


def path_table(groups: Sequence[Group]) -> Table:
    """What really ran: a row for all generations of a recipe that ran alike."""
    rows = []
    for group in groups:
        ways: dict[tuple[str, ...], set[int]] = {}
        for generation in group.generations:
            for _, row in group.rows(generation):
                ways.setdefault(_way(row), set()).add(generation)
        rows += [
            (Span(group.name), Span(", ".join(map(str, sorted(where)))), *map(Span, way)) for way, where in ways.items()
        ]
    return Table(
        name="paths",
        caption=words("What ran, as the runs recorded it."),
        headings=("recipe", "generations", *PATH),
        rows=tuple(rows),
        text_columns=2 + len(PATH),
        merged_columns=1,
    )


def _way(row: Row) -> tuple[str, ...]:
    known = {**row.get("path", {}), "backend": row.get("backend"), "engine": row.get("engine")}
    return tuple(str(known.get(name) or DASH) for name in PATH)
