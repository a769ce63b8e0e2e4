"""What the files of a report hold: report.html, report.md, tables.tex, tidy CSV, and its figures as PNG."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from fastgen.files import csv_text
from fastgen.report.document import (
    Block,
    Code,
    Document,
    Figure,
    Gallery,
    Listing,
    Paragraph,
    Sample,
    Span,
    Table,
    Words,
    plain,
)
from fastgen.report.drawing import png
from fastgen.report.groups import Group
from fastgen.report.page import page
from fastgen.report.place import BESIDE, FIGURES, PAGE
from fastgen.report.stats import DASH, MINUS

MEASURES = (
    "top1_error", "top5_error", "ensemble_top1_error", "ensemble_top5_error", "nll", "ece", "samples_evaluated",
    "train_top1_error", "mean_confidence", "mean_label_confidence", "topk_share", "ideal_confidence",
    "ideal_confidence_at_share", "train_images_per_second", "wall_images_per_second", "train_seconds", "wall_seconds",
    "eval_seconds", "processes", "backend", "engine",
)  # fmt: skip
EPOCH_MEASURES = ("loss", "accuracy", "top1_error", "top5_error")
# Beyond ASCII, as LaTeX has them.
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", MINUS: "$-$", DASH: "--",
    "\N{EM DASH}": "---",
}  # fmt: skip


def files_of(document: Document, groups: Sequence[Group], done: Callable[[], None]) -> dict[str, bytes]:
    """Content of all files by name, the page first.

    Args:
        done: called after each file.
    """
    files = {}
    for name, make in _makers(document, groups):
        files[name] = make()
        done()
    return files


def count_of(document: Document) -> int:
    """How many files `files_of` makes."""
    return 1 + len(BESIDE) + len(document.figures())


def _makers(document: Document, groups: Sequence[Group]) -> Iterator[tuple[str, Callable[[], bytes]]]:
    yield PAGE, lambda: _encoded(page(document))
    yield "report.md", lambda: _encoded(markdown(document))
    yield "tables.tex", lambda: _encoded(latex(document))
    yield "results.csv", lambda: _encoded(csv_text(result_rows(groups)))
    yield "history.csv", lambda: _encoded(csv_text(history_rows(groups), ("recipe", "seed")))
    for figure in document.figures():
        yield f"{FIGURES}/{figure.name}.png", partial(png, figure)


def _encoded(text: str) -> bytes:
    """Names on a disk need not be UTF-8; files of a report are."""
    return text.encode(errors="replace")


def result_rows(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """A row a recipe, seed and generation."""
    return [
        {
            "recipe": group.name,
            "seed": run.seed_name,
            "run": run.record.name,
            "generation": row["generation"],
            "role": row["role"],
            "node": row["node"],
            **{name: row.get(name) for name in MEASURES},
        }
        for group in groups
        for run in group.runs
        for row in run.rows
    ]


def history_rows(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """A row a recipe, seed, generation and epoch."""
    return [
        {
            "recipe": group.name,
            "seed": run.seed_name,
            "generation": generation,
            "epoch": row["epoch"],
            **{name: row.get(name) for name in EPOCH_MEASURES},
        }
        for group in groups
        for run in group.runs
        for generation, history in sorted(run.histories.items())
        for row in history
    ]


def markdown(document: Document) -> str:
    """The report as Markdown, with its figures as pictures beside it."""
    parts = [f"# {_marked(document.title)}", _marked(document.facts), _markdown_words(document.headline)]
    parts.append("\n".join(f"- {_markdown_words(line)}" for line in document.details))
    for section in document.sections:
        parts.append(f"## {_marked(section.title)}")
        parts += [_markdown(block) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Paragraph():
            return _markdown_words(block.words)
        case Listing():
            return "\n".join(f"- {_markdown_words(item)}" for item in block.items)
        case Code():
            fence = "`" * max(3, _longest_run(block.text) + 1)
            return f"{_marked(block.title)}:\n\n{fence}\n{block.text.strip()}\n{fence}"
        case Table():
            return _markdown_table(block)
        case Figure():
            alt = _marked(block.alt.replace("\n", " "))
            return f"![{alt}]({FIGURES}/{block.name}.png)\n\n{_markdown_words(block.caption)}"
        case Gallery():
            return "\n".join([_markdown_words(block.caption), "", *map(_markdown_sample, block.samples)])


def _markdown_table(table: Table) -> str:
    heads = "| " + " | ".join(map(_marked, table.headings)) + " |"
    sides = ["---" if n < table.text_columns else "---:" for n in range(len(table.headings))]
    rows = ["| " + " | ".join(_markdown_span(cell) for cell in row) + " |" for row in table.rows]
    return "\n".join([_markdown_words(table.caption), "", heads, f"| {' | '.join(sides)} |", *rows])


def _markdown_sample(sample: Sample) -> str:
    told = [
        f"{name}: {', '.join(f'{one.name} {100 * one.probability:.1f} %' for one in ranked)}"
        for name, ranked in sample.answers
    ]
    return _marked(f"- image {sample.sample_id}, {sample.label}. {'; '.join(told)}")


def _markdown_words(text: Words) -> str:
    return "".join(map(_markdown_span, text))


def _markdown_span(span: Span) -> str:
    if span.style == "code":
        fence = "`" * (_longest_run(span.text) + 1)
        # Next to a fence, a backtick would be of it.
        room = " " if len(fence) > 1 else ""
        return f"{fence}{room}{span.text}{room}{fence}"
    text = _marked(span.text)
    return f"**{text.strip()}**" if span.style == "strong" else text


def _longest_run(text: str) -> int:
    """Of backticks."""
    return max(map(len, re.findall("`+", text)), default=0)


def _marked(text: str) -> str:
    """Without what Markdown takes for marks."""
    for mark in ("\\", "|", "*", "_", "`", "[", "]", "<"):
        text = text.replace(mark, f"\\{mark}")
    return text


def latex(document: Document) -> str:
    """Tables of errors for a paper; \\usepackage{booktabs}."""
    tables = [table for table in document.tables() if table.in_paper]
    return "% \\usepackage{booktabs}\n\n" + "\n\n".join(map(_latex_table, tables)) + "\n"


def _latex_table(table: Table) -> str:
    columns = "l" * table.text_columns + "r" * (len(table.headings) - table.text_columns)
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_escaped(plain(table.caption))}}}",
        rf"\label{{tab:{table.name}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        " & ".join(map(_escaped, table.headings)) + r" \\",
        r"\midrule",
        *_latex_rows(table),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines)


def _latex_rows(table: Table) -> list[str]:
    lines = []
    for number, row in enumerate(table.rows):
        above = table.rows[number - 1] if number else None
        if above is not None and table.merged_columns and above[0] != row[0]:
            lines.append(r"\addlinespace")
        hidden = [
            above is not None and n < table.merged_columns and above[: n + 1] == row[: n + 1] for n in range(len(row))
        ]
        cells = ["" if hide else _latex_span(cell) for hide, cell in zip(hidden, row, strict=True)]
        lines.append(" & ".join(cells) + r" \\")
    return lines


def _latex_span(span: Span) -> str:
    text = _escaped(span.text)
    return {"plain": text, "strong": rf"\textbf{{{text}}}", "code": rf"\texttt{{{text}}}"}[span.style]


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)
