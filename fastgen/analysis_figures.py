"""Figures of an analysis, drawn from what analysis.json holds, to be read at 600 pixels of width.

Colours are Okabe and Ito's for recipes, steps of cividis for generations, one or two hues for heat maps: readers who
are colour-blind tell them apart.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastgen.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Content = Mapping[str, Any]

DOTS_PER_INCH = 150
WIDTH_INCHES = 7.0
RECIPE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
# A bin of fewer images says little: an accuracy of ten images is known within 15 points.
LEAST_BIN_IMAGES = 10
# Beyond so many, names or numbers in the cells of a heat map cannot be read.
MOST_NAMES, MOST_NUMBERS = 20, 10
SECONDS = ((3 * 3600.0, 3600.0, "hours"), (180.0, 60.0, "minutes"), (0.0, 1.0, "seconds"))


def draw_all(folder: Path, content: Content) -> list[Path]:
    """Writes analysis_<name>.png into a folder, for all that the content tells.

    Returns:
        the files, in the order in which they are to be looked at.
    """
    rows = content["generations"]
    figures: dict[str, Callable[[Figure], None]] = {"sorted_scores": partial(sorted_scores, content=content)}
    for found in content["second_best"]:
        figures[f"second_best_{found['generation']}"] = partial(second_best, content=content, found=found)
    figures["confidence"] = partial(confidence, content=content)
    if rows[0]["training"]["in_group"] is not None:
        figures["groups"] = partial(groups, content=content)
    figures["calibration"] = partial(calibration, content=content)
    if content["pairs"] is not None:
        figures["pairs"] = partial(pairs, content=content)
    if _points(content, "ensemble_top1_error") and (len(rows) > 1 or len(content["comparison"]) > 1):
        figures["ensembles"] = partial(ensembles, content=content)
    figures["time"] = partial(time, content=content)
    written = [_write(folder / f"analysis_{name}.png", draw, name) for name, draw in figures.items()]
    for path in folder.glob("analysis_second_best_*.png"):
        # Of what was the last generation when fewer were trained.
        if path not in written:
            path.unlink()
    return written


def _write(path: Path, draw: Callable[[Figure], None], name: str) -> Path:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = 6.5 if name.startswith("second_best") else 3.9 if name == "pairs" else 5.0
    # The reader's own matplotlibrc shall not darken the background, or shrink the letters.
    with rc_context():
        from matplotlib import rcdefaults

        rcdefaults()
        figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    write_atomically(path, buffer.getvalue())
    return path


def sorted_scores(figure: Figure, content: Content) -> None:
    """Mean r-th largest score of each generation on the training set, as arXiv 1805.05551's Figure 1 (left) has it."""
    axis, rows = figure.subplots(), content["generations"]
    for row, colour in zip(rows, _steps(len(rows)), strict=True):
        means = row["training"]["sorted_scores"]
        ranks = range(1, len(means) + 1)
        axis.plot(ranks, means, "o-", color=colour, label=f"generation {row['generation']}, {row['role']}")
    bands = np.array(rows[0]["training"]["sorted_scores_percentiles"])
    ranks, low, high = range(1, len(bands) + 1), content["percentiles"][0], content["percentiles"][-1]
    text = f"percentiles {low} to {high}, generation {rows[0]['generation']}"
    axis.fill_between(ranks, bands[:, 0], bands[:, -1], color="0.5", alpha=0.2, linewidth=0, label=text)
    for number, other in enumerate(content["patriarchs"], 1):
        colour, marker = RECIPE_COLOURS[number % len(RECIPE_COLOURS)], MARKERS[number % len(MARKERS)]
        means = other["sorted_scores"]
        name = f"first of {Path(other['run']).name}"
        axis.plot(range(1, len(means) + 1), means, f"{marker}--", color=colour, label=name)
    # Percentiles of a network that is sure go down to 1e-30, where there is nothing to be seen.
    smallest = min(min(row["training"]["sorted_scores"]) for row in rows)
    axis.set(yscale="log", xlabel="rank of the score, r", ylabel="mean r-th largest softmax score")
    axis.set_ylim(max(1e-7, smallest / 3), 1.3)
    axis.set_xticks(ranks)
    _finish(figure, axis, f"Sorted scores on {content['training_images']:,} training images")


