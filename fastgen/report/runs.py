"""What run folders tell: results, analyses, curves, environment, and what of a run is unfinished."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgen.analysis_runs import (
    ANALYSIS_FILE,
    RunRecord,
    read_analysis,
    read_environment,
    read_run,
    require_comparable,
)
from fastgen.errors import UserError
from fastgen.nodes import Node
from fastgen.record import read_events
from fastgen.run_forms import is_epoch

Row = Mapping[str, Any]
Seed = tuple[int, int]


@dataclass(frozen=True)
class Run:
    """A run of which at least one generation is measured.

    Attributes:
        record: recipe and results.
        analysis: content of analysis.json; None: there is none of these very networks.
        environment: content of environment.json; empty: it is damaged, or not there.
        histories: generation -> a row an epoch: `epoch`, `loss`, `accuracy` while training, and errors where evaluated.
        planned: generations that it trains, measured or not.
        lacking: what of these is not measured, and why; empty: nothing.
        unfit: of files that cannot be used, what they are and what is missing for it.
    """

    record: RunRecord
    analysis: Mapping[str, Any] | None
    environment: Mapping[str, Any]
    histories: Mapping[int, Sequence[Row]]
    planned: tuple[int, ...]
    lacking: str
    unfit: tuple[str, ...]

    @property
    def rows(self) -> Sequence[Row]:
        """A row a measured generation, of results.json."""
        rows: Sequence[Row] = self.record.results["generations"]
        return rows

    @property
    def seed(self) -> Seed:
        """Of the initial weights, and of the views."""
        recipe = self.record.recipe
        return recipe["run"]["init_seed"], recipe["data"]["seed"]

    @property
    def seed_name(self) -> str:
        """For people."""
        init, data = self.seed
        return str(init) if init == data else f"{init}, data {data}"


@dataclass(frozen=True)
class Found:
    """Run folders that were named.

    Attributes:
        runs: that can be compared; at least one.
        notes: of those that are left out.
    """

    runs: tuple[Run, ...]
    notes: tuple[str, ...]


def read_runs(places: Sequence[Path]) -> Found:
    """Reads run folders, and folders of run folders.

    Raises:
        UserError: a place is neither, a file is damaged, nothing is measured, or errors are of different images.
    """
    folders = [folder for place in places for folder in _run_folders(place)]
    measured = [folder for folder in folders if (folder / "results.json").is_file()]
    if not measured:
        raise UserError(f"{folders[0]}: no generation is measured yet (it has no results.json): train it first")
    runs = tuple(_read(folder) for folder in measured)
    require_comparable(runs[0].record, [run.record for run in runs[1:]], option="")
    left_out = [folder for folder in folders if folder not in measured]
    notes = [f"{folder.name}: no generation is measured yet{_last_words(folder)}" for folder in left_out]
    return Found(runs, tuple(notes))


def _run_folders(place: Path) -> list[Path]:
    """The place itself, or what it holds: of a sweep, what is in `runs`."""
    if (place / "recipe.yaml").is_file():
        return [place]
    for folder in (place, place / "runs"):
        found = sorted(path.parent for path in folder.glob("*/recipe.yaml"))
        if found:
            return found
    what = "is no run folder (it has no recipe.yaml), and holds none" if place.exists() else "there is no such folder"
    raise UserError(
        f"{place}: {what}: name folders that fastgen.train made, such as runs/NAME, or runs for all of them"
    )


def _read(folder: Path) -> Run:
    """Reads what is looked at for its form as well, and what is not known to be looked at for what it raises."""
    try:
        return _run(folder)
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise UserError(f"{folder}: a file of it is damaged ({error!r}): start the run's own command again") from None
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be read ({error.strerror})") from None


def _run(folder: Path) -> Run:
    record, environment = read_run(folder), read_environment(folder)
    analysis = read_analysis(record)
    rows = record.results["generations"]
    by_nodes = {row["generation"]: _told_by_node(folder, row["generation"]) for row in rows}
    damaged = [generation for generation, told in by_nodes.items() if told is None]
    return Run(
        record=record,
        analysis=analysis,
        environment=environment,
        histories={row["generation"]: _history(folder, row, by_nodes[row["generation"]] or ()) for row in rows},
        planned=(planned := _planned(folder)),
        lacking=_lacking(record, planned),
        unfit=_unfit(record, environment, analysis, damaged),
    )


def _unfit(record: RunRecord, environment: Row, analysis: Row | None, damaged: Sequence[int]) -> tuple[str, ...]:
    found = []
    if not environment:
        found.append("environment.json is damaged or not there: its machine and command are not told")
    if analysis is None and (record.folder / ANALYSIS_FILE).is_file():
        found.append(f"{ANALYSIS_FILE} is not of these networks and samples, or damaged, and is left out")
    for generation in damaged:
        found.append(f"node.json of generation {generation} is damaged: its training curve is from events.jsonl")
    return tuple(found)


def _history(folder: Path, row: Row, by_node: Sequence[Row]) -> Sequence[Row]:
    """From the node, else from the events. The last epoch's network is the one that was measured."""
    told = by_node or _epochs(read_events(folder), row["generation"])
    errors = {name: row[name] for name in ("top1_error", "top5_error")}
    return [*told[:-1], {**told[-1], **errors}] if told else []


def _told_by_node(folder: Path, generation: int) -> Sequence[Row] | None:
    """A row an epoch; empty: the node is gone, as it may be after the run; None: its file is damaged."""
    node = Node(folder / f"generation_{generation}")
    if not node.finished:
        return ()
    try:
        match node.facts():
            case {"training": {"history": [*history]}} if all(map(is_epoch, history)):
                return history
    except UserError:
        # It is told with what else of the run cannot be used.
        return None
    return None


def _epochs(events: Iterable[Row], generation: int) -> Sequence[Row]:
    """An epoch that was taken again after a kill counts once, as it came out last."""
    own = (e for e in events if e["event"] == "epoch" and e.get("generation") == generation and is_epoch(e))
    found = {event["epoch"]: event for event in own}
    return [found[epoch] for epoch in sorted(found)]


def _planned(folder: Path) -> tuple[int, ...]:
    plan = json.loads((folder / "plan.json").read_text())
    return tuple(generation["index"] for generation in plan if generation["train"])


def _lacking(record: RunRecord, wanted: Sequence[int]) -> str:
    told = {row["generation"] for row in record.results["generations"]}
    missing = [index for index in wanted if index not in told]
    if not missing:
        return ""
    which = f"generation {missing[0]}" if len(missing) == 1 else f"generations {missing[0]} to {missing[-1]}"
    are = "is" if len(missing) == 1 else "are"
    return f"{which} of 0 to {wanted[-1]} {are} not trained and measured yet{_last_words(record.folder)}"


def _last_words(folder: Path) -> str:
    """How a run ended that is not finished, as far as its events tell."""
    events = list(read_events(folder))
    if not events:
        return ""
    last = events[-1]
    if last["event"] in ("stopped", "diverged"):
        return f" ({' '.join(str(last.get('reason', last['event'])).split())})"
    begun = [event for event in events if event["event"] in ("step", "generation_begin")]
    match begun[-1:]:
        case [{"generation": int(generation), "step": int(step)}]:
            return f" (last heard of in generation {generation}, step {step})"
    return ""
