"""What a report consists of, whatever it is written as: plain values, no HTML, no LaTeX, no figures' libraries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Style = Literal["plain", "strong", "code"]
Dash = Literal["-", "--", ":", ""]
# Names of `style.palette`.
Colour = str


@dataclass(frozen=True)
class Span:
    """Text of one style."""

    text: str
    style: Style = "plain"


Words = tuple[Span, ...]


def words(*parts: str | Span) -> Words:
    """Text with parts of other styles in it."""
    return tuple(Span(part) if isinstance(part, str) else part for part in parts)


def strong(text: str) -> Span:
    """Bold: for what is beyond noise, and for nothing else."""
    return Span(text, "strong")


def code(text: str) -> Span:
    """What is typed, or stands in a file."""
    return Span(text, "code")


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        name: for anchors and files: a-z and hyphens.
        caption: says what the numbers are.
        headings: one a column.
        rows: cells, as many as headings.
        text_columns: the first so many columns are text, the others numbers.
        merged_columns: in the first so many columns, equal cells below each other are one.
        in_paper: whether it is also written as LaTeX.
    """

    name: str
    caption: Words
    headings: tuple[str, ...]
    rows: tuple[tuple[Span, ...], ...]
    text_columns: int = 1
    merged_columns: int = 0
    in_paper: bool = False

    def __post_init__(self) -> None:
        if any(len(row) != len(self.headings) for row in self.rows):
            raise ValueError(f"table {self.name}: rows and headings differ in length")


@dataclass(frozen=True)
class Line:
    """A curve, or points.

    Attributes:
        name: of what it shows.
        xs, ys: places, as many of both.
        bars: half lengths of error bars; empty: there are none.
        colour: a name of the palette.
        marker: of matplotlib; empty: none.
        dash: of matplotlib.
    """

    name: str
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    colour: Colour
    bars: tuple[float, ...] = ()
    marker: str = "o"
    dash: Dash = "-"


@dataclass(frozen=True)
class Chart:
    """Curves over common axes.

    Attributes:
        x_ticks: where ticks stand; empty: anywhere.
        y_range: of the axis; None: what the lines need.
        log: whether the vertical axis is logarithmic.
        square: whether both axes run from 0 to 1, with the diagonal drawn.
    """

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]
    x_ticks: tuple[int, ...] = ()
    y_range: tuple[float, float] | None = None
    log: bool = False
    square: bool = False

    @property
    def alt(self) -> str:
        """In numbers, for those who cannot see it."""
        ends = [f"{line.name} from {_short(line.ys[0])} to {_short(line.ys[-1])}" for line in self.lines if line.ys]
        return f"{self.title} against {self.x_label}: {', '.join(ends)}."


@dataclass(frozen=True)
class HeatMap:
    """A matrix, the stronger the larger.

    Attributes:
        values: rows from top to bottom.
        full: value that has the full colour: what is compared has the same.
        names: of rows and columns alike; empty: they are too many to be named.
        unit: what the values are.
        breaks: rows and columns that begin a group, told by a line.
        alt: in words, for those who cannot see it.
    """

    title: str
    x_label: str
    y_label: str
    values: tuple[tuple[float, ...], ...]
    full: float
    names: tuple[str, ...]
    unit: str
    breaks: tuple[int, ...]
    alt: str


Panel = Chart | HeatMap


@dataclass(frozen=True)
class Key:
    """A line of a legend."""

    name: str
    colour: Colour
    marker: str = "o"
    dash: Dash = "-"


@dataclass(frozen=True)
class Figure:
    """Panels under one legend.

    Attributes:
        name: for anchors and files.
        title: short.
        caption: what is to be seen, and how it was measured.
        keys: the legend.
    """

    name: str
    title: str
    caption: Words
    panels: tuple[Panel, ...]
    keys: tuple[Key, ...] = ()

    @property
    def alt(self) -> str:
        """In numbers, for those who cannot see it."""
        return " ".join(panel.alt for panel in self.panels)


@dataclass(frozen=True)
class Paragraph:
    """A paragraph."""

    words: Words


@dataclass(frozen=True)
class Listing:
    """Points."""

    items: tuple[Words, ...]


@dataclass(frozen=True)
class Code:
    """Lines as they stand in a file or are typed.

    Attributes:
        title: what they are.
        folded: whether they are shown on demand alone.
    """

    title: str
    text: str
    folded: bool = False


@dataclass(frozen=True)
class Ranked:
    """A class that a network ranks among the first.

    Attributes:
        probability: 0..1.
        is_label: whether it is the right one.
    """

    name: str
    probability: float
    is_label: bool


@dataclass(frozen=True)
class Sample:
    """An image, and what networks say of it.

    Attributes:
        png: the image as a file.
        width_px, height_px: of it.
        sample_id: in the data set.
        label: name of its class.
        answers: of each network, its name and its first classes.
    """

    png: bytes
    width_px: int
    height_px: int
    sample_id: int
    label: str
    answers: tuple[tuple[str, tuple[Ranked, ...]], ...]


@dataclass(frozen=True)
class Gallery:
    """Samples."""

    caption: Words
    samples: tuple[Sample, ...]


Block = Paragraph | Listing | Code | Table | Figure | Gallery


@dataclass(frozen=True)
class Section:
    """A chapter.

    Attributes:
        name: for anchors.
    """

    name: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Document:
    """A whole report.

    Attributes:
        facts: what it is about, in a line.
        headline: what came out, in a sentence.
        details: the figures behind it.
        sections: in order; those without blocks are left out.
    """

    title: str
    facts: str
    headline: Words
    details: tuple[Words, ...]
    sections: tuple[Section, ...]

    def tables(self) -> list[Table]:
        """All tables, in order."""
        return [block for block in self.blocks() if isinstance(block, Table)]

    def figures(self) -> list[Figure]:
        """All figures, in order."""
        return [block for block in self.blocks() if isinstance(block, Figure)]

    def blocks(self) -> Sequence[Block]:
        """All that the sections hold."""
        return [block for section in self.sections for block in section.blocks]


def plain(text: Words) -> str:
    """Without styles."""
    return "".join(span.text for span in text)


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
