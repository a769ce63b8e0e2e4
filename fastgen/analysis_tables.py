"""Tables of an analysis for the terminal, from what analysis.json holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from fastgen.tables import new_table

Content = Mapping[str, Any]
# Wider matrices do not fit into a terminal; analysis.json holds all of them.
MOST_COLUMNS = 10
# Most frequent pairs of label and second-best class that are printed.
PRINTED_PAIRS = 8


def all_tables(content: Content) -> list[Table]:
    """All that the content tells, in the order of the figures."""
    second_best = [_second_best(content, found) for found in content["second_best"]]
    groups = [_groups(content)] if content["groups"] is not None else []
    tables = [_scores(content), _confidence(content), *groups, *second_best, _calibration(content)]
    return [*tables, *_pairs(content), _comparison(content)]


def _pairs(content: Content) -> list[Table]:
    rows = content["generations"]
    if content["pairs"] is None:
        return []
    shown = rows[-MOST_COLUMNS:]
    part = "" if len(shown) == len(rows) else f" (the last {len(shown)} of {len(rows)})"
    title = f"pairs of generations a, b{part} on {_samples(content)}: rank the same class first, percent"
    agreement = [[100 * share for share in row] for row in content["pairs"]["agreement"]]
    kl = _matrix("... and mean KL(p_a || p_b), nats", shown, content["pairs"]["kl"], 4)
    return [_matrix(title, shown, agreement, 2), kl]


def _scores(content: Content) -> Table:
    rows = content["generations"]
    ranks = [f"r = {rank}" for rank in range(1, len(rows[0]["training"]["sorted_scores"]) + 1)]
    title = f"mean r-th largest softmax score on {content['training_images']:,} training images, plain views"
    table = new_table(title, ("generation", *ranks))
    for row in rows:
        table.add_row(_name(row), *(f"{score:.2g}" for score in row["training"]["sorted_scores"]))
    return table


def _confidence(content: Content) -> Table:
    """Confidence beside the laws."""
    headings = ("generation", "error %", "mean p_a1", "mean p_y", "f_g", "f_g(s)", "classes 2..5")
    table = new_table("... confidence beside the laws f_g and f_g(s), and mass of classes 2..5", headings)
    for row in content["generations"]:
        told = row["training"]
        laws = [told[name] for name in ("mean_confidence", "mean_label_confidence", "ideal_confidence")]
        laws += [told["ideal_confidence_at_share"], told["secondary_mass"]]
        table.add_row(_name(row), _number(told["top1_error"], 2), *(_number(value, 3) for value in laws))
    return table


def _groups(content: Content) -> Table:
    """Which secondary classes share the label's group."""
    title = "... of the label's group: how many of the 4 highest-scored other classes, of the top 5; mass beside p_y"
    table = new_table(title, ("generation", "of 4 others", "of top 5", "mass", "mass by chance"))
    for row in content["generations"]:
        near = row["training"]["in_group"]
        table.add_row(_name(row), *(_number(near[name], 3) for name in ("others", "top5", "mass", "mass_by_chance")))
    table.add_row("by chance", *(_number(near[name], 3) for name in ("others_by_chance", "top5_by_chance")), "", "")
    return table


def _second_best(content: Content, found: Content) -> Table:
    """The most frequent pairs of label and second-best class."""
    pairs = [(images, label, other) for label, row in enumerate(found["frequent"]) for other, images in row]
    title = f"most frequent second-best classes of generation {found['generation']}, training images"
    table = new_table(title, ("label", "second-best", "images", "% of the label's"), ("label", "second-best"))
    names = content["class_names"]
    for images, label, other in sorted(pairs, key=lambda pair: (-pair[0], pair[1:]))[:PRINTED_PAIRS]:
        table.add_row(names[label], names[other], str(images), f"{100 * images / found['images'][label]:.1f}")
    return table


def _calibration(content: Content) -> Table:
    rows = [(_name(row), row["evaluation"]) for row in content["generations"]]
    if content["ensembles"]["all"] is not None:
        rows.append((f"ensemble of {len(rows)}", content["ensembles"]["all"]))
    table = new_table(f"calibration on {_samples(content)}", ("network", "top-1 %", "NLL, nats", "ECE"))
    for name, told in rows:
        table.add_row(name, f"{told['top1_error']:.2f}", f"{told['nll']:.4f}", f"{told['ece']:.4f}")
    return table


def _matrix(title: str, rows: Sequence[Content], values: Sequence[Sequence[float]], digits: int) -> Table:
    """The last rows and columns of a matrix, as many as there are generations given."""
    table = new_table(title, ("a", *(f"b = {row['generation']}" for row in rows)))
    last = len(rows)
    for row, cells in zip(rows, values[-last:], strict=True):
        table.add_row(_name(row), *(f"{cell:.{digits}f}" for cell in cells[-last:]))
    return table


def _comparison(content: Content) -> Table:
    """Errors, alone and together, and the training steps that they take."""
    headings = ("recipe", "generation", "runs", "top-1", "first g+1", "last g+1", "s alone", "s together")
    title = (
        f"errors on {_samples(content)}, percent: alone, and mean softmax of the first and the last g+1 networks; "
        "seconds of training steps"
    )
    table = new_table(title, headings, ("recipe", "generation"), wrap=True)
    for recipe in content["comparison"]:
        for place, point in enumerate(recipe["points"]):
            errors = ("top1_error", "ensemble_top1_error", "last_members_top1_error")
            cells = [_mean(point[name], 2) for name in errors]
            cells += [_mean(point[name], 0) for name in ("seconds_alone", "seconds_together")]
            name = recipe["name"] if place == 0 else ""
            table.add_row(name, f"{point['generation']} {point['role']}", str(point["runs"]), *cells)
    return table


def _mean(value: Content | None, digits: int) -> str:
    if value is None:
        return "-"
    deviation = "" if value["deviation"] is None else f" ± {value['deviation']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{deviation}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _name(row: Content) -> str:
    return f"{row['generation']} {row['role']}"


def _samples(content: Content) -> str:
    on = content["evaluated_on"]
    return f"{on['samples']:,} {on['part']} images"
