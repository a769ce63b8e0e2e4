"""Draws figures: a panel as SVG for the page, a whole figure as PNG for elsewhere. The same input gives the same bytes.

Text stays text in the SVG, in the page's own type; colours are the page's variables, so that both follow the reader's
light or dark. A panel is as wide as a phone, so that its letters are not shrunk there.
"""

from __future__ import annotations

import html
import io
import re
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fastgen.report.document import Chart, Figure, HeatMap, Key, Line, Panel
from fastgen.report.style import palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

# 360 x 259 points: one of them is about a pixel of a phone's page.
PANEL_INCHES = (5.0, 3.6)
SQUARE_INCHES = (5.0, 4.6)
POINTS = 11.0
DOTS_PER_INCH = 150
TITLE_LETTERS = 48
# Panels of a PNG side by side; three of them are.
MOST_COLUMNS = 2
SMALLEST_SCORE = 1e-7


def svg(panel: Panel, name: str) -> str:
    """A panel as an <svg> element for a page that has `style.sheet`.

    Args:
        name: of the panel, no two alike in a page.
    """
    with _settings(name):
        canvas = _canvas(_size(panel))
        _draw(canvas.subplots(), panel)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        canvas.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _for_page(buffer.getvalue(), panel.alt)


def png(figure: Figure) -> bytes:
    """All panels with their legend, on white."""
    columns = min(len(figure.panels), 3 if len(figure.panels) == 3 else MOST_COLUMNS)
    rows = -(-len(figure.panels) // columns)
    width, height = _size(figure.panels[0])
    with _settings(figure.name):
        canvas = _canvas((columns * width, rows * height + 0.32 * -(-len(figure.keys) // columns)))
        axes = list(canvas.subplots(rows, columns, squeeze=False).flat)
        for axis, panel in zip(axes, figure.panels, strict=False):
            _draw(axis, panel)
        for axis in axes[len(figure.panels) :]:
            axis.set_axis_off()
        handles = [_handle(key) for key in figure.keys]
        if handles:
            names = [_literal(textwrap.fill(key.name, 60)) for key in figure.keys]
            canvas.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False)
        buffer = io.BytesIO()
        canvas.savefig(buffer, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return buffer.getvalue()


def key_svg(key: Key) -> str:
    """A legend's sign, as wide as the style sheet says."""
    marks = {
        "o": '<circle cx="15" cy="6" r="3.5"/>',
        "s": '<rect x="11.5" y="2.5" width="7" height="7"/>',
        "D": '<path d="M15 1.5 19.5 6 15 10.5 10.5 6z"/>',
        "^": '<path d="M15 2 19 10H11z"/>',
        "v": '<path d="M15 10 19 2H11z"/>',
        "P": '<path d="M13.5 2h3v2.5H19v3h-2.5V10h-3V7.5H11v-3h2.5z"/>',
        "X": '<path d="M12 2l3 2.5 3-2.5 1 1-2.5 3 2.5 3-1 1-3-2.5-3 2.5-1-1 2.5-3-2.5-3z"/>',
    }
    colour = f"var(--{key.colour})"
    dashes = {"-": "", "--": ' stroke-dasharray="5 3"', ":": ' stroke-dasharray="1.5 2.5"', "": ""}[key.dash]
    line = f'<path d="M1 6H29" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>' if key.dash else ""
    return f'<svg viewBox="0 0 30 12" fill="{colour}" aria-hidden="true">{line}{marks.get(key.marker, "")}</svg>'


@contextmanager
def _settings(salt: str) -> Iterator[None]:
    """The reader's own matplotlibrc shall change nothing."""
    from matplotlib import rc_context, rcdefaults, rcParams

    light = {name: colour for name, (colour, _) in palette().items()}
    with rc_context():
        rcdefaults()
        rcParams.update(
            {
                "font.size": POINTS,
                "axes.titlesize": POINTS,
                "axes.titleweight": "bold",
                "axes.titlelocation": "left",
                "axes.titlepad": 8,
                "axes.labelsize": POINTS - 0.5,
                "xtick.labelsize": POINTS - 1,
                "ytick.labelsize": POINTS - 1,
                "legend.fontsize": POINTS - 1,
                "text.color": light["ink"],
                "axes.titlecolor": light["ink"],
                "axes.labelcolor": light["muted"],
                "axes.edgecolor": light["muted"],
                "xtick.color": light["muted"],
                "ytick.color": light["muted"],
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.linewidth": 0.8,
                "grid.color": light["line"],
                "grid.linewidth": 0.8,
                "axes.axisbelow": True,
                "lines.linewidth": 1.8,
                "lines.markersize": 5,
                "svg.fonttype": "none",
                "svg.hashsalt": salt,
            }
        )
        with warnings.catch_warnings():
            # A letter that matplotlib's type lacks is a box in the PNG; in the page the reader's type has it.
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            yield


def _size(panel: Panel) -> tuple[float, float]:
    return SQUARE_INCHES if isinstance(panel, HeatMap) else PANEL_INCHES


def _canvas(size: tuple[float, float]) -> Canvas:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=size, layout="constrained")
    FigureCanvasAgg(canvas)
    return canvas


def _draw(axis: Axes, panel: Panel) -> None:
    if isinstance(panel, HeatMap):
        _draw_heat_map(axis, panel)
    else:
        _draw_chart(axis, panel)
    axis.set_title(_literal(textwrap.fill(panel.title, TITLE_LETTERS)))
    axis.set(xlabel=_literal(panel.x_label), ylabel=_literal(panel.y_label))


def _draw_chart(axis: Axes, panel: Chart) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.grid(visible=True)
    for line in panel.lines:
        _draw_line(axis, line)
    if panel.log:
        axis.set_yscale("log")
        smallest = min(y for line in panel.lines for y in line.ys if y > 0)
        axis.set_ylim(max(SMALLEST_SCORE, smallest / 2), 1.3)
    if panel.square:
        axis.plot([0, 1], [0, 1], color=_light("muted"), linestyle=":", linewidth=1)
        axis.set(xlim=(0, 1.02), ylim=(0, 1.02))
    if panel.y_range is not None:
        axis.set_ylim(*panel.y_range)
    places = {x for line in panel.lines for x in line.xs}
    if len(places) == 1:
        # Of one epoch: around a single place, ticks would stand at fractions.
        axis.set_xticks(sorted(places))
    elif panel.x_ticks and len(panel.x_ticks) <= 12:
        axis.set_xticks(panel.x_ticks)
    elif not panel.square:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_line(axis: Axes, line: Line) -> None:
    colour = _light(line.colour)
    axis.errorbar(
        line.xs, line.ys, line.bars or None, color=colour, marker=line.marker or None, linestyle=line.dash or "none",
        capsize=3, elinewidth=1.2, capthick=1.2,
    )  # fmt: skip


def _draw_heat_map(axis: Axes, panel: HeatMap) -> None:
    import numpy as np
    from matplotlib.colors import to_rgb

    values = np.array(panel.values)
    # One hue, the fuller the more: it lies on a light ground as on a dark one. Square roots: many shares are small.
    shares = np.sqrt(values / panel.full)
    pixels = np.empty((*values.shape, 4))
    pixels[..., :3], pixels[..., 3] = to_rgb("#2f81d6"), shares
    axis.imshow(pixels, interpolation="nearest")
    for place in panel.breaks:
        axis.axhline(place - 0.5, color=_light("line"), linewidth=0.6)
        axis.axvline(place - 0.5, color=_light("line"), linewidth=0.6)
    for spine in axis.spines.values():
        spine.set_visible(True)
    if panel.names:
        turned = any(len(name) > 3 for name in panel.names)
        places = range(len(panel.names))
        names = list(map(_literal, panel.names))
        axis.set_xticks(places, names, rotation=60 if turned else 0, ha="right" if turned else "center")
        axis.set_yticks(places, names)
    else:
        axis.set(xticks=[], yticks=[])


def _handle(key: Key) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=_light(key.colour), marker=key.marker or None, linestyle=key.dash or "none")


def _literal(text: str) -> str:
    """Text between two dollars would be read as a formula."""
    return text.replace("$", r"\$")


def _light(name: str) -> str:
    return palette()[name][0]


def _size_alone(found: re.Match[str]) -> str:
    """`font: bold 10px 'A', 'B'` without the type."""
    return (f"font-weight: {found[1]}; " if found[1] else "") + f"font-size: {found[2]}px"


def _for_page(drawn: str, alt: str) -> str:
    """Turns matplotlib's file into an element: no declarations, ids and styles of its own; the page's colours."""
    text = drawn[drawn.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<defs>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    # The sizes stay, the type is the page's.
    text = re.sub(r" ?font-family: [^;\"]*;?", "", text)
    text = re.sub(r"font: (?:(\d+|bold) )?([\d.]+)px [^;\"]*", _size_alone, text)
    text = text.replace("xlink:href", "href")
    for name, (colour, _) in palette().items():
        text = text.replace(colour, f"var(--{name})")
    box = re.search(r'viewBox="[^"]*"', text)
    if box is None:
        raise ValueError("a drawing without a viewBox")
    head = f'<svg {box[0]} role="img" aria-label="{html.escape(alt)}" fill="none" stroke-linejoin="round">'
    return re.sub(r"\s*\n\s*", "\n", head + text[text.index(">") + 1 :]).strip()