def second_best(figure: Figure, content: Content, found: Content) -> None:
    """How often class j is the highest-scored one other than the label, of the images of each class: a heat map."""
    from matplotlib.colors import PowerNorm

    axis, counts = figure.subplots(), np.array(found["counts"], float)
    # A class without training images has no row.
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    grouped = content["groups"] is not None and found["classes_per_cell"] == 1
    order = np.argsort(content["groups"]["of_class"], kind="stable") if grouped else np.arange(len(shares))
    # Square-rooted: the many small shares are to be seen beside the few large ones.
    norm = PowerNorm(0.5, vmin=0, vmax=max(shares.max(), 1))
    # Axes count classes, also where a cell is of several.
    step = found["classes_per_cell"]
    end = len(shares) * step - 0.5
    image = axis.imshow(shares[np.ix_(order, order)], cmap="Blues", norm=norm, extent=(-0.5, end, end, -0.5))
    bar = figure.colorbar(image, ax=axis, location="bottom", shrink=0.6, aspect=30)
    bar.set_label("percent of the label's images")
    if grouped:
        _group_axes(axis, content["groups"], order)
    elif len(shares) <= MOST_NAMES:
        names = content["class_names"]
        turned = any(len(name) > 3 for name in names)
        axis.set_xticks(range(len(names)), names, rotation=60 if turned else 0, ha="right" if turned else "center")
        axis.set_yticks(range(len(names)), names)
        _numbers(axis, np.where(counts > 0, shares, np.nan), ".0f", shares.max() / 4, light_above=True)
    unit = ", by number" if step == 1 else f", by number; a cell is of {step} neighbours"
    named = grouped or len(shares) <= MOST_NAMES
    axis.set(xlabel="second-best class" + ("" if named else unit), ylabel="label" + ("" if named else unit))
    if grouped:
        axis.set_xlabel("second-best class, in the order of the labels")
    axis.set_title(f"Second-best classes of generation {found['generation']}, training images", fontsize=11)


def _group_axes(axis: Axes, groups: Content, order: Any) -> None:
    """Names each group at the middle of its classes, with lines between groups."""
    sizes = np.bincount(groups["of_class"], minlength=len(groups["names"]))
    ends = np.cumsum(sizes)
    for end in ends[:-1]:
        axis.axhline(end - 0.5, color="0.75", linewidth=0.5)
        axis.axvline(end - 0.5, color="0.75", linewidth=0.5)
    axis.set_yticks(ends - (sizes + 1) / 2, [name.replace("_", " ") for name in groups["names"]], fontsize=8.5)
    axis.set_xticks([])


def confidence(figure: Figure, content: Content) -> None:
    """Mean confidence on the training set beside the laws that predict it."""
    axis, rows = figure.subplots(), content["generations"]
    generations = [row["generation"] for row in rows]
    shown = (
        ("mean_confidence", "o-", RECIPE_COLOURS[0], "measured: mean p_a1, of the first class"),
        ("mean_label_confidence", "s-", RECIPE_COLOURS[1], "measured: mean p_y, of the label"),
        ("ideal_confidence", "^--", RECIPE_COLOURS[6], "law f_g"),
        ("ideal_confidence_at_share", "v:", RECIPE_COLOURS[2], "law f_g(s), s of the patriarch"),
    )
    for name, style, colour, text in shown:
        known = [(g, row["training"][name]) for g, row in zip(generations, rows, strict=True)]
        points = [(g, value) for g, value in known if value is not None]
        if points:
            axis.plot(*zip(*points, strict=True), style, color=colour, label=text)
    axis.set(xlabel="generation", ylabel="mean probability", ylim=(0, 1.03))
    axis.set_xticks(generations)
    _finish(figure, axis, f"Confidence on {content['training_images']:,} training images")


