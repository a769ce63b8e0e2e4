"""Figures of a report, as data: what is drawn where. `drawing.py` draws."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fastgen.report.document import Chart, Colour, Dash, Figure, HeatMap, Key, Line, words
from fastgen.report.groups import Group
from fastgen.report.runs import Row, Run
from fastgen.report.style import MARKERS, RECIPES, generation_colour, recipe_colour
from fastgen.report.tables import TOP1, TOP5, generations_of

# Beyond so many curves a panel cannot be read: the other recipes are in the tables.
MOST_RECIPES = len(RECIPES)
# An accuracy of ten images is known within 15 points: smaller bins of a reliability diagram are left out.
LEAST_BIN_IMAGES = 10
MOST_NAMES = 20
NAME_LETTERS = 16


def _left_out(groups: Sequence[Group], shown: int) -> str:
    return f" The first {shown} of {len(groups)} recipes." if len(groups) > shown else ""


def error_figure(groups: Sequence[Group], images: str) -> Figure:
    """Errors over the generations, as arXiv 1805.05551's Figure 2 has them: a curve a recipe, single and ensemble."""
    shown = groups[:MOST_RECIPES]
    panels = [
        panel
        for title, measures in (("top-1", TOP1), ("top-5", TOP5))
        for panel in _error_panels(shown, title, measures)
    ]
    return Figure(
        name="errors",
        title="Errors over the generations",
        caption=words(
            f"Error on {images}, each network alone (single) and the mean softmax of generations 0 to g (ensemble), as "
            "Figure 2 of arXiv 1805.05551. Points are means over seeds, bars their standard deviation."
            f"{_left_out(groups, MOST_RECIPES)}"
        ),
        panels=tuple(panels),
        keys=tuple(Key(group.name, recipe_colour(n), MARKERS[n]) for n, group in enumerate(shown)),
    )


def _error_panels(groups: Sequence[Group], title: str, measures: Mapping[str, str]) -> list[Chart]:
    lines = {measure: _error_lines(groups, measure) for measure in measures}
    ends = [
        y + sign * bar
        for own in lines.values()
        for line in own
        for y, bar in zip(line.ys, line.bars or (0.0,) * len(line.ys), strict=True)
        for sign in (-1, 1)
    ]
    if not ends:
        return []
    room = 0.06 * max(max(ends) - min(ends), 5.0)
    # Both panels have one scale, so that an ensemble's gain is seen.
    y_range = max(0.0, min(ends) - room), max(ends) + room
    ticks = tuple(generations_of(groups))
    return [
        Chart(f"{title} error, {measures[measure]}", "generation", "percent", tuple(own), ticks, y_range)
        for measure, own in lines.items()
        if own
    ]


def _error_lines(groups: Sequence[Group], measure: str) -> list[Line]:
    return [
        line
        for n, group in enumerate(groups)
        if (line := _over_generations(group, measure, group.name, recipe_colour(n), MARKERS[n])) is not None
    ]


def _over_generations(group: Group, measure: str, name: str, colour: str, marker: str, dash: Dash = "-") -> Line | None:
    found = [(g, spread) for g in group.generations if (spread := group.spread(measure, g)) is not None]
    if not found:
        return None
    bars = tuple(spread.deviation or 0.0 for _, spread in found)
    xs, ys = tuple(float(g) for g, _ in found), tuple(spread.mean for _, spread in found)
    return Line(name, xs, ys, colour, bars if any(bars) else (), marker, dash)


def _colours(groups: Iterable[Group]) -> dict[int, Colour]:
    """Of each generation, the same in all figures."""
    generations = generations_of(groups)
    return {g: generation_colour(n, len(generations)) for n, g in enumerate(generations)}


def curve_figures(groups: Sequence[Group], part: str) -> list[Figure]:
    """Training of each recipe: loss, error on the training views, error on the evaluation images."""
    colours = _colours(groups)
    drawn = [_curves(n, group, colours, part) for n, group in enumerate(groups[:MOST_RECIPES])]
    return [figure for figure in drawn if figure is not None]


def _curves(number: int, group: Group, colours: Mapping[int, Colour], part: str) -> Figure | None:
    shown: list[tuple[str, str, Callable[[Row], float | None]]] = [
        ("training loss", "objective", lambda row: row.get("loss")),
        ("training error", "percent", _training_error),
        (f"{part} error, top-1", "percent", lambda row: row.get("top1_error")),
    ]
    panels = []
    for title, label, value in shown:
        lines = [line for g in group.generations if (line := _curve(group, g, colours[g], value)) is not None]
        if lines:
            panels.append(Chart(title, "epoch", label, tuple(lines)))
    if not panels:
        return None
    return Figure(
        name=f"training-{number}",
        title=f"Training: {group.name}",
        caption=words(
            f"{group.name}: means over {_seeds_of_curves(group)}, epoch by epoch. The objectives of "
            "patriarch and students differ, so their losses are not on one scale. Training error is that of the "
            f"augmented views while the network changes; {part} error that of evaluations on the way."
        ),
        panels=tuple(panels),
        keys=_generation_keys(group.generations, colours, marker=""),
    )


