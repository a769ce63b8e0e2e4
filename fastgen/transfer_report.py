"""What came of a transfer: rows of generations side by side, as a table, files and a figure."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from fastgen.files import csv_text, write_atomically, write_json
from fastgen.probe import CS, Comparison, Probe, compare, told_apart, wilson
from fastgen.tables import new_table, print_table


@dataclass(frozen=True)
class Measured:
    """One network's features under the classifier.

    Attributes:
        node: of the generation; None: its weights file does not tell.
        dimensions: of its features.
        probe: what the classifier does.
    """

    node: str | None
    dimensions: int
    probe: Probe

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy, 0..1."""
        return wilson(int(self.probe.correct.sum()), len(self.probe.correct))

    def as_dict(self) -> dict[str, Any]:
        """Plain values; accuracies in percent."""
        probe = self.probe
        return {
            "node": self.node,
            "feature_dimensions": self.dimensions,
            "accuracy": 100 * probe.accuracy,
            "accuracy_low95": 100 * self.interval[0],
            "accuracy_high95": 100 * self.interval[1],
            "correct": int(probe.correct.sum()),
            "c": probe.c,
            "c_at_edge": probe.at_edge,
            "cv_accuracy": 100 * probe.cv_accuracy,
            "converged": probe.converged,
            "unconverged_cv_fits": probe.unconverged_fits,
        }


@dataclass(frozen=True)
class Row:
    """A generation of the run beside the same one of the baseline.

    Attributes:
        run, baseline: None: that one has no such generation.
        comparison: of run and baseline; None: one of them is missing.
        told_apart: whether the two differ by more than the test pictures' chance.
    """

    generation: int
    run: Measured | None
    baseline: Measured | None
    comparison: Comparison | None
    told_apart: bool | None


def rows_of(run: Mapping[int, Measured], baseline: Mapping[int, Measured]) -> list[Row]:
    """A row for each generation that one of them has."""
    both = {g: compare(run[g].probe.correct, baseline[g].probe.correct) for g in sorted(run.keys() & baseline.keys())}
    apart = dict(zip(both, told_apart([comparison.p for comparison in both.values()]), strict=True))
    return [
        Row(g, run.get(g), baseline.get(g), both.get(g), apart.get(g)) for g in sorted(run.keys() | baseline.keys())
    ]


def write_all(stem: Path, facts: Mapping[str, Any], names: Sequence[str], rows: Sequence[Row]) -> list[Path]:
    """Writes <stem>.json, .csv and .png, each whole or not at all.

    Args:
        facts: all that the rows do not tell.
        names: of the run and, where there is one, the baseline.
    """
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("json", "csv", "png")]
    write_json(paths[0], {**facts, "generations": [_plain(row) for row in rows]})
    write_atomically(paths[1], _csv(rows).encode())
    draw(paths[2], f"frozen features on {facts['to']['name']}: {facts['to']['val_images']:,} pictures", names, rows)
    return paths


def _plain(row: Row) -> dict[str, Any]:
    comparison = None
    if row.comparison is not None:
        found = row.comparison
        comparison = {
            "difference": 100 * found.difference,
            "difference_standard_error": 100 * found.standard_error,
            "only_run_correct": found.only_first,
            "only_baseline_correct": found.only_second,
            "mcnemar_p": found.p,
            "told_apart": row.told_apart,
        }
    run, baseline = (None if one is None else one.as_dict() for one in (row.run, row.baseline))
    return {"generation": row.generation, "run": run, "baseline": baseline, "comparison": comparison}


def _csv(rows: Sequence[Row]) -> str:
    return csv_text(
        [
            {"generation": row["generation"]}
            | {f"{part}_{key}": value for part in ("run", "baseline") for key, value in (row[part] or {}).items()}
            | (row["comparison"] or {})
            for row in map(_plain, rows)
        ]
    )


def print_rows(title: str, names: Sequence[str], rows: Sequence[Row]) -> None:
    """Prints the table.

    Args:
        names: of the run and, where there is one, the baseline.
    """
    print_table(_table(title, names, rows))


def _table(title: str, names: Sequence[str], rows: Sequence[Row]) -> Table:
    own = [heading for name in names for heading in (name, "C")]
    paired = ["difference ± s.e.", "p", "told apart"] if len(names) > 1 else []
    shown = new_table(title, ["generation", *own, *paired, "not converged"], wrap=True)
    for column in shown.columns:
        # Names and reasons may go on in the next line, numbers may not.
        column.min_width = {"difference ± s.e.": 13}.get(str(column.header), 14 if column.header in names else None)
    for row in rows:
        both = (row.run, row.baseline)[: len(names)]
        cells = [cell for one in both for cell in _cells(one)]
        failed = [text for name, one in zip(names, both, strict=True) for text in _failed(name, one)]
        shown.add_row(str(row.generation), *cells, *(_paired(row) if paired else ()), ", ".join(failed) or "none")
    return shown


def _cells(one: Measured | None) -> tuple[str, str]:
    if one is None:
        return "-", "-"
    low, high = one.interval
    # At an end of those tried, a better one may lie beyond.
    beyond = {CS[0]: "≤ ", CS[-1]: "≥ "}.get(one.probe.c, "")
    return f"{100 * one.probe.accuracy:.2f} [{100 * low:.0f}, {100 * high:.0f}]", f"{beyond}{one.probe.c:g}"


def _failed(name: str, one: Measured | None) -> list[str]:
    """Which fits did not converge."""
    if one is None:
        return []
    final = [] if one.probe.converged else [f"{name}: the classifier"]
    choice = [f"{name}: {one.probe.unconverged_fits} in the choice of C"] if one.probe.unconverged_fits else []
    return final + choice


def _paired(row: Row) -> tuple[str, str, str]:
    found = row.comparison
    if found is None:
        return "-", "-", "-"
    difference = f"{100 * found.difference:+.2f} ± {100 * found.standard_error:.2f}"
    return difference, f"{found.p:.2g}", "yes" if row.told_apart else "no"


def draw(path: Path, title: str, names: Sequence[str], rows: Sequence[Row]) -> None:
    """Accuracy over the generations, a line for run and baseline each; bars are 95 % intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for number, name in enumerate(names):
        found = [(row.generation, (row.run, row.baseline)[number]) for row in rows]
        points = [(generation, one) for generation, one in found if one is not None]
        accuracies = [100 * one.probe.accuracy for _, one in points]
        below = [accuracy - 100 * one.interval[0] for accuracy, (_, one) in zip(accuracies, points, strict=True)]
        above = [100 * one.interval[1] - accuracy for accuracy, (_, one) in zip(accuracies, points, strict=True)]
        # A little apart, so that bars do not cover each other.
        places = [generation + 0.04 * number for generation, _ in points]
        axis.errorbar(places, accuracies, [below, above], label=name, marker="o", capsize=3)
    axis.set(title=title, xlabel="generation", ylabel="accuracy, percent, with 95 % interval")
    axis.set_xticks([row.generation for row in rows])
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(path, buffer.getvalue())
