"""What came of a sweep: mean and standard deviation of each cell, as a table, a file and a figure."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from fastgen.files import csv_text, write_atomically
from fastgen.grid import Cell, Run, run_folder
from fastgen.nodes import read_json
from fastgen.recipe import load_text
from fastgen.spread import spread_of
from fastgen.tables import new_table, print_table

MEASURES = {"top1_error": "top-1 error", "ensemble_top1_error": "ensemble's top-1 error"}
# Beyond so many a legend hides the figure.
MOST_LINES = 24


@dataclass(frozen=True)
class Point:
    """Errors of one cell's generation over the seeds, in percent.

    Attributes:
        values: by measure, one a seed; none of the ensemble where generations are missing from it.
    """

    cell: Cell
    generation: int
    role: str
    values: dict[str, list[float]]

    @property
    def seeds(self) -> int:
        """How many are measured."""
        return len(self.values["top1_error"])

    def mean(self, measure: str) -> float | None:
        """Over the seeds; None: it is not known."""
        found = spread_of(self.values[measure])
        return None if found is None else found.mean

    def deviation(self, measure: str) -> float | None:
        """Standard deviation over the seeds, n - 1 in the denominator; None: there are not two."""
        found = spread_of(self.values[measure])
        return None if found is None else found.deviation


def points_of(results: Sequence[tuple[Run, dict[str, Any]]]) -> list[Point]:
    """A point for each generation of each cell that has been measured, with the seeds that are there."""
    found: dict[tuple[int, int], Point] = {}
    for run, content in results:
        for row in content["generations"]:
            key = run.cell.number, row["generation"]
            point = found.setdefault(key, Point(run.cell, row["generation"], row["role"], {m: [] for m in MEASURES}))
            for measure in MEASURES:
                point.values[measure] += [] if row[measure] is None else [row[measure]]
    return [found[key] for key in sorted(found)]


def report(folder: Path, name: str, runs: Sequence[Run]) -> None:
    """Prints the table of a sweep, and writes sweep.csv and sweep.png.

    Args:
        folder: of the sweep.
        name: of its recipe.
        runs: of which those that are measured are told.
    """
    found = [(run, read_results(folder, run)) for run in runs]
    results = [(run, content) for run, content in found if content is not None]
    points = points_of(results)
    if not points:
        print("nothing is measured yet")
        return
    images = {row["samples_evaluated"] for _, content in results for row in content["generations"]}
    counted = " and ".join(f"{count:,}" for count in sorted(images))
    title = f"{name}: errors in percent of {counted} held-out images, mean ± standard deviation (n - 1) of the seeds"
    print_table(table(title, points))
    _tell_best(points, len({run.cell.number for run in runs}))
    if len(results) < len(runs):
        print(f"{len(results)} of {len(runs)} runs are measured")
    write_atomically(folder / "sweep.csv", csv_text([_row(point) for point in points]).encode())
    draw(folder / "sweep.png", name, points)
    print(f"{folder / 'sweep.csv'}  {folder / 'sweep.png'}")


def read_results(folder: Path, run: Run) -> dict[str, Any] | None:
    """Content of a run's results.json; None: it is not measured, or what is there is not of this very run.

    Another grid, other data, or another way to evaluate may have had the same folder.
    """
    place = run_folder(folder, run)
    if not (place / "results.json").exists():
        return None
    content: dict[str, Any] = read_json(place / "results.json")
    nodes = [row["node"] for row in content["generations"]]
    recipe = load_text((place / "recipe.yaml").read_text(), str(place / "recipe.yaml"))
    same = recipe.identity() == run.recipe.identity()
    return content if same and nodes == [generation.node for generation in run.plan][: len(nodes)] else None


def is_measured(folder: Path, run: Run) -> bool:
    """Whether all generations of a run have their errors."""
    content = read_results(folder, run)
    return content is not None and len(content["generations"]) == len(run.plan)


def chosen(points: Sequence[Point]) -> Point:
    """The last generation of the cell in which it errs least, by mean; among equals the first cell.

    Cells that lack seeds which others have are not compared with them.
    """
    last = [point for point in points if point.generation == max(point.generation for point in points)]
    most = max(point.seeds for point in last)
    return min((point for point in last if point.seeds == most), key=_error)


def _error(point: Point) -> float:
    return sum(point.values["top1_error"]) / point.seeds


def _tell_best(points: Sequence[Point], cells: int) -> None:
    best = chosen(points)
    seeds = "1 seed" if best.seeds == 1 else f"{best.seeds} seeds"
    compared = sum(point.generation == best.generation and point.seeds == best.seeds for point in points)
    rest = f"; cells that lack generations or seeds, not compared: {cells - compared}" if compared < cells else ""
    print(
        f"lowest {MEASURES['top1_error']} in generation {best.generation}: {best.cell.name}, "
        f"{_text(best, 'top1_error')} ({seeds}){rest}"
    )


def table(title: str, points: Sequence[Point]) -> Table:
    """A row a cell and generation."""
    shown = new_table(title, ("cell", "generation", "seeds", *MEASURES.values()), ("cell", "generation"), wrap=True)
    for number, point in enumerate(points):
        errors = (_text(point, measure) for measure in MEASURES)
        name = "" if shown.rows and points[number - 1].cell is point.cell else point.cell.name
        shown.add_row(name, f"{point.generation} {point.role}", str(point.seeds), *errors)
    return shown


def _text(point: Point, measure: str) -> str:
    mean, deviation = point.mean(measure), point.deviation(measure)
    return "-" if mean is None else f"{mean:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")


def _row(point: Point) -> dict[str, Any]:
    row: dict[str, Any] = {**point.cell.values, "generation": point.generation, "role": point.role}
    row["seeds"] = point.seeds
    for measure in MEASURES:
        mean, deviation = point.mean(measure), point.deviation(measure)
        row[f"{measure}_mean"] = None if mean is None else round(mean, 4)
        row[f"{measure}_deviation"] = None if deviation is None else round(deviation, 4)
        row[f"{measure}_values"] = " ".join(f"{value:.4f}" for value in point.values[measure])
    return row


def draw(path: Path, name: str, points: Sequence[Point]) -> None:
    """Errors over the generations, a line a cell, as arXiv 1805.05551's Figure 2 has them; bars are deviations.

    Of many cells those with the lowest errors in their last generations.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(MEASURES), sharey=True)
    lines = _lines(points)
    for axis, (measure, title) in zip(axes, MEASURES.items(), strict=True):
        for line in lines[:MOST_LINES]:
            own = [point for point in line if point.values[measure]]
            bars = [point.deviation(measure) or 0.0 for point in own]
            generations, means = [point.generation for point in own], [point.mean(measure) for point in own]
            axis.errorbar(generations, means, bars, label=line[0].cell.name, marker="o", capsize=3)
        axis.set(title=title, xlabel="generation", ylabel="percent")
        axis.set_xticks(sorted({point.generation for point in points}))
        axis.grid(alpha=0.3)
    axes[-1].legend(fontsize="small")
    best = f", the best {MOST_LINES} of {len(lines)} cells" if len(lines) > MOST_LINES else ""
    figure.suptitle(f"{name}: held-out images{best}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(path, buffer.getvalue())


def _lines(points: Sequence[Point]) -> list[list[Point]]:
    """Points of each cell; of more than can be drawn, the best cells first."""
    cells: dict[int, list[Point]] = {}
    for point in points:
        cells.setdefault(point.cell.number, []).append(point)
    lines = list(cells.values())
    return lines if len(lines) <= MOST_LINES else sorted(lines, key=lambda line: _error(line[-1]))
