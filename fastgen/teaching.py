"""A generation's teacher: its networks, made ready, and what is kept of its word in a label store or a label table."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from fastgen.config import Recipe
from fastgen.crops import ShiftCrop
from fastgen.data.batch import Loader
from fastgen.data.split import Dataset
from fastgen.distributed import ALONE, Group
from fastgen.errors import MachineError, UserError
from fastgen.evaluate import load_network
from fastgen.files import size_text, write_json
from fastgen.label_parts import generation_folder
from fastgen.label_store import LabelStore, StoreKind, Whereabouts, other_stores, weights_hash, whereabouts
from fastgen.labelling import TABLE_BATCH, build_table, claim_cost
from fastgen.labels import LabelTable, TableKind, read_table, table_path
from fastgen.locks import InUse, Lock, locked
from fastgen.lookup import teachers_recipe
from fastgen.meters import Stopwatch
from fastgen.networks import library_and_name
from fastgen.nodes import Node, nodes_folder
from fastgen.plan import Generation
from fastgen.pulse import StopsOfAll
from fastgen.rules import MOST_STORED_CLASSES
from fastgen.schedule import resolution_px
from fastgen.step import DTYPES, Prepare
from fastgen.stop import Checks
from fastgen.teacher import FrozenTeacher, make_teacher, mean_teacher
from fastgen.truncation import truncation
from fastgen.views import EpochName
from fastgen.workbench import Workbench


def store_kind(recipe: Recipe, dataset: Dataset, teacher: str, weights: str = "") -> StoreKind:
    """What a teacher's label store is of.

    Args:
        recipe, dataset: of the student.
        teacher: id of its node, or of its weights file.
        weights: `weights_hash`; empty: the teacher may not be trained yet, and the store is not opened.
    """
    return StoreKind(
        teacher=teacher,
        images=dataset.train.content_hash,
        count=len(dataset.train),
        crop=dataset.crop,
        pixels=dataset.pixels,
        mean=dataset.facts.mean,
        std=dataset.facts.std,
        precision=recipe.train.precision,
        engine=recipe.teacher.engine,
        truncation=truncation(dataset.facts.classes, recipe.teacher.store_classes, recipe.teacher.store_dtype),
        weights=weights,
    )


def told_stores(recipe: Recipe, dataset: Dataset, plan: Sequence[Generation]) -> str | None:
    """How large the label stores of a plan will be; None: it has none."""
    taught = [g for g in plan if g.train and g.teacher is not None]
    if recipe.teacher.labels != "store" or not taught:
        return None
    kind = store_kind(recipe, dataset, str(taught[0].teacher))
    each = size_text(recipe.train.epochs * kind.epoch_bytes)
    return f"label stores: {len(taught)} of {each} each, {kind.truncation.how}; {nodes_folder(recipe)}/labels"


def open_store(
    bench: Workbench, generation: Generation, weights: Sequence[Path], held: ExitStack
) -> tuple[LabelStore, bool, Callable[[], bool]]:
    """The label store of a generation's teacher; this run adds what it lacks, unless another one does.

    Args:
        bench: of the run.
        generation: that is taught.
        weights: of its teachers.
        held: until the generation's end; the store's lock is put there.

    Returns:
        it; whether it has all labels; and what tells, in all processes at once, whether it is still this run's to
        write to.

    Raises:
        UserError: it cannot number that many classes, or a part of it is damaged.
        MachineError: it would fill the disk.
    """
    recipe, dataset, group = bench.recipe, bench.dataset, bench.group
    if generation.teacher is None:
        raise TypeError("a label store needs a teacher")
    kind = store_kind(recipe, dataset, generation.teacher, _agreed_hash(group, weights))
    if dataset.facts.classes > MOST_STORED_CLASSES and not kind.truncation.dense:
        raise UserError(
            f"teacher.labels = store numbers classes up to {MOST_STORED_CLASSES}, the data set has "
            f"{dataset.facts.classes}: set teacher.labels=live"
        )
    store = LabelStore(nodes_folder(recipe) / "labels", kind, writes=False)
    locks = list[Lock]()

    def look() -> tuple[bool, bool]:
        """Whether all of it is there, and whether it is this run that adds to it."""
        if not group.main:
            return False, False
        missing = store.missing(epoch_names(bench, generation))
        if missing:
            locks.extend(_claimed(bench, generation, store, held))
        if locks:
            store.clear(generation.data_seed, generation.index)
            store.require_room(missing)
            store.describe(_whereabouts(generation, weights))
        _tell_store(bench, generation, store, missing, kept=bool(locks))
        return not missing, bool(locks)

    complete, store.writes = group.agree(group.in_turn(look))

    def still_ours() -> bool:
        ours = group.agree(not any(lock.lost for lock in locks))
        if not ours:
            bench.recorder.say(f"{store.folder}: another run adds to it now: no more of this one is kept")
        return ours

    return store, complete, still_ours


def _whereabouts(generation: Generation, weights: Sequence[Path]) -> list[Whereabouts]:
    nodes = generation.members or ("",)
    return [Whereabouts(node, path) for node, path in zip(nodes, weights, strict=True)]


def _claimed(bench: Workbench, generation: Generation, store: LabelStore, held: ExitStack) -> list[Lock]:
    """The lock of a generation's labels; none: another run adds to them."""
    place = generation_folder(store.folder, generation.data_seed, generation.index)
    place.mkdir(parents=True, exist_ok=True)
    try:
        lock = locked(place, "this label store", say=bench.recorder.say, check=bench.stop.check)
        return [held.enter_context(lock)]
    except InUse as holder:
        bench.recorder.say(f"{str(holder).rpartition(': ')[0]}: what is asked of the teacher here is not kept")
        return []


