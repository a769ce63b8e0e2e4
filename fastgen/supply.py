"""Where a generation's batches come from: images from the data set's loader, logits from its teacher."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from fastgen.augment import Normaliser
from fastgen.crops import NO_JITTER, JitterPolicy, ShiftCrop
from fastgen.data.batch import Batch, DeviceSource, Loader
from fastgen.data.resident import ResidentLoader
from fastgen.distributed import ALONE, Group
from fastgen.errors import MachineError
from fastgen.evaluate import load_network
from fastgen.label_store import LabelStore, StoreKind, generation_folder
from fastgen.labelling import TABLE_BATCH, build_table, claim_cost
from fastgen.labels import LabelTable, TableKind, read_table, table_path
from fastgen.lessons import LookAhead, StoreLoader, StoreSource, TableLoader, TableSource
from fastgen.locks import InUse, locked
from fastgen.lookup import teachers_recipe
from fastgen.meters import Stopwatch
from fastgen.nodes import Node
from fastgen.plan import Generation
from fastgen.pulse import StopsOfAll
from fastgen.shapes import group_sizes
from fastgen.step import DTYPES, Prepare, make_prepare
from fastgen.stop import Checks
from fastgen.teacher import FrozenTeacher, Teacher, make_teacher
from fastgen.truncation import truncation
from fastgen.views import EpochName
from fastgen.workbench import Workbench


@dataclass(frozen=True)
class Supply:
    """Batches of a generation.

    Attributes:
        loader: gives them.
        dress: makes of a raw batch, as the data set's loader gives it, one as this loader gives it; for blank batches
            before the training.
        prepare: what the network sees of a batch's images.
        live_teacher: asked within the step; None: there is none, or batches bring its logits along.
        source: the same batches, but for what `ahead` does, made on the device alone; None: they are not.
        ahead: asks a teacher before the step.
        store: keeps what a teacher was asked for; None: nothing does.
        views: how views are executed, for the record.
        lessons: how the teacher is asked, for the record; None: there is none.
    """

    loader: Loader
    dress: Callable[[Batch], Batch]
    prepare: Prepare
    live_teacher: Teacher | None
    views: str
    lessons: str | None
    source: DeviceSource | None = None
    ahead: LookAhead | None = None
    store: LabelStore | None = None

    def keep(self) -> None:
        """Writes down what this process has asked its teacher since the last time, if that is to be kept.

        Raises:
            OSError: the disk is full.
        """
        if self.store is not None:
            self.store.flush()

    def with_store(self, store: LabelStore, device: torch.device, ahead: LookAhead | None, asked: str) -> Supply:
        """The same batches with labels from a store.

        Args:
            store: of a teacher.
            device: where batches are.
            ahead: asks it for those that the store lacks; None: it has all.
            asked: how, for the record.
        """
        loader = StoreLoader(self.loader, store, ahead, self.prepare, device)
        source = StoreSource(self.source, store, device) if self.source is not None and ahead is None else None
        lessons = f"label store {store.kind.key}, {store.kind.truncation.how}"
        lessons += ", all of it read" if ahead is None else f", filled by {asked}"
        return replace(self._then(loader, loader.dress, lessons), source=source, ahead=ahead, store=store)

    def with_table(self, table: LabelTable) -> Supply:
        """The same batches with the teacher's logits from a table."""
        loader = TableLoader(self.loader, table)
        source = None if self.source is None else TableSource(self.source, table)
        return replace(self._then(loader, loader.dress, f"label table {table.kind.key}"), source=source)

    def with_teacher(self, teacher: FrozenTeacher, batches: int, classes: int) -> Supply:
        """The same batches with a teacher: the folded one is asked within the step, others before it.

        Args:
            teacher: frozen.
            batches: of the student that it sees at once; of several it is asked before the step.
            classes: of its logits.
        """
        if teacher.engine == "folded" and batches == 1:
            return replace(self, live_teacher=teacher, lessons=teacher.how)
        ahead = LookAhead(self.loader, teacher, self.prepare, batches, classes)
        return replace(self._then(ahead, ahead.dress, _how(teacher, batches)), ahead=ahead)

    def _then(self, loader: Loader, dress: Callable[[Batch], Batch], lessons: str) -> Supply:
        return replace(self, loader=loader, dress=lambda batch: dress(self.dress(batch)), lessons=lessons)