def groups(figure: Figure, content: Content) -> None:
    """How many of the four highest-scored classes other than the label are of its group."""
    axis, rows = figure.subplots(), content["generations"]
    generations = [row["generation"] for row in rows]
    told = [row["training"]["in_group"] for row in rows]
    axis.plot(generations, [row["others"] for row in told], "o-", color=RECIPE_COLOURS[0], label="measured")
    chance = told[0]["others_by_chance"]
    axis.axhline(chance, color=RECIPE_COLOURS[1], linestyle="--", label=f"by chance: {chance:.2f}")
    highest = max(max(row["others"] for row in told), chance)
    axis.set(xlabel="generation", ylabel="of the label's group, mean of 4", ylim=(0, 1.25 * highest))
    axis.set_xticks(generations)
    _finish(figure, axis, "The 4 highest-scored classes other than the label, training images")


def calibration(figure: Figure, content: Content) -> None:
    """Reliability diagram on the evaluation set."""
    axis, rows = figure.subplots(), content["generations"]
    axis.plot([0, 1], [0, 1], color="0.5", linestyle=":", label="calibrated")
    shown = [(f"generation {row['generation']}", row["evaluation"], "o-") for row in rows]
    colours = _steps(len(rows))
    if content["ensembles"]["all"] is not None:
        shown.append((f"ensemble of {len(rows)}", content["ensembles"]["all"], "s--"))
        colours = [*colours, RECIPE_COLOURS[1]]
    for (name, told, style), colour in zip(shown, colours, strict=True):
        bins = told["reliability"]
        kept = [number for number, images in enumerate(bins["images"]) if images >= LEAST_BIN_IMAGES]
        confidence, accuracy = ([bins[measure][number] for number in kept] for measure in ("confidence", "accuracy"))
        axis.plot(confidence, accuracy, style, color=colour, label=f"{name}: ECE {told['ece']:.3f}")
    axis.set(xlabel="mean p_a1 of a bin", ylabel="accuracy of a bin", xlim=(0, 1), ylim=(0, 1))
    title = f"Calibration on {_samples(content)}, bins of {LEAST_BIN_IMAGES} images or more"
    _finish(figure, axis, title)


def pairs(figure: Figure, content: Content) -> None:
    """Agreement and mean KL of all pairs of generations: two heat maps."""
    names = [str(row["generation"]) for row in content["generations"]]
    agreement, kl = 100 * np.array(content["pairs"]["agreement"]), np.array(content["pairs"]["kl"])
    apart = agreement[~np.eye(len(names), dtype=bool)]
    shown = (
        (agreement, apart.min(), 100.0, ".1f", "cividis", "Agree on the first class, %"),
        (kl, 0.0, kl.max(), ".3f", "cividis_r", "Mean KL(p_a || p_b), nats"),
    )
    for axis, (values, low, high, form, colours, title) in zip(figure.subplots(1, 2), shown, strict=True):
        image = axis.imshow(values, cmap=colours, vmin=low, vmax=high)
        axis.set_xticks(range(len(names)), names)
        axis.set_yticks(range(len(names)), names)
        if len(names) <= MOST_NUMBERS:
            middle = (low + high) / 2
            _numbers(axis, values, form, middle, light_above=colours.endswith("_r"))
        else:
            figure.colorbar(image, ax=axis, location="bottom")
        axis.set_title(title, fontsize=11)
        axis.set(xlabel="generation b", ylabel="generation a")
    figure.suptitle(f"Generations beside each other, {_samples(content)}", fontsize=11)


def ensembles(figure: Figure, content: Content) -> None:
    """Error of the mean softmax against the number of its members, a line a recipe."""
    axis = figure.subplots()
    lines = _recipes(content)
    for recipe, colour, marker in lines:
        _line(axis, recipe, "ensemble_top1_error", _members, f"{marker}-", colour, f"{_label(recipe)}, first m")
    for recipe, colour, marker in lines:
        name = f"{_label(recipe)}, last m"
        _line(axis, recipe, "last_members_top1_error", _members, f"{marker}:", colour, name, filled=False)
    counts = {point["members"] for recipe in content["comparison"] for point in recipe["points"]}
    axis.set(xlabel="members of the ensemble, m", ylabel="top-1 error, percent")
    axis.set_xticks(sorted(counts))
    _finish(figure, axis, f"Ensembles on {_samples(content)}{_bars(content)}")