def _tell_store(bench: Workbench, generation: Generation, store: LabelStore, missing: int, *, kept: bool) -> None:
    """How large the store is, or will be."""
    epochs = bench.recipe.train.epochs
    size = f"{size_text(epochs * store.kind.epoch_bytes)} for {epochs} epochs, {store.kind.truncation.how}"
    if not missing:
        bench.recorder.say(f"generation {generation.index} learns from {store.folder} ({size}): no teacher runs")
    elif kept:
        there = 1 - missing / (epochs * store.kind.count)
        state = f"; {there:.1%} of it is there" if there else ""
        bench.recorder.say(f"generation {generation.index} keeps its teacher's word in {store.folder} ({size}{state})")
        for other in other_stores(store.folder.parent, store.kind) if not there else ():
            bench.recorder.say(other)


def epoch_names(bench: Workbench, generation: Generation) -> list[EpochName]:
    """The epochs of a generation's training."""
    facts, data, epochs = bench.dataset.facts, bench.recipe.data, bench.recipe.train.epochs
    names = []
    for epoch in range(epochs):
        side_px = resolution_px(data, epochs, epoch)
        size = facts.height_px or side_px, facts.width_px or side_px
        names.append(EpochName(generation.data_seed, generation.index, epoch, *size))
    return names


def ready_teacher(
    bench: Workbench, weights: Sequence[Path], images: int, shapes: int, group: Group = ALONE
) -> FrozenTeacher:
    """The teacher, ready to be asked; of several, their mean prediction.

    Args:
        bench: of the run.
        weights: of all members.
        images: that one pass has at most.
        shapes: of passes.
        group: whose main process reads the weights for all.
    """
    return mean_teacher([_one_teacher(bench, path, images, shapes, group) for path in weights])


