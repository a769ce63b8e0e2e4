"""How findings are told: aligned lines for people, JSON for machines. Without rich, which may be what is missing."""

from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from fastgen import __version__
from fastgen.doctor.findings import Finding, Mark

# Where the output is no terminal, as in tables.py.
PLAIN_WIDTH = 120
COLOURS = {Mark.OK: "32", Mark.MISSING: "33", Mark.BROKEN: "31", Mark.NOT_USED: "2", Mark.NOT_TRIED: "33"}
MARK_WIDTH = max(len(mark) for mark in Mark)


def lines_of(findings: Sequence[Finding], width: int, *, colours: bool) -> Iterator[str]:
    """The report, a group after the other.

    Args:
        findings: in the order in which they are told.
        width: of a line; one that mends something is never broken, so that it can be copied.
        colours: whether marks have colours.
    """
    names = max(len(finding.name) for finding in findings)
    group = ""
    for finding in findings:
        if finding.group != group:
            group = finding.group
            yield ""
            yield group
        yield from _lines(finding, names, width, colours=colours)


def _lines(finding: Finding, names: int, width: int, *, colours: bool) -> Iterator[str]:
    answer = finding.answer
    indent = " " * (2 + MARK_WIDTH + 2 + names + 2)
    mark = f"{answer.mark:<{MARK_WIDTH}}"
    seen = answer.seen if finding.purpose == "" else f"{answer.seen} [{finding.purpose}]"
    first, *rest = textwrap.wrap(seen, max(width - len(indent), 30), break_on_hyphens=False) or [""]
    shown = f"\033[{COLOURS[answer.mark]}m{mark}\033[0m" if colours else mark
    yield f"  {shown}  {finding.name:<{names}}  {first}".rstrip()
    yield from (indent + line for line in rest)
    if answer.mend:
        yield f"{indent}-> {answer.mend}"


def width_and_colours() -> tuple[int, bool]:
    """Of standard output."""
    if not os.isatty(1):
        return PLAIN_WIDTH, False
    return shutil.get_terminal_size().columns, not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def as_json(findings: Sequence[Finding], failures: Sequence[str]) -> dict[str, Any]:
    """The report as plain values.

    Args:
        findings: in order.
        failures: why the exit code is not 0; none: it is.
    """
    rows = []
    for finding in findings:
        row = asdict(finding)
        rows.append({**{key: row[key] for key in ("name", "group", "purpose", "seconds")}, **row["answer"]})
    return {"fastgen": __version__, "ready": not failures, "failures": list(failures), "findings": rows}
