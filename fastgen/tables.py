"""Tables for the terminal: results in the paper's form, and measurements."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from fastgen.data.split import Dataset
from fastgen.evaluate import Measurement

PLAIN_WIDTH = 200


def results_table(results: Mapping[str, Any]) -> Table:
    """A row a generation: errors alone and as the ensemble of 0..g, confidence beside its laws, speed."""
    rows = results["generations"]
    table = Table(title=_title(results), box=box.SIMPLE_HEAD, title_justify="left")
    for heading in (
        "generation", "top-1 error %", "top-5 error %", "ensemble top-1 %", "ensemble top-5 %", "train error %",
        "mean p_a1", "mean p_y", "law f_g", "law f_g(s)", "share s", "images/s", "seconds",
    ):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "generation" else "right")
    for row in rows:
        table.add_row(
            f"{row['generation']} {row['role']}",
            _number(row["top1_error"], 2),
            _number(row["top5_error"], 2),
            _number(row["ensemble_top1_error"], 2),
            _number(row["ensemble_top5_error"], 2),
            _number(row["train_top1_error"], 2),
            _number(row["mean_confidence"], 3),
            _number(row["mean_label_confidence"], 3),
            _number(row["ideal_confidence"], 3),
            _number(row["ideal_confidence_at_share"], 3),
            _number(row["topk_share"], 3),
            f"{row['train_images_per_second']:,.0f}",
            f"{row['wall_seconds']:,.0f}",
        )
    return table


def measurement_table(rows: Sequence[tuple[str, Measurement]], dataset: Dataset) -> Table:
    """A row a network, or an ensemble."""
    samples = rows[0][1].samples
    table = Table(title=f"{dataset.evaluated_on}: {samples:,} samples", box=box.SIMPLE_HEAD, title_justify="left")
    for heading in ("network", "top-1 error %", "top-5 error %", "mean p_a1", "mean p_y", "share s", "NLL", "ECE"):
        table.add_column(heading, justify="left" if heading == "network" else "right")
    for name, m in rows:
        values = (m.mean_confidence, m.mean_label_confidence, m.topk_share, m.nll, m.ece)
        table.add_row(name, f"{m.top1_error:.2f}", f"{m.top5_error:.2f}", *(f"{value:.3f}" for value in values))
    return table


def print_table(table: Table) -> None:
    """Prints to standard output; where that is no terminal, at a width that breaks no heading."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=PLAIN_WIDTH)
    console.print(table)


def as_text(table: Table) -> str:
    """The table as plain text."""
    console = Console(file=io.StringIO(), width=PLAIN_WIDTH)
    console.print(table)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())


def _title(results: Mapping[str, Any]) -> str:
    samples = {row["samples_evaluated"] for row in results["generations"]}
    counted = " and ".join(f"{count:,}" for count in sorted(samples))
    evaluated = f"{counted} {results['evaluated_on']} images"
    return f"{results['model']} on {results['dataset']}, {evaluated}, ensemble of generations 0..g"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