def _one_teacher(bench: Workbench, weights: Path, images: int, shapes: int, group: Group) -> FrozenTeacher:
    recipe, facts = bench.recipe, bench.dataset.facts
    own = group.agree(group.in_turn(lambda: teachers_recipe(recipe, weights) if group.main else recipe))
    model = load_network(own, bench.dataset, weights, bench.device, group)
    side_px = recipe.data.resolution_px
    height_px, width_px = facts.height_px or side_px, facts.width_px or side_px
    return make_teacher(
        model,
        bench.device,
        DTYPES[recipe.train.precision],
        recipe.teacher.engine,
        shape=(images, facts.channels, height_px, width_px),
        timed=not recipe.run.deterministic,
        shapes=shapes,
        checked=library_and_name(own.model.name)[0] is not None,
    )


def open_table(
    bench: Workbench,
    generation: Generation,
    node: Node,
    weights: Sequence[Path],
    loader: Loader,
    prepare: Prepare,
    stopwatch: Stopwatch,
) -> LabelTable:
    """The label table of a generation's teacher; made, where it is not there.

    Args:
        bench: of the run.
        generation: that is taught.
        node: its own, which pays for it.
        weights: of its teachers.
        loader, prepare: of the student's images.
        stopwatch: of the generation; the table is charged to its phase `labels`.

    Raises:
        Stopped: a signal came; what is done of it is kept.
        UserError: the teacher is of another network, or the table is damaged.
    """
    kind = _kind(bench, generation, _agreed_hash(bench.group, weights))
    folder = nodes_folder(bench.recipe) / "labels" / kind.key
    group = bench.group
    with stopwatch.phase("labels"):
        began = time.monotonic()
        if not group.agree(table_path(folder).exists()):
            labelling = StopsOfAll(group, bench.stop)
            if group.main:
                _build_table(bench, generation, kind, folder, weights, loader, prepare, labelling)
                labelling.end()
            else:
                labelling.wait()
        spent = time.monotonic() - began
        table = read_table(folder, kind, bench.device)
    if table is None:
        raise MachineError(f"{folder}: the table was written a moment ago and is not to be seen here: start again")
    if group.main and not node.checkpoints:
        # Sessions that were broken off, this student's or another's; a checkpoint holds what was charged before.
        stopwatch.add({"labels": max(0.0, claim_cost(folder, node.id, bench.stop, bench.recorder.say) - spent)})
    size = table_path(folder).stat().st_size
    bench.recorder.say(f"generation {generation.index} learns from {table_path(folder)} ({size_text(size)})")
    return table


def _build_table(
    bench: Workbench,
    generation: Generation,
    kind: TableKind,
    folder: Path,
    weights: Sequence[Path],
    loader: Loader,
    prepare: Prepare,
    stop: Checks,
) -> None:
    teacher = ready_teacher(bench, weights, min(TABLE_BATCH, kind.count), 2)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "teacher.json", whereabouts(_whereabouts(generation, weights)))
    what = f"teacher of generation {generation.index} labels {kind.views} views of {kind.count} images"
    with bench.recorder.display.passes(what, kind.views, kind.count) as passed:
        build_table(folder, kind, loader, prepare, teacher, stop, passed, bench.recorder.say)
    bench.recorder.event("label_table", generation=generation.index, path=str(folder), teacher=teacher.how)


def _agreed_hash(group: Group, weights: Sequence[Path]) -> str:
    """As the main process sees the files."""
    return group.agree(group.in_turn(lambda: weights_hash(weights) if group.main else ""))


def _kind(bench: Workbench, generation: Generation, weights: str) -> TableKind:
    recipe, dataset = bench.recipe, bench.dataset
    if not isinstance(dataset.crop, ShiftCrop) or generation.teacher is None:
        raise TypeError("a label table needs a teacher, and crops that are not resampled")
    return TableKind(
        teacher=generation.teacher,
        images=dataset.train.content_hash,
        count=len(dataset.train),
        crop=dataset.crop,
        mean=dataset.facts.mean,
        std=dataset.facts.std,
        classes=dataset.facts.classes,
        precision=recipe.train.precision,
        engine=recipe.teacher.engine,
        weights=weights,
    )