def supply_images(
    loader: Loader, backend: str, normalise: Normaliser, jitter: JitterPolicy = NO_JITTER, *, fused: bool
) -> Supply:
    """Batches without a teacher.

    Args:
        loader: of the data set; a resident one was built with kernels where `fused` is asked for.
        backend: its name, for the record.
        normalise: pixels -> the dtype of the step.
        jitter: what rows of jitter ask for.
        fused: with kernels, where there are some: those of a resident loader normalise too, unless there is jitter.
    """
    plain = Supply(loader, lambda batch: batch, make_prepare(normalise, jitter), None, backend, None)
    if not isinstance(loader, ResidentLoader):
        return plain
    plain = replace(plain, source=loader)
    if not fused:
        return plain
    if jitter.active:
        return replace(plain, views=f"{backend}, triton")

    def dress(batch: Batch) -> Batch:
        return replace(batch, images_NCHW=normalise(batch.images_NCHW))

    normalised = loader.normalised(normalise)
    views = f"{backend}, triton, normalised"
    return replace(plain, loader=normalised, source=normalised, dress=dress, views=views)


def make_supply(
    bench: Workbench,
    generation: Generation,
    node: Node,
    teacher_weights: Path | None,
    stopwatch: Stopwatch,
    sides: Collection[tuple[int, int]],
    held: ExitStack,
) -> Supply:
    """Builds what the recipe asks for; a label table that is not there yet is made.

    Args:
        bench: of the run.
        generation: to be trained.
        node: its own.
        teacher_weights: of the generation that teaches it; None: it learns from labels alone.
        stopwatch: of the generation; a label table is charged to its phase `labels`.
        sides: heights and widths of all views that will come.
        held: until the generation's end; the lock of a label store is put there.

    Raises:
        Stopped: a signal came while a label table was made; what is done of it is kept.
        UserError: the teacher is of another network, or its label table is damaged.
    """
    facts, data, train = bench.dataset.facts, bench.recipe.data, bench.recipe.train
    normalise = Normaliser(facts.mean, facts.std, bench.device, DTYPES[train.precision])
    jitter, fused = bench.dataset.crop.jitter, train.kernels == "triton"
    supply = supply_images(bench.train_loader, data.backend, normalise, jitter, fused=fused)
    if teacher_weights is None:
        return supply
    settings = bench.recipe.teacher
    if settings.labels == "table":
        return supply.with_table(_table(bench, generation, node, teacher_weights, supply, stopwatch))
    store = _store(bench, generation, held) if settings.labels == "store" else None
    if store is not None and _complete(bench, generation, store):
        return supply.with_store(store, bench.device, None, "")
    # Programs ask for a batch alone where no full group is left.
    groups = {
        images
        for batches in (settings.look_ahead_batches, 1)
        for images in group_sizes(len(bench.dataset.train), train.batch_size, batches, bench.group.share)
    }
    teacher = _teacher(bench, teacher_weights, max(groups), len(groups) * len(sides), bench.group)
    if store is None:
        return supply.with_teacher(teacher, settings.look_ahead_batches, facts.classes)
    batches = settings.look_ahead_batches
    ahead = LookAhead(supply.loader, teacher, supply.prepare, batches, facts.classes)
    return supply.with_store(store, bench.device, ahead, _how(teacher, batches))


def _how(teacher: FrozenTeacher, batches: int) -> str:
    return f"{teacher.how}, {batches} batch{'es' if batches > 1 else ''} at once"


