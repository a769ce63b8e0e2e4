"""Commands that make what a report lacks."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from fastgen.report.document import Span, code
from fastgen.report.figures import MOST_RECIPES, analysed
from fastgen.report.groups import Group


def to_analyse(groups: Sequence[Group]) -> tuple[Span, ...]:
    """What makes the analyses that figures are drawn from: a command a recipe that has none, of its first run."""
    lacking = [group for group in groups[:MOST_RECIPES] if analysed(group) is None]
    commands = [_analysis(str(group.runs[0].record.folder)) for group in lacking]
    between = [Span("")] + [Span(", ")] * (len(commands) - 1)
    return tuple(span for pair in zip(between, commands, strict=False) for span in pair)


def _analysis(folder: str) -> Span:
    return code(shlex.join(["python", "-m", "fastgen.evaluate", folder, "--analyse"]))
