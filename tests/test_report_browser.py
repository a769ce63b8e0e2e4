"""The report's page in a real browser: on a laptop and a phone, light and dark. Skipped where there is no Chromium."""

from __future__ import annotations

import io
import shutil
from urllib.parse import urlsplit

import pytest
from PIL import Image, ImageColor
from report_runs import with_settings

from fastgen.report.__main__ import main as report_main
from fastgen.report.style import palette

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
LOOKS = [(400, "light"), (400, "dark"), (1400, "light"), (1400, "dark")]

# Text boxes of what is read side by side: none of them may lie on another. Of a cell that a reader scrolls to, only
# what is in sight counts.
BOXES = """() => {
  const found = [];
  const add = (kind, element, group) => {
    const range = document.createRange();
    range.selectNodeContents(element);
    for (const box of range.getClientRects())
      if (box.width > 1 && box.height > 1 && element.checkVisibility())
        found.push([kind, element.textContent.trim().slice(0, 60), box.left, box.top, box.right, box.bottom, group]);
  };
  document.querySelectorAll('h1, h2, h3, h4, p, li, figcaption, summary, pre').forEach((element, number) => {
    if (!element.querySelector('li')) add(element.tagName, element, 'text' + number);
  });
  document.querySelectorAll('table').forEach((table, number) => {
    table.querySelectorAll('th, td').forEach((cell, n) => {
      const inside = cell.getBoundingClientRect(), box = table.parentElement.getBoundingClientRect();
      if (inside.right <= box.right + 1) add('cell', cell, 'cell' + number + '-' + n);
    });
  });
  document.querySelectorAll('figure svg[role=img] text').forEach((text, number) => {
    const box = text.getBoundingClientRect();
    found.push(['svg', text.textContent, box.left, box.top, box.right, box.bottom, 'svg' + number]);
  });
  return found;
}"""

# Contrast of every text with the ground behind it, as WCAG 2.2 computes it.
CONTRASTS = """() => {
  const linear = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const luminance = c => 0.2126 * linear(c[0]) + 0.7152 * linear(c[1]) + 0.0722 * linear(c[2]);
  const ground = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = rgb(getComputedStyle(e).backgroundColor);
      if (colour.length < 4 || colour[3] === 1) return colour;
    }
    throw new Error('no ground');
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim();
    if (!text || !element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    const colour = rgb(element.closest('svg') ? style.fill : style.color);
    const [high, low] = [luminance(colour), luminance(ground(element))].sort((a, b) => b - a);
    found.push([text.slice(0, 40), (high + 0.05) / (low + 0.05)]);
  }
  return found;
}"""

# Smaller letters are not read on a phone; of drawings the size on the screen counts.
SIZES = """() => [...document.querySelectorAll('figure svg[role=img]')].map(svg => {
  const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
  const sizes = [...svg.querySelectorAll('text')].map(t => parseFloat(getComputedStyle(t).fontSize) * scale);
  return Math.min(...sizes);
})"""


