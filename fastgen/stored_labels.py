"""The command: lists label stores and label tables, checks them, and removes those that are of no more use.

python -m fastgen.stored_labels [NODES]                  what there is in a store of generations (default runs/nodes)
python -m fastgen.stored_labels [NODES] --check          reads all of it; names what is damaged or missing
python -m fastgen.stored_labels [NODES] --remove=KEY     removes one, or with `stale` those whose teacher is gone
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from fastgen.arguments import Arguments
from fastgen.errors import FastgenError, UserError, command
from fastgen.label_parts import ROWS, SUFFIX, known_rows, missing_rows, read_columns, read_part
from fastgen.label_store import Whereabouts, weights_hash
from fastgen.labels import METADATA_KEY, table_damage, table_path
from fastgen.locks import InUse, locked
from fastgen.nodes import find_node, read_json
from fastgen.tables import new_table, print_table

STALE = "stale"


class DamageFound(FastgenError):
    """Labels are damaged; told line by line before."""


@dataclass(frozen=True)
class Labels:
    """What a folder of labels holds.

    Attributes:
        kind: `store` or `table`.
        teacher: its node, or its file's hash; empty: it is not known.
        kept: of its word.
        state: how much of it is there.
        size_bytes: of all files.
        whereabouts: of all members of the teacher; none: that is not known.
        weights: of these, `weights_hash`; empty: that is not known.
    """

    folder: Path
    kind: str
    teacher: str
    kept: str
    state: str
    size_bytes: int
    whereabouts: tuple[Whereabouts, ...] = ()
    weights: str = ""


def labels_in(nodes: Path) -> list[Labels]:
    """All label stores and tables beside a store of generations."""
    folders = sorted(path for path in (nodes / "labels").glob("*") if path.is_dir())
    return [_store(folder) if _is_store(folder) else _table(folder) for folder in folders]


def _is_store(folder: Path) -> bool:
    return (folder / "store.json").exists() or any(folder.glob("seed_*_generation_*"))


def _store(folder: Path) -> Labels:
    about = _about(folder)
    if about is None:
        return Labels(folder, "store", "", "", "store.json is damaged or missing", _size(folder))
    cut, count = about["truncation"], about["count"]
    epochs = [_rows_in(epoch, count) for epoch in sorted(folder.glob("*/epoch_*"))]
    counts = {
        "epochs": sum(rows is not None and rows >= count for rows in epochs),
        "in part": sum(rows is not None and 0 < rows < count for rows in epochs),
        "damaged": epochs.count(None),
    }
    state = ", ".join(f"{number} {what}" for what, number in counts.items() if number) or "nothing yet"
    kept = f"{cut['kept']} of {cut['classes']} classes, {cut['dtype']}"
    where, weights = _whereabouts(about), about.get("weights", "")
    return Labels(folder, "store", about["teacher"], kept, state, _size(folder), where, weights)


def _whereabouts(about: Mapping[str, Any]) -> tuple[Whereabouts, ...]:
    return tuple(Whereabouts(node, Path(weights)) for node, weights in about.get("teachers", ()))


def _about(folder: Path) -> dict[str, Any] | None:
    """None: it cannot be read; the next student that adds to the store writes it anew."""
    path = folder / "store.json"
    try:
        about: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        return None
    return about if {"teacher", "truncation", "count"} <= {*about} else None


def _rows_in(epoch: Path, count: int) -> int | None:
    """None: a part of it is damaged."""
    try:
        return int(known_rows(epoch, count).sum())
    except UserError:
        return None


def _table(folder: Path) -> Labels:
    if not table_path(folder).exists():
        return Labels(folder, "table", "", "all classes, all views", "in part", _size(folder))
    try:
        with safe_open(table_path(folder), framework="np") as file:
            about = json.loads((file.metadata() or {})[METADATA_KEY])
    except (SafetensorError, KeyError, ValueError):
        return Labels(folder, "table", "", "", "damaged", _size(folder))
    kept = f"all {about['classes']} classes, {about['precision']}"
    place = folder / "teacher.json"
    where = _whereabouts(read_json(place)) if place.exists() else ()
    return Labels(folder, "table", about["teacher"], kept, "all views", _size(folder), where, about.get("weights", ""))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@dataclass(frozen=True)
class Fault:
    """Something that a check has found.

    Attributes:
        text: names the file.
        damage: False: labels are missing, which the next student asks for.
    """

    text: str
    damage: bool


def faults_in(found: Labels) -> Iterator[Fault]:
    """Reads a whole store or table."""
    if found.kind == "table":
        text = table_damage(found.folder) if table_path(found.folder).exists() else None
        if text is not None:
            yield Fault(f"{text}: delete it, and it is made anew", damage=True)
        return
    about = _about(found.folder)
    if about is None:
        text = f"{found.folder / 'store.json'}: is damaged or missing: the next student that adds labels writes it anew"
        yield Fault(text, damage=True)
        return
    count = about["count"]
    for epoch in sorted(found.folder.glob("*/epoch_*")):
        known, damaged = np.zeros(count, bool), False
        for path in sorted(epoch.glob(f"*{SUFFIX}")):
            try:
                known[read_columns(read_part(path))[ROWS]] = True
            except UserError as error:
                damaged = True
                yield Fault(str(error), damage=True)
        missing = [f"{first}..{end - 1}" for first, end in missing_rows(known)]
        if missing and (damaged or known.any()):
            shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            yield Fault(f"{epoch}: lacks {int((~known).sum()):,} of {count:,} labels (rows {shown})", damage=False)


def remove(found: Labels) -> None:
    """Removes a folder of labels that nobody uses.

    Raises:
        UserError: a training holds it.
    """
    places = [found.folder] if found.kind == "table" else [path for path in found.folder.iterdir() if path.is_dir()]
    with ExitStack() as held:
        for place in places:
            held.enter_context(locked(place, "this folder of labels"))
        shutil.rmtree(found.folder)


def stale(nodes: Path, found: Labels) -> bool:
    """Whether a member of the teacher is gone, or trained anew with other weights; of labels that do not say: no."""
    there = [_weights_now(nodes, one) for one in found.whereabouts]
    weights = [path for path in there if path is not None]
    if len(weights) < len(there):
        return True
    return bool(weights and found.weights) and weights_hash(weights) != found.weights


def _weights_now(nodes: Path, one: Whereabouts) -> Path | None:
    """Where it was, else as a node of these."""
    if one.weights.exists():
        return one.weights
    node = find_node(nodes, one.node) if one.node else None
    return None if node is None else node.weights


def main(words: Sequence[str]) -> None:
    """The command.

    Raises:
        UserError: there is no such folder, or no such labels.
        DamageFound: with --check.
    """
    options = _parser().parse_args(words)
    if not options.nodes.is_dir():
        raise UserError(f"{options.nodes}: there is no such folder: name the one that holds trained generations")
    there = labels_in(options.nodes)
    if options.remove:
        _remove(options.nodes, there, options.remove)
        return
    table = new_table(f"labels in {options.nodes}", ("key", "kind", "teacher", "kept", "there", "MB"), _TEXTS)
    for found in there:
        gone = " (gone)" if stale(options.nodes, found) else ""
        size = f"{found.size_bytes / 1e6:,.1f}"
        table.add_row(found.folder.name, found.kind, found.teacher[:21] + gone, found.kept, found.state, size)
    print_table(table)
    if options.check:
        faults = [fault for found in there for fault in faults_in(found)]
        for fault in faults:
            print(fault.text)
        if any(fault.damage for fault in faults):
            raise DamageFound("some of it is damaged: delete what is named above, and it is asked for again")
        print("nothing is damaged")


def _remove(nodes: Path, there: Sequence[Labels], key: str) -> None:
    chosen = [found for found in there if (stale(nodes, found) if key == STALE else found.folder.name == key)]
    if not chosen and key != STALE:
        raise UserError(f"--remove={key}: there are no such labels in {nodes}: call it without --remove for a list")
    in_use = list[str]()
    for found in chosen:
        try:
            remove(found)
        except InUse as error:
            in_use.append(str(error))
            continue
        print(f"removed {found.folder} ({found.size_bytes / 1e6:,.1f} MB)")
    if in_use:
        raise UserError("; ".join(in_use))
    if not chosen:
        print("nothing is stale")


_TEXTS = ("key", "kind", "teacher", "kept", "there")


def _parser() -> Arguments:
    parser = Arguments("fastgen.stored_labels", "Lists, checks and removes what teachers have said.")
    parser.add_argument("nodes", nargs="?", type=Path, default=Path("runs/nodes"), help="run.nodes of the runs")
    parser.add_argument("--check", action="store_true", help="read all of it")
    parser.add_argument("--remove", help=f"a key, or `{STALE}`: all whose teacher is gone")
    return parser


if __name__ == "__main__":
    sys.exit(command(main, sys.argv[1:]))
