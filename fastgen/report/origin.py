"""Where results come from: recipes, machines, versions, nodes, and the commands that make them again."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import yaml

from fastgen.report.document import Block, Code, Span, Table, words
from fastgen.report.groups import SEEDS, Group, differing, value_text
from fastgen.report.runs import Run
from fastgen.report.stats import DASH
from fastgen.report.tables import generations_of

COMMIT_LETTERS = 10


def origin(groups: Sequence[Group]) -> tuple[Block, ...]:
    """All of it."""
    return (*_recipes(groups), _runs(groups), _nodes(groups), *_commands(groups))


def _recipes(groups: Sequence[Group]) -> list[Block]:
    """What all recipes have in common, folded, and what not."""
    settings = [group.settings for group in groups]
    apart = differing(settings)
    if len({own["gen.generations"] for own in settings}) > 1 and "gen.generations" not in apart:
        apart.append("gen.generations")
    common: dict[str, dict[str, object]] = {}
    for key, value in settings[0].items():
        section, _, name = key.partition(".")
        # Where runs lie, and their seeds, is told by the table of runs.
        if section != "run" and key not in SEEDS and all(own[key] == value for own in settings):
            common.setdefault(section, {})[name] = value
    text = yaml.safe_dump(common, sort_keys=False, default_flow_style=None, width=100)
    shared = Code("The recipe, resolved" if len(groups) == 1 else "What all recipes share, resolved", text, folded=True)
    if not apart:
        return [shared]
    rows = tuple((Span(g.name), *(Span(value_text(g.settings.get(key))) for key in apart)) for g in groups)
    table = Table(
        name="recipes",
        caption=words("Settings in which the recipes differ."),
        headings=("recipe", *apart),
        rows=rows,
        text_columns=1 + len(apart),
    )
    return [table, shared]


def _runs(groups: Sequence[Group]) -> Table:
    rows = [(Span(group.name), *_run(run)) for group in groups for run in group.runs]
    return Table(
        name="runs",
        caption=words("Runs, and where they were trained last."),
        headings=("recipe", "seed", "folder", "device", "cores", "threads", "processes", "fastgen", "commit", "torch"),
        rows=tuple(rows),
        text_columns=10,
        merged_columns=1,
    )


def _run(run: Run) -> tuple[Span, ...]:
    e = run.environment
    commit = e.get("commit") or DASH
    changed = "+changes" if commit.endswith("+changes") else ""
    told = (
        run.seed_name, run.record.name, e.get("device"), e.get("cpu_cores"), e.get("threads"), e.get("processes"),
        e.get("fastgen"), commit.removesuffix("+changes")[:COMMIT_LETTERS] + changed,
        (e.get("packages") or {}).get("torch"),
    )  # fmt: skip
    return tuple(Span(DASH if value is None else str(value)) for value in told)


def _nodes(groups: Sequence[Group]) -> Table:
    generations = generations_of(groups)

    def cells(run: Run) -> tuple[Span, ...]:
        nodes = {row["generation"]: row["node"] for row in run.rows}
        return tuple(Span(nodes.get(g, DASH), "code") for g in generations)

    return Table(
        name="nodes",
        caption=words("Each network's name, a hash of all that decides its weights: equal names, equal networks."),
        headings=("recipe", "seed", *(f"gen {g}" for g in generations)),
        rows=tuple((Span(group.name), Span(run.seed_name), *cells(run)) for group in groups for run in group.runs),
        text_columns=2 + len(generations),
        merged_columns=1,
    )


def _commands(groups: Sequence[Group]) -> list[Block]:
    runs = [run for group in groups for run in group.runs]
    given = list(dict.fromkeys(_given(run) for run in runs))
    again = [_again(run) for run in runs]
    return [
        Code("As the runs were last started", "\n".join(given)),
        Code("The same trainings from what the run folders keep, into new ones", "\n".join(again)),
    ]


def _given(run: Run) -> str:
    words_given = [str(word) for word in run.environment.get("command", [])]
    if not words_given:
        return f"# {run.record.name}: its environment.json does not tell"
    if Path(words_given[0]).name != "train.py":
        # Another program, which calls fastgen.train.
        return shlex.join(words_given)
    return shlex.join(["python", "-m", "fastgen.train", *words_given[1:]])


def _again(run: Run) -> str:
    folder = str(run.record.folder)
    return shlex.join(
        [
            "python",
            "-m",
            "fastgen.train",
            f"--cfg={folder}/recipe.yaml",
            f"--run.dir=again/{run.record.name}",
            "--run.nodes=again/nodes",
        ]
    )
