"""Where a generation's batches come from: images from the data set's loader, logits from its teacher."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fastgen.augment import Normaliser
from fastgen.config import Recipe
from fastgen.consistency import DTYPES as MEANS_DTYPES
from fastgen.consistency import Means, MeansLoader, MeansSource
from fastgen.crops import NO_JITTER, JitterPolicy, ShiftCrop
from fastgen.data.batch import Batch, DeviceSource, Loader
from fastgen.data.resident import ResidentLoader
from fastgen.data.split import Dataset
from fastgen.distributed import ALONE, Group
from fastgen.errors import MachineError, UserError
from fastgen.evaluate import load_network
from fastgen.files import write_json
from fastgen.label_store import LabelStore, StoreKind, Whereabouts, generation_folder, other_stores, whereabouts
from fastgen.labelling import TABLE_BATCH, build_table, claim_cost
from fastgen.labels import LabelTable, TableKind, read_table, table_path
from fastgen.lessons import LookAhead, StoreLoader, StoreSource, TableLoader, TableSource
from fastgen.locks import InUse, Lock, locked
from fastgen.lookup import teachers_recipe
from fastgen.meters import Stopwatch
from fastgen.networks import library_and_name
from fastgen.nodes import Node
from fastgen.plan import Generation
from fastgen.pulse import StopsOfAll
from fastgen.rules import MOST_STORED_CLASSES
from fastgen.schedule import resolution_px
from fastgen.shapes import group_sizes
from fastgen.step import DTYPES, Prepare, make_prepare
from fastgen.stop import Checks
from fastgen.teacher import FrozenTeacher, Teacher, make_teacher, mean_teacher
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
        means: of earlier predictions, which the step adds to; None: there are none.
        still_ours: whether the store is this run's to write to; asked in all processes at once.
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
    means: Means | None = None
    still_ours: Callable[[], bool] = lambda: True

    def keep(self) -> None:
        """Writes down what this process has asked its teacher since the last time, if that is to be kept.

        To be called in all processes of a run at once.

        Raises:
            OSError: the disk is full.
        """
        if self.store is None or not self.store.writes:
            return
        if not self.still_ours():
            self.store.give_up()
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

    def with_means(self, means: Means, device: torch.device) -> Supply:
        """The same batches, which know where the means of their predictions are."""
        loader = MeansLoader(self.loader, means, device)
        source = None if self.source is None else MeansSource(self.source, means, device)
        return replace(self._then(loader, loader.dress, None), source=source, means=means)

    def with_table(self, table: LabelTable) -> Supply:
        """The same batches with the teacher's logits from a table."""
        loader = TableLoader(self.loader, table)
        source = None if self.source is None else TableSource(self.source, table)
        return replace(self._then(loader, loader.dress, f"label table {table.kind.key}"), source=source)

    def with_teacher(self, teacher: FrozenTeacher, batches: int, classes: int) -> Supply:
        """The same batches with a teacher: a folded and a plain one are asked within the step, others before it.

        Args:
            teacher: frozen.
            batches: of the student that it sees at once; of several it is asked before the step.
            classes: of its logits.
        """
        if teacher.engine in ("folded", "plain") and batches == 1:
            return replace(self, live_teacher=teacher, lessons=teacher.how)
        ahead = LookAhead(self.loader, teacher, self.prepare, batches, classes)
        return replace(self._then(ahead, ahead.dress, _how(teacher, batches)), ahead=ahead)

    def _then(self, loader: Loader, dress: Callable[[Batch], Batch], lessons: str | None) -> Supply:
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
    teacher_weights: Sequence[Path],
    stopwatch: Stopwatch,
    sides: Collection[tuple[int, int]],
    held: ExitStack,
) -> Supply:
    """Builds what the recipe asks for; a label table that is not there yet is made.

    Args:
        bench: of the run.
        generation: to be trained.
        node: its own.
        teacher_weights: of the generations that teach it; none: it learns from labels alone.
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
    means = _means(bench, generation)
    supply = supply_images(bench.train_loader, data.backend, normalise, jitter, fused=fused)
    if not teacher_weights:
        return supply if means is None else supply.with_means(means, bench.device)
    settings = bench.recipe.teacher
    if settings.labels == "table":
        return supply.with_table(_table(bench, generation, node, teacher_weights, supply, stopwatch))
    store, still_ours = None, supply.still_ours
    if settings.labels == "store":
        store, complete, still_ours = _store(bench, generation, teacher_weights, held)
        if complete:
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
    return replace(supply.with_store(store, bench.device, ahead, _how(teacher, batches)), still_ours=still_ours)


def _means(bench: Workbench, generation: Generation) -> Means | None:
    objective, dataset, train = generation.objective, bench.dataset, bench.recipe.train
    if not objective.consistency_weight:
        return None
    numbers = len(dataset.train) * dataset.facts.classes
    size = numbers * MEANS_DTYPES[objective.consistency_dtype].itemsize / 1e9
    bench.recorder.say(
        f"generation {generation.index} keeps mean predictions of all images: {size:.3g} GB, over all devices together "
        "and in each checkpoint"
    )
    return Means(
        images=len(dataset.train),
        classes=dataset.facts.classes,
        batch_size=train.batch_size,
        epochs=train.epochs,
        weight=objective.consistency_weight,
        dtype=objective.consistency_dtype,
        device=bench.device,
        group=bench.group,
    )


def _how(teacher: FrozenTeacher, batches: int) -> str:
    return f"{teacher.how}, {batches} batch{'es' if batches > 1 else ''} at once"


def store_kind(recipe: Recipe, dataset: Dataset, teacher: str) -> StoreKind:
    """What a teacher's label store is of.

    Args:
        recipe, dataset: of the student.
        teacher: id of its node, or of its weights file.
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
    )