def _seeds_of_curves(group: Group) -> str:
    """`3 seeds`; `3 seeds (generation 2: 2)` where later generations are not there of all."""
    counts = {g: sum(bool(run.histories.get(g)) for run, _ in group.rows(g)) for g in group.generations}
    most = max(counts.values())
    fewer = ", ".join(f"generation {g}: {count}" for g, count in counts.items() if 0 < count < most)
    return f"{most} seed{'s' if most != 1 else ''}{f' ({fewer})' if fewer else ''}"


def _training_error(row: Row) -> float | None:
    accuracy = row.get("accuracy")
    return None if accuracy is None else 100 * (1 - accuracy)


def _curve(group: Group, generation: int, colour: Colour, value: Callable[[Row], float | None]) -> Line | None:
    """Mean over the runs of what all of them tell, against epochs that are over."""
    histories = [run.histories.get(generation, ()) for run, _ in group.rows(generation)]
    told = [{row["epoch"] + 1: v for row in history if (v := value(row)) is not None} for history in histories]
    told = [own for own in told if own]
    epochs = sorted(set(told[0]).intersection(*told)) if told else []
    if not epochs:
        return None
    ys = tuple(statistics.mean(own[epoch] for own in told) for epoch in epochs)
    marker = "o" if len(epochs) < 2 else ""
    return Line(f"generation {generation}", tuple(map(float, epochs)), ys, colour, marker=marker)


def _generation_keys(generations: Iterable[int], colours: Mapping[int, Colour], marker: str = "o") -> tuple[Key, ...]:
    return tuple(Key(f"generation {g}", colours[g], marker) for g in sorted(generations))


def confidence_figure(groups: Sequence[Group], images: str) -> Figure | None:
    """Measured confidence beside the laws, a panel a recipe."""
    shown: tuple[tuple[str, str, str, str, Dash], ...] = (
        ("mean_confidence", "p_a1, measured", RECIPES[0], "o", "-"),
        ("mean_label_confidence", "p_y, measured", RECIPES[1], "s", "-"),
        ("ideal_confidence", "law f_g", "ink", "^", "--"),
        ("ideal_confidence_at_share", "law f_g(s)", RECIPES[2], "v", ":"),
    )
    panels = []
    for group in groups[:MOST_RECIPES]:
        found = [_over_generations(group, *one) for one in shown]
        lines = tuple(line for line in found if line is not None)
        if lines:
            panels.append(Chart(group.name, "generation", "mean", lines, tuple(group.generations), (0.0, 1.04)))
    if not panels:
        return None
    told = {line.name for panel in panels for line in panel.lines}
    return Figure(
        name="confidence",
        title="Measured confidence and laws",
        caption=words(
            f"Mean probabilities on {images}, and what the laws predict of networks that fit "
            f"them.{_left_out(groups, MOST_RECIPES)}"
        ),
        panels=tuple(panels),
        keys=tuple(Key(name, colour, marker, dash) for _, name, colour, marker, dash in shown if name in told),
    )


def analysed(group: Group) -> Run | None:
    """The first run of a recipe that was analysed."""
    return next((run for run in group.runs if run.analysis is not None), None)


def score_figure(groups: Sequence[Group]) -> Figure | None:
    """Sorted scores on the training set, as arXiv 1805.05551's Figure 1 (left): a panel a recipe."""
    panels, colours = [], _colours(groups)
    for group, content in _analyses(groups):
        lines = tuple(_scores(row, colours) for row in content["generations"])
        ranks = tuple(range(1, len(lines[0].xs) + 1))
        panels.append(Chart(group.name, "rank of the score", "mean softmax score", lines, ranks, log=True))
    if not panels:
        return None
    return Figure(
        name="scores",
        title="Sorted scores",
        caption=words(
            "Mean r-th largest softmax score on the training images, as Figure 1 of arXiv 1805.05551: of each recipe "
            "the first seed that was analysed."
        ),
        panels=tuple(panels),
        keys=_generation_keys(_analysed_generations(groups), colours),
    )


def _scores(row: Mapping[str, Any], colours: Mapping[int, Colour]) -> Line:
    means = tuple(row["training"]["sorted_scores"])
    xs = tuple(map(float, range(1, len(means) + 1)))
    return Line(f"generation {row['generation']}", xs, means, colours[row["generation"]])


def _analysed_generations(groups: Iterable[Group]) -> set[int]:
    return {row["generation"] for _, content in _analyses(groups) for row in content["generations"]}


def _analyses(groups: Iterable[Group]) -> list[tuple[Group, Mapping[str, Any]]]:
    found = [(group, run.analysis) for group in groups if (run := analysed(group)) is not None]
    return [(group, content) for group, content in found if content is not None][:MOST_RECIPES]