def _store(bench: Workbench, generation: Generation, held: ExitStack) -> LabelStore:
    """The label store of a generation's teacher; this run fills it, unless another one does."""
    recipe, dataset, group = bench.recipe, bench.dataset, bench.group
    if generation.teacher is None:
        raise TypeError("a label store needs a teacher")
    kind = StoreKind(
        teacher=generation.teacher,
        images=dataset.train.content_hash,
        count=len(dataset.train),
        crop=dataset.crop,
        pixels=dataset.pixels,
        mean=dataset.facts.mean,
        std=dataset.facts.std,
        precision=recipe.train.precision,
        engine=recipe.teacher.engine,
        truncation=truncation(dataset.facts.classes, recipe.teacher.store_classes, recipe.teacher.store_dtype),
    )
    folder = Path(str(recipe.run.nodes)) / "labels"

    def claim() -> bool:
        if not group.main:
            return False
        place = generation_folder(folder / kind.key, generation.data_seed, generation.index)
        place.mkdir(parents=True, exist_ok=True)
        try:
            held.enter_context(locked(place, "this label store", say=bench.recorder.say, check=bench.stop.check))
        except InUse as holder:
            bench.recorder.say(f"{str(holder).rpartition(': ')[0]}: what is asked of the teacher here is not kept")
            return False
        return True

    return LabelStore(folder, kind, writes=group.agree(group.in_turn(claim)))


def epoch_names(bench: Workbench, generation: Generation) -> list[EpochName]:
    """The epochs of a generation's training."""
    epochs = range(bench.recipe.train.epochs)
    return [EpochName(generation.data_seed, generation.index, epoch) for epoch in epochs]


def _complete(bench: Workbench, generation: Generation, store: LabelStore) -> bool:
    """Whether no label has to be asked for."""
    look = partial(_look_into, bench, generation, store)
    return bench.group.agree(bench.group.in_turn(lambda: bench.group.main and look()))


def _look_into(bench: Workbench, generation: Generation, store: LabelStore) -> bool:
    """As `_complete`, in the main process; tells how large the store is, or will be."""
    epochs, names = bench.recipe.train.epochs, epoch_names(bench, generation)
    size = f"{epochs * store.kind.epoch_bytes / 1e9:.3g} GB for {epochs} epochs, {store.kind.truncation.how}"
    missing = store.missing(names)
    if not missing:
        bench.recorder.say(f"generation {generation.index} learns from {store.folder} ({size}): no teacher runs")
        return True
    if store.writes:
        store.require_room(missing)
        there = 1 - missing / (epochs * store.kind.count)
        state = f"; {there:.1%} of it is there" if there else ""
        bench.recorder.say(f"generation {generation.index} keeps its teacher's word in {store.folder} ({size}{state})")
    return False


def _teacher(bench: Workbench, weights: Path, images: int, shapes: int, group: Group = ALONE) -> FrozenTeacher:
    """The teacher, for passes of so many images; a group's main process reads its weights for all."""
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
    )


def _table(
    bench: Workbench,
    generation: Generation,
    node: Node,
    weights: Path,
    images: Supply,
    stopwatch: Stopwatch,
) -> LabelTable:
    kind = _kind(bench, generation)
    folder = Path(str(bench.recipe.run.nodes)) / "labels" / kind.key
    group = bench.group
    with stopwatch.phase("labels"):
        began = time.monotonic()
        if not group.agree(table_path(folder).exists()):
            labelling = StopsOfAll(group, bench.stop)
            if group.main:
                _build_table(bench, generation, kind, folder, weights, images, labelling)
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
    bench.recorder.say(f"generation {generation.index} learns from {table_path(folder)} ({size / 1e9:.2f} GB)")
    return table


def _build_table(
    bench: Workbench,
    generation: Generation,
    kind: TableKind,
    folder: Path,
    weights: Path,
    images: Supply,
    stop: Checks,
) -> None:
    teacher = _teacher(bench, weights, min(TABLE_BATCH, kind.count), 2)
    what = f"teacher of generation {generation.index} labels {kind.views} views of {kind.count} images"
    with bench.recorder.display.passes(what, kind.views, kind.count) as passed:
        build_table(folder, kind, images.loader, images.prepare, teacher, stop, passed, bench.recorder.say)
    bench.recorder.event("label_table", generation=generation.index, path=str(folder), teacher=teacher.how)


def _kind(bench: Workbench, generation: Generation) -> TableKind:
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
    )
