"""Writes the recipe reference, docs/recipe.md, from the settings' declarations and from the lines of their rules.

python -m fastgen.reference [--check] [--to FILE]

Nothing in it is written by hand: keys, types, defaults and meanings are those of `config.py`, rules are the lines that
`rules.py` answers a broken recipe with, read from its source.
"""

from __future__ import annotations

import ast
import itertools
import re
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from fastgen import rules
from fastgen.arguments import Arguments
from fastgen.config import SECTIONS
from fastgen.errors import FastgenError, UserError, command
from fastgen.files import write_atomically
from fastgen.recipe import type_text, value_text

PAGE = Path(__file__).parent.parent / "docs" / "recipe.md"
HEAD = """\
# Recipe reference

<!-- Written by `python -m fastgen.reference`: change fastgen/config.py or fastgen/rules.py instead. -->

A recipe is a YAML file of these sections. Every key can be overridden on the command line as `--section.key=value`,
and by nothing else. An unknown or doubled key, a wrong type, a missing value and a broken rule are each one line and
exit code 2. `null` is no value. A list is written in brackets, on the command line in quotes as well, as some
shells read brackets: `'--gen.teacher_weight=[0.6,0.5]'`.

**Decides** says whether a key may decide the trained weights, and so the names of runs and nodes: *yes*; *yes, if set*,
where the default leaves the names as they were before there was such a key; *no*, where it is about how and where a run
goes, and how much of it (a label store that rounds or cuts what a teacher says is part of a node's name all the same).
Which key is which symbol of the papers: [The method](method.md#notation).
"""
RULES = """\
Rules, in the words that refuse a recipe (`...` is what was given, other code what follows from the recipe or the data):
"""
# Placeholders are marked so that text is told from code.
OPEN, CLOSE = "\0", "\1"

# What the rules' own variables stand for.
NAMED = {
    "least": "the number of classes",
    "most": "C",
    "len(ks)": f"{OPEN}...{CLOSE}",
    "count": f"{OPEN}...{CLOSE}",
    "generations": f"{OPEN}gen.generations{CLOSE}",
}

Bindings = Mapping[str, str]


class Stale(FastgenError):
    """The page is not what would be written now."""


def main(words: Sequence[str]) -> None:
    """The command.

    Raises:
        UserError: there is no folder for the page.
        Stale: with --check.
    """
    options = _parser().parse_args(words)
    page = page_text()
    if options.check:
        if not options.to.is_file() or options.to.read_text(encoding="utf-8") != page:
            raise Stale(f"{options.to} is stale: write it anew with python -m fastgen.reference")
        print(f"{options.to} is up to date")
        return
    if not options.to.parent.is_dir():
        raise UserError(f"{options.to.parent}: there is no such folder: name a file with --to")
    write_atomically(options.to, page.encode())
    print(options.to)


def page_text() -> str:
    """The whole page, in Markdown."""
    told = list(rule_lines())
    parts = [HEAD, *(_section(name, section, told) for name, section in SECTIONS.items())]
    return "\n".join(parts)