def second_best_figures(groups: Sequence[Group]) -> list[Figure]:
    """Which class is the highest-scored one other than the label: two heat maps a recipe."""
    return [_second_best(number, group, content) for number, (group, content) in enumerate(_analyses(groups))]


def _second_best(number: int, group: Group, content: Mapping[str, Any]) -> Figure:
    shares = [_shares(found["counts"]) for found in content["second_best"]]
    # One scale for all, as they are compared.
    full = max(share for rows in shares for row in rows for share in row) or 1.0
    maps = [_heat_map(content, found, rows, full) for found, rows in zip(content["second_best"], shares, strict=True)]
    named, per_cell = bool(maps[0].names), content["second_best"][0]["classes_per_cell"]
    grouped = content["groups"] is not None and per_cell == 1
    order = " in the order of their groups, with lines between these" if grouped else " by number"
    cells = f", {per_cell} neighbours a row and column, so that the diagonal tells of others of the same cell"
    return Figure(
        name=f"second-best-{number}",
        title=f"Second-best classes: {group.name}",
        caption=words(
            f"{group.name}: how often each class is the highest-scored one other than the label, in percent of the "
            f"label's training images{'' if named else f'; classes{order}'}{cells if per_cell > 1 else ''}. The "
            f"stronger the more, on a scale of square roots up to {full:.0f} %, the same for all generations. Of the "
            "first seed that was analysed."
        ),
        panels=tuple(maps),
    )


def _shares(counts: Sequence[Sequence[int]]) -> list[list[float]]:
    """In percent of each row."""
    return [[100 * count / max(sum(row), 1) for count in row] for row in counts]


def _heat_map(
    content: Mapping[str, Any], found: Mapping[str, Any], shares: Sequence[Sequence[float]], full: float
) -> HeatMap:
    classes = len(shares)
    grouped = content["groups"] is not None and found["classes_per_cell"] == 1
    groups = content["groups"]["of_class"] if grouped else ()
    order = sorted(range(classes), key=lambda c: groups[c]) if grouped else list(range(classes))
    names = content["class_names"] if classes <= MOST_NAMES and found["classes_per_cell"] == 1 else ()
    return HeatMap(
        title=f"generation {found['generation']}",
        x_label="second-best class",
        y_label="label",
        values=tuple(tuple(shares[row][column] for column in order) for row in order),
        full=full,
        names=tuple(map(_short_name, names)),
        unit="percent of the label's images",
        breaks=tuple(n for n in range(1, len(order)) if grouped and groups[order[n]] != groups[order[n - 1]]),
        alt=_most_frequent(content, found),
    )


def _short_name(name: str) -> str:
    """As long as there is room for beside a heat map; names of one kind differ at either end."""
    return name if len(name) <= NAME_LETTERS else f"{name[:9]}…{name[-6:]}"


def _most_frequent(content: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    names = content["class_names"]
    pairs = [(images, label, other) for label, row in enumerate(found["frequent"]) for other, images in row]
    most = sorted(pairs, key=lambda pair: (-pair[0], pair[1:]))[:5]
    told = ", ".join(f"{names[label]} with {names[other]} ({images} images)" for images, label, other in most)
    return f"Generation {found['generation']}: most frequent are {told}."


def calibration_figure(groups: Sequence[Group]) -> Figure | None:
    """Reliability diagrams on the evaluation set, a panel a recipe."""
    panels, colours, ensembles = [], _colours(groups), False
    for group, content in _analyses(groups):
        lines = [
            _reliability(f"generation {row['generation']}", row["evaluation"], colours[row["generation"]])
            for row in content["generations"]
        ]
        if content["ensembles"]["all"] is not None:
            ensembles = True
            lines.append(_reliability("ensemble of all", content["ensembles"]["all"], RECIPES[1], "s", "--"))
        panels.append(Chart(group.name, "p_a1 of a bin", "accuracy of a bin", tuple(lines), square=True))
    if not panels:
        return None
    ensemble = (Key("ensemble of all", RECIPES[1], "s", "--"),) if ensembles else ()
    return Figure(
        name="reliability",
        title="Reliability",
        caption=words(
            "Accuracy of images by the confidence of their first class; on the diagonal both are equal, below it the "
            f"network is too sure. Bins of {LEAST_BIN_IMAGES} images or more; of the first seed that was analysed."
        ),
        panels=tuple(panels),
        keys=(*_generation_keys(_analysed_generations(groups), colours), *ensemble),
    )


def _reliability(name: str, told: Mapping[str, Any], colour: str, marker: str = "o", dash: Dash = "-") -> Line:
    bins = told["reliability"]
    kept = [number for number, images in enumerate(bins["images"]) if images >= LEAST_BIN_IMAGES]
    xs, ys = (tuple(bins[measure][number] for number in kept) for measure in ("confidence", "accuracy"))
    return Line(name, xs, ys, colour, marker=marker, dash=dash)