@pytest.fixture(scope="module")
def browser():
    """One browser for all tests."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if executable is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def report(written_report):
    """The page."""
    return written_report / "report.html"


@pytest.fixture(scope="module", params=LOOKS, ids=[f"{width}-{scheme}" for width, scheme in LOOKS])
def opened(browser, report, request):
    """The page as a reader sees it, with what the browser had to say and asked for."""
    width, scheme = request.param
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    told, asked = [], []
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("requestfailed", lambda request: told.append(request.url))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report.as_uri())
    yield page, told, asked
    page.close()


def test_nothing_is_fetched_and_nothing_fails(opened, report):
    _, told, asked = opened
    assert told == []
    assert {urlsplit(url).scheme for url in asked} <= {"file", "data"}
    assert [url for url in asked if url.startswith("file")] == [report.as_uri()]


def test_all_pictures_are_there(opened):
    page, _, _ = opened
    widths = page.evaluate("[...document.images].map(image => image.complete ? image.naturalWidth : 0)")
    assert widths == [8] * 8
    drawn = page.evaluate(
        "[...document.querySelectorAll('figure svg[role=img]')].map(s => s.getBoundingClientRect().width)"
    )
    assert len(drawn) > 10
    assert min(drawn) > 250
    # Heat maps are pictures within drawings.
    inside = page.evaluate("[...document.querySelectorAll('svg image')].map(i => i.getBoundingClientRect().width)")
    assert len(inside) == 2
    assert min(inside) > 100


def test_the_page_is_as_wide_as_the_window(opened):
    page, _, _ = opened
    assert page.evaluate("document.documentElement.scrollWidth") == page.viewport_size["width"]
    # What is wider scrolls in a box of its own, which lies within the page.
    boxes = page.evaluate("[...document.querySelectorAll('.scroll, pre')].map(e => e.getBoundingClientRect().right)")
    assert len(boxes) > 5
    assert max(boxes) <= page.viewport_size["width"]
    wide = page.evaluate("[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length")
    assert bool(wide) == (page.viewport_size["width"] == 400)


def test_no_text_lies_on_another(opened):
    page, _, _ = opened
    assert overlapping(page) == []


@pytest.mark.parametrize("width", [400, 1400])
def test_long_names_of_recipes_stay_in_their_column(browser, report_runs, tmp_path, width):
    """They have words that no line of a phone can hold."""
    for seed in (0, 1):
        with_settings(report_runs / f"tolerant_{seed}", tmp_path / f"usual_{seed}")
        settings = {"gen__student_confidence": 0.8123456, "gen__student_k": 7, "gen__k_mass": 0.987654}
        with_settings(report_runs / f"tolerant_{seed}", tmp_path / f"long_{seed}", **settings)
    report_main([str(tmp_path), "--samples=0", f"--to={tmp_path / 'report'}"])
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto((tmp_path / "report" / "report.html").as_uri())
    assert "student_confidence=0.812346" in page.content()
    assert overlapping(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.close()


def overlapping(page):
    """Pairs of texts that lie on each other."""
    boxes = page.evaluate(BOXES)
    assert len(boxes) > 100
    boxes.sort(key=lambda box: box[3])
    return [
        (one[:2], other[:2])
        for number, one in enumerate(boxes)
        for other in _below(boxes, number)
        if one[6] != other[6] and _overlap(one, other)
    ]


def _below(boxes, number):
    """Boxes that begin before this one ends, of those sorted by their tops."""
    bottom = boxes[number][5]
    for other in boxes[number + 1 :]:
        if other[3] >= bottom:
            return
        yield other


def _overlap(one, other, slack_px=2.0):
    """Lines of text stand closer than their boxes are high: by a little they may touch."""
    wide = min(one[4], other[4]) - max(one[2], other[2])
    high = min(one[5], other[5]) - max(one[3], other[3])
    return wide > slack_px and high > slack_px


def test_all_text_can_be_read(opened):
    page, _, _ = opened
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 200
    assert [(text, ratio) for text, ratio in contrasts if ratio < 4.5] == []
    assert min(page.evaluate(SIZES)) >= 8


def test_dark_is_dark_and_paper_is_white(browser, report):
    page = browser.new_page(color_scheme="dark")
    page.goto(report.as_uri())
    ground = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(ground) == "rgb(18, 22, 28)"
    page.emulate_media(media="print")
    assert page.evaluate(ground) == "rgb(255, 255, 255)"
    pages = page.pdf(format="A4")
    assert pages.startswith(b"%PDF")
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_shade_says_that_a_table_goes_on(browser, report, scheme):
    page = browser.new_page(viewport={"width": 400, "height": 900}, color_scheme=scheme)
    page.goto(report.as_uri())
    table = page.locator("#table-confidence .scroll")
    assert table.evaluate("e => e.scrollWidth > e.clientWidth + 60")
    ground = ImageColor.getrgb(palette()["ground"][scheme == "dark"])

    def is_shaded():
        """Whether the right edge, below the table's last line of text, is darker or lighter than the ground."""
        picture = Image.open(io.BytesIO(table.screenshot())).convert("RGB")
        colours = [picture.getpixel((picture.width - 2, y)) for y in range(picture.height // 2, picture.height - 4)]
        return max(abs(a - b) for a, b in zip(max(colours, key=colours.count), ground, strict=True)) > 12

    assert is_shaded()
    table.evaluate("e => e.scrollTo(e.scrollWidth, 0)")
    assert not is_shaded()
    page.close()