def rule_lines() -> Iterator[str]:
    """The lines of `rules.py` in its order; one for each key where a rule is about several.

    Values that were given are `...`, other values that only a recipe tells are code.
    """
    tree = ast.parse(Path(rules.__file__).read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    shared = _tables(tree.body)
    for function in functions:
        for bindings in _parameters(function, tree):
            yield from dict.fromkeys(_lines_in(function.body, bindings, {**shared, **_tables(function.body)}))


def _section(name: str, section: Any, told: Sequence[str]) -> str:
    hints = typing.get_type_hints(section)
    rows = "\n".join(_row(f"{name}.{key.name}", hints[key.name], key) for key in fields(section))
    own = [line for line in told if _first_section(line) == name]
    listed = f"\n{RULES}\n" + "\n".join(f"- {line}" for line in own) + "\n" if own else ""
    return (
        f"## {name}\n\n{_sentence(section)}.\n\n"
        f"| key | type | default | decides | meaning |\n|---|---|---|---|---|\n{rows}\n{listed}"
    )


def _sentence(section: Any) -> str:
    text = str(section.__doc__).partition(": ")[2]
    return text[0].upper() + text[1:]


def _row(path: str, hint: Any, key: Field[Any]) -> str:
    required, decides, silent = (key.metadata[name] for name in ("required", "decides", "silent"))
    default = "required" if required else f"`{value_text(key.default)}`"
    said = ("yes, if set" if silent else "yes") if decides else "no"
    cells = f"`{path}`", type_text(hint), default, said, key.metadata["text"]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"


def _first_section(line: str) -> str | None:
    found = re.search(rf"\b({'|'.join(SECTIONS)})\.", line)
    return found[1] if found else None


def _parameters(function: ast.FunctionDef, tree: ast.Module) -> Iterator[Bindings]:
    """What the module itself gives a function's first parameter as text, one after the other; else nothing."""
    calls = [
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == function.name
        and node.args
        and isinstance(node.args[0], ast.Constant)
    ]
    yield from ({function.args.args[0].arg: str(value)} for value in calls)
    if not calls:
        yield {}


def _tables(body: Sequence[ast.stmt]) -> dict[str, ast.Dict]:
    """The literal dicts that are named in the first level of a module or function."""
    return {
        target.id: node.value
        for node in body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _lines_in(body: Sequence[ast.stmt], bindings: Bindings, tables: Mapping[str, ast.Dict]) -> Iterator[str]:
    for statement in body:
        if isinstance(statement, ast.For):
            for bound in _turns(statement, tables):
                yield from _lines_in(statement.body, {**bindings, **bound}, tables)
        elif isinstance(statement, ast.If):
            yield from _lines_in(statement.body, bindings, tables)
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            call = statement.value
            if isinstance(call.func, ast.Name) and call.func.id == "_require":
                yield _line(call.args[1], bindings)


def _turns(loop: ast.For, tables: Mapping[str, ast.Dict]) -> list[Bindings]:
    """What the variables of a loop over literals are, turn by turn; of other loops one turn, of nothing known."""
    values: Sequence[ast.expr] = []
    if isinstance(loop.iter, ast.Tuple):
        values = loop.iter.elts
    elif isinstance(loop.iter, ast.Call) and isinstance(loop.iter.func, ast.Attribute):
        table = tables.get(loop.iter.func.value.id) if isinstance(loop.iter.func.value, ast.Name) else None
        pairs = zip(table.keys, table.values, strict=True) if table is not None else ()
        values = [ast.Tuple([key, value]) for key, value in pairs if key is not None]
    return [dict(_bound(loop.target, value)) for value in values] or [{}]


def _bound(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, str]]:
    if isinstance(target, ast.Name) and isinstance(value, ast.Constant):
        yield target.id, str(value.value)
    elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        pairs = zip(target.elts, value.elts, strict=True)
        yield from itertools.chain.from_iterable(_bound(one, other) for one, other in pairs)


def _line(text: ast.expr, bindings: Bindings) -> str:
    parts = text.values if isinstance(text, ast.JoinedStr) else [text]
    line = "".join(_part(part, bindings) for part in parts)
    # `key = 3:` and `key is 3:` tell what was given.
    line = re.sub(rf"( = | is ){OPEN}[^{CLOSE}]*{CLOSE}", r"\1...", line)
    line = re.sub(rf"^(\S+) = {OPEN}?\.\.\.{CLOSE}?:", r"\1:", line)
    line = line.replace(OPEN, "`").replace(CLOSE, "`")
    return re.sub(rf"^((?:{'|'.join(SECTIONS)})\.\w+)", r"`\1`", line)


def _part(part: ast.expr, bindings: Bindings) -> str:
    if isinstance(part, ast.Constant):
        return str(part.value)
    if not isinstance(part, ast.FormattedValue):
        raise TypeError(f"line {part.lineno} of rules.py: a rule's line is a text, not {type(part).__name__}")
    if isinstance(part.value, ast.Name) and part.value.id in bindings:
        return bindings[part.value.id]
    if isinstance(part.value, ast.Name) and part.value.id.isupper():
        return str(getattr(rules, part.value.id))
    text = ast.unparse(part.value)
    return NAMED.get(text, f"{OPEN}{text}{CLOSE}")


def _parser() -> Arguments:
    parser = Arguments("fastgen.reference", "Writes the recipe reference from the code.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where the page is stale")
    parser.add_argument("--to", type=Path, default=PAGE, help="the page; default docs/recipe.md of the repository")
    return parser


if __name__ == "__main__":
    sys.exit(command(main, sys.argv[1:]))
