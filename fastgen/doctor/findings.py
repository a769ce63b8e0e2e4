"""What a trial answers, and what doctor makes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any


class Mark(StrEnum):
    """How something stands."""

    OK = "ok"
    MISSING = "missing"
    BROKEN = "broken"
    NOT_USED = "not used"
    NOT_TRIED = "not tried"


@dataclass(frozen=True)
class Answer:
    """What a trial has seen.

    Attributes:
        mark: how it stands.
        seen: for people; a line.
        mend: the line that installs it, or what else to do; empty: nothing.
        facts: for machines: plain values.
    """

    mark: Mark
    seen: str
    mend: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """What a trial is told.

    Attributes:
        scratch: a folder for its files, removed afterwards.
        runs: the folder of the runs, which need not exist.
    """

    scratch: Path
    runs: Path


@dataclass(frozen=True)
class Trial:
    """Something that is tried, in a process.

    Attributes:
        name: what `--require` calls it.
        group: the heading that it stands under.
        purpose: what is not there without it.
        probe: tries it. What it raises is told as broken, or as missing where a package is not installed.
        session: trials of the same one share a process, in their order.
        needs_torch: False: it says something also where torch does not import.
        package: of `extras.PACKAGES`, that is installed anew where it is broken; empty: none.
    """

    name: str
    group: str
    purpose: str
    probe: Callable[[Place], Answer]
    session: str
    needs_torch: bool = True
    package: str = ""


@dataclass(frozen=True)
class Finding:
    """What came of a trial.

    Attributes:
        seconds: that it took, the start of its process included; 0: no trial was needed.
    """

    name: str
    group: str
    purpose: str
    answer: Answer
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether it can be used."""
        return self.answer.mark is Mark.OK