def time(figure: Figure, content: Content) -> None:
    """Error against the training that it takes, a line a recipe: networks alone, and their ensembles."""
    axis = figure.subplots()
    longest = max(point["seconds_together"]["mean"] for recipe in content["comparison"] for point in recipe["points"])
    unit_seconds, unit = next((size, name) for least, size, name in SECONDS if longest >= least)
    alone, together = _taken("seconds_alone", unit_seconds), _taken("seconds_together", unit_seconds)
    for recipe, colour, marker in _recipes(content):
        # Networks that nobody taught are no sequence: each took its own time.
        taught = all(point["role"] != "independent" for point in recipe["points"])
        style = f"{marker}-" if taught else marker
        _line(axis, recipe, "top1_error", alone, style, colour, f"{_label(recipe)}, alone")
        if len(recipe["points"]) > 1:
            name = f"{_label(recipe)}, ensemble of 0..g"
            _line(axis, recipe, "ensemble_top1_error", together, f"{marker}:", colour, name, filled=False)
    axis.set(xlabel=f"{unit} of training steps, teachers' included", ylabel="top-1 error, percent")
    axis.set_xlim(left=0)
    _finish(figure, axis, f"Error and training time, {_samples(content)}{_bars(content)}")


def _recipes(content: Content) -> list[tuple[Content, str, str]]:
    """Each with its colour and marker; there may be more recipes than colours."""
    found = list(content["comparison"])
    count = len(RECIPE_COLOURS)
    return [(recipe, RECIPE_COLOURS[n % count], MARKERS[n % len(MARKERS)]) for n, recipe in enumerate(found)]


def _members(point: Content) -> float:
    return float(point["members"])


def _taken(name: str, unit_seconds: float) -> Callable[[Content], float]:
    """Where a point lies on an axis of time."""
    return lambda point: float(point[name]["mean"]) / unit_seconds


def _line(
    axis: Axes,
    recipe: Content,
    measure: str,
    place: Callable[[Content], float],
    style: str,
    colour: str,
    name: str,
    *,
    filled: bool = True,
) -> None:
    """A recipe's means of a measure, with their deviations as bars; nothing where it is not known."""
    points = [point for point in recipe["points"] if point[measure] is not None]
    if not points:
        return
    bars = [point[measure]["deviation"] or 0.0 for point in points]
    axis.errorbar(
        [place(point) for point in points],
        [point[measure]["mean"] for point in points],
        bars if any(bars) else None,
        fmt=style,
        color=colour,
        label=name,
        capsize=3,
        markerfacecolor=colour if filled else "white",
    )


def _points(content: Content, measure: str) -> list[Content]:
    return [point for recipe in content["comparison"] for point in recipe["points"] if point[measure] is not None]


def _label(recipe: Content) -> str:
    count = len(recipe["runs"])
    return str(recipe["name"]) + (f" ({count} runs)" if count > 1 else "")


def _bars(content: Content) -> str:
    return "; mean ± sd" if any(len(recipe["runs"]) > 1 for recipe in content["comparison"]) else ""


def _samples(content: Content) -> str:
    on = content["evaluated_on"]
    return f"{on['samples']:,} {on['part']} images"


def _numbers(axis: Axes, values: Any, form: str, middle: float, *, light_above: bool = False) -> None:
    """Writes each cell's number, if it is one: dark on the light end of the colours, the high one unless turned."""
    size = 9 if len(values) <= 6 else 7.5
    for (row, column), value in np.ndenumerate(values):
        if np.isnan(value):
            continue
        dark = (value >= middle) != light_above
        axis.text(column, row, f"{value:{form}}", ha="center", va="center", size=size, color="k" if dark else "w")


def _steps(count: int) -> list[Any]:
    """Colours of generations, from dark to light; the lightest tenth of the map is hardly seen on white."""
    from matplotlib import colormaps

    return [colormaps["cividis"](place) for place in np.linspace(0, 0.88, max(count, 1))]


def _finish(figure: Figure, axis: Axes, title: str) -> None:
    axis.set_title(title, fontsize=11)
    axis.grid(alpha=0.3)
    # Below the axes, where it hides nothing.
    lines, names = axis.get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", fontsize=9, ncols=2)
