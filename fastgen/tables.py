"""Tables for the terminal: results in the paper's form, and measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table

if TYPE_CHECKING:
    from fastgen.data.split import Dataset
    from fastgen.measuring import Measurement

PLAIN_WIDTH = 120


def error_table(results: Mapping[str, Any]) -> Table:
    """A row a generation, in the paper's form: errors alone and as the ensemble of 0..g; speed and time."""
    title = f"{_title(results)}: errors in percent, alone and as the ensemble of generations 0..g"
    headings = ("generation", "top-1", "top-5", "ensemble top-1", "top-5", "images/s", "seconds")
    table = new_table(title, headings)
    for row in results["generations"]:
        errors = ("top1_error", "top5_error", "ensemble_top1_error", "ensemble_top5_error")
        speed = (f"{row['train_images_per_second']:,.0f}", f"{row['wall_seconds']:,.0f}")
        table.add_row(_name(row), *(_number(row[key], 2) for key in errors), *speed)
    return table


def confidence_table(results: Mapping[str, Any]) -> Table:
    """A row a generation: confidence on the training set beside the laws that predict it."""
    title = (
        f"confidence on the {results['train_images']:,} training images, plain views, "
        "beside the laws f_g and, at the patriarch's share s, f_g(s)"
    )
    headings = ("generation", "error %", "mean p_a1", "mean p_y", "f_g", "f_g(s)", "share s")
    table = new_table(title, headings)
    for row in results["generations"]:
        laws = (
            "mean_confidence",
            "mean_label_confidence",
            "ideal_confidence",
            "ideal_confidence_at_share",
            "topk_share",
        )
        table.add_row(_name(row), _number(row["train_top1_error"], 2), *(_number(row[key], 3) for key in laws))
    return table


def measurement_table(rows: Sequence[tuple[str, Measurement]], dataset: Dataset) -> Table:
    """A row a network, or an ensemble."""
    samples = rows[0][1].samples
    headings = ("network", "top-1 %", "top-5 %", "p_a1", "p_y", "share s", "NLL", "ECE")
    table = new_table(f"{dataset.evaluated_on}: errors and means over {samples:,} samples", headings)
    for name, m in rows:
        values = (m.mean_confidence, m.mean_label_confidence, m.topk_share, m.nll, m.ece)
        table.add_row(name, f"{m.top1_error:.2f}", f"{m.top5_error:.2f}", *(f"{value:.3f}" for value in values))
    return table


def new_table(title: str, headings: Sequence[str], left: Sequence[str] = (), *, wrap: bool = False) -> Table:
    """An empty table in the form of all of ours.

    Args:
        left: headings of columns of text; none: the first one. Numbers, in the others, stand to the right.
        wrap: whether what is too wide for the terminal goes on in the next line, and is not cut off.
    """
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for heading in headings:
        justify: JustifyMethod = "left" if heading in (left or headings[:1]) else "right"
        table.add_column(heading, justify=justify, no_wrap=not wrap)
    return table


def print_table(table: Table) -> None:
    """Prints to standard output; where that is no terminal, at a width that breaks no line."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=PLAIN_WIDTH)
    console.print(table)


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['generation']} {row['role']}"


def _title(results: Mapping[str, Any]) -> str:
    samples = {row["samples_evaluated"] for row in results["generations"]}
    counted = " and ".join(f"{count:,}" for count in sorted(samples))
    return f"{results['model']} on {results['dataset']}, {counted} {results['evaluated_on']} images"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
