"""Writes a report as one HTML page: no script, nothing fetched, light and dark, wide and narrow, on paper."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html import escape

from fastgen.report.document import (
    Block,
    Code,
    Document,
    Figure,
    Gallery,
    Listing,
    Paragraph,
    Ranked,
    Sample,
    Section,
    Span,
    Table,
    Words,
    plain,
)
from fastgen.report.drawing import key_svg, svg
from fastgen.report.place import MAKER
from fastgen.report.style import sheet

# Nothing may be fetched, whatever the content is.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
# Smaller ones are enlarged with hard edges.
SMALL_PX = 64


def page(document: Document) -> str:
    """The whole file."""
    links = "".join(f'<a href="#{s.name}">{escape(s.title)}</a>' for s in document.sections)
    details = "".join(f"<li>{_words(line)}</li>" for line in document.details)
    body = "\n".join(_section(section) for section in document.sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(document.title)}</title>
<link rel="icon" href="data:,">
<style>
{sheet()}</style>
</head>
<body>
<header>
<h1>{escape(document.title)}</h1>
<p class="facts">{escape(document.facts)}</p>
<div class="headline"><p>{_words(document.headline)}</p>
<ul>{details}</ul></div>
<nav aria-label="Sections">{links}</nav>
</header>
<main>
{body}
</main>
<footer><p>{MAKER}; the method is that of arXiv 1805.05551.</p></footer>
</body>
</html>
"""


def _section(section: Section) -> str:
    blocks = "\n".join(_block(block) for block in section.blocks)
    return f'<section id="{section.name}">\n<h2>{escape(section.title)}</h2>\n{blocks}\n</section>'


def _block(block: Block) -> str:
    match block:
        case Paragraph():
            return f"<p>{_words(block.words)}</p>"
        case Listing():
            return "<ul>" + "".join(f"<li>{_words(item)}</li>" for item in block.items) + "</ul>"
        case Code():
            return _code(block)
        case Table():
            return _table(block)
        case Figure():
            return _figure(block)
        case Gallery():
            samples = "\n".join(_sample(sample) for sample in block.samples)
            return f'<p>{_words(block.caption)}</p>\n<div class="samples">\n{samples}\n</div>'


def _words(text: Words) -> str:
    return "".join(map(_span, text))


def _span(span: Span) -> str:
    if span.style == "code":
        # A line may end between words, and not after the hyphens of an option.
        return "<code>" + " ".join(f"<span>{word}</span>" for word in escape(span.text).split(" ")) + "</code>"
    text = escape(_held(span.text))
    return f"<strong>{text}</strong>" if span.style == "strong" else text


def _held(text: str) -> str:
    """With spaces at which no line ends: a number keeps its deviation and unit, a method its numbers."""
    return re.sub(r" ± | %|\bp [=<] |\bD\([^)]*\)", lambda found: found[0].replace(" ", "\N{NO-BREAK SPACE}"), text)


def _code(block: Code) -> str:
    lines = f'<pre tabindex="0"><code>{escape(block.text.strip())}</code></pre>'
    if block.folded:
        return f"<details><summary>{escape(block.title)}</summary>{lines}</details>"
    return f"<h3>{escape(block.title)}</h3>\n{lines}"


def _table(table: Table) -> str:
    heads = "".join(
        f'<th scope="col"{_class(table, column)}>{escape(text)}</th>' for column, text in enumerate(table.headings)
    )
    rows = "\n".join(_row(table, number) for number in range(len(table.rows)))
    label = escape(plain(table.caption))
    return f"""<div class="table" id="table-{table.name}">
<p class="note">{_words(table.caption)}</p>
<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>
<thead><tr>{heads}</tr></thead>
<tbody>
{rows}
</tbody>
</table></div>
</div>"""


def _class(table: Table, column: int, *, last: bool = False) -> str:
    kinds = ["name"] * (column == 0) + ["text"] * (column < table.text_columns) + ["last"] * last
    return f' class="{" ".join(kinds)}"' if kinds else ""


def _row(table: Table, number: int) -> str:
    cells = []
    for column, cell in enumerate(table.rows[number]):
        spanned = _spanned(table, number, column)
        if spanned == 0:
            continue
        span = f' rowspan="{spanned}"' if spanned > 1 else ""
        tag, scope = ("th", f' scope="row{"group" if spanned > 1 else ""}"') if column == 0 else ("td", "")
        kinds = _class(table, column, last=number + spanned == len(table.rows))
        cells.append(f"<{tag}{scope}{span}{kinds}>{_span(cell)}</{tag}>")
    first = ' class="first"' if _spanned(table, number, 0) else ""
    return f"<tr{first}>{''.join(cells)}</tr>"


def _spanned(table: Table, number: int, column: int) -> int:
    """Rows that a cell covers; 0: one above covers it."""
    if column >= table.merged_columns:
        return 1
    rows, upto = table.rows, column + 1
    if number and rows[number - 1][:upto] == rows[number][:upto]:
        return 0
    end = number
    while end < len(rows) and rows[end][:upto] == rows[number][:upto]:
        end += 1
    return end - number


def _figure(figure: Figure) -> str:
    keys = "".join(f"<li>{key_svg(key)}<span>{escape(key.name)}</span></li>" for key in figure.keys)
    legend = f'<ul class="keys">{keys}</ul>\n' if keys else ""
    drawings = "\n".join(svg(panel, f"{figure.name}-{number}") for number, panel in enumerate(figure.panels))
    kind = "panels two" if len(figure.panels) in (1, 2, 4) else "panels"
    return f"""<figure id="figure-{figure.name}">
<h3>{escape(figure.title)}</h3>
{legend}<div class="{kind}">
{drawings}
</div>
<figcaption>{_words(figure.caption)}</figcaption>
</figure>"""


def _sample(sample: Sample) -> str:
    data = base64.b64encode(sample.png).decode()
    alt = escape(f"image {sample.sample_id}: {sample.label}")
    kind = ' class="small"' if max(sample.width_px, sample.height_px) <= SMALL_PX else ""
    answers = "".join(_answer(name, ranked) for name, ranked in sample.answers)
    size = f'width="{sample.width_px}" height="{sample.height_px}"'
    return f"""<div class="sample"><img{kind} alt="{alt}" {size} src="data:image/png;base64,{data}">
<p class="label"><b>{escape(sample.label)}</b> <span>image {sample.sample_id}</span></p>
<div class="answers">{answers}</div></div>"""


def _answer(name: str, ranked: Sequence[Ranked]) -> str:
    rows = "".join(
        f"<li{' class=right' if one.is_label else ''}><span>{escape(one.name)}</span>"
        f"<span>{100 * one.probability:.1f} %</span>"
        f'<span class="bar"><i style="width:{100 * one.probability:.1f}%"></i></span></li>'
        for one in ranked
    )
    return f"<div><h4>{escape(name)}</h4><ol>{rows}</ol></div>"
