"""What stands in README.md and docs/: pages, links, commands and snippets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Fences that hold commands; others hold equations, code and changes to code.
SHELL = ("", "sh", "bash")
# In the text these are commands; other words in backquotes are names. Settings alone are words for fastgen.train.
INLINE_COMMAND = re.compile(r"(?:\.venv/bin/)?python -m |make [a-z]|sbatch ")
INLINE_SETTING = re.compile(r"--[a-z_]+\.[a-z_]+=")
# How settings are written, not one of them.
NO_SETTING = "--section.key=value"
TRAIN = "python -m fastgen.train --cfg RECIPE"


class Block(NamedTuple):
    """Lines of code: `kind` is the fence's word, or empty for indented lines."""

    kind: str
    lines: tuple[str, ...]


def split(text: str) -> tuple[str, list[Block]]:
    """A page's prose, without its code, and its blocks of code."""
    prose, blocks, lines = list[str](), list[Block](), iter(text.splitlines())
    before = ""
    for line in lines:
        if line.startswith("```"):
            inside = list[str]()
            for own in lines:
                if own.startswith("```"):
                    break
                inside.append(own)
            blocks.append(Block(line[3:].strip(), tuple(inside)))
        elif line.startswith("    ") and (not before or (before.startswith("    ") and blocks)):
            if before.startswith("    "):
                blocks[-1] = Block("", (*blocks[-1].lines, line[4:]))
            else:
                blocks.append(Block("", (line[4:],)))
        else:
            prose.append(line)
        before = line
    return "\n".join(prose), blocks


def commands_in(text: str) -> Iterator[str]:
    """All commands of a page, as a person would type them, but for `.venv/bin/` and comments."""
    prose, blocks = split(text)
    for block in blocks:
        if block.kind in SHELL:
            yield from filter(None, map(_typed, "\n".join(block.lines).replace("\\\n", " ").splitlines()))
    for inline in re.findall(r"`([^`]+)`", prose):
        if INLINE_COMMAND.match(inline):
            yield _typed(inline)
        elif INLINE_SETTING.match(inline) and inline != NO_SETTING:
            yield f"{TRAIN} {_typed(inline)}"


def _typed(line: str) -> str:
    return " ".join(re.sub(r"(^|\s+)# .*", "", line).removeprefix(".venv/bin/").split())


def anchors_of(text: str) -> set[str]:
    """The anchors that GitHub gives a page's headings: small letters, no punctuation, hyphens for blanks."""
    prose, _ = split(text)
    heads = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def links_of(text: str) -> list[tuple[str, str]]:
    """(path, anchor) of all links that lead to this repository; path empty: the same page."""
    prose, _ = split(text)
    found = re.findall(r"!?\[[^\]]*\]\(((?!https?:)[^)\s]+)\)", prose)
    return [(path, anchor) for path, _, anchor in (target.partition("#") for target in found)]