def _store(
    bench: Workbench, generation: Generation, weights: Sequence[Path], held: ExitStack
) -> tuple[LabelStore, bool, Callable[[], bool]]:
    """The label store of a generation's teacher; this run adds what it lacks, unless another one does.

    Returns:
        it; whether it has all labels; and what tells, in all processes at once, whether it is still this run's to
        write to.
    """
    recipe, dataset, group = bench.recipe, bench.dataset, bench.group
    if generation.teacher is None:
        raise TypeError("a label store needs a teacher")
    kind = store_kind(recipe, dataset, generation.teacher)
    if dataset.facts.classes > MOST_STORED_CLASSES and not kind.truncation.dense:
        raise UserError(
            f"teacher.labels = store numbers classes up to {MOST_STORED_CLASSES}, the data set has "
            f"{dataset.facts.classes}: set teacher.labels=live"
        )
    store = LabelStore(Path(str(recipe.run.nodes)) / "labels", kind, writes=False)
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
    size = f"{epochs * store.kind.epoch_bytes / 1e9:.3g} GB for {epochs} epochs, {store.kind.truncation.how}"
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


def _teacher(
    bench: Workbench, weights: Sequence[Path], images: int, shapes: int, group: Group = ALONE
) -> FrozenTeacher:
    """The teacher, for passes of so many images; of several, their mean prediction."""
    return mean_teacher([_one_teacher(bench, path, images, shapes, group) for path in weights])


def _one_teacher(bench: Workbench, weights: Path, images: int, shapes: int, group: Group) -> FrozenTeacher:
    """A group's main process reads the weights for all."""
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


def _table(
    bench: Workbench,
    generation: Generation,
    node: Node,
    weights: Sequence[Path],
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
    weights: Sequence[Path],
    images: Supply,
    stop: Checks,
) -> None:
    teacher = _teacher(bench, weights, min(TABLE_BATCH, kind.count), 2)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "teacher.json", whereabouts(_whereabouts(generation, weights)))
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
